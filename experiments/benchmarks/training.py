"""Training steps compared with PyTorch's, and the cost of GC penalty, monitor and first step.

    python -m experiments.benchmarks.training [--json] [--rows=WORD]

Full-width networks take plain SGD steps in float32 on a batch of CIFAR-10's shape. Both sides run
in one process on the same number of threads and take turns; seconds are medians. The monitor's row
adds one call to the number of steps between two calls by default. The first step is that of a new
process, from its start to the step's result, with an empty and with a filled compilation cache.
The limit is the FLOPs of our step, as XLA counts them, over the rate of a 2048 x 2048 matmul, which
is measured at the start. --rows keeps the rows whose name contains the word.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import jax
import numpy as np
import optax
from absl import flags

from experiments import launcher
from experiments.benchmarks import reporting
from gc_nc.compilation import jit_for_device
from gc_nc.data.datasets import ImageSplit
from gc_nc.data.device_batches import Augmentation, channel_normalization
from gc_nc.errors import InputError
from gc_nc.models import build_model
from gc_nc.runs.configuration import default_config
from gc_nc.training.evaluation import monitor_complexity
from gc_nc.training.penalties import GCPenalty
from gc_nc.training.step import init_state, train_step, train_step_at

_ROWS = flags.DEFINE_string("rows", "", "Only rows whose name contains this.")

_REPETITIONS, _STEPS, _WEIGHT = 7, 2, 1e-6
_WHOLE, _QUARTER = GCPenalty(), GCPenalty(batch_fraction=0.25)
_FIRST_STEP = "from experiments.benchmarks.training import first_step; first_step()"


def main(argv: list[str]) -> None:
    """Times the rows one after the other."""
    del argv
    rows = [build for name, build in _rows().items() if _ROWS.value in name]
    if not rows:
        raise InputError(f"--rows={_ROWS.value!r} is in none of: {'; '.join(_rows())}")
    rate = reporting.matmul_flops_per_second()
    print(f"matmul: {rate / 1e9:.3g} GFLOP/s", file=sys.stderr, flush=True)
    reporting.print_rows([row(rate) for row in rows])


def _rows() -> dict[str, Callable[[float], reporting.Row]]:
    def compared(name, goal, ours, reference):
        def row(rate):
            seconds = _alternate(ours(), reference())
            return reporting.Row(name, *seconds, goal, limit=ours.flops / rate)

        return row

    vgg13 = partial(_Ours, "vgg13")
    rows = {}
    for name, goal, ours, reference in (
        ("VGG-13, batch 32, against PyTorch", 1.0, vgg13(32), _torch("VGG", 32)),
        ("VGG-13, batch 128, against PyTorch", 1.0, vgg13(128), _torch("VGG", 128)),
        ("ResNet-18, batch 32, against PyTorch", 1.0, _Ours("resnet18", 32), _torch("ResNet", 32)),
        ("GC penalty, whole batch, against the plain step", 2.0, vgg13(32, _WHOLE), vgg13(32)),
        ("GC penalty, whole batch, against PyTorch", 0.8, vgg13(32, _WHOLE), _torch("VGG", 32, 1)),
        (
            "GC penalty, quarter of the batch, against the plain step",
            1.25,
            vgg13(32, _QUARTER),
            vgg13(32),
        ),
    ):
        rows[name] = compared(name, goal, ours, reference)
    for name, build in (("GC monitor, against none", _monitor_row),):
        rows[name] = partial(build, name)
    name = "first step of a process, against {} s"
    cold, warm = name.format(20), name.format(5) + ", with the cache"
    rows[cold] = partial(_first_step_row, cold, 20.0, cached=False)
    rows[warm] = partial(_first_step_row, warm, 5.0, cached=True)
    return rows


class _Ours:
    """One of our training steps; a call builds it and counts its FLOPs."""

    def __init__(self, name: str, batch_size: int, penalty: GCPenalty | None = None):
        self._name, self._batch_size, self._penalty = name, batch_size, penalty

    def __call__(self) -> Callable[[], None]:
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (self._batch_size, 32, 32, 3), dtype=np.uint8)
        labels = np.arange(self._batch_size, dtype=np.int32) % 10
        self.model, optimizer = build_model(self._name, 10), optax.sgd(1e-3)
        self.normalization = channel_normalization(images)
        self.split = jax.device_put(ImageSplit(images, labels))
        self.state = init_state(0, self.model, optimizer, images.shape[1:])
        step = partial(
            train_step,
            model=self.model,
            optimizer=optimizer,
            normalization=self.normalization,
            augmentation=Augmentation(),
            penalty=self._penalty,
        )
        function = partial(train_step_at, batch_size=self._batch_size, step=step)
        step = jit_for_device(function, donate_argnames="state")
        order, key = jax.device_put(np.arange(self._batch_size, dtype=np.int32)), jax.random.key(1)
        arguments = (key, np.float32(_WEIGHT)) if self._penalty else ()

        lowered = jax.jit(function).lower(self.state, self.split, order, 0, key, *arguments)
        # FLOPs of the program as written, because the compiled one hides those of library calls.
        self.flops = lowered.cost_analysis()["flops"]

        def run():
            self.state, metrics = step(self.state, self.split, order, 0, key, *arguments)
            jax.block_until_ready(metrics)

        return run


def _torch(name: str, batch_size: int, penalty_weight: float = 0.0):
    def build():
        reporting.import_torch().manual_seed(0)
        from experiments.benchmarks import torch_networks

        network = torch_networks.VGG(13, 10) if name == "VGG" else torch_networks.ResNet18(10)
        return torch_networks.training_step(
            network, batch_size, penalty_weight=_WEIGHT * penalty_weight
        )

    return build


def _alternate(ours, reference) -> tuple[float, float]:
    """Median seconds per step; each turn begins with a step that is not timed."""
    for run in (ours, reference):
        run()
    seconds = [(_seconds(ours), _seconds(reference)) for _ in range(_REPETITIONS)]
    return tuple(map(median, zip(*seconds, strict=True)))


def _seconds(run) -> float:
    # Not timed, because the other side's threads are still spinning for a moment.
    run()
    start = time.perf_counter()
    for _ in range(_STEPS):
        run()
    return (time.perf_counter() - start) / _STEPS


def _monitor_row(name: str, rate: float) -> reporting.Row:
    del rate
    settings = default_config().monitor
    ours = _Ours("vgg13", 32)
    step = ours()
    watch = jit_for_device(
        partial(
            monitor_complexity,
            model=ours.model,
            normalization=ours.normalization,
            num_probes=settings.probes,
        )
    )
    watched = np.resize(np.arange(32), settings.examples)
    images = jax.device_put(np.asarray(ours.split.images)[watched])

    def monitor():
        jax.block_until_ready(watch(ours.state.variables, images, jax.random.key(0)))

    monitor_seconds, step_seconds = _alternate(monitor, step)
    without = settings.every_steps * step_seconds
    return reporting.Row(name, without + monitor_seconds, without, 1.02)


def _first_step_row(name: str, allowed: float, rate: float, *, cached: bool) -> reporting.Row:
    del rate
    with tempfile.TemporaryDirectory() as cache:
        seconds = []
        for i in range(6 if cached else 5):
            place = cache if cached else f"{cache}/{i}"
            seconds.append(_time_process(place))
        # With the cache, the first process is left out, because it filled the cache.
        return reporting.Row(name, median(seconds[1:] if cached else seconds), allowed, 1.0)


def _time_process(cache: str) -> float:
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache}
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", _FIRST_STEP], env=environment, check=True)
    return time.perf_counter() - start


def first_step() -> None:
    """What the process of the last two rows does: builds a VGG-13 and takes a step of batch 32."""
    launcher.use_compilation_cache(os.environ["JAX_COMPILATION_CACHE_DIR"])
    _Ours("vgg13", 32)()()


if __name__ == "__main__":
    launcher.run(main)
