"""What a run's training steps penalise, and how strongly: its configuration, and BatchNorm."""

import dataclasses
import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict

from gc_nc.array_types import Array, check_whole
from gc_nc.errors import InputError
from gc_nc.metrics.argument_checks import as_number
from gc_nc.metrics.penalty import (
    MAX_EXACT_DIM,
    PENALTY_METHODS,
    geometric_complexity_with_outputs,
)


@dataclasses.dataclass(frozen=True)
class GCPenalty:
    """What a training step penalises; hashable, so that jax.jit takes it as a static argument.

    BatchNorm mixes the examples of a training batch. With it, the penalised network therefore uses
    the running statistics from before the step, as constants, like the network that is measured.
    That takes a separate forward pass.

    Attributes:
      of: "embedding" or "logits".
      method: one of metrics.PENALTY_METHODS.
      num_probes: number of products for each example.
      batch_fraction: the share of the batch, from its start, whose GC is estimated; batches are in
        random order.

    Raises:
      ValueError: another `of` or `method`, `num_probes` not a whole number of 1 or more, or
        `batch_fraction` not in (0, 1].
    """

    of: str = "embedding"
    method: str = "output_probes"
    num_probes: int = 1
    batch_fraction: float = 1.0

    def __post_init__(self):
        """Checks the fields."""
        if self.of not in ("embedding", "logits"):
            raise ValueError(f"of={self.of!r} is not one of: embedding, logits")
        if self.method not in PENALTY_METHODS:
            raise ValueError(f"method={self.method!r} is not one of: {', '.join(PENALTY_METHODS)}")
        check_whole(self.num_probes, 1, "num_probes")
        as_number(self.batch_fraction, "batch_fraction", lambda q: 0 < q <= 1, "must be in (0, 1]")

    def forward(
        self, model: nn.Module, variables: dict, images: Array, key: jax.Array
    ) -> tuple[Float[Array, ""], Float[Array, "B C"], dict]:
        """Returns GC of the penalised part, and the batch's logits and new running statistics."""

        def network(train, x):
            (logits, embedding), updates = model.apply(
                variables, x, train=train, mutable=["batch_stats"]
            )
            return embedding if self.of == "embedding" else logits, (logits, updates)

        num_penalised = math.ceil(self.batch_fraction * images.shape[0])
        part, rest = images[:num_penalised], images[num_penalised:]
        options = {"method": self.method, "num_probes": self.num_probes}
        if variables["batch_stats"]:
            gc, _ = geometric_complexity_with_outputs(partial(network, False), part, key, **options)
            _, (logits, updates) = network(True, images)
            return gc, logits, updates
        gc, (logits, updates) = geometric_complexity_with_outputs(
            partial(network, True), part, key, **options
        )
        if rest.shape[0]:
            _, (others, _) = network(True, rest)
            logits = jnp.concatenate([logits, others])
        return gc, logits, updates


def make_penalty(
    config: ConfigDict, model: nn.Module, image_shape: tuple[int, ...]
) -> GCPenalty | None:
    """The penalty of a configuration, checked against the network's sizes, or None.

    Raises:
      InputError: an exact penalty of more than MAX_EXACT_DIM dimensions.
    """
    chosen = config.gc_penalty
    if not chosen.weight:
        return None
    images = jnp.zeros((1, *image_shape), jnp.float32)
    sizes = jax.eval_shape(lambda: model.init_with_output(jax.random.key(0), images)[0])
    dim = sizes[0 if chosen.of == "logits" else 1].shape[1]
    if chosen.method == "exact" and dim > MAX_EXACT_DIM:
        raise InputError(
            f"config.gc_penalty.method='exact' takes a Jacobian product for each of the {dim}"
            f" dimensions of the {chosen.of}, at most {MAX_EXACT_DIM}; use output_probes"
        )
    return GCPenalty(chosen.of, chosen.method, chosen.num_probes, chosen.batch_fraction)


def penalty_weight(config: ConfigDict, step: int) -> float:
    """The penalty's weight in the step after `step` steps; 0 for a step without a penalty.

    It is every_steps * weight * factor(step / num_steps) in every every_steps-th step, so that the
    mean over steps is that of a penalty in every step.
    """
    penalty = config.gc_penalty
    # The last of every n steps has the penalty, since steps n, 2 n and so on are logged.
    if not penalty.weight or (step + 1) % penalty.every_steps:
        return 0.0
    factor = 1.0
    if penalty.boundaries:
        factor = np.interp(step / config.num_steps, penalty.boundaries, penalty.factors)
    return float(penalty.weight * factor * penalty.every_steps)
