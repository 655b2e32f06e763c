"""The training state, the loss and one pure training step."""

import contextlib
import operator
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from gc_nc.data.datasets import ImageSplit
from gc_nc.data.device_batches import Augmentation, Normalization, augment, normalize
from gc_nc.devices import Placement
from gc_nc.training.penalties import GCPenalty


@flax.struct.dataclass
class TrainState:
    """What a checkpoint holds: everything that a step changes.

    Attributes:
      step: scalar, the number of steps taken.
      params: of the model.
      batch_stats: running statistics of BatchNorm; {} without.
      opt_state: of the optimizer.
    """

    # A pytree holds whatever its transformations put there: arrays, shapes, shardings.
    step: Any
    params: Any
    batch_stats: Any
    opt_state: Any

    @property
    def variables(self) -> dict[str, Any]:
        """What the model's apply takes."""
        return {"params": self.params, "batch_stats": self.batch_stats}


def make_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """SGD, with momentum if it is above 0, under the configured learning-rate schedule.

    With gradient g_t of the loss (its L2 term included), learning rate r_t, momentum b and
    decoupled decay d:

      m_t = b m_(t-1) + g_t,  theta_t = theta_(t-1) - r_t (m_t + d theta_(t-1))

    SGDW of Loshchilov and Hutter (arXiv 1711.05101), whose schedule multiplier is r_t here, as in
    PyTorch's AdamW. The L2 term differs from it in that its gradient goes through the momentum
    too; without momentum they are the same. All parameters decay, as all are in the L2 term. Decay
    0 has the state and the program of plain SGD.
    """
    rate, momentum = learning_rate_schedule(config), config.optimizer.momentum or None
    decay = config.optimizer.decoupled_decay
    if not decay:
        return optax.sgd(rate, momentum)
    return optax.chain(
        optax.trace(momentum) if momentum else optax.identity(),
        optax.add_decayed_weights(decay),
        optax.scale_by_learning_rate(rate),
    )


def learning_rate_schedule(config: ConfigDict) -> optax.Schedule:
    """Learning rate of each step: constant, step or cosine, after a linear warm-up."""
    peak, schedule = config.optimizer.learning_rate, config.schedule
    if schedule.name == "constant":
        after = optax.constant_schedule(peak)
    elif schedule.name == "step":
        # Counted from the end of the warm-up, as join_schedules does.
        steps = [round(b * config.num_steps) - schedule.warmup_steps for b in schedule.boundaries]
        after = optax.piecewise_constant_schedule(peak, dict.fromkeys(steps, schedule.factor))
    else:
        after = optax.cosine_decay_schedule(peak, max(1, config.num_steps - schedule.warmup_steps))
    if not schedule.warmup_steps:
        return after
    warmup = optax.linear_schedule(0.0, peak, schedule.warmup_steps)
    return optax.join_schedules([warmup, after], [schedule.warmup_steps])


def init_state(
    seed: int, model: nn.Module, optimizer: optax.GradientTransformation, image_shape: tuple
) -> TrainState:
    """The state before the first step; a function of the seed."""
    images = jnp.zeros((1, *image_shape), jnp.float32)

    @jax.jit
    def init(key):
        variables = model.init(key, images)
        params = variables["params"]
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            batch_stats=variables.get("batch_stats", {}),
            opt_state=optimizer.init(params),
        )

    return init(jax.random.key(seed))


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """(B,) -log softmax(logits)[label]."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def l2_penalty(params: dict) -> jax.Array:
    """Half the sum of all squared parameters: its gradient is the parameters themselves.

    Times the coefficient it is the term of the loss that the paper calls L2 regularisation, coupled
    decay: its gradient goes through the momentum. `make_optimizer` has the decoupled one.
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
    l2: float,
    penalty: GCPenalty | None = None,
    precision: str = "default",
    placement: Placement | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One SGD step on a batch.

    Minimises total_loss = loss + l2 * l2_penalty(params) + penalty_weight * GC, loss being the mean
    cross-entropy.

    Args:
      state: before the step.
      batch: images (B, H, W, c) uint8 and labels (B,).
      key: of the augmentation, which `fold_in` makes the step's own.
      penalty_key: of the penalty's probes, likewise.
      penalty_weight: a traced number, so that a schedule compiles nothing anew.
      model: gives (logits, embedding), and computes in its own dtype.
      optimizer: of the parameters.
      normalization: of the pixels.
      augmentation: of the pixels.
      l2: coefficient; 0 compiles to no term at all.
      penalty: what GC is penalised; None compiles to no term at all.
      precision: of matmuls and convolutions, as jax.default_matmul_precision has it; "default"
        leaves it as it is.
      placement: devices that divide the batch; None for the one it is on.

    Returns:
      The next state, and of the batch before the step: loss, l2_penalty and gc_penalty (times their
      coefficients), total_loss and accuracy; with a penalty also geometric_complexity, the estimate
      that was penalised.
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
        l2_term = l2 * l2_penalty(params) if l2 else jnp.zeros((), jnp.float32)
        total = loss + l2_term
        if penalty is not None:
            total = total + gc_term
        metrics |= {
            "loss": loss,
            "l2_penalty": l2_term,
            "gc_penalty": gc_term,
            "total_loss": total,
            "accuracy": jnp.mean(jnp.argmax(logits, axis=1) == labels, dtype=jnp.float32),
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
      state: before the step.
      split: all its examples.
      order: of the examples, (N,).
      offset: where in the order the batch starts.
      *keys: what `train_step` takes after the batch.
      batch_size: B.
      step: `train_step` with its options.
    """
    indices = jax.lax.dynamic_slice(order, (offset,), (batch_size,))
    return step(state, ImageSplit(split.images[indices], split.labels[indices]), *keys)
