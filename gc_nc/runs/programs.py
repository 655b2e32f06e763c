"""The compiled programs of a run, shared by all runs of this process that need the same ones."""

import functools
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from gc_nc.compilation import jit_for_device
from gc_nc.data.device_batches import Augmentation, Normalization
from gc_nc.devices import Placement
from gc_nc.random_streams import stream_key
from gc_nc.training.evaluation import monitor_complexity
from gc_nc.training.penalties import GCPenalty
from gc_nc.training.step import OptimizerSpec, train_step, train_step_at


class ProgramSpec(NamedTuple):
    """All that decides what is compiled; hashable.

    Attributes:
      model: that is trained, in its own dtype.
      optimizer: without its hyperparameters.
      normalization: of the pixels.
      augmentation: of the pixels.
      penalty: on GC, or None.
      precision: of the training's matmuls and convolutions.
      placement: the devices of the run.
      batch_size: of batches that the program takes from a resident split; None if streamed.
      monitor_probes: Jacobian products an image of the monitor.
    """

    model: nn.Module
    optimizer: OptimizerSpec
    normalization: Normalization
    augmentation: Augmentation
    penalty: GCPenalty | None
    precision: str
    placement: Placement
    batch_size: int | None
    monitor_probes: int


class Programs(NamedTuple):
    """What is compiled of a run; JAX compiles each at its first call.

    Attributes:
      keys: seed -> keys of augmentation, evaluation, penalty and monitor.
      plain_step: (state, hyperparameters, *batch, key) -> state, metrics; the batch is what
        `train_step` takes, or what `train_step_at` takes of a resident split.
      penalised_step: the same with the run's GC penalty, whose key and weight follow.
      monitor: `monitor_complexity`.
    """

    keys: Callable
    plain_step: Callable
    penalised_step: Callable
    monitor: Callable


@functools.lru_cache(maxsize=16)
def compile_programs(spec: ProgramSpec) -> Programs:
    """The programs of a run; the same ones for an equal `spec`."""
    compiled = partial(jit_for_device, **spec.placement.jit_options)
    # Never both in one program: XLA's CPU backend runs convolutions inside a conditional many times
    # slower, so the host chooses by the step number.
    plain, penalised = (
        compiled(partial(_step, spec._replace(penalty=penalty)), donate_argnames="state")
        for penalty in (None, spec.penalty)
    )
    monitor = partial(
        monitor_complexity,
        # What is measured is float32 whatever the network trains in.
        model=spec.model.clone(dtype=jnp.dtype(jnp.float32)),
        normalization=spec.normalization,
        num_probes=spec.monitor_probes,
        placement=spec.placement,
    )
    return Programs(compiled(_keys), plain, penalised, compiled(monitor))


def _keys(seed) -> tuple[jax.Array, ...]:
    return tuple(
        stream_key(seed, name)
        for name in ("augmentation", "evaluation probes", "penalty probes", "monitor probes")
    )


def _step(spec: ProgramSpec, state, hyperparameters, *batch_and_keys):
    step = partial(
        train_step,
        model=spec.model,
        optimizer=spec.optimizer.make(hyperparameters),
        normalization=spec.normalization,
        augmentation=spec.augmentation,
        l2=hyperparameters.l2,
        penalty=spec.penalty,
        precision=spec.precision,
        placement=spec.placement,
    )
    if spec.batch_size is None:
        return step(state, *batch_and_keys)
    return train_step_at(state, *batch_and_keys, batch_size=spec.batch_size, step=step)
