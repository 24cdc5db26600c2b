#!/usr/bin/env bash
# Creates the virtual environment and installs the package, editable, at the pinned versions.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ -z "${PYTHON:-}" ]; then
    echo "No Python 3.11 or newer on PATH. Install one (Debian, Ubuntu: apt-get install python3 python3-venv)" >&2
    echo "or name it: make PYTHON=/path/to/python3" >&2
    exit 1
fi

echo "== installing into $VENV with $("$PYTHON" --version) (once; several minutes on a slow connection)"
if [ ! -x "$VENV/bin/pip" ]; then
    rm -rf "$VENV"
    if ! "$PYTHON" -m ensurepip --version >/dev/null 2>&1; then
        # Debian and Ubuntu keep venv's pip in a package of its own.
        package="python$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')-venv"
        if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
            echo "== installing $package, which $PYTHON needs for virtual environments"
            apt-get update -qq && apt-get install -y -qq "$package" >/dev/null
        else
            echo "$PYTHON cannot make virtual environments. Run: sudo apt-get install $package" >&2
            exit 1
        fi
    fi
    "$PYTHON" -m venv "$VENV"
fi
"$VENV/bin/pip" install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev,ray]"
echo "== installed"
