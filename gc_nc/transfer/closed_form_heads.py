"""Heads with a closed form: nearest class mean, cosine and ridge regression.

A head is a function (support (W, S, K), query (N, K)) -> (N,) that returns way indices. All heads
are inductive: a query's prediction depends only on the support and on the query itself. They
compute in float32 with precision "highest", accept any real numbers, and work under jit and vmap.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, Shaped

from gc_nc.array_types import Array, as_floating, as_scalar, is_known, nan_where, with_nan
from gc_nc.metrics.argument_checks import as_number
from gc_nc.metrics.weighted_means import power_of_two_near


def nearest_mean_predictions(
    support_embeddings: Shaped[Array, "W S K"], query_embeddings: Shaped[Array, "N K"]
) -> Int[Array, "N"]:
    """argmin over ways w of |z - mu_w|, mu_w = 1/S sum of support; the lowest way at ties.

    Source: prototypical networks (Snell, Swersky, Zemel, arXiv 1703.05175) without training; this
    is the classifier of arXiv 2405.15706 and of Galanti, Gyorgy, Hutter (arXiv 2112.15121).

    It is computed as the argmax of (z - o).(mu_w - o) - |mu_w - o|^2 / 2, where the origin o is the
    support mean, so that close means are distinguished whatever their norm.

    Args:
      support_embeddings: (W, S, K), S examples of each way.
      query_embeddings: (N, K), any number of queries.

    Returns:
      (N,) int32 in 0..W-1; -1, which is never right, for a query that is not finite, and for all
      queries if a mean is not.

    Raises:
      ValueError: shapes that do not fit, fewer than 2 ways, no shots; complex numbers.
    """
    support, query = checked_shapes(support_embeddings, query_embeddings)
    support, query, _ = centred_and_size(support, query)
    means = jnp.mean(support, axis=1)
    scores = _products(query, means) - jnp.sum(means**2, axis=1)[None] / 2
    return best_way(scores)


def cosine_predictions(
    support_embeddings: Shaped[Array, "W S K"], query_embeddings: Shaped[Array, "N K"]
) -> Int[Array, "N"]:
    """argmax over ways w of cos(z, mu_w) = z.mu_w / (|z| |mu_w|); the lowest way at ties.

    mu_w = 1/S sum of support is the mean of the embeddings as they come. For the mean of their
    directions, apply `transform_features(..., l2=True)` first. The cosine with a zero vector is 0.
    Source: Chen, Liu, Xu, Darrell, Wang, Meta-Baseline (arXiv 2003.04390), equation 2.

    Args:
      support_embeddings: (W, S, K).
      query_embeddings: (N, K).

    Returns:
      (N,) int32 in 0..W-1; -1 for a query that is not finite, and for all queries if a mean is not.

    Raises:
      ValueError: as `nearest_mean_predictions`.
    """
    support, query = checked_shapes(support_embeddings, query_embeddings)
    size = power_of_two_near(jnp.max(jnp.abs(support)))
    directions = unit_vectors(jnp.mean(support / size, axis=1))
    # |z| is the same for all ways. So is the product with the mean direction, which is subtracted
    # because it would round away the difference between close directions.
    query_size = power_of_two_near(jnp.max(jnp.abs(query), axis=1, keepdims=True))
    shared = jnp.mean(directions, axis=0, keepdims=True)
    return best_way(_products(query / query_size, directions - shared))


def ridge_predictions(
    support_embeddings: Shaped[Array, "W S K"],
    query_embeddings: Shaped[Array, "N K"],
    *,
    regularization: float | Array = 1.0,
) -> Int[Array, "N"]:
    """argmax over ways of ridge regression on one-hot targets; the lowest way at ties.

      (A, b) = argmin sum over support n of |A^T z_n + b - y_n|^2 + lambda |A|_F^2
      A = X^T (X X^T + lambda I)^-1 Y = (X^T X + lambda I)^-1 X^T Y,    b = 1/W - A^T o

    with the support's mean o, centred support X (W S, K) and centred targets Y; the intercept b is
    not penalised. The smaller of the two systems is solved. Source: Bertinetto, Henriques, Torr,
    Vedaldi, R2-D2 (arXiv 1805.08136), equation 6, which has no intercept and learns a scale.

    Args:
      support_embeddings: (W, S, K).
      query_embeddings: (N, K).
      regularization: lambda above 0, in units of |z|^2, like scikit-learn's `Ridge(alpha=lambda)`.

    Returns:
      (N,) int32 in 0..W-1; -1 for a query that is not finite, and for all queries if the support is
      not, or if lambda is so small that float32 cannot solve the system.

    Raises:
      ValueError: as `nearest_mean_predictions`; lambda not above 0 or not finite (under jit -1).
    """
    strength = as_regularization(regularization)
    support, query = checked_shapes(support_embeddings, query_embeddings)
    num_ways, num_shots, dim = support.shape
    support, query, size = centred_and_size(support, query)
    examples = support.reshape(num_ways * num_shots, dim)
    strength = relative_strength(strength, size)
    targets = jnp.repeat(jnp.eye(num_ways, dtype=jnp.float32), num_shots, axis=0) - 1 / num_ways
    if len(examples) <= dim:
        # Constant vectors are in the null space of both X^T and Y^T, so any multiple of their
        # projection may be added. One of the size of X X^T keeps the system solvable.
        gram = _products(examples, examples)
        gram = gram + jnp.trace(gram) / len(examples) ** 2
        weights = _solve(gram, strength, targets)
        scores = _products(_products(query, examples), weights.T)
    else:
        gram = _products(examples.T, examples.T)
        weights = _solve(gram, strength, _products(examples.T, targets.T))
        scores = _products(query, weights.T)
    return best_way(scores)


def as_regularization(value: float | Array) -> jax.Array:
    """Returns a finite number above 0; under jit, any other number becomes NaN."""
    needed = "must be above 0 and finite"
    # Heads are called under jit, but their options are usually concrete even then.
    if is_known(value) and np.ndim(value) == 0:
        as_number(value, "regularization", lambda known: 0 < known < jnp.inf, needed)
    value = as_scalar(value, "regularization")
    return nan_where(~((value > 0) & (value < jnp.inf)), value, "regularization", needed)


def relative_strength(strength: jax.Array, size: jax.Array) -> jax.Array:
    """lambda for embeddings divided by `size`.

    It is at most 1e12, because the square of a small size is out of range. To rounding, 1e12
    already gives the limit of an infinite lambda.
    """
    return jnp.minimum(strength / size / size, 1e12)


def best_way(scores: Shaped[Array, "N W"]) -> Int[Array, "N"]:
    """argmax over ways, the lowest at ties; -1 if a score is not finite."""
    known = jnp.all(jnp.isfinite(scores), axis=1)
    return jnp.where(known, jnp.argmax(scores, axis=1).astype(jnp.int32), -1)


def unit_vectors(vectors: Shaped[Array, "N K"]) -> Shaped[Array, "N K"]:
    """Rows divided by their Euclidean norm; rows of 0 stay 0, rows that are not finite become NaN.

    The squares stay in range whatever the norm.
    """
    largest = jnp.max(jnp.abs(vectors), axis=1, keepdims=True)
    vectors = vectors / power_of_two_near(largest)
    norms = jnp.sqrt(jnp.sum(vectors**2, axis=1, keepdims=True))
    units = vectors / jnp.where(norms > 0, norms, 1)
    return with_nan(~jnp.isfinite(largest), units)


def checked_shapes(support: Array, query: Array) -> tuple[jax.Array, jax.Array]:
    """Casts both to float32 and refuses shapes that do not fit."""
    support = as_floating(support, "support_embeddings")
    query = as_floating(query, "query_embeddings")
    if support.ndim != 3 or support.shape[0] < 2 or support.shape[1] < 1 or support.shape[2] < 1:
        raise ValueError(
            f"support_embeddings of shape {support.shape}; (W, S, K) with 2 or more ways is needed"
        )
    if query.ndim != 2 or query.shape[1] != support.shape[2]:
        raise ValueError(
            f"query_embeddings of shape {query.shape}; (N, {support.shape[2]}) is needed"
        )
    return support, query


def centred_and_size(support: jax.Array, query: jax.Array) -> tuple[jax.Array, ...]:
    """Subtracts the support's mean from both and divides them by a power of two, also returned.

    The support is then of order 1, and its squares are in range.
    """
    origin = jnp.mean(support, axis=(0, 1))
    support = support - origin[None, None]
    size = power_of_two_near(jnp.max(jnp.abs(support)))
    # For a power of two this is as exact as a division, and takes one pass over the queries.
    inverse = 1 / size
    return support * inverse, (query - origin[None]) * inverse, size


def _products(a, b):
    """a b^T."""
    return jnp.matmul(a, b.T, precision="highest")


def _solve(gram, strength, right):
    system = gram + strength * jnp.eye(len(gram), dtype=gram.dtype)
    factor = jax.scipy.linalg.cho_factor(system)
    with jax.default_matmul_precision("highest"):
        return jax.scipy.linalg.cho_solve(factor, right)
