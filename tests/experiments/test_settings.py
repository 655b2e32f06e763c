"""The commands under settings of JAX that a user may have in the environment."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jaxtyping
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from matplotlib.figure import Figure

from experiments import launcher, measure, transfer
from gc_nc.errors import InputError
from gc_nc.reproduction import reproduce
from gc_nc.reproduction.catalogue import FIGURES
from gc_nc.runs import loop
from gc_nc.runs.configuration import default_config
from gc_nc.runs.finished_run import open_run
from gc_nc.sweeps.inline_executor import run_inline
from gc_nc.sweeps.members import make_members, read_sweep
from tests.sweeps.config_file import CONFIG

ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def _64_bits_and_strict_promotion():
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        yield


#: As context managers, and as the environment variables that processes of their own read.
SETTINGS = {
    # At once: together they refuse more mixed dtypes than each alone.
    "x64_strict": (
        _64_bits_and_strict_promotion,
        {"JAX_ENABLE_X64": "1", "JAX_NUMPY_DTYPE_PROMOTION": "strict"},
    ),
    "debug_nans": (lambda: jax.debug_nans(True), {"JAX_DEBUG_NANS": "1"}),
    "disable_jit": (jax.disable_jit, {"JAX_DISABLE_JIT": "1"}),
}


@pytest.fixture(autouse=True)
def _small_and_without_pictures(monkeypatch):
    flags.FLAGS.mark_as_parsed()
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **options: Path(path).touch())


def tiny_config(folder):
    """A run with augmentation, a penalty, a monitor, BatchNorm and held-out classes."""
    rng = np.random.default_rng(0)
    labels = np.arange(48) % 6
    patterns = rng.integers(0, 256, (6, 8, 8, 1))
    images = np.clip(patterns[labels] + rng.normal(scale=40, size=(48, 8, 8, 1)), 0, 255)
    np.savez(
        folder / "data.npz",
        images=images.astype(np.uint8),
        labels=labels,
        split=np.arange(48) >= 24,
    )
    config = default_config()
    config.data.source, config.data.data_dir = "npz", str(folder / "data.npz")
    config.data.classes.split, config.data.classes.counts = "random", (4, 2)
    config.data.crop_padding, config.data.flip = 1, True
    config.model.name, config.model.width, config.model.batch_norm = "mlp", 0.05, True
    config.batch_size, config.num_steps = 4, 3
    config.optimizer.momentum, config.optimizer.l2 = 0.9, 1e-3
    config.gc_penalty.weight, config.gc_penalty.every_steps = 1e-3, 2
    config.monitor.every_steps = 2
    config.evaluation.batch_size, config.evaluation.gc_examples = 8, 8
    config.evaluation.every_steps = 2
    config.checkpoint.every_steps = 2
    return config.lock()


def run_and_results(folder):
    """Trains, measures and transfers; what the three found."""
    folder.mkdir()
    config, workdir = tiny_config(folder), folder / "run"
    found = dict(loop.train(config, workdir))
    with flagsaver.flagsaver(workdir=str(workdir), gc_examples=16, flatness_examples=8):
        measure.main([])
    found |= json.loads((workdir / "measurements.json").read_text())["3"]
    for head in ("nearest_mean", "ridge", "fine_tuning"):
        options = {"head": head, "num_episodes": 3, "num_queries": 2, "fine_tuning_steps": 1}
        with flagsaver.flagsaver(
            workdir=str(workdir), num_ways=["2"], num_shots=["1"], gc_examples=8, **options
        ):
            transfer.main([])
    return found


@pytest.fixture(scope="module")
def as_by_default(tmp_path_factory):
    flags.FLAGS.mark_as_parsed()
    return run_and_results(tmp_path_factory.mktemp("default") / "runs")


def flatten(results, path=""):
    flat = {}
    for key, value in results.items():
        flat |= flatten(value, f"{path}{key}.") if isinstance(value, dict) else {path + key: value}
    return flat


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_train_measure_and_transfer(setting, as_by_default, tmp_path, monkeypatch):
    # Without jit its functions see the Python numbers that they are called with.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", setting == "disable_jit")
    with SETTINGS[setting][0]():
        found = run_and_results(tmp_path / "runs")
    found, expected = flatten(found), flatten(as_by_default)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        if isinstance(value, str) or any(word in name for word in ("seconds", "per_sec", "time")):
            continue
        # rtol: three steps of training let rounding grow.
        np.testing.assert_allclose(value, expected[name], rtol=2e-2, atol=1e-4, err_msg=name)


def test_a_mesh_of_the_callers_is_one_line(tmp_path):
    with jax.set_mesh(jax.make_mesh((8,), ("d",))):
        for call in (
            lambda: loop.train(tiny_config(tmp_path), tmp_path / "run"),
            lambda: open_run(tmp_path),
        ):
            with pytest.raises(InputError, match=r"jax\.set_mesh is in force, of 8") as error:
                call()
            assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_reproduce(setting, tmp_path, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", setting == "disable_jit")
    figure = FIGURES["2"]
    file = f"experiments/configs/figures/{figure.sweep}.py:smoke"
    base = launcher.config_of_file(file)
    members = make_members(base, read_sweep(file))
    base = base.lock()
    with SETTINGS[setting][0]():
        reproduce.prepare(tmp_path / figure.sweep, members, base)
        run_inline(members, tmp_path / figure.sweep)
        record = reproduce.make_figure(figure, "smoke", tmp_path, members, base)
    assert not record["missing"]


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_sweep(setting, tmp_path):
    """Its runs are processes, which have the settings from the environment."""
    tiny_config(tmp_path)
    path = tmp_path / "sweep_config.py"
    data = str(tmp_path / "data.npz")
    path.write_text(CONFIG.format(data=data, num_steps=2, sweep='grid({"seed": (0,)})'))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "experiments.sweep"),
            *(f"--config={path}", f"--workdir={tmp_path / 'sweep'}"),
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **SETTINGS[setting][1]},
    )
    assert done.returncode == 0, done.stdout + done.stderr
