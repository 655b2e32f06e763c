"""Fine-tuning of a whole network on an episode's support, for a given number of steps."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Shaped

from gc_nc.array_types import Array, as_floating, as_numbers, as_scalar, check_whole
from gc_nc.errors import require_extra
from gc_nc.metrics.argument_checks import as_number, check_function, check_leaves
from gc_nc.metrics.mixing_check import MixingCheck
from gc_nc.metrics.shared_programs import SharedFunction
from gc_nc.metrics.weighted_means import power_of_two_near
from gc_nc.transfer.closed_form_heads import best_way


def fine_tune_predictions(
    embed_fn: Callable[[Any, jax.Array], jax.Array],
    params: Any,
    support_inputs: Shaped[Array, "W S *input"],
    query_inputs: Shaped[Array, "N *input"],
    *,
    num_steps: int,
    learning_rate: float,
    momentum: float = 0.0,
    report: Callable[[int, float], None] | None = None,
) -> Int[Array, "N"]:
    """Way indices after T steps of full-batch SGD on all parameters and a new linear head.

    The embeddings z before the first step give the support mean o and the root mean square
    t = sqrt(mean |z - o|^2), which both stay fixed. With u = (z - o) / t:

      logits = A^T u + b,  at first A_w = 2 mean_w(u), b_w = -|mean_w(u)|^2
      loss = mean over the W S support examples of the cross-entropy of softmax(logits)

    At first the logits are -|u - mean_w(u)|^2 up to a term that all ways share. So with no steps
    the head is the nearest class mean, to which more steps can be compared (Triantafillou et al.,
    Proto-MAML, arXiv 1903.03096, section 3). The unit t gives the head's learning rate the same
    meaning for embeddings of any size. Nothing is fitted on queries.

    Args:
      embed_fn: pure (params, inputs (B, *input)) -> (B, K); BatchNorm uses running statistics.
        Traced anew at every call, because it may close over what has changed; episodes of one
        shape share the compiled programs.
      params: pytree of the parameters to train; it is not changed.
      support_inputs: (W, S, *input), S examples of each way.
      query_inputs: (N, *input).
      num_steps: T, 0 or more.
      learning_rate: learning rate of SGD, 0 or more, for both network and head.
      momentum: heavy-ball momentum in [0, 1).
      report: called after each step with its number and the loss before it.

    Returns:
      (N,) int32 in 0..W-1, the lowest at ties; -1 for a query whose logits are not finite, and so
      for all queries if training diverged.

    Warns:
      ImpureEmbeddingWarning: examples mix, so a query's prediction may depend on other queries.

    Raises:
      ValueError: fewer than 2 ways, no shots, shapes that do not fit; a setting outside its range;
        an `embed_fn` that does not return (B, K).
    """
    require_extra("train", "optax")
    check_function(embed_fn, "embed_fn", "(params, inputs (B, *input)) -> (B, K)")
    if report is not None:
        check_function(report, "report", "of the step and its loss")
    check_leaves(params)
    num_steps = check_whole(num_steps, 0, "num_steps")
    learning_rate = as_scalar(learning_rate, "learning_rate")
    momentum = as_number(momentum, "momentum", lambda m: 0 <= m < 1, "must be in [0, 1)")
    support_inputs = _at_most_float32(support_inputs, "support_inputs")
    query_inputs = _at_most_float32(query_inputs, "query_inputs")
    shape = support_inputs.shape
    if len(shape) < 2 or shape[0] < 2 or shape[1] < 1 or query_inputs.shape[1:] != shape[2:]:
        raise ValueError(
            f"support_inputs of shape {shape} and query_inputs of shape {query_inputs.shape};"
            " (W, S, *input) with 2 or more ways and (N, *input) are needed"
        )
    begin, step, predict = (
        SharedFunction(partial(function, embed_fn)) for function in (_begin, _step, _predict)
    )
    head, frame, embeddings = begin(params, support_inputs)
    _warn_if_mixed(embed_fn, begin, params, support_inputs, embeddings)
    trained = params, head
    state = _optimizer(learning_rate, momentum).init(trained)
    # A Python loop, because XLA's loops run convolutions about 4.5 times slower on the CPU.
    for number in range(1, num_steps + 1):
        trained, state, loss = step(
            trained, state, frame, support_inputs, learning_rate, jnp.float32(momentum)
        )
        if report is not None:
            report(number, float(loss))
    return predict(trained, frame, query_inputs)


def _at_most_float32(inputs, name):
    inputs = as_numbers(inputs, name)
    return as_floating(inputs, name) if inputs.dtype == np.float64 else jnp.asarray(inputs)


def _warn_if_mixed(embed_fn, begin, params, support_inputs, embeddings):
    def run(inputs):
        return begin(params, inputs.reshape(support_inputs.shape))[2]

    check = MixingCheck(
        partial(_embed, embed_fn, params), lambda inputs: begin.program(params, support_inputs)
    )
    check(run, _flat(support_inputs), embeddings)


class _Head(NamedTuple):
    kernel: Float[Array, "K W"]
    bias: Float[Array, "W"]


class _Frame(NamedTuple):
    """The origin and the unit in which the head measures embeddings."""

    origin: Float[Array, "K"]
    unit: Float[Array, ""]


def _begin(embed_fn, params, support_inputs):
    num_ways, num_shots = support_inputs.shape[:2]
    z = _embed(embed_fn, params, _flat(support_inputs))
    origin = jnp.mean(z, axis=0)
    offsets = z - origin[None]
    # Scaled to order 1, so that squares are in range.
    size = power_of_two_near(jnp.max(jnp.abs(offsets)))
    unit = size * jnp.sqrt(jnp.mean(jnp.sum((offsets / size) ** 2, axis=1)))
    unit = jnp.where(unit == 0, 1, unit)
    means = jnp.mean((offsets / unit).reshape(num_ways, num_shots, -1), axis=1)
    return _Head(2 * means.T, -jnp.sum(means**2, axis=1)), _Frame(origin, unit), z


def _step(embed_fn, trained, state, frame, support_inputs, learning_rate, momentum):
    import optax

    num_ways, num_shots = support_inputs.shape[:2]
    ways = jnp.repeat(jnp.arange(num_ways, dtype=jnp.int32), num_shots)

    def loss_of(trained):
        logits = _logits(embed_fn, trained, frame, _flat(support_inputs))
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, ways))

    loss, gradients = jax.value_and_grad(loss_of)(trained)
    updates, state = _optimizer(learning_rate, momentum).update(gradients, state)
    return optax.apply_updates(trained, updates), state, loss


def _predict(embed_fn, trained, frame, query_inputs):
    return best_way(_logits(embed_fn, trained, frame, query_inputs))


def _optimizer(learning_rate, momentum):
    # Imported here, because the other heads do not need optax.
    import optax

    return optax.sgd(learning_rate, momentum)


def _logits(embed_fn, trained, frame, inputs):
    params, head = trained
    u = (_embed(embed_fn, params, inputs) - frame.origin[None]) / frame.unit
    return jnp.matmul(u, head.kernel, precision="highest") + head.bias[None]


def _embed(embed_fn, params, inputs):
    z = embed_fn(params, inputs)
    if getattr(z, "ndim", None) != 2 or len(z) != len(inputs):
        raise ValueError(
            f"embed_fn returns {getattr(z, 'shape', type(z).__name__)} for {len(inputs)} inputs;"
            f" ({len(inputs)}, K) is needed"
        )
    return as_floating(z, "embeddings")


def _flat(support_inputs):
    return support_inputs.reshape(-1, *support_inputs.shape[2:])
