"""Standard errors of what class statistics say, by a jackknife over groups of examples.

Neural collapse and its kin are functions of means and variances, not means themselves, so the
spread of examples does not give a standard error. The delete-a-group jackknife takes the value
without each group, which statistics gathered in groups give by merging (Efron and Tibshirani, An
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
    """A group for each example, dealt out in turn within its class.

    So every group has its share of every class. Examples of a class must be exchangeable: shuffle
    those that come in an order, such as the frames of a film.

    Args:
      labels: (B,) integers.
      num_groups: G, 2 or more.

    Returns:
      (B,) int32 in 0..G-1.

    Raises:
      ValueError: labels that are not integers (B,), or `num_groups` below 2.
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
    that examples were drawn from, independently within their classes; theta +- 1.96 sem covers it
    as far as theta is unbiased, so take `population_neural_collapse` where classes have few
    examples. The spread of G values is known to 1 / sqrt(2 (G - 1)) of itself: 20 groups are a good
    choice, with a quantile of 2.09 in the place of 1.96.

    `groups` are ClassStatistics, or whatever `merge` merges: with the norms of the examples beside
    them geometric collapse is a value, with pairs of embeddings and labels, merged by
    concatenation, `directional_cdnv` is. Every class needs examples in two groups at least, or it
    is missing from a theta_-g.

    Args:
      value_fn: of merged groups, to an array or a pytree of arrays.
      groups: G of them, 2 or more, of disjoint examples; see `jackknife_groups`.
      merge: of two.

    Returns:
      Estimate(mean=theta, sem), each of the structure of `value_fn`'s value.

    Raises:
      ValueError: fewer than 2 groups, and as `value_fn` and `merge`.
    """
    check_function(value_fn, "value_fn", "from merged groups to a value")
    groups = list(groups)
    if len(groups) < 2:
        raise ValueError(f"{len(groups)} groups; a jackknife needs at least 2")
    # Merges of what comes before each and after: all G values in some 3 G merges, not G^2.
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
        # The mean of differences from one: exact where nothing varies.
        spread = values - values[:1]
        spread = spread - jnp.mean(spread, axis=0, keepdims=True)
        return jnp.sqrt((len(groups) - 1) * jnp.mean(spread**2, axis=0))

    return Estimate(value, jax.tree.map(standard_error, *map(value_fn, without)))
