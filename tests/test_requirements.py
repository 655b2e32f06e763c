"""What the code imports is declared in setup.cfg."""

import ast
import configparser
import importlib.metadata
import re
import subprocess
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


ALL = ("", "train", "data", "sweeps")


@pytest.mark.parametrize(
    ("pattern", "extras"),
    [
        ("gc_nc/metrics/*.py", ("",)),
        # What needs an extra there imports it when it is called.
        ("gc_nc/transfer/*.py", ("", "train")),
        ("gc_nc/models/*.py", ("", "train")),
        ("gc_nc/training/*.py", ("", "train")),
        ("gc_nc/runs/*.py", ("", "train")),
        ("gc_nc/measurement/*.py", ("", "train")),
        ("gc_nc/*.py", ("", "train")),
        ("gc_nc/data/*.py", ("", "train", "data")),
        ("gc_nc/sweeps/*.py", ("", "train", "sweeps")),
        ("gc_nc/reproduction/*.py", ("", "train", "sweeps")),
        ("experiments/**/*.py", (*ALL, "bench")),
        ("tests/**/*.py", (*ALL, "test", "bench")),
    ],
)
def test_every_import_is_declared(pattern, extras):
    files = sorted(ROOT.glob(pattern))
    assert files
    assert undeclared(files, set().union(*(declared()[extra] for extra in extras))) == []


@pytest.mark.slow
def test_the_metrics_and_episodes_run_without_any_extra():
    # As in an environment that has what `pip install .` brings and no more.
    script = """
import importlib.util, sys

BLOCKED = set(sys.argv[1:])
find_spec = importlib.util.find_spec
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
importlib.util.find_spec = lambda name, *a: None if name in BLOCKED else find_spec(name, *a)

import gc_nc, jax
from gc_nc import metrics, transfer
inputs, key = jax.numpy.ones((3, 2)), jax.random.key(0)
gc = metrics.estimate_geometric_complexity(lambda x: 2 * x, inputs, key)
assert gc.mean == 8
predictions = transfer.nearest_mean_predictions([[[0.0]], [[1.0]]], [[0.1], [0.9]])
assert predictions.tolist() == [0, 1]
for module in ("models", "data", "training", "runs", "measurement"):
    try:
        importlib.import_module(f"gc_nc.{module}")
    except ModuleNotFoundError as error:
        assert "install with: pip install 'gc_nc[train]'" in str(error), error
    else:
        raise AssertionError(module)
"""
    base = declared()[""]
    modules = [
        module
        for module, distributions in importlib.metadata.packages_distributions().items()
        if {normalized(d) for d in distributions} & (set().union(*declared().values()) - base)
    ]
    assert {"flax", "optax", "scipy", "sklearn", "absl"} <= set(modules)
    # SciPy and ml_dtypes are JAX's own requirements.
    blocked = sorted(set(modules) - {"scipy", "numpy"})
    done = subprocess.run(
        [sys.executable, "-c", script, *blocked], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_an_import_that_is_not_declared_is_found(tmp_path):
    path = tmp_path / "module.py"
    path.write_text("import os\ndef f():\n    from scipy.stats import rankdata\n    import torch\n")
    assert undeclared([path], {"numpy"}) == ["module.py: scipy", "module.py: torch"]
