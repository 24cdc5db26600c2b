"""Imports go one way, and importing the package loads nothing heavy."""

import ast
import sys
from pathlib import Path

import pytest

from tests.processes import run

ROOT = Path(__file__).resolve().parents[1]
CORE = "core"
MAY_IMPORT = {
    "shards_spec": {"shards_spec"},
    CORE: {"shards_spec", CORE},
    "preprocess": {"shards_spec", CORE, "preprocess"},
    "train": {"shards_spec", CORE, "train"},
    "evaluate": {"shards_spec", CORE, "evaluate"},
}
FOLDERS = {"shards_spec": "shards_spec", CORE: "avid_pipeline", "preprocess": "preprocess", "train": "train"}
FOLDERS["evaluate"] = "evaluate"


def imported_modules(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; import by the full name"
            yield node.module


def room_of(module):
    parts = module.split(".")
    if parts[0] != "avid_pipeline":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in MAY_IMPORT else CORE


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_go_downwards(room):
    files = sorted((ROOT / FOLDERS[room]).rglob("*.py"))
    assert files
    for path in files:
        for module in imported_modules(path):
            assert module.split(".")[0] not in set(FOLDERS.values()) - {"avid_pipeline"}, f"{path} imports {module}"
            allowed = MAY_IMPORT[room] | {None}
            if room == "evaluate" and module == "avid_pipeline.train.checkpoint":
                continue
            assert room_of(module) in allowed, f"{path} imports {module}"


def test_importing_the_package_is_light():
    code = "import sys, avid_pipeline; print([m for m in ('torch', 'nvidia', 'av', 'numpy') if m in sys.modules])"
    done = run(sys.executable, "-c", code, cwd="/")
    assert done.stdout.strip() == "[]"


def test_every_subpackage_has_its_line_in_setup_cfg():
    listed = (ROOT / "setup.cfg").read_text().split("packages =")[1].split("install_requires")[0].split()
    found = set()
    for room, folder in FOLDERS.items():
        prefix = "avid_pipeline" if room == CORE else f"avid_pipeline.{room}"
        for init in (ROOT / folder).rglob("__init__.py"):
            found.add(".".join([prefix, *init.parent.relative_to(ROOT / folder).parts]))
    assert set(listed) == found
