"""House rules of the tests: shapes checked, rank promotion refused, 8 virtual CPU devices."""

import os

import jax
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 8)
os.environ.setdefault("MPLBACKEND", "Agg")

# Must come before any test imports the package.
install_import_hook("gc_nc", "beartype.beartype")


def pytest_collection_modifyitems(config, items):
    """Skips tests marked gpu where JAX sees no GPU."""
    gpu_items = [item for item in items if "gpu" in item.keywords]
    if gpu_items and jax.default_backend() != "gpu":
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="no GPU"))
