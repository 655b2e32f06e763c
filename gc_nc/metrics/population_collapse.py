"""Neural collapse of the distribution that examples were drawn from, not of the sample.

A sample's variances are taken about its own means, and the sampling error of the means moves them
apart. With n examples per class, variances are (1 - 1/n) times those of the distribution, and
squared distances d^2 become d^2 (1 + 2 V / n). So NC of the sample is about
(1 - 1/n) / (1 + 2 NC / n) times NC of the distribution, and 0 for n = 1.
"""

import jax.numpy as jnp
from jaxtyping import Float

from gc_nc.array_types import Array, with_nan
from gc_nc.metrics.class_statistics import ClassStatistics, as_statistics
from gc_nc.metrics.collapse import checked_pairs, number_of, squared_distances, unless_too_few


def population_cdnv_matrix(stats: ClassStatistics) -> Float[Array, "C C"]:
    """CDNV from unbiased variances and squared distances, V_ij = (u_i + u_j) / (2 D_ij).

    The expectations of u_i = S_i / (n_i - 1) and D_ij = |mu_i - mu_j|^2 - u_i / n_i - u_j / n_j are
    v_i and d_ij^2 of the distribution, whatever it is, if examples are independent. Their quotient
    is still too large, by about 4/n times the directional CDNV of (i, j) and (j, i). Dimensionless.
    Counts n_i are summed weights, so weights must be numbers of examples here.

    Returns:
      (C, C) symmetric. NaN on the diagonal and for classes with one example or none. inf where D_ij
      is 0 or less, that is, where the means are not further apart than their sampling error.
    """
    stats = as_statistics(stats)
    pairs = checked_pairs(stats)
    known = stats.counts > 1
    variances = jnp.where(
        known, stats.squared_deviations / jnp.where(known, stats.counts - 1, 1), 0
    )
    scatter = variances / jnp.where(known, stats.counts, 1)
    apart = squared_distances(stats) - (scatter[:, None] + scatter[None, :])
    # Written this way because `apart > 0` would treat an unknown distance (NaN) like 0.
    resolved = ~(apart <= 0)
    ratios = (variances[:, None] + variances[None, :]) / 2 / jnp.where(resolved, apart, 1)
    values = jnp.where(resolved, ratios, jnp.inf)
    return with_nan(~(pairs & known[:, None] & known[None, :]), values)


def population_neural_collapse(stats: ClassStatistics) -> Float[Array, ""]:
    """Mean over ordered pairs i != j of `population_cdnv_matrix`: NC of the distribution.

    The bounds of few-shot error are about this NC. `neural_collapse` is NC of the sample, which is
    smaller.

    Returns:
      Scalar. NaN if a class present has only one example, inf if two means are not further apart
      than their sampling error.

    Raises:
      ValueError: fewer than two classes have an example (outside jit; under jit NaN).
    """
    stats = as_statistics(stats)
    pairs = checked_pairs(stats)
    total = jnp.sum(jnp.where(pairs, population_cdnv_matrix(stats), 0))
    return unless_too_few(total / number_of(pairs), stats)
