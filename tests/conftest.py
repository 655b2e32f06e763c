"""House rules of the tests: shapes checked, rank promotion refused, 8 virtual CPU devices."""

import gc
import os
import tempfile

# Read when NumPy and SciPy are imported. Two threads for matrices of a few dozen entries spend most
# of their time waiting for each other, and more so beside another worker of pytest-xdist.
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import jax
import numpy as np
import pytest
from jax._src import compiler as jax_compiler
from jaxtyping import install_import_hook
from PIL import Image

# Collections look through all of JAX's caches; as often as by default they take 4% of the time.
gc.set_threshold(200_000, 20, 100)

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 8)

# Many tests compile the same few programs. One cache a test session, shared by the processes that
# tests start and by the workers of pytest-xdist, which inherit its place.
if "GC_NC_TEST_CACHE" not in os.environ:
    _CACHE = tempfile.TemporaryDirectory(prefix="gc_nc_tests_")
    os.environ["GC_NC_TEST_CACHE"] = _CACHE.name
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    # Of the processes that tests start, for the same reason as _quick_compilation.
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    # A small program compiles in less than half the time. Of this process too, which has not yet
    # read it.
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false"
    )
jax.config.update("jax_compilation_cache_dir", os.environ["GC_NC_TEST_CACHE"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
os.environ.setdefault("MPLBACKEND", "Agg")

# Must come before any test imports the package.
install_import_hook("gc_nc", "beartype.beartype")

from gc_nc.models.vgg import VGG_STAGES  # noqa: E402
from gc_nc.training import loop  # noqa: E402
from gc_nc.training.configuration import default_config  # noqa: E402
from gc_nc.training.run_figure import draw_run  # noqa: E402


def pytest_collection_modifyitems(config, items):
    """Skips tests marked gpu where JAX sees no GPU."""
    gpu_items = [item for item in items if "gpu" in item.keywords]
    if gpu_items and jax.default_backend() != "gpu":
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="no GPU"))


_compile_options = jax_compiler.get_compile_options


def _careful_compile_options(*args, env_options_overrides=None, **kwargs):
    overrides = {"xla_cpu_use_fusion_emitters": True} | (env_options_overrides or {})
    return _compile_options(*args, env_options_overrides=overrides, **kwargs)


@pytest.fixture(autouse=True)
def _pictures(request, monkeypatch):
    """Runs do not draw, which takes two fifths of a tiny one, unless a test is marked for it."""
    if "draws_pictures" in request.keywords:
        monkeypatch.setattr(loop, "draw_run", draw_run)


def _draw_nothing(evaluations, path, *, title, subtitle):
    pass


# At once, for fixtures of a module too.
loop.draw_run = _draw_nothing


# What rounding decides: these want XLA at its best, as users have it.
_COMPILED_WITH_CARE = (
    "test_class_statistics.py",
    "test_coinciding_means.py",
    "test_collapse.py",
    "test_collapse_of_many_classes.py",
    "test_extremes.py",
    "test_flatness.py",
)


@pytest.fixture(autouse=True)
def _quick_compilation(request, monkeypatch):
    """Most programs are compiled for one call, and take longer to compile than to run."""
    with_care = request.path.name in _COMPILED_WITH_CARE or request.path.suffix != ".py"
    # These look for a message, or compile with options of their own.
    with_care &= "compiled_quickly" not in request.keywords
    jax.config.update("jax_disable_most_optimizations", not with_care)
    if with_care:
        # JAX has no public default for the options of a compilation.
        monkeypatch.setattr(jax_compiler, "get_compile_options", _careful_compile_options)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


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
def tiny_run(tmp_path, monkeypatch):
    """(config, workdir) of a run of 8 steps on 10 random images, batch 2; a second or two long.

    Its vgg11 has 3 of its 8 convolutions, in this process alone: each run traces and compiles a
    handful of programs, and what runs are tested for does not depend on the depth.
    """
    monkeypatch.setitem(VGG_STAGES, 11, ((64,), (512, 512)))
    rng = np.random.default_rng(0)
    labels = np.arange(20) % 2
    images = rng.integers(0, 256, (20, 8, 8, 1), dtype=np.uint8)
    # The two classes can be told apart by their left halves.
    images[:, :, :4] = np.where(labels[:, None, None, None] == 1, 250, 5)
    np.savez(tmp_path / "tiny.npz", images=images, labels=labels, split=np.arange(20) >= 10)
    config = default_config()
    config.data.source = "npz"
    config.data.data_dir = str(tmp_path / "tiny.npz")
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
