"""What the code imports is declared in setup.cfg."""

import ast
import configparser
import importlib.metadata
import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
OURS = {"gc_nc", "experiments", "tests"}


def declared():
    """{section: normalized names}: "" for what every installation has, or an extra."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    sections = {"": setup["options"]["install_requires"], **setup["options.extras_require"]}
    return {
        section: {
            normalized(Requirement(line).name)
            for line in text.splitlines()
            if line.strip() and not line.strip().startswith("#")
        }
        for section, text in sections.items()
    }


def normalized(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def imported(path):
    """The top-level modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.partition(".")[0]


def undeclared(files, allowed):
    distributions = importlib.metadata.packages_distributions()
    return sorted(
        {
            f"{path.name}: {module}"
            for path in files
            for module in imported(path)
            if module not in OURS | sys.stdlib_module_names
            # An extra that is not installed has the name of its module.
            and not {normalized(d) for d in distributions.get(module, [module])} & allowed
        }
    )


@pytest.mark.parametrize(
    ("folder", "extras"),
    [
        ("gc_nc", ("", "slurm")),
        ("experiments", ("", "bench")),
        ("tests", ("", "test", "slurm")),
    ],
)
def test_every_import_is_declared(folder, extras):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    assert undeclared(files, set().union(*(declared()[extra] for extra in extras))) == []


def test_an_import_that_is_not_declared_is_found(tmp_path):
    path = tmp_path / "module.py"
    path.write_text("import os\ndef f():\n    from scipy.stats import rankdata\n    import torch\n")
    assert undeclared([path], {"numpy"}) == ["module.py: scipy", "module.py: torch"]
