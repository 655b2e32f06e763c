"""The training state, the loss and one pure training step."""

import contextlib
import operator
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from gc_nc.data.datasets import ImageSplit
from gc_nc.data.device_batches import Augmentation, Normalization, augment, normalize
from gc_nc.devices import Placement
from gc_nc.training.penalties import GCPenalty


@flax.struct.dataclass
class TrainState:
    """The content of a checkpoint: everything that a step changes.

    Attributes:
      step: scalar, the number of steps taken.
      params: the parameters of the model.
      batch_stats: the running statistics of BatchNorm; {} without BatchNorm.
      opt_state: the state of the optimizer.
    """

    # Any, because transformations of the pytree put arrays, shapes or shardings here.
    step: Any
    params: Any
    batch_stats: Any
    opt_state: Any

    @property
    def variables(self) -> dict[str, Any]:
        """The variables that the model's apply takes."""
        return {"params": self.params, "batch_stats": self.batch_stats}


class Hyperparameters(NamedTuple):
    """Numbers that a step takes as arguments, so that runs with different ones share a program.

    Attributes:
      learning_rate: the peak r of the schedule.
      l2: the coefficient of `l2_penalty`; None for no such term.
      decoupled_decay: d of `OptimizerSpec`; None for no such term.
    """

    learning_rate: Any
    l2: Any = None
    decoupled_decay: Any = None


class OptimizerSpec(NamedTuple):
    """SGD with a learning-rate schedule, without its hyperparameters; hashable.

    With gradient g_t of the loss (including its L2 term), learning rate r_t, momentum b and
    decoupled decay d:

      m_t = b m_(t-1) + g_t,  theta_t = theta_(t-1) - r_t (m_t + d theta_(t-1))

    This is SGDW of Loshchilov and Hutter (arXiv 1711.05101) with r_t as its schedule multiplier, as
    in PyTorch's AdamW. The L2 term differs from decoupled decay in that its gradient goes through
    the momentum; without momentum they are the same. All parameters decay, as all are in the L2
    term. Without decay, state and program are those of plain SGD.

    Attributes:
      momentum: b; with 0 there is no state for it.
      schedule: "constant", "step" or "cosine", after a linear warm-up.
      boundaries: boundaries of "step", as fractions of `num_steps`.
      factor: the factor of "step" at each boundary.
      warmup_steps: number of steps of the linear rise from 0.
      num_steps: number of steps of the run.
    """

    momentum: float
    schedule: str
    boundaries: tuple[float, ...]
    factor: float
    warmup_steps: int
    num_steps: int

    def learning_rate(self, peak: Any) -> optax.Schedule:
        """The learning rate of each step; `peak` may be traced."""
        if self.schedule == "constant":
            after = optax.constant_schedule(peak)
        elif self.schedule == "step":
            # Counted from the end of the warm-up, as join_schedules counts.
            steps = [round(b * self.num_steps) - self.warmup_steps for b in self.boundaries]
            after = optax.piecewise_constant_schedule(peak, dict.fromkeys(steps, self.factor))
        else:
            after = optax.cosine_decay_schedule(peak, max(1, self.num_steps - self.warmup_steps))
        if not self.warmup_steps:
            return after
        warmup = optax.linear_schedule(0.0, peak, self.warmup_steps)
        return optax.join_schedules([warmup, after], [self.warmup_steps])

    def make(self, hyperparameters: Hyperparameters) -> optax.GradientTransformation:
        """The optimizer with these hyperparameters."""
        rate = self.learning_rate(hyperparameters.learning_rate)
        momentum, decay = self.momentum or None, hyperparameters.decoupled_decay
        if decay is None:
            return optax.sgd(rate, momentum)
        return optax.chain(
            optax.trace(momentum) if momentum else optax.identity(),
            optax.add_decayed_weights(decay),
            optax.scale_by_learning_rate(rate),
        )


def optimizer_spec(config: ConfigDict) -> OptimizerSpec:
    """The part of a configuration's optimizer that is compiled into the program."""
    schedule = config.schedule
    return OptimizerSpec(
        config.optimizer.momentum,
        schedule.name,
        tuple(schedule.boundaries),
        schedule.factor,
        schedule.warmup_steps,
        config.num_steps,
    )


def hyperparameters(config: ConfigDict) -> Hyperparameters:
    """The hyperparameters of a configuration, float32; a coefficient of 0 becomes None."""
    chosen = config.optimizer
    return Hyperparameters(
        np.float32(chosen.learning_rate),
        np.float32(chosen.l2) if chosen.l2 else None,
        np.float32(chosen.decoupled_decay) if chosen.decoupled_decay else None,
    )


def make_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """The optimizer of a configuration, as `OptimizerSpec` describes it."""
    return optimizer_spec(config).make(hyperparameters(config))


def init_state(
    seed: int, model: nn.Module, optimizer: optax.GradientTransformation, image_shape: tuple
) -> TrainState:
    """The state before the first step, determined by the seed."""
    variables = _init_variables(jax.random.key(seed), model=model, image_shape=image_shape)
    params = variables["params"]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=variables.get("batch_stats", {}),
        opt_state=optimizer.init(params),
    )


@partial(jax.jit, static_argnames=("model", "image_shape"))
def _init_variables(key, *, model, image_shape):
    return model.init(key, jnp.zeros((1, *image_shape), jnp.float32))


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """(B,) -log softmax(logits)[label]."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def l2_penalty(params: dict) -> jax.Array:
    """Half the sum of all squared parameters, whose gradient is the parameters themselves.

    Times its coefficient, this is the loss term that the paper calls L2 regularisation. It is a
    coupled decay: its gradient goes through the momentum. `OptimizerSpec` has the decoupled one.
    """
    return 0.5 * jax.tree.reduce(
        operator.add, jax.tree.map(lambda p: jnp.sum(p.astype(jnp.float32) ** 2), params)
    )


def train_step(
    state: TrainState,
    batch: ImageSplit,
    key: jax.Array,
    penalty_key: jax.Array | None = None,
    penalty_weight: Any = None,
    *,
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    normalization: Normalization,
    augmentation: Augmentation,
    l2: Any = None,
    penalty: GCPenalty | None = None,
    precision: str = "default",
    placement: Placement | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One SGD step on a batch.

    It minimises total_loss = loss + l2 * l2_penalty(params) + penalty_weight * GC, where loss is
    the mean cross-entropy.

    Args:
      state: the state before the step.
      batch: images (B, H, W, c) uint8 and labels (B,).
      key: the run's key of the augmentation, into which the step number is folded.
      penalty_key: the run's key of the penalty's probes, likewise.
      penalty_weight: a traced number, so that a schedule does not recompile the step.
      model: a network that returns (logits, embedding) and computes in its own dtype.
      optimizer: the optimizer of the parameters.
      normalization: the normalization of the pixels.
      augmentation: the augmentation of the pixels.
      l2: the coefficient of the L2 term, which may be traced; with None the term is not compiled.
      penalty: the GC penalty; with None the term is not compiled at all.
      precision: a value of jax.default_matmul_precision for matmuls and convolutions, or "default"
        to leave it unchanged.
      placement: devices that divide the batch; None for the one that it is on.

    Returns:
      The next state, and metrics of the batch before the step: loss, l2_penalty and gc_penalty
      (times their coefficients), total_loss and accuracy; with a penalty also geometric_complexity,
      the estimate that was penalised.
    """
    images, labels = batch if placement is None else placement.constrain_batch(batch)
    if augmentation != Augmentation():
        images = augment(jax.random.fold_in(key, state.step), images, augmentation)
    images = normalize(images, normalization)

    def total_loss(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        metrics = {}
        if penalty is None:
            (logits, _), updates = model.apply(
                variables, images, train=True, mutable=["batch_stats"]
            )
            gc_term = jnp.zeros((), jnp.float32)
        else:
            step_key = jax.random.fold_in(penalty_key, state.step)
            gc, logits, updates = penalty.forward(model, variables, images, step_key)
            gc_term = penalty_weight * gc
            metrics["geometric_complexity"] = gc
        loss = jnp.mean(cross_entropy(logits, labels))
        l2_term = jnp.zeros((), jnp.float32) if l2 is None else l2 * l2_penalty(params)
        total = loss + l2_term
        if penalty is not None:
            total = total + gc_term
        predictions = jnp.argmax(logits, axis=1).astype(labels.dtype)
        metrics |= {
            "loss": loss,
            "l2_penalty": l2_term,
            "gc_penalty": gc_term,
            "total_loss": total,
            "accuracy": jnp.mean(predictions == labels, dtype=jnp.float32),
        }
        return total, (updates, metrics)

    chosen = contextlib.nullcontext()
    if precision != "default":
        chosen = jax.default_matmul_precision(precision)
    with chosen:
        gradients, (updates, metrics) = jax.grad(total_loss, has_aux=True)(state.params)
    changes, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    state = TrainState(
        step=state.step + 1,
        params=optax.apply_updates(state.params, changes),
        batch_stats=updates.get("batch_stats", state.batch_stats),
        opt_state=opt_state,
    )
    return state, metrics


def train_step_at(
    state: TrainState,
    split: ImageSplit,
    order: jax.Array,
    offset: jax.Array,
    *keys: Any,
    batch_size: int,
    step: Callable[..., tuple[TrainState, dict[str, jax.Array]]],
) -> tuple[TrainState, dict[str, jax.Array]]:
    """A step on the batch order[offset : offset + batch_size] of a split that is on the device.

    Args:
      state: the state before the step.
      split: all examples of the split.
      order: (N,), the order of the examples.
      offset: where the batch starts in the order.
      *keys: the arguments of `train_step` after the batch.
      batch_size: B.
      step: `train_step` with its options.
    """
    indices = jax.lax.dynamic_slice(order, (offset,), (batch_size,))
    return step(state, ImageSplit(split.images[indices], split.labels[indices]), *keys)
