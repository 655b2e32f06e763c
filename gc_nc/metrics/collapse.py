"""Neural collapse from class statistics: CDNV, NC and geometric collapse.

k is the number of classes that have an example; classes without one are left out.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from gc_nc.array_types import Array, as_scalar, is_known, with_nan
from gc_nc.metrics.class_statistics import ClassStatistics, as_statistics

# Terms of sums of squares below this may have been lost to underflow.
_SMALLEST_SQUARE = float(jnp.finfo(jnp.float32).tiny / jnp.finfo(jnp.float32).eps)


def cdnv_matrix(stats: ClassStatistics) -> Float[Array, "C C"]:
    """Class-distance normalised variance V_ij = (v_i + v_j) / (2 |mu_i - mu_j|^2).

    Dimensionless. Source: Galanti, Gyorgy, Hutter (arXiv 2112.15121), definition 1, with population
    variances summed over dimensions.

    Returns:
      (C, C) symmetric. NaN on the diagonal, which is not defined, for classes without an example,
      and where float32 cannot represent the squared distance (distances above 1e19, or below 3e-16
      and not 0). Equal means give inf, or NaN (0/0) if both variances are 0 too.
    """
    stats = as_statistics(stats)
    return with_nan(~_ordered_pairs(stats), _cdnv_of_pairs(stats))


def _cdnv_of_pairs(stats: ClassStatistics) -> Float[Array, "C C"]:
    """Returns V_ij for ordered pairs, and 0 elsewhere."""
    variances = stats.known_variances
    numerator = variances[:, None] + variances[None, :]
    numerator = jnp.where(_ordered_pairs(stats), numerator, 0)
    return numerator / 2 / squared_distances(stats)


def neural_collapse(stats: ClassStatistics) -> Float[Array, ""]:
    """NC = 1 / (k (k - 1)) sum over ordered pairs i != j of V_ij (see `cdnv_matrix`).

    0 is complete collapse. Two classes with equal means give inf (NaN if neither of them varies).

    This is NC of the given examples. As an estimate for the distribution that they were drawn from,
    n per class, it is too low by a factor of about (1 - 1/n) / (1 + 2 NC / n), and it is 0 with one
    example per class; `population_neural_collapse` corrects for that.

    Raises:
      ValueError: fewer than two classes have an example (outside jit; under jit NaN).
    """
    stats = as_statistics(stats)
    pairs = checked_pairs(stats)
    return unless_too_few(jnp.sum(_cdnv_of_pairs(stats)) / number_of(pairs), stats)


def geometric_collapse(gc: Float[Array, ""] | float, stats: ClassStatistics) -> Float[Array, ""]:
    """GC / (k - 1) sum over ordered pairs i != j of 1 / |mu_i - mu_j|^2.

    The right side of Proposition 4.1 of arXiv 2405.15706 with the Poincare constant set to 1: for
    balanced classes NC <= c * geometric collapse. In 1 / (input units)^2.

    Args:
      gc: geometric complexity of the embedding whose class statistics are `stats`; a scalar.
      stats: class statistics of the embeddings.

    Returns:
      Scalar; inf where two class means are equal (NaN if gc is 0 as well).

    Raises:
      ValueError: `gc` is not a scalar or (outside jit; under jit NaN) is negative; fewer than two
        classes have an example (outside jit; under jit NaN).
    """
    gc, stats = as_scalar(gc, "gc"), as_statistics(stats)
    pairs = checked_pairs(stats)
    inverse = jnp.where(pairs, 1 / squared_distances(stats), 0)
    others = jnp.maximum(stats.num_present - 1, 1).astype(jnp.float32)
    return unless_too_few(gc * jnp.sum(inverse) / others, stats)


def unless_too_few(value: Array, stats: ClassStatistics) -> Float[Array, ""]:
    """Returns NaN if fewer than two classes are present; outside jit that was an error before."""
    return with_nan(stats.num_present < 2, value)


def number_of(pairs: Bool[Array, "C C"]) -> Float[Array, ""]:
    """Returns the number of pairs, or 1 if there are none."""
    return jnp.maximum(jnp.sum(pairs, dtype=jnp.float32), 1)


def _ordered_pairs(stats: ClassStatistics) -> Bool[Array, "C C"]:
    present = stats.present
    return present[:, None] & present[None, :] & ~jnp.eye(present.size, dtype=bool)


def checked_pairs(stats: ClassStatistics) -> Bool[Array, "C C"]:
    """Returns which (i, j) are pairs of present classes; raises if there are fewer than two."""
    num_present = stats.num_present
    if is_known(num_present) and num_present < 2:
        raise ValueError(
            f"{int(num_present)} of {stats.counts.size} classes have an example;"
            " collapse compares at least 2"
        )
    return _ordered_pairs(stats)


def squared_distances(stats: ClassStatistics) -> Float[Array, "C C"]:
    """|mu_i - mu_j|^2 for ordered pairs, 1 elsewhere so that dividing by it is harmless.

    Differences are computed one class at a time: |a|^2 + |b|^2 - 2ab would lose the digits of close
    means, and all differences at once would take C x C x K memory.
    """
    squares, unknown = _distances_of_means(stats.mean_offsets, stats.mean_offset_residuals)
    return jnp.where(_ordered_pairs(stats), with_nan(unknown, squares), 1)


# Jitted, since outside jit the loop would be compiled anew at each call.
@jax.jit
def _distances_of_means(offsets, residuals):
    """Squared distances (C, C), and which of them float32 cannot hold."""

    # Recomputed for the gradient, which otherwise would keep all C x C x K differences.
    @jax.checkpoint
    def squared_distances_from(mean):
        differences = (offsets - mean[0][None]) + (residuals - mean[1][None])
        squares = jnp.sum(differences**2, axis=1)
        # A distance whose square is out of range is unknown: inf would look like complete collapse,
        # and the square of a tiny distance is mostly rounding error.
        differs = jnp.max(jnp.abs(differences), axis=1) > 0
        unknown = jnp.isinf(squares) | (differs & (squares < _SMALLEST_SQUARE))
        return squares, unknown

    return jax.lax.map(squared_distances_from, (offsets, residuals))
