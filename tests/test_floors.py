"""Imports run one way: a package takes from those on the floors below it, and from no others."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "gc_nc"

#: The lowest floor first; packages on one floor do not know each other, and single modules stand on
#: the lowest.
FLOORS = (
    {"metrics", "models", "data"},
    {"training", "transfer"},
    {"runs"},
    {"measurement", "sweeps"},
    {"reproduction"},
)
FLOOR = {package: height for height, floor in enumerate(FLOORS) for package in floor}


def imported_parts(path):
    """The packages and modules directly below gc_nc that a file imports, wherever it does."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "gc_nc":
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gc_nc."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (n.name.split(".")[1] for n in node.names if n.name.startswith("gc_nc."))


def test_every_package_has_a_floor():
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} == set(FLOOR)


@pytest.mark.parametrize("package", sorted(FLOOR))
def test_a_package_takes_from_the_floors_below_it(package):
    for path in (ROOT / package).rglob("*.py"):
        for part in imported_parts(path):
            if part != package and part in FLOOR:
                assert FLOOR[part] < FLOOR[package], f"{path} imports gc_nc.{part}"


def test_single_modules_stand_on_the_lowest_floor():
    for path in ROOT.glob("*.py"):
        assert not set(imported_parts(path)) & set(FLOOR), path


def test_the_launchers_are_above_all():
    for path in ROOT.rglob("*.py"):
        assert not re.search(r"^\s*(from|import) experiments", path.read_text("utf-8"), re.M), path
