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
    """Everything that determines what is compiled; hashable.

    Attributes:
      model: the network to train, in its own dtype.
      optimizer: the optimizer without its hyperparameters.
      normalization: the normalization of the pixels.
      augmentation: the augmentation of the pixels.
      penalty: the GC penalty, or None.
      precision: the precision of matmuls and convolutions in training.
      placement: the devices of the run.
      batch_size: size of batches that the program takes from a resident split; None if streamed.
      monitor_probes: number of Jacobian products for each image of the monitor.
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
    """The compiled programs of a run; JAX compiles each one at its first call.

    Attributes:
      keys: seed -> keys of augmentation, evaluation, penalty and monitor.
      plain_step: (state, hyperparameters, *batch, key) -> state, metrics; the batch is that of
        `train_step`, or for a resident split the arguments of `train_step_at`.
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
    # The host chooses by the step number. Both steps in one program would need a conditional, in
    # which XLA's CPU backend runs convolutions many times slower.
    plain, penalised = (
        compiled(partial(_step, spec._replace(penalty=penalty)), donate_argnames="state")
        for penalty in (None, spec.penalty)
    )
    monitor = partial(
        monitor_complexity,
        # Measurements are in float32, whatever dtype the network trains in.
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
