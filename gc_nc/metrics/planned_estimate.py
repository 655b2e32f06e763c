"""Geometric complexity of a large set to a given relative error, at the least cost.

Two things make it cheap. **Between examples**, it is a regression estimate (Cochran, Sampling
Techniques, 1977, chapter 7). n random examples b give t_b, the mean of |J^T c|^2 over m probes c,
which is fitted by least squares to covariates whose mean over the whole set is known (pixel
statistics of the input, and its class),

    t_b = GC + beta . (a_b - mean a) + residual,

so that only the residual has a sampling error. **Between probes**, the random signs are drawn in a
basis that is chosen for each example (see `drawn_sample`).
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Shaped

from gc_nc.array_types import Array, EmbedFn, as_numbers, check_whole
from gc_nc.metrics import jacobian_products as products
from gc_nc.metrics.argument_checks import as_key, as_labels, as_number
from gc_nc.metrics.drawn_sample import CHUNK, DrawnSample
from gc_nc.metrics.embedding_functions import check_embedding
from gc_nc.metrics.regression_estimate import (
    Covariates,
    RegressionEstimate,
    known_covariates,
    regress,
)

# Cost of one VJP in forward passes; 0.9 to 1.2 was measured on VGG.
_PRODUCT_COST = 1.1
# A draw passes if its error is at most _PASSES times the requested one. The measured error may be
# too small by the factor _UNDERSTATED, because drawing stops when the measured error is small. Both
# were chosen by simulation on skewed norms.
_PASSES, _UNDERSTATED = 0.9, 1.25


class PlannedEstimate(NamedTuple):
    """The estimated mean over a given set, its standard error for that set, and what it cost.

    Attributes:
      mean: estimated geometric complexity.
      set_sem: its standard error about the GC of the given examples; 0 if it is exact, NaN if all
        drawn norms were 0 and `max_products` ended the search.
      num_examples: number of distinct examples that were differentiated.
      num_probes: number of Jacobian products per example; 0 if each example's norm is exact.
      num_products: number of Jacobian products in all, including those of the pilot run.
      met: whether `set_sem` is at most relative_error * mean.
    """

    mean: Float[Array, ""]
    set_sem: Float[Array, ""]
    num_examples: int
    num_probes: int
    num_products: int
    met: bool


def geometric_complexity_to_error(
    embed_fn: EmbedFn,
    inputs: Shaped[Array, "N ..."],
    key: jax.Array,
    *,
    relative_error: float = 0.01,
    labels: Shaped[Array, "N"] | None = None,
    num_pilot: int = 256,
    max_products: int | None = None,
) -> PlannedEstimate:
    """Geometric complexity of a set of N examples, to a standard error of `relative_error` * GC.

    A pilot run of `num_pilot` random examples with two probes each gives the variance between
    examples, S_b, and between probes, S_w, after regression. A plan has n examples and m probes
    with

        sem^2 = (S_b + S_w / m) / n - S_b / N  <=  (relative_error * GC)^2.

    Sampling is without replacement, so with all N examples only the error of the probes is left.
    The plan with the least work, n (1 + 1.1 m) forward passes, is run. Then S_b and S_w are
    measured again on everything drawn so far, and more is drawn until the standard error is small
    enough. With one probe per example S_b cannot be told from S_w, and the last term is left out.
    Exact norms of the n examples are one of the plans. The whole set is computed exactly if it has
    fewer than 64 examples or if all drawn norms are 0, and also if no sample reaches the requested
    error: that takes N min(K, D) products, unless `max_products` is lower.

    Unlike that of `estimate_geometric_complexity`, the standard error is about the GC of the N
    examples themselves, not of a population behind them. Like every standard error, it depends only
    on what was drawn: if a few of very many examples make up most of GC, a sample can miss them.

    It stops at the first draw that passes, and draws with too little spread, which often also have
    too small a mean, pass more easily. Two things compensate for the spread. A draw passes only if
    its measured error is 10% below the requested one; and the reported error is the requested one
    (as in the fixed-width intervals of Chow and Robbins, 1965), or 1.25 times the measured one if
    that is less. The mean stays too low by up to relative_error^2 (g / h - 2) of GC, where h is the
    standard deviation of the regression's residuals relative to GC, and g is their skewness. In
    simulations of norms whose logarithms are normal with standard deviation 1.5, at relative error
    0.08, the bias is -2.0% and mean +- 1.96 set_sem covers 94%; with standard deviation 0.5, at
    relative error 0.02, the bias is 0.0% and it covers 98%.

    Args:
      embed_fn: pure function (B, *input) -> (B, K) in which examples do not mix.
      inputs: (N, *input) in model-input units; a NumPy array stays on the host and is read once
        for its pixel statistics.
      key: a JAX random key.
      relative_error: the largest standard error relative to GC, above 0.
      labels: (N,) integers; classes then help to predict GC. A class is a covariate of its own if
        10 of its examples are expected in the sample, up to 100 classes, the most frequent first.
      num_pilot: the least number of examples to draw, 64 or more. With 256 or more examples, pixel
        statistics and classes are used, one for every 10 examples.
      max_products: the largest number of Jacobian products in all; None sets no limit. If they do
        not suffice, the estimate so far is returned, with `met` False.

    Returns:
      PlannedEstimate; mean and set_sem are NaN if a product that was drawn is not finite.

    Raises:
      ValueError: there are no examples, an argument is out of range, `max_products` is less than
        the pilot run needs, labels are not integers, `embed_fn` does not return (B, K), or
        arguments are traced: the plan depends on values, so it cannot run under jit, vmap or grad.
    """
    relative_error = as_number(
        relative_error,
        "relative_error",
        lambda e: 0 < e < math.inf,
        "must be above 0, such as 0.01",
    )
    num_pilot = check_whole(num_pilot, 64, "num_pilot")
    if max_products is not None:
        max_products = check_whole(max_products, 1, "max_products")
    leaves = jax.tree.leaves((embed_fn, inputs, key, labels))
    if products.staged() or any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        raise ValueError(
            "geometric_complexity_to_error chooses its plan from values and cannot be traced; use"
            " estimate_geometric_complexity under jit, vmap and grad"
        )
    inputs, key = as_numbers(inputs, "inputs"), as_key(key)
    embed_fn, example = check_embedding(embed_fn, inputs[:CHUNK] if inputs.ndim else inputs)
    num_examples = inputs.shape[0]
    if labels is not None:
        labels = np.asarray(as_labels(labels, num_examples))
    full_rank = min(embed_fn.dim, example[0].size)
    sample = DrawnSample(embed_fn, inputs, key, full_rank, max_products)
    if num_examples < 64 and sample.affords(num_examples, full_rank):
        return _exact(sample)
    num_pilot = min(num_pilot, num_examples)
    if not sample.affords(num_pilot, min(2, full_rank)):
        raise ValueError(
            f"max_products={max_products} is below the {num_pilot * min(2, full_rank)} of the pilot"
            f" run; allow at least that many, or take a num_pilot below {num_pilot} (64 or more)"
        )
    known = known_covariates(inputs, labels, sample.order)
    return _draw_until(sample, known, relative_error, num_pilot)


def _draw_until(
    sample: DrawnSample, known: Covariates, relative_error: float, num_pilot: int
) -> PlannedEstimate:
    """Draws until the error is small enough or the budget is spent."""
    num_examples = len(sample.order)
    # If the rank is at most 2, two products per example are exact already.
    m, needed = sample.full_rank, num_pilot
    if sample.full_rank > 2:
        m = 2
        pilot = sample.draw(num_pilot, m)
        if np.isfinite(pilot).all():
            m, needed = _plan(sample, regress(pilot, known), relative_error, num_pilot)
    # Every round draws more examples or, once all are drawn, more probes.
    while True:
        needed = min(num_examples, max(num_pilot, math.ceil(needed / CHUNK) * CHUNK))
        values = sample.draw(sample.affordable(needed, m), m)
        if not np.isfinite(values).all():
            return _found(sample, math.nan, math.nan, values, m, met=False)
        fit = regress(values, known, exact=m == sample.full_rank)
        # The share is computed first: with all examples it is exactly 1, and nothing is left over.
        share = len(values) / num_examples
        sem = math.sqrt(max(0.0, fit.variance - fit.between * share) / len(values))
        target = relative_error * fit.mean
        # An all-zero sample says nothing about the examples that were not drawn.
        if target > 0 and sem <= _PASSES * target:
            # Below the target in float32 as well.
            sem = min(_UNDERSTATED * sem, (1 - 1e-6) * target)
            return _found(sample, fit.mean, sem, values, m, met=True)
        shortfall = (sem / (_PASSES * target)) ** 2 if target > 0 else math.inf
        if not math.isfinite(shortfall) and sample.affords(num_examples, sample.full_rank):
            return _exact(sample)
        goes_on = False
        if len(values) < num_examples:
            needed = math.ceil(min(len(values) * shortfall * 1.01, num_examples))
            goes_on = sample.affordable(needed, m) > len(values)
        elif math.isfinite(shortfall):
            more = min(sample.full_rank, math.ceil(m * shortfall * 1.1) + 1)
            if not sample.affords(num_examples, more):
                more = min(sample.full_rank - 1, m + sample.left // num_examples)
            goes_on, m = more > m, more
        if not goes_on:
            sem = math.nan if fit.mean == sem == 0 else sem
            return _found(sample, fit.mean, sem, values, m, met=False)


def _plan(
    sample: DrawnSample, fit: RegressionEstimate, relative_error: float, num_pilot: int
) -> tuple[int, float]:
    """Returns the number of probes and the number of examples to draw."""
    num_examples = len(sample.order)
    target = _PASSES * relative_error * fit.mean
    m = _cheapest_num_probes(fit, target, num_examples, sample.full_rank)
    needed = _num_examples(fit, target, num_examples, m, exact=m == sample.full_rank)
    needed = min(needed, num_examples)
    if not sample.affords(needed, m):
        # With a limited number of products, one per example is best until all examples have one.
        m = max(1, sample.left // num_examples)
        needed = num_examples
    if not sample.affords(num_pilot, m):
        m, needed = 2, num_pilot
    # The pilot run predicts the number to about 20%, and rather too high. If too few examples are
    # drawn, more can follow; if too many are drawn, the work is lost.
    return m, 0.75 * needed


def _exact(sample: DrawnSample) -> PlannedEstimate:
    """Returns the mean of the exact norms of all examples."""
    norms = sample.draw(len(sample.order), sample.full_rank)
    mean = np.mean(norms)
    return _found(sample, mean, 0 * mean, norms, sample.full_rank, met=bool(np.isfinite(mean)))


def _found(sample, mean, sem, values, num_probes, *, met) -> PlannedEstimate:
    return PlannedEstimate(
        mean=jnp.float32(mean),
        set_sem=jnp.float32(sem),
        num_examples=len(values),
        num_probes=num_probes % sample.full_rank,
        num_products=sample.num_products,
        met=met,
    )


def _num_examples(fit: RegressionEstimate, target, num_examples, num_probes, *, exact=False) -> int:
    """Returns how many examples a plan needs; more than there are if it cannot reach the target."""
    within = 0.0 if exact else fit.within / num_probes
    # With one probe S_b is unknown, so the gain from the set being finite is not used.
    saved = fit.between / num_examples if exact or num_probes > 1 else 0.0
    allowed = max(target, 0.0) ** 2 + saved
    needed = (fit.between + within) / allowed if allowed > 0 else math.inf
    return math.ceil(min(needed, 2.0 * num_examples))


def _cheapest_num_probes(fit: RegressionEstimate, target, num_examples, full_rank) -> int:
    """Returns the m of least n (1 + cost m) for which some n <= N suffices; full_rank is exact."""
    costs = {}
    for m in sorted({*range(1, 9), *(2**i for i in range(4, 20)), full_rank}):
        n = _num_examples(fit, target, num_examples, m, exact=m == full_rank)
        if m <= full_rank and (n <= num_examples or m == full_rank):
            costs[m] = n * (1 + _PRODUCT_COST * m)
    return min(costs, key=costs.get)
