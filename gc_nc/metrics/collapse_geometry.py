"""NC1 to NC3 of Papyan, Han, Donoho (arXiv 2008.08186) from class statistics.

With k classes present, m_i = mu_i - mean_j mu_j (the unweighted mean) and M = [m_1 .. m_k]:

  NC1  within-class scatter vanishes against that between classes   tr(S_W pinv(S_B)) / k
  NC2  the m_i become a simplex equiangular tight frame (ETF)       equal norms, cos = -1 / (k - 1)
  NC3  the head's columns become proportional to the m_i            |M / |M| - W / |W||^2

All are dimensionless and 0 at complete collapse (NC4 is in `nearest_means`). Means that
coincide are the opposite of collapse: they give inf, with a warning outside jit, since no warning
can be given while tracing. Lengths that are within the rounding error of the means count as 0.
"""

import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Shaped

from gc_nc.array_types import Array, as_floating, is_known, with_nan
from gc_nc.metrics.class_statistics import ClassStatistics, as_statistics
from gc_nc.metrics.collapse import unless_too_few

_EPS = float(jnp.finfo(jnp.float32).eps)
_TINY = float(jnp.finfo(jnp.float32).tiny)


class NC2(NamedTuple):
    """How far k centred class means m_i are from a simplex ETF, for which every field is 0.

    Attributes:
      equinorm: std_i |m_i| / mean_i |m_i|, with the population std.
      equiangle: population std of cos(m_i, m_j) over pairs i != j (equiangularity).
      maximal_angle: mean over pairs i != j of |cos(m_i, m_j) + 1 / (k - 1)| (maximal-angle
        equiangularity).
      etf_error: |G / |G|_F - (I - 11^T / k) / sqrt(k - 1)|_F, G = M^T M the Gram matrix.
    """

    equinorm: Float[Array, ""]
    equiangle: Float[Array, ""]
    maximal_angle: Float[Array, ""]
    etf_error: Float[Array, ""]


def nc1(stats: ClassStatistics) -> Float[Array, ""]:
    """NC1 = tr(S_W pinv(S_B)) / k, S_W = scatter / N, S_B = 1/k sum_i m_i m_i^T.

    Because of the pseudo-inverse, directions that the class means do not span (such as dead units)
    are ignored. It is computed from the singular values of the (C, K) means, which are as accurate
    as float32 allows. Those up to 8 eps sqrt(sum_i |m_i|^2 + v_i), twice the rounding of all means
    together, count as 0, so the rank is at most k - 1. Memory is O(C K + K^2).

    Args:
      stats: class statistics of the embeddings, gathered with `scatter=True`.

    Returns:
      Scalar. inf where two present means coincide, exactly or up to the rounding above: the
      pseudo-inverse would drop their difference, and the value would look like collapse. NaN if
      nothing varies either (0 / 0), if the statistics are not finite, and if float32 cannot resolve
      the scatter along the means, for example because embeddings have scale 1e-18 or because the
      spread across the means is about 9,000 times the spread along one of them. Differentiable
      where the rank is constant.

    Raises:
      ValueError: `stats` has no scatter; fewer than two classes are present (outside jit; under jit
        NaN).
    """
    stats = as_statistics(stats)
    if stats.scatter is None:
        raise ValueError("nc1 needs the scatter; gather the statistics with scatter=True")
    check_enough_classes(stats)
    means, scale, rounding = centred_means(stats)
    inverse = _pseudo_inverse(means, 2 * jnp.sqrt(_at_least_two(stats)) * rounding)
    # This is pinv of the unscaled means; its square may be out of range, as may that of the scale.
    unscaled = inverse / scale
    within = stats.scatter / _at_least_one(jnp.sum(stats.counts))
    value = jnp.sum(unscaled * jnp.matmul(within, unscaled, precision="highest"))

    coincide = _some_means_coincide(stats.present, means, inverse, rounding)
    variance = jnp.trace(within)
    varies = safe_sqrt(variance) > rounding * scale
    degenerate = with_nan(~(varies & jnp.isfinite(variance)), jnp.full_like(value, jnp.inf))
    # The most that can be lost because products below the smallest normal number are flushed to 0.
    lost = _TINY * means.shape[1] * jnp.sum(unscaled**2)
    # What rounding can add if most of the scatter lies outside of the span of the means.
    unresolved = _EPS / 10 * variance * jnp.sum(unscaled**2)
    known = jnp.isfinite(value) & (value >= unresolved) & (lost <= 1e-6 * value + _EPS**2)
    value = jnp.where(coincide, degenerate, with_nan(~known, value))
    warn_if(jnp.isinf(value), "two class means coincide: nc1 is inf, not collapse")
    return unless_too_few(value, stats)


def scatter_ratio(stats: ClassStatistics) -> Float[Array, ""]:
    """tr(S_W) / tr(S_B), S_W and S_B as in `nc1`: sum_i S_i / N over sum_i |m_i|^2 / k.

    This is the simplest relative of NC1: it needs neither the scatter nor any (K, K) matrix and,
    unlike NC1, includes variance in directions that the class means do not span. Dimensionless.
    Source: the trace criterion of discriminant analysis (Fukunaga 1990, section 10.2).

    Returns:
      Scalar; inf where all means coincide (NaN if nothing varies either).

    Raises:
      ValueError: fewer than two classes are present (outside jit; under jit NaN).
    """
    stats = as_statistics(stats)
    check_enough_classes(stats)
    means, scale, rounding = centred_means(stats)
    between = jnp.sum(means**2) / _at_least_two(stats)
    # Computed in units of the means, because their squares may be out of range.
    shares = stats.counts / _at_least_one(jnp.sum(stats.counts))
    within = jnp.sum(shares * (jnp.sqrt(stats.known_variances) / scale) ** 2)
    coincide = jnp.max(jnp.sum(means**2, axis=1)) <= rounding**2
    degenerate = with_nan(within == 0, jnp.full_like(within, jnp.inf))
    value = jnp.where(coincide, degenerate, within / jnp.where(between > 0, between, 1))
    warn_if(jnp.isinf(value), "all class means coincide: scatter_ratio is inf, not collapse")
    return unless_too_few(value, stats)


def nc2(stats: ClassStatistics) -> NC2:
    """NC2: equinorm, equiangle, maximal_angle and etf_error of the centred class means; see `NC2`.

    Papyan et al. plot the first three; the ETF error compares the whole Gram matrix. None of them
    depends on scale, rotation or shift. Two classes are always a simplex ETF.

    Returns:
      NC2. All fields are inf where all means coincide. Only the two angle fields are inf where one
      mean lies at the centre, because it has no direction. NaN where the statistics are not finite.

    Raises:
      ValueError: fewer than two classes are present (outside jit; under jit NaN).
    """
    stats = as_statistics(stats)
    check_enough_classes(stats)
    present, k = stats.present, _at_least_two(stats)
    pairs = present[:, None] & present[None, :] & ~jnp.eye(present.size, dtype=bool)
    means, _, rounding = centred_means(stats)
    lengths = safe_sqrt(jnp.sum(means**2, axis=1))
    coincide = jnp.max(lengths) <= rounding
    undirected = jnp.any(present & (lengths <= rounding))

    mean_length = jnp.sum(lengths) / k
    equinorm = safe_sqrt(jnp.sum(jnp.where(present, lengths - mean_length, 0) ** 2) / k)
    directions = means / jnp.where(lengths > rounding, lengths, 1)[:, None]
    cosines = jnp.matmul(directions, directions.T, precision="highest")
    num_pairs = k * (k - 1)
    mean_cosine = jnp.sum(jnp.where(pairs, cosines, 0)) / num_pairs
    spread = jnp.sum(jnp.where(pairs, cosines - mean_cosine, 0) ** 2) / num_pairs
    from_simplex = jnp.where(pairs, jnp.abs(cosines + 1 / (k - 1)), 0)
    gram = jnp.matmul(means, means.T, precision="highest")
    gram_norm = safe_sqrt(jnp.sum(gram**2))
    ones = present.astype(jnp.float32)
    simplex = (jnp.diag(ones) - jnp.outer(ones, ones) / k) / jnp.sqrt(k - 1)
    error = gram / jnp.where(gram_norm > 0, gram_norm, 1) - simplex

    fields = NC2(
        equinorm=equinorm / jnp.where(mean_length > 0, mean_length, 1),
        equiangle=safe_sqrt(spread),
        maximal_angle=jnp.sum(from_simplex) / num_pairs,
        etf_error=safe_sqrt(jnp.sum(error**2)),
    )
    infinite = NC2(coincide, coincide | undirected, coincide | undirected, coincide)
    warn_if(coincide, "all class means coincide: nc2 is inf, not collapse")
    warn_if(
        undirected & ~coincide,
        "a class mean lies at the centre and has no direction: the angles of nc2 are inf",
    )
    return NC2(
        *(
            unless_too_few(jnp.where(infinitely, jnp.inf, value), stats)
            for value, infinitely in zip(fields, infinite, strict=True)
        )
    )


def nc3(stats: ClassStatistics, head_kernel: Shaped[Array, "rows columns"]) -> Float[Array, ""]:
    """NC3, self-duality error: |M / |M|_F - W / |W|_F|_F^2, between 0 and 4.

    M (K, k) are the centred means, and W (K, k) are the head's columns of the classes present,
    which are not centred. It is 0 where W is a positive multiple of M.

    Args:
      stats: class statistics of the embeddings that enter the head.
      head_kernel: (K, C) kernel, as Flax stores it; torch stores (C, K), which must be transposed.

    Returns:
      Scalar. inf where all means coincide; NaN where the head is 0 or not finite.

    Raises:
      ValueError: `head_kernel` does not have shape (K, C); fewer than two classes are present
        (outside jit; under jit NaN).
    """
    stats = as_statistics(stats)
    head = checked_head(head_kernel, stats)
    check_enough_classes(stats)
    means, _, rounding = centred_means(stats)
    coincide = jnp.max(safe_sqrt(jnp.sum(means**2, axis=1))) <= rounding
    largest = jnp.max(jnp.abs(head))
    head = head / jnp.where(largest > 0, largest, 1)
    means = means / jnp.where(coincide, 1, safe_sqrt(jnp.sum(means**2)))
    head = head / jnp.where(largest > 0, safe_sqrt(jnp.sum(head**2)), 1)
    value = jnp.where(coincide, jnp.inf, jnp.sum((means - head) ** 2))
    value = with_nan(~((largest > 0) & jnp.isfinite(largest)), value)
    warn_if(jnp.isinf(value), "all class means coincide: nc3 is inf, not collapse")
    return unless_too_few(value, stats)


def checked_head(head_kernel: Array, stats: ClassStatistics) -> Float[Array, "C K"]:
    """Returns the head's columns as rows, 0 for absent classes; raises unless it is (K, C)."""
    num_classes, embedding_dim = stats.mean_offsets.shape
    head_kernel = as_floating(head_kernel, "head_kernel")
    if head_kernel.shape != (embedding_dim, num_classes):
        transposed = head_kernel.shape == (num_classes, embedding_dim)
        raise ValueError(
            f"head_kernel of shape {head_kernel.shape}; (K, C) = ({embedding_dim}, {num_classes})"
            f" is needed{', so transpose it' if transposed else ''}"
        )
    return jnp.where(stats.present[:, None], head_kernel.T, 0)


def check_enough_classes(stats: ClassStatistics) -> None:
    """Raises ValueError if fewer than two classes are present, unless `stats` is traced."""
    num_present = stats.num_present
    if is_known(num_present) and num_present < 2:
        raise ValueError(
            f"{int(num_present)} of {stats.counts.size} classes have an example;"
            " neural collapse compares at least 2"
        )


def _at_least_two(stats: ClassStatistics) -> Float[Array, ""]:
    """Returns k, or 2 if fewer classes are present."""
    return jnp.maximum(stats.num_present, 2).astype(jnp.float32)


def _at_least_one(count: Float[Array, ""]) -> Float[Array, ""]:
    """Returns a count, or 1 if it is 0."""
    return jnp.where(count == 0, 1, count)


def warn_if(condition: Bool[Array, ""], message: str) -> None:
    """Warns if a condition is known to hold; the warning points to the caller's caller."""
    if is_known(condition) and bool(condition):
        warnings.warn(message, RuntimeWarning, stacklevel=3)


def safe_sqrt(x: Array) -> Array:
    """Returns the square root, with gradient 0 instead of NaN at 0."""
    return jnp.where(x == 0, 0, jnp.sqrt(jnp.where(x == 0, 1, x)))


def centred_means(
    stats: ClassStatistics,
) -> tuple[Float[Array, "C K"], Float[Array, ""], Float[Array, ""]]:
    """Returns (m_i / scale, scale, rounding of one m_i / scale); rows of absent classes are 0.

    The scale is near the largest |entry|, so that squares stay in range. Everything is NaN if a
    mean or a variance is not finite. The rounding is 4 eps sqrt(mean_i |m_i|^2 + v_i), because the
    error of a mean is about eps times its distance from the centre and the spread of its examples.
    """
    present = stats.present[:, None]
    k = jnp.maximum(stats.num_present, 1).astype(jnp.float32)
    offsets = jnp.where(present, stats.mean_offsets, 0)
    residuals = jnp.where(present, stats.mean_offset_residuals, 0)
    deviations = jax.lax.stop_gradient(jnp.sqrt(stats.known_variances))
    largest = jax.lax.stop_gradient(jnp.maximum(jnp.max(jnp.abs(offsets)), jnp.max(deviations)))
    largest = with_nan(~jnp.isfinite(largest), jnp.where(largest > 0, largest, 1))
    deviations = deviations / largest

    # First, all means are taken relative to one point near the centre; its distance from the centre
    # then follows from differences, which are small and so almost exact. The differences are
    # scaled, not the offsets, because quotients of large offsets would be rounded.
    near = largest * (jnp.sum(offsets / largest, axis=0, keepdims=True) / k)
    means = jnp.where(present, ((offsets - near) + residuals) / largest, 0)
    means = jnp.where(present, means - jnp.sum(means, axis=0, keepdims=True) / k, 0)

    rounding = 4 * _EPS * jnp.sqrt((jnp.sum(means**2) + jnp.sum(deviations**2)) / k)
    spread = jnp.maximum(jnp.max(jnp.abs(means)), rounding)
    rounding, spread = jax.lax.stop_gradient((rounding, jnp.where(spread == 0, 1, spread)))
    return means / spread, largest * spread, rounding / spread


@jax.custom_jvp
def _pseudo_inverse(means: Float[Array, "C K"], cutoff: Float[Array, ""]) -> Float[Array, "K C"]:
    """Returns the pseudo-inverse, with singular values up to `cutoff` taken as 0."""
    left, singular, right = jnp.linalg.svd(means, full_matrices=False)
    kept = singular > cutoff
    inverse = jnp.where(kept, 1 / jnp.where(kept, singular, 1), 0)
    # A comparison with NaN is False, so every direction would be dropped and the result be 0.
    inverse = with_nan(jnp.isnan(singular), inverse)
    return jnp.matmul(right.T * inverse[None], left.T, precision="highest")


@_pseudo_inverse.defjvp
def _pseudo_inverse_jvp(primals, tangents):
    """The derivative at constant rank (Golub and Pereyra 1973).

    It does not divide by gaps between singular values, so it is finite at an ETF, where they are 0.

    dX = -X dM X + X X^T dM^T (I - M X) + (I - X M) dM^T X^T X.
    """
    (m, cutoff), (dm, _) = primals, tangents
    x = _pseudo_inverse(m, cutoff)

    def mul(a, b):
        return jnp.matmul(a, b, precision="highest")

    first = mul(mul(x, x.T), dm.T)
    second = mul(dm.T, mul(x.T, x))
    return x, first - mul(mul(first, m), x) + second - mul(x, mul(m, second)) - mul(mul(x, dm), x)


# Jitted, since outside jit the search would be compiled anew at each call.
@jax.jit
def _some_means_coincide(
    present: Bool[Array, "C"],
    means: Float[Array, "C K"],
    inverse: Float[Array, "K C"],
    rounding: Float[Array, ""],
) -> Bool[Array, ""]:
    """Returns whether float32 cannot tell two present class means apart.

    Either they are closer than their own rounding error, or most of their difference lies in
    directions that the pseudo-inverse dropped. Different means on a line do not coincide.
    """
    means, inverse, rounding = jax.lax.stop_gradient((means, inverse, rounding))
    numbers = jnp.arange(present.size, dtype=jnp.int32)
    rank = jnp.sum(inverse.T * means)
    full_rank = rank > jnp.sum(present, dtype=jnp.float32) - 1.5

    def search():
        dropped = means - jnp.matmul(
            jnp.matmul(means, inverse, precision="highest"), means, precision="highest"
        )

        def coincides_with_a_later_one(i):
            distances = jnp.sum((means - means[i][None]) ** 2, axis=1)
            lost = jnp.sum((dropped - dropped[i][None]) ** 2, axis=1)
            close = (distances <= rounding**2) | (lost > distances / 2)
            return jnp.any(close & present & present[i] & (numbers > i))

        return jnp.any(jax.lax.map(coincides_with_a_later_one, numbers))

    # At full rank no two means coincide, so the search over pairs, O(C^2 K), can be skipped.
    return jax.lax.cond(full_rank, lambda: jnp.zeros_like(full_rank), search)
