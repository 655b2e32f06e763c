"""Standard errors of functions of class statistics, by a jackknife over groups of examples.

Neural collapse and related measures are not means over examples but functions of means and
variances, so the spread of examples does not give a standard error. The delete-a-group jackknife
leaves out each group in turn, by merging the statistics of all others (Efron and Tibshirani, An
Introduction to the Bootstrap, 1993, chapter 11).
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Int, Shaped

from gc_nc.array_types import Array, check_whole
from gc_nc.metrics.argument_checks import as_labels, check_function
from gc_nc.metrics.class_statistics import merge_class_statistics
from gc_nc.metrics.jacobian_estimators import Estimate


def jackknife_groups(labels: Shaped[Array, "B"], num_groups: int) -> Int[Array, "B"]:
    """Assigns each example to a group, dealing out the examples of each class in turn.

    So every group gets its share of every class. Examples of a class must be exchangeable: shuffle
    them first if they are ordered, such as the frames of a film.

    Args:
      labels: (B,) integers.
      num_groups: G, the number of groups, 2 or more.

    Returns:
      (B,) int32 in 0..G-1.

    Raises:
      ValueError: labels are not integers of shape (B,), or `num_groups` is below 2.
    """
    num_groups = check_whole(num_groups, 2, "num_groups")
    labels = as_labels(labels, len(labels) if jnp.ndim(labels) else 0)
    labels = jnp.asarray(labels)
    order = jnp.argsort(labels, stable=True)
    ordered = labels[order]
    places = jnp.arange(labels.size, dtype=jnp.int32)
    first = jnp.searchsorted(ordered, ordered).astype(jnp.int32)
    return jnp.zeros_like(places).at[order].set((places - first) % num_groups)


def jackknife(
    value_fn: Callable[[Any], Any],
    groups: Sequence[Any],
    *,
    merge: Callable[[Any, Any], Any] = merge_class_statistics,
) -> Estimate:
    """theta = value_fn(all groups), and sem^2 = (G - 1) / G sum_g (theta_-g - mean of them)^2.

    theta_-g is the value without group g. The standard error is about theta of the distribution
    that the examples were drawn from, independently within their classes. theta +- 1.96 sem covers
    that only if theta is unbiased, so use `population_neural_collapse` if classes have few
    examples. The relative error of sem itself is about 1 / sqrt(2 (G - 1)): 20 groups are a good
    choice, with a quantile of 2.09 instead of 1.96.

    `groups` are ClassStatistics, or anything that `merge` can merge. For example, pairs of class
    statistics and Jacobian norms give geometric collapse, and pairs of embeddings and labels,
    merged by concatenation, give `directional_cdnv`. Every class needs examples in at least two
    groups; otherwise it is missing from one of the theta_-g.

    Args:
      value_fn: function from merged groups to an array or a pytree of arrays.
      groups: G groups of disjoint examples, 2 or more; see `jackknife_groups`.
      merge: function that merges two groups.

    Returns:
      Estimate(mean=theta, sem), both with the structure of `value_fn`'s result.

    Raises:
      ValueError: there are fewer than 2 groups, or `value_fn` or `merge` raises it.
    """
    check_function(value_fn, "value_fn", "from merged groups to a value")
    groups = list(groups)
    if len(groups) < 2:
        raise ValueError(f"{len(groups)} groups; a jackknife needs at least 2")
    # The groups before and after each group are merged step by step: 3 G merges instead of G^2.
    before, after = [groups[0]], [groups[-1]]
    for group in groups[1:-1]:
        before.append(merge(before[-1], group))
    for group in groups[-2:0:-1]:
        after.append(merge(group, after[-1]))
    after.reverse()
    pairs = zip(before[:-1], after[1:], strict=True)
    without = [after[0], *(merge(one, other) for one, other in pairs), before[-1]]
    value = value_fn(merge(before[-1], groups[-1]))

    def standard_error(*values):
        values = jnp.stack(values)
        # Differences from the first value are averaged, so that equal values give exactly 0.
        spread = values - values[:1]
        spread = spread - jnp.mean(spread, axis=0, keepdims=True)
        return jnp.sqrt((len(groups) - 1) * jnp.mean(spread**2, axis=0))

    return Estimate(value, jax.tree.map(standard_error, *map(value_fn, without)))
