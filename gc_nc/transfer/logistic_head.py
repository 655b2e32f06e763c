"""Multinomial logistic regression on the support, as a head."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
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
    """A as coordinates (see `_Coordinates`), and b; gradients and directions of it too."""

    kernel: Float[Array, "coordinates W"]
    bias: Float[Array, "W"]


class _Coordinates(NamedTuple):
    """In which coordinates A (K, W) is held, X (n, K) being the centred support.

    With fewer examples than dimensions it is alpha with A = X^T alpha: where A starts at 0 it never
    leaves the support's span, and neither do gradients. Products then take the Gram matrix X X^T
    alone, and no basis of the span, whose LAPACK calls wait for threads of their own. With more
    examples alpha is not unique, and it is A itself.

    Attributes:
      rows: X X^T or X; times coordinates it gives A^T x of the support.
      of_queries: the same for the queries.
      gradient: X^T r in coordinates, from r (n, W).
      dual: inner products of A are sums of coordinates times these, from coordinates.
    """

    rows: Float[Array, "n coordinates"]
    of_queries: Float[Array, "N coordinates"]
    gradient: Callable[[jax.Array], jax.Array]
    dual: Callable[[jax.Array], jax.Array]


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

    The solver is Newton's method by conjugate gradients, from A = 0, with a step length that is
    halved until the slope along the step has all but vanished or is still downward. 10 steps give
    what L-BFGS needs 100 or more for, and many episodes run at once on the device. It has converged
    when |gradient| <= 1e-4 lambda |A|, or is 0 to float32's rounding.

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
    coordinates = _coordinates(examples, query)
    own = jnp.repeat(jnp.eye(num_ways, dtype=bool), num_shots, axis=0)
    head, converged = _minimum(coordinates, own, strength)
    return _logits(coordinates.of_queries, head), converged


def _coordinates(examples, query):
    if len(examples) <= examples.shape[1]:
        gram = _products(examples, examples.T)
        of_queries = _products(query, examples.T)
        return _Coordinates(gram, of_queries, lambda r: r, lambda alpha: _products(gram, alpha))
    return _Coordinates(examples, query, lambda r: _products(examples.T, r), lambda kernel: kernel)


def _minimum(coordinates, own, strength):
    """The head at the minimum, and whether it was found.

    Where a weak penalty lets the support be fitted well, all that is left are small probabilities
    of other ways. What is computed from the own way's p is computed from theirs instead: 1 - p
    would be rounding.
    """
    rows = coordinates.rows

    def inner(a, b):
        return jnp.sum(a.kernel * coordinates.dual(b.kernel)) + jnp.sum(a.bias * b.bias)

    def kernel_norm(head):
        # Rounding may leave a small negative number.
        square = jnp.sum(head.kernel * coordinates.dual(head.kernel))
        return jnp.sqrt(jnp.maximum(square, 0))

    def pulled_back(residuals, penalised):
        """The gradient in the head of what has the gradient `residuals` / n in logits."""
        kernel = coordinates.gradient(residuals) / len(rows) + strength * penalised
        return _Head(kernel, jnp.mean(residuals, axis=0))

    def gradient_at(head):
        others = _probabilities_of_others(_logits(rows, head), own)
        residuals = jnp.where(own, -jnp.sum(others, axis=1, keepdims=True), others)
        # A logit of size l is known to eps l, and exp(l) to that share of itself.
        rounding = _ROUNDING * (1 + kernel_norm(head)) * jnp.mean(jnp.sum(others, axis=1))
        return pulled_back(residuals, head.kernel), rounding

    def hessian_product_at(head):
        logits = _logits(rows, head)
        others = _probabilities_of_others(logits, own)
        probabilities = jax.nn.softmax(logits, axis=1)

        def product(direction):
            change = _logits(rows, direction)
            change = change - jnp.sum(jnp.where(own, change, 0), axis=1, keepdims=True)
            mean_change = jnp.sum(others * change, axis=1, keepdims=True)
            return pulled_back(probabilities * (change - mean_change), direction.kernel)

        return product

    def is_minimum(head, gradient, rounding):
        allowed = _TOLERANCE * kernel_norm(head)
        # The intercept has no penalty; its curvature is at most of order 1.
        bias_allowed = allowed * jnp.minimum(strength, 1)
        return (kernel_norm(gradient) <= jnp.maximum(allowed * strength, rounding)) & (
            jnp.linalg.norm(gradient.bias) <= jnp.maximum(bias_allowed, rounding)
        )

    def unfinished(carry):
        steps, *where = carry
        return (steps < _MAX_NEWTON_STEPS) & ~is_minimum(*where)

    def newton_step(carry):
        steps, head, gradient, _ = carry
        direction = _conjugate_gradients(
            hessian_product_at(head), jax.tree.map(jnp.negative, gradient), inner
        )

        def go(length):
            there = _plus(head, length, direction)
            gradient, rounding = gradient_at(there)
            return (there, gradient, rounding), inner(gradient, direction)

        # All lengths at once cost less than a loop. Slopes, since losses would be equal to
        # rounding long before the minimum.
        lengths = 0.5 ** jnp.arange(_NUM_STEP_LENGTHS, dtype=rows.dtype)
        places, slopes = jax.vmap(go)(lengths)
        chosen = jnp.argmax(slopes <= -0.1 * inner(gradient, direction))
        return steps + 1, *jax.tree.map(lambda array: array[chosen], places)

    num_ways = own.shape[1]
    start = _Head(jnp.zeros((rows.shape[1], num_ways), rows.dtype), jnp.zeros(num_ways, rows.dtype))
    _, *where = jax.lax.while_loop(unfinished, newton_step, (0, start, *gradient_at(start)))
    return where[0], is_minimum(*where)


def _conjugate_gradients(product, right, inner):
    """About the solution of product(x) = right, from x = 0, in the geometry of `inner`."""
    target = _CG_TOLERANCE**2 * inner(right, right)

    def unfinished(carry):
        steps, _, _, _, size = carry
        return (steps < _MAX_CG_STEPS) & (size > target)

    def step(carry):
        steps, solution, residual, direction, size = carry
        image = product(direction)
        length = size / inner(direction, image)
        solution, residual = _plus(solution, length, direction), _plus(residual, -length, image)
        new_size = inner(residual, residual)
        return steps + 1, solution, residual, _plus(residual, new_size / size, direction), new_size

    start = 0, jax.tree.map(jnp.zeros_like, right), right, right, inner(right, right)
    return jax.lax.while_loop(unfinished, step, start)[1]


def _plus(a, factor, b):
    return jax.tree.map(lambda x, y: x + factor * y, a, b)


def _products(a, b):
    return jnp.matmul(a, b, precision="highest")


def _logits(rows, head):
    return _products(rows, head.kernel) + head.bias[None]


def _probabilities_of_others(logits, own):
    return jnp.where(own, 0, jax.nn.softmax(logits, axis=1))
