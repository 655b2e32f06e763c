"""What geometric complexity says about neural collapse, its sampling error and few-shot error.

Every bound is proved in docs/proofs.md, which states its assumptions and where it is loose.

A value outside its range raises a ValueError; under jit, where nothing can be raised, the result
is NaN.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Shaped

from gc_nc.array_types import (
    Array,
    as_floating,
    as_scalar,
    check_whole,
    nan_where,
    with_nan,
)
from gc_nc.metrics.argument_checks import as_number, check_choice, counted_rows
from gc_nc.metrics.class_statistics import ClassStatistics, as_statistics
from gc_nc.metrics.collapse import (
    checked_pairs,
    geometric_collapse,
    number_of,
    squared_distances,
    unless_too_few,
)
from gc_nc.metrics.weighted_means import power_of_two_near


class NeuralCollapseBound(NamedTuple):
    """Two upper bounds on NC from geometric complexity; `paper` is at least twice `per_class`.

    Attributes:
      paper: from the mean GC of all classes (arXiv 2405.15706, Proposition 4.1).
      per_class: from each class's own GC.
    """

    paper: Float[Array, ""]
    per_class: Float[Array, ""]


class ConfidenceInterval(NamedTuple):
    """Contains the geometric complexity of the population with probability at least 1 - delta."""

    lower: Float[Array, ""]
    upper: Float[Array, ""]


def class_geometric_complexity(
    norms: Shaped[Array, "B"],
    labels: Shaped[Array, "B"],
    num_classes: int,
    *,
    weights: Shaped[Array, "B"] | None = None,
) -> Float[Array, "C"]:
    """GC_i = sum w |J|_F^2 / sum w over the examples of class i.

    In (embedding unit / model-input unit)^2.

    Args:
      norms: (B,) Jacobian norms |J(x)|_F^2, from `squared_jacobian_norms`.
      labels: (B,) integers in 0..C-1.
      num_classes: C, at least 1.
      weights: (B,) weights that are not negative, 1 each by default. A row of weight 0 is ignored
        and may have any label and any norm, NaN included.

    Returns:
      (C,); NaN for classes without an example or with a norm that is not finite.

    Raises:
      ValueError: there are no examples, shapes do not fit, labels are not integers, or (outside
        jit) a label is out of range or a weight is invalid. Under jit a row whose label is out of
        range is ignored, and an invalid weight gives NaN for its class.
    """
    num_classes = check_whole(num_classes, 1, "num_classes")
    norms = as_floating(norms, "norms")
    if norms.ndim != 1 or norms.size == 0:
        raise ValueError(f"norms of shape {norms.shape}; (B,) with B of 1 or more is needed")
    labels, weights, _ = counted_rows(labels, weights, num_classes, norms.size)
    norms = jnp.where(weights != 0, norms, 0)

    # Scaled, because a sum of very large weights would be out of range.
    weights = weights / power_of_two_near(jnp.max(weights))
    totals = jax.ops.segment_sum(weights, labels, num_classes)
    safe_totals = jnp.where(totals != 0, totals, 1)

    def class_means(values):
        return jax.ops.segment_sum(weights * values, labels, num_classes) / safe_totals

    means = class_means(norms)
    # A float32 sum of a million norms is off by 2e-4; adding the mean of the residuals corrects it.
    means = means + class_means(norms - means[labels])
    return with_nan(totals == 0, means)


def poincare_constant(class_gc: Shaped[Array, "C"], stats: ClassStatistics) -> Float[Array, ""]:
    """Empirical Poincare constant max_i v_i / GC_i over the classes present.

    In (model-input unit)^2. It is the smallest c with v_i <= c GC_i for every class. The true
    constant holds for all functions, not only for this embedding, so it can only be larger (up to
    the sampling error of v_i and GC_i). On the data that it is taken from, `neural_collapse_bound`
    holds by construction, so a check of the bound should take it from a split that the check does
    not use.

    Args:
      class_gc: (C,) GC_i, from `class_geometric_complexity`; ignored for classes not in `stats`.
      stats: class statistics of the embeddings.

    Returns:
      Scalar. Classes with v_i = GC_i = 0 give no information and are left out; v_i > 0 with
      GC_i = 0 gives inf. NaN if no class is left, or if GC_i of a class present is NaN.

    Raises:
      ValueError: `class_gc` does not have shape (C,), or (outside jit; under jit NaN) is negative.
    """
    stats = as_statistics(stats)
    gc = _checked_class_gc(class_gc, stats)
    variances = stats.known_variances
    informative = ~((variances == 0) & (gc == 0))
    ratios = jnp.where(informative, variances / jnp.where(informative, gc, 1), -jnp.inf)
    return with_nan(~jnp.any(informative), jnp.max(ratios))


def neural_collapse_bound(
    class_gc: Shaped[Array, "C"],
    stats: ClassStatistics,
    *,
    poincare_constant: Float[Array, ""] | float,
) -> NeuralCollapseBound:
    """Geometric complexity bounds neural collapse.

    With a Poincare constant c of every class's inputs, p_i = n_i / sum n, GC = sum p_i GC_i and
    sums over ordered pairs of the k classes present,

      NC <= per_class = c / (k (k - 1)) sum GC_i / |mu_i - mu_j|^2
         <= paper     = c / (k (k - 1)) GC / p_min sum 1 / |mu_i - mu_j|^2.

    For balanced classes `paper` is c `geometric_collapse(GC, stats)`, Proposition 4.1 of
    arXiv 2405.15706. `per_class` is our own. paper / per_class is 2 or more, and it is k where
    classes are balanced and have the same GC. Dimensionless. This bounds NC of the distribution
    that has these means and GC_i. In a sample with n examples per class the squared distances are
    too large by about 2 v / n, which makes the bound too small accordingly.

    Args:
      class_gc: (C,) GC_i, from `class_geometric_complexity`; ignored for classes not in `stats`.
      stats: class statistics of the embeddings; their counts give p_i.
      poincare_constant: c >= 0 in (model-input unit)^2, for instance the largest eigenvalue of a
        class's covariance if inputs are Gaussian, or `metrics.poincare_constant` of other data.

    Returns:
      Two scalars; inf where two class means are equal (NaN where 0 is multiplied by inf).

    Raises:
      ValueError: fewer than two classes have an example, or the constant or a GC_i is negative
        (outside jit; under jit NaN); `class_gc` does not have shape (C,).
    """
    stats = as_statistics(stats)
    gc = _checked_class_gc(class_gc, stats)
    constant = as_scalar(poincare_constant, "poincare_constant")
    pairs = checked_pairs(stats)
    # The mean of a pair's GC, as in CDNV, so that (0, GC_j) at distance 0 gives inf, not 0/0.
    terms = (gc[:, None] + gc[None, :]) / 2 / squared_distances(stats)
    per_class = constant * jnp.sum(jnp.where(pairs, terms, 0)) / number_of(pairs)
    per_class = unless_too_few(per_class, stats)

    total = jnp.sum(stats.counts)
    smallest = jnp.min(stats.counts, where=stats.present, initial=jnp.inf)
    mean_gc = jnp.sum(stats.counts * gc) / total
    # k p_min is exactly 1 where classes are balanced.
    k_p_min = stats.num_present.astype(jnp.float32) * smallest / total
    paper = constant * geometric_collapse(mean_gc, stats) / k_p_min
    return NeuralCollapseBound(paper=paper, per_class=per_class)


def geometric_complexity_interval(
    norms: Shaped[Array, "B"],
    *,
    value_range: Float[Array, ""] | float,
    delta: float = 0.05,
    method: str = "empirical_bernstein",
) -> ConfidenceInterval:
    """Interval that contains the population's GC with probability at least 1 - delta.

    For n independent examples with mean m and unbiased sample variance V of |J|_F^2 in [0, R],

      hoeffding:            m +- R sqrt(ln(2 / delta) / (2 n))
      empirical_bernstein:  m +- (sqrt(2 V ln(4 / delta) / n) + 7 R ln(4 / delta) / (3 (n - 1)))

    both clipped to [0, R]. In the units of the norms. Sources: Hoeffding 1963; Maurer and Pontil
    2009 (arXiv 0907.3740), theorem 4, applied to both sides with delta / 2 each; Propositions 4.2
    and 4.3 of arXiv 2405.15706.

    Args:
      norms: (B,) exact Jacobian norms of independent examples; estimates by random probes have
        another range.
      value_range: R, an upper bound on |J|_F^2 over **all** inputs, known before the sample was
        drawn. The largest norm in the sample is not such a bound: a rare large norm that the sample
        missed is exactly what the interval has to allow for. If whatever lies between layers has
        slopes of at most 1 (ReLU, max-pool without overlap), min(K, D) times the product of the
        layers' squared spectral norms is a valid R. inf is allowed, but gives no information.
      delta: the probability that the interval misses GC, between 0 and 1.
      method: "empirical_bernstein", which is narrower where n is large and V is small compared
        with R^2, or "hoeffding".

    Raises:
      ValueError: the method is unknown; delta is not in (0, 1); there are fewer than 2 norms (1 for
        hoeffding); a norm is not in [0, R] or not finite, or R is negative or NaN (outside jit;
        under jit NaN).
    """
    smallest_n = {"hoeffding": 1, "empirical_bernstein": 2}
    check_choice(method, smallest_n, "method")
    delta = as_number(delta, "delta", lambda d: 0 < d < 1, "must be between 0 and 1, both excluded")
    norms = as_floating(norms, "norms")
    n = norms.size
    if norms.ndim != 1 or n < smallest_n[method]:
        raise ValueError(
            f"norms of shape {norms.shape}; (B,) with B of {smallest_n[method]} or more is needed"
        )
    limit = as_scalar(value_range, "value_range")
    limit = nan_where(jnp.isnan(limit), limit, "value_range", "must be 0 or more")
    outside = ~((norms >= 0) & (norms <= limit) & jnp.isfinite(norms))
    norms = nan_where(outside, norms, "norm", f"must be in 0..value_range={value_range}")

    # Computed in units of R, because sums and squares of norms may be out of range.
    unit = jnp.where((limit > 0) & jnp.isfinite(limit), limit, 1)
    norms, limit = norms / unit, limit / unit
    mean = jnp.mean(norms)
    if method == "hoeffding":
        half_width = limit * math.sqrt(math.log(2 / delta) / (2 * n))
    else:
        log_term = math.log(4 / delta)
        half_width = jnp.sqrt(2 * jnp.var(norms, ddof=1) * log_term / n)
        half_width = half_width + limit * (7 * log_term / (3 * (n - 1)))
    return ConfidenceInterval(
        lower=unit * jnp.maximum(mean - half_width, 0),
        upper=unit * jnp.minimum(mean + half_width, limit),
    )


def nearest_mean_error_bound(
    nc: Float[Array, ""] | float, num_classes: int, num_shots: int | None = None
) -> Float[Array, ""]:
    """Neural collapse bounds the error of the nearest-class-mean classifier.

      min(1, 16 (k - 1) (1 + 2 / n) NC)   class means of n examples each
      min(1, 4 (k - 1) NC)                exact class means

    The error is the probability that another class's centre is at least as near to a query as the
    centre of its own class; it is taken over queries, their classes (equally frequent) and the n
    support examples. The bound follows Proposition 5.1 of arXiv 2405.15706, from Galanti, Gyorgy,
    Hutter (arXiv 2112.15121); the constants are those of our proof in docs/proofs.md.

    Args:
      nc: NC of the distribution that queries and support come from, or any upper bound on it. From
        a sample, take `population_neural_collapse`; its `neural_collapse` is too small. In terms
        of geometric complexity:
        `nearest_mean_error_bound(neural_collapse_bound(class_gc, stats, poincare_constant=c)
        .per_class, num_classes)`.
      num_classes: k, the number of classes that a query may belong to; in episodes the number of
        ways.
      num_shots: n, the number of support examples per class; None for exact class means.

    Returns:
      Scalar in [0, 1]; 1 for an infinite `nc`, NaN for NaN.

    Raises:
      ValueError: `num_classes` is below 2, `num_shots` is below 1, or `nc` is negative (outside
        jit; under jit NaN).
    """
    num_classes = check_whole(num_classes, 2, "num_classes")
    if num_shots is not None:
        num_shots = check_whole(num_shots, 1, "num_shots")
    nc = as_scalar(nc, "nc")
    factor = 4.0 if num_shots is None else 16 * (1 + 2 / num_shots)
    return jnp.minimum(factor * (num_classes - 1) * nc, 1)


def _checked_class_gc(class_gc: Array, stats: ClassStatistics) -> Float[Array, "C"]:
    """Returns GC_i, with 0 for classes without an example in `stats`."""
    class_gc = as_floating(class_gc, "class_gc")
    if class_gc.shape != stats.counts.shape:
        raise ValueError(f"class_gc of shape {class_gc.shape} for {stats.counts.size} classes")
    class_gc = jnp.where(stats.present, class_gc, 0)
    return nan_where(class_gc < 0, class_gc, "class_gc", "must be 0 or more")
