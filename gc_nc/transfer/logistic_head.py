"""Multinomial logistic regression on the support, as a head."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.sparse.linalg import cg
from jaxtyping import Bool, Float, Int, Shaped

from gc_nc.array_types import Array
from gc_nc.transfer.closed_form_heads import (
    as_regularization,
    best_way,
    centred_and_size,
    checked_shapes,
    relative_strength,
)

# 5 to 15 Newton steps are the rule; one more for each unit of margin that a weak penalty allows.
_MAX_NEWTON_STEPS, _MAX_CG_STEPS = 100, 200
# By strong convexity A is then right to this share of its norm.
_TOLERANCE = 1e-4
_ROUNDING = 2 * float(jnp.finfo(jnp.float32).eps)
_CG_TOLERANCE = 0.02
# Per mean |z - o|^2. Logits past it would drown in rounding; predictions no longer depend on it.
_STRONGEST = 1e3
_NUM_STEP_LENGTHS = 12


class _Head(NamedTuple):
    kernel: Float[Array, "K W"]
    bias: Float[Array, "W"]


def logistic_regression_predictions(
    support_embeddings: Shaped[Array, "W S K"],
    query_embeddings: Shaped[Array, "N K"],
    *,
    regularization: float | Array = 1.0,
) -> Int[Array, "N"]:
    """argmax over ways of L2-regularised multinomial logistic regression; the lowest way at ties.

      (A, b) = argmin sum over support n of -log softmax(A^T z_n + b)[way of n] + lambda/2 |A|_F^2

    The intercept b is not penalised: scikit-learn's `LogisticRegression(C=1/lambda)`. Source: Tian,
    Wang, Krishnan, Tenenbaum, Isola (arXiv 2003.11539), section 3.

    The solver is Newton's method by conjugate gradients in the support's span, from A = 0, with a
    step length that is halved until the slope along the step has all but vanished or is still
    downward. 10 steps give what L-BFGS needs 100 or more for, and it runs many episodes at once on
    the device. It has converged when |gradient| <= 1e-4 lambda |A|, or is 0 to float32's rounding.

    Args:
      support_embeddings: (W, S, K).
      query_embeddings: (N, K).
      regularization: lambda above 0, in units of |z|^2.

    Returns:
      (N,) int32 in 0..W-1; -1 for a query that is not finite, and for all queries if the support is
      not or the solver has not converged.

    Raises:
      ValueError: as `nearest_mean_predictions`; lambda not above 0 or not finite (under jit -1).
    """
    scores, converged = logistic_regression_scores(
        support_embeddings, query_embeddings, regularization=regularization
    )
    return best_way(jnp.where(converged, scores, jnp.nan))


def logistic_regression_scores(
    support_embeddings: Shaped[Array, "W S K"],
    query_embeddings: Shaped[Array, "N K"],
    *,
    regularization: float | Array,
) -> tuple[Float[Array, "N W"], Bool[Array, ""]]:
    """A^T z + b of each query, but for a term that all ways share, and whether A has converged."""
    strength = as_regularization(regularization)
    support, query = checked_shapes(support_embeddings, query_embeddings)
    num_ways, num_shots, dim = support.shape
    support, query, size = centred_and_size(support, query)
    examples = support.reshape(num_ways * num_shots, dim)
    length = jnp.sqrt(jnp.mean(jnp.sum(examples**2, axis=1)))
    length = jnp.where(length == 0, 1, length)
    examples, query = examples / length, query / length
    # Of the mean over examples.
    strength = relative_strength(strength / len(examples), size * length)
    strength = jnp.minimum(strength, _STRONGEST)
    if len(examples) < dim:
        # A lies in the span of the support, and has the norm of its coordinates there.
        basis, coordinates = jnp.linalg.qr(examples.T)
        examples, query = coordinates.T, jnp.matmul(query, basis, precision="highest")
    own = jnp.repeat(jnp.eye(num_ways, dtype=bool), num_shots, axis=0)
    head, converged = _minimum(examples, own, strength)
    return _logits(query, head), converged


def _minimum(examples, own, strength):
    """The head at the minimum, and whether it was found.

    Where a weak penalty lets the support be fitted well, all that is left are small probabilities
    of other ways. What is computed from the own way's p is computed from theirs instead: 1 - p
    would be rounding.
    """

    def gradient_at(head):
        others = _probabilities_of_others(_logits(examples, head), own)
        residuals = jnp.where(own, -jnp.sum(others, axis=1, keepdims=True), others)
        gradient = _pulled_back(examples, residuals, strength * head.kernel)
        # A logit of size l is known to eps l, and exp(l) to that share of itself.
        rounding = _ROUNDING * (1 + jnp.linalg.norm(head.kernel))
        return gradient, rounding * jnp.mean(jnp.sum(others, axis=1))

    def hessian_product_at(head):
        logits = _logits(examples, head)
        others = _probabilities_of_others(logits, own)
        probabilities = jax.nn.softmax(logits, axis=1)

        def product(direction):
            change = _logits(examples, direction)
            change = change - jnp.sum(jnp.where(own, change, 0), axis=1, keepdims=True)
            mean_change = jnp.sum(others * change, axis=1, keepdims=True)
            curved = probabilities * (change - mean_change)
            return _pulled_back(examples, curved, strength * direction.kernel)

        return product

    def is_minimum(head, gradient, rounding):
        allowed = _TOLERANCE * jnp.linalg.norm(head.kernel)
        # The intercept has no penalty; its curvature is at most of order 1.
        return (jnp.linalg.norm(gradient.kernel) <= jnp.maximum(allowed * strength, rounding)) & (
            jnp.linalg.norm(gradient.bias)
            <= jnp.maximum(allowed * jnp.minimum(strength, 1), rounding)
        )

    def unfinished(carry):
        steps, *where = carry
        return (steps < _MAX_NEWTON_STEPS) & ~is_minimum(*where)

    def newton_step(carry):
        steps, head, gradient, _ = carry
        downhill = jax.tree.map(jnp.negative, gradient)
        direction, _ = cg(
            hessian_product_at(head), downhill, tol=_CG_TOLERANCE, maxiter=_MAX_CG_STEPS
        )

        def go(length):
            there = jax.tree.map(lambda start, change: start + length * change, head, direction)
            gradient, rounding = gradient_at(there)
            return (there, gradient, rounding), _inner(gradient, direction)

        # All lengths at once cost less than a loop. Slopes, since losses would be equal to
        # rounding long before the minimum.
        lengths = 0.5 ** jnp.arange(_NUM_STEP_LENGTHS, dtype=examples.dtype)
        places, slopes = jax.vmap(go)(lengths)
        chosen = jnp.argmax(slopes <= -0.1 * _inner(gradient, direction))
        return steps + 1, *jax.tree.map(lambda array: array[chosen], places)

    dtype = examples.dtype
    start = _Head(
        jnp.zeros((examples.shape[1], own.shape[1]), dtype), jnp.zeros(own.shape[1], dtype)
    )
    _, *where = jax.lax.while_loop(unfinished, newton_step, (0, start, *gradient_at(start)))
    return where[0], is_minimum(*where)


def _logits(examples, head):
    return jnp.matmul(examples, head.kernel, precision="highest") + head.bias[None]


def _probabilities_of_others(logits, own):
    return jnp.where(own, 0, jax.nn.softmax(logits, axis=1))


def _pulled_back(examples, residuals, penalty):
    """The gradient with respect to the head of what has `residuals` as its gradient in logits."""
    kernel = jnp.matmul(examples.T, residuals, precision="highest") / len(examples)
    return _Head(kernel + penalty, jnp.mean(residuals, axis=0))


def _inner(a, b):
    return jnp.sum(a.kernel * b.kernel) + jnp.sum(a.bias * b.bias)
