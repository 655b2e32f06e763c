"""House rules of the tests: shapes checked, rank promotion refused, 8 virtual CPU devices."""

import gc
import os
import tempfile

# Read when NumPy is imported: two threads for a matrix of a few dozen entries mostly wait for each
# other.
os.environ["OPENBLAS_NUM_THREADS"] = "1"
os.environ.setdefault("MPLBACKEND", "Agg")
# One cache of compiled programs a test session, shared with the workers of pytest-xdist and with
# the processes that tests start, which inherit these variables.
if "GC_NC_TEST_CACHE" not in os.environ:
    _CACHE = tempfile.TemporaryDirectory(prefix="gc_nc_tests_")
    os.environ["GC_NC_TEST_CACHE"] = os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE.name
    # Small programs take longer to write, and to clear away, than to compile.
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"

import jax
import numpy as np
import pytest
from jaxtyping import install_import_hook
from PIL import Image

# Collections look through all of JAX's caches; as often as by default they take 4% of the time.
gc.set_threshold(200_000, 20, 100)

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 8)

# Before any test imports the package.
install_import_hook("gc_nc", "beartype.beartype")

from gc_nc.runs.configuration import default_config  # noqa: E402


def pytest_collection_modifyitems(items):
    """Skips tests marked gpu where JAX sees no GPU."""
    gpu_items = [item for item in items if "gpu" in item.keywords]
    if gpu_items and jax.default_backend() != "gpu":
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="no GPU"))


_COMPILATIONS = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, duration, **_: (
        _COMPILATIONS.append(duration) if event.endswith("backend_compile_duration") else None
    )
)


@pytest.fixture
def compilations():
    """A list that grows by one with each program compiled, or read from the cache."""
    return _COMPILATIONS


@pytest.fixture
def tiny_run(tmp_path):
    """(config, workdir) of a run of 8 steps on 10 random images, batch 2, of a one-layer network.

    What runs are tested for does not depend on the depth of their network.
    """
    rng = np.random.default_rng(0)
    labels = np.arange(20) % 2
    images = rng.integers(0, 256, (20, 8, 8, 1), dtype=np.uint8)
    # The two classes can be told apart by their left halves.
    images[:, :, :4] = np.where(labels[:, None, None, None] == 1, 250, 5)
    np.savez(tmp_path / "tiny.npz", images=images, labels=labels, split=np.arange(20) >= 10)
    config = default_config()
    config.data.source = "npz"
    config.data.data_dir = str(tmp_path / "tiny.npz")
    config.model.name = "mlp"
    config.model.width = 0.05
    config.batch_size = 2
    config.num_steps = 8
    config.optimizer.momentum = 0.9
    config.optimizer.l2 = 1e-3
    config.evaluation.every_steps = 4
    config.evaluation.batch_size = 4
    config.evaluation.gc_examples = 6
    config.log_every_steps = 2
    config.checkpoint.every_steps = 5
    return config.lock(), tmp_path / "run"


@pytest.fixture
def folder_run(tiny_run, tmp_path):
    """The tiny run on 24 images in two folders, with flips and a penalty in every second step."""
    config, workdir = tiny_run
    rng = np.random.default_rng(1)
    for name, level in (("dark", 60), ("light", 180)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(12):
            pixels = rng.integers(0, 60, (8, 8, 3)) + level
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "images" / name / f"{i}.png")
    config.data.source, config.data.data_dir = "image_folder", str(tmp_path / "images")
    config.data.image_size = 8
    config.data.flip = True
    config.gc_penalty.weight, config.gc_penalty.every_steps = 1e-3, 2
    return config, workdir
