"""What importing the package costs and starts."""

import subprocess
import sys


def modules_after(*imports):
    script = f"""
import {", ".join(imports)}
import sys
from jax._src import xla_bridge
assert not xla_bridge._backends, "importing started a backend"
print(*{{name.partition(".")[0] for name in sys.modules}})
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_r6_no_import_starts_a_backend():
    modules_after(
        "gc_nc.metrics",
        "gc_nc.models",
        "gc_nc.data.sources",
        "gc_nc.training.loop",
        "gc_nc.sweeps.local_executor",
        "gc_nc.sweeps.slurm_executor",
        "experiments.train",
        "experiments.prepare",
    )


def test_grain_starts_no_backend_and_is_imported_by_runs_that_stream_alone():
    modules_after("tensorflow_datasets", "grain")
    assert "grain" not in modules_after("gc_nc.data.streaming", "gc_nc.training.loop")


def test_metrics_import_little_beyond_jax():
    added = modules_after("gc_nc", "gc_nc.metrics") - modules_after("jax")
    heavy = {"flax", "optax", "orbax", "sklearn", "scipy", "matplotlib", "tensorflow_datasets"}
    assert "gc_nc" in added
    assert not added & heavy
