"""What importing the package costs and starts."""

import os
import subprocess
import sys

import pytest

import gc_nc


def modules_after(*imports):
    script = f"""
import {", ".join(imports)}
import sys
print(*{{name.partition(".")[0] for name in sys.modules}})
"""
    # No such platform: the start of any backend is an error.
    environment = os.environ | {"JAX_PLATFORMS": "none_such"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_a_backend_that_starts_would_be_seen():
    with pytest.raises(AssertionError, match="none_such"):
        modules_after("jax; jax.devices()")


def test_r6_no_import_starts_a_backend():
    modules_after(
        "gc_nc.metrics",
        "gc_nc.models",
        "gc_nc.data.sources",
        "gc_nc.runs.loop",
        "gc_nc.sweeps.local_executor",
        "gc_nc.sweeps.slurm_executor",
        "experiments.train",
        "experiments.prepare",
        "tensorflow_datasets",
        "grain",
    )


@pytest.mark.slow
def test_grain_is_imported_by_runs_that_stream_alone():
    assert "grain" not in modules_after("gc_nc.data.streaming", "gc_nc.runs.loop")


def test_metrics_import_little_beyond_jax():
    added = modules_after("gc_nc", "gc_nc.metrics") - modules_after("jax")
    heavy = {"flax", "optax", "orbax", "sklearn", "scipy", "matplotlib", "tensorflow_datasets"}
    assert "gc_nc" in added
    assert not added & heavy


def test_the_package_gives_its_rooms_when_asked():
    asked = modules_after("gc_nc; gc_nc.metrics.neural_collapse; gc_nc.transfer; gc_nc.__version__")
    assert "gc_nc" in asked
    assert not asked & {"flax", "optax", "ml_collections"}
    assert {"metrics", "transfer", "__version__"} <= {*dir(gc_nc)}
    with pytest.raises(AttributeError, match="no attribute 'metric'"):
        gc_nc.metric  # noqa: B018
