"""NC2 and NC3 where there may be more classes than dimensions: uniformity, and duality by class.

With more than K + 1 classes no simplex ETF fits into R^K. Class means then collapse to directions
that are spread as uniformly as possible (Jiang et al., arXiv 2310.05351). As in `nc2` and `nc3`,
m_i = mu_i - mean_j mu_j.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Shaped

from gc_nc.array_types import Array, with_nan
from gc_nc.metrics.class_statistics import ClassStatistics, as_statistics
from gc_nc.metrics.collapse import checked_pairs, number_of, unless_too_few
from gc_nc.metrics.collapse_geometry import centred_means, checked_head, safe_sqrt, warn_if


class GNC2(NamedTuple):
    """How uniformly the directions of k class means are spread over the sphere.

    Attributes:
      energy: mean over pairs of log(1 / distance of the directions). The smallest value for k
        directions is -1/2 log(2 k / (k - 1)), at a simplex ETF; where K < k - 1 it is larger.
      variance: population variance over pairs of the same logarithm; 0 at a simplex ETF.
    """

    energy: Float[Array, ""]
    variance: Float[Array, ""]


def gnc2(stats: ClassStatistics) -> GNC2:
    """GNC2, uniformity on the hypersphere: mean and variance of log 1/|u_i - u_j|, u_i = m_i/|m_i|.

    Taken over pairs i != j of the k classes present. The logarithmic energy is the limit of Riesz
    energies as their exponent goes to 0 (Liu et al., arXiv 2303.06484); arXiv 2405.17767 uses it
    for language models, and Jiang et al. (arXiv 2310.05351) study margins of the same arrangement.
    It does not depend on scale, rotation or shift.

    Returns:
      GNC2. energy is inf and variance NaN where two directions are equal; both are NaN where a mean
      lies at the centre and has no direction, or where the statistics are not finite.

    Raises:
      ValueError: fewer than two classes are present (outside jit; under jit NaN).
    """
    stats = as_statistics(stats)
    pairs = checked_pairs(stats)
    directions, undirected = _directions(stats)

    squares = _squared_distances(directions)
    energies = -0.5 * jnp.log(jnp.where(pairs, squares, 1))
    count = number_of(pairs)
    mean = jnp.sum(energies) / count
    deviations = jnp.where(pairs, energies - jnp.where(jnp.isfinite(mean), mean, jnp.nan), 0)
    values = GNC2(mean, jnp.sum(deviations**2) / count)
    return GNC2(*(unless_too_few(with_nan(undirected, value), stats) for value in values))


# Jitted, since outside jit the loop would be compiled anew at each call.
@jax.jit
def _squared_distances(directions):
    """(C, C), from differences, since 2 - 2 cos loses the digits of close directions."""

    def squared_distances_from(direction):
        return jnp.sum((directions - direction[None]) ** 2, axis=1)

    return jax.lax.map(jax.checkpoint(squared_distances_from), directions)


def gnc3(stats: ClassStatistics, head_kernel: Shaped[Array, "rows columns"]) -> Float[Array, ""]:
    """GNC3, duality by class: mean over classes of |m_i/|m_i| - w_i/|w_i||^2, between 0 and 4.

    w_i is the head's column of class i, which is not centred. GNC3 is 0 where every column points
    along the centred mean of its class, whatever their lengths; NC3 is 0 only if the lengths agree
    too. The two are equal where all |m_i| are equal and all |w_i| are equal. Source: the
    self-duality of Jiang et al. (arXiv 2310.05351), class by class.

    Args:
      stats: class statistics of the embeddings that enter the head.
      head_kernel: (K, C) kernel, as Flax stores it; torch stores (C, K), which must be transposed.

    Returns:
      Scalar. NaN if a class mean lies at the centre, a column of the head is 0, or one of them is
      not finite.

    Raises:
      ValueError: in the cases in which `nc3` raises it.
    """
    stats = as_statistics(stats)
    head = checked_head(head_kernel, stats)
    checked_pairs(stats)
    directions, undirected = _directions(stats)
    largest = jnp.max(jnp.abs(head), axis=1, keepdims=True)
    head = head / jnp.where(largest > 0, largest, 1)
    lengths = safe_sqrt(jnp.sum(head**2, axis=1, keepdims=True))
    undirected = undirected | jnp.any(stats.present & ~(lengths[:, 0] > 0))
    units = head / jnp.where(lengths > 0, lengths, 1)
    squares = jnp.where(stats.present, jnp.sum((directions - units) ** 2, axis=1), 0)
    mean = jnp.sum(squares) / jnp.maximum(stats.num_present, 1).astype(jnp.float32)
    return unless_too_few(with_nan(undirected, mean), stats)


def _directions(stats: ClassStatistics) -> tuple[Float[Array, "C K"], Bool[Array, ""]]:
    """Returns m_i / |m_i|, 0 for absent classes, and whether a present class has no direction."""
    means, _, rounding = centred_means(stats)
    lengths = safe_sqrt(jnp.sum(means**2, axis=1))
    undirected = jnp.any(stats.present & (lengths <= rounding))
    warn_if(undirected, "a class mean lies at the centre and has no direction: the value is NaN")
    return means / jnp.where(lengths > rounding, lengths, 1)[:, None], undirected
