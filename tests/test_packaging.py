"""The wheel holds one top-level name; an editable install works from any directory."""

import configparser
import shutil
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.processes import run

ROOT = Path(__file__).resolve().parents[1]
IGNORED = shutil.ignore_patterns(
    ".git", ".venv", "build", "demo/shards", "*.egg-info", "__pycache__", ".*_cache", "runs"
)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    target = tmp_path_factory.mktemp("checkout") / "somewhere"

    def ignore(folder, names):
        ignored = IGNORED(folder, names)
        return ignored | ({"demo"} if Path(folder) == ROOT else set())

    return shutil.copytree(ROOT, target, ignore=ignore)


def packages():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser["options"]["packages"].split()


def test_the_wheel_has_one_top_level_name(checkout, tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    run(*command, "--wheel-dir", tmp_path, checkout)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"avid_pipeline"}
    assert {"avid_pipeline/py.typed", "avid_pipeline/shards_spec/SPEC.md", "avid_pipeline/train/trainer.py"} <= set(
        names
    )


@pytest.mark.slow
def test_an_editable_install_imports_everything_from_elsewhere(checkout, tmp_path):
    environment = tmp_path / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", environment)
    # Dependencies come from this environment, without its own editable install (whose .pth is not followed).
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = environment / "lib" / version / "site-packages"
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    python = environment / "bin" / "python"
    install = [
        str(python),
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--ignore-installed",
    ]
    run(*install, "--editable", checkout, cwd=tmp_path)
    code = f"import importlib; [print(importlib.import_module(name).__file__) for name in {packages()!r}]"
    files = run(python, "-c", code, cwd="/", env={"PYTHONPATH": None}).stdout.split()
    assert len(files) == len(packages())
    assert all(Path(file).is_relative_to(checkout) for file in files)
