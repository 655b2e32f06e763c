"""NC4 of Papyan, Han, Donoho (arXiv 2008.08186): agreement with the nearest class mean."""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int, Shaped

from gc_nc.array_types import (
    Array,
    as_floating,
    as_numbers,
    as_weights,
    is_known,
    with_nan,
)
from gc_nc.metrics.argument_checks import check_rows
from gc_nc.metrics.class_statistics import ClassStatistics, as_statistics, two_sum
from gc_nc.metrics.collapse_geometry import check_enough_classes
from gc_nc.metrics.weighted_means import power_of_two_near


def nearest_class_mean(embeddings: Shaped[Array, "B K"], stats: ClassStatistics) -> Int[Array, "B"]:
    """argmin over classes i present of |z - mu_i|; ties go to the lowest label.

    It uses differences relative to the origin of `stats`, so that close means can be told apart
    whatever their norm. Classes are taken one at a time, so memory is O(B K).

    Args:
      embeddings: (B, K) embeddings; all real numbers are cast to float32.
      stats: class statistics with the class means.

    Returns:
      (B,) labels; -1 for an embedding that is not finite, and everywhere if a mean is not finite.

    Raises:
      ValueError: `embeddings` is not (B, K); fewer than two classes are present (outside jit; under
        jit -1).
    """
    stats = as_statistics(stats)
    check_enough_classes(stats)
    embeddings = as_floating(embeddings, "embeddings")
    check_rows(embeddings, stats.origin.size)
    present = stats.present
    means = jnp.where(present[:, None], stats.mean_offsets, 0)
    residuals = jnp.where(present[:, None], stats.mean_offset_residuals, 0)
    offsets, offset_residuals = two_sum(embeddings, -stats.origin[None])
    labels = _nearest(offsets, offset_residuals, means, residuals, present)
    known = jnp.all(jnp.isfinite(means)) & (stats.num_present >= 2)
    return jnp.where(known & jnp.all(jnp.isfinite(offsets), axis=1), labels, -1)


# Jitted, since outside jit the loop would be compiled anew at each call.
@jax.jit
def _nearest(offsets, offset_residuals, means, residuals, present):
    """(B,) labels of the nearest means of present classes."""

    def closer(nearest, candidate):
        """A squared distance is kept as (scale, squares), since squares * scale^2 may overflow."""
        label, scale, squares = nearest
        candidate_label, mean, residual, is_present = candidate
        difference = (offsets - mean[None]) + (offset_residuals - residual[None])
        largest = jnp.max(jnp.abs(difference), axis=1)
        # A power of two, so that ties stay ties.
        its_scale = jnp.where(largest > 0, power_of_two_near(largest), 0)
        difference = difference / jnp.where(its_scale > 0, its_scale, 1)[:, None]
        its_squares = jnp.sum(difference**2, axis=1)
        better = is_present & (its_squares * (its_scale / scale) ** 2 < squares)
        return (
            jnp.where(better, candidate_label, label),
            jnp.where(better, its_scale, scale),
            jnp.where(better, its_squares, squares),
        ), None

    infinite = jnp.full_like(offsets[:, 0], jnp.inf)
    start = jnp.full_like(infinite, -1, jnp.int32), infinite, infinite
    candidates = jnp.arange(present.size, dtype=jnp.int32), means, residuals, present
    (labels, *_), _ = jax.lax.scan(closer, start, candidates)
    return labels


def nc4(
    predictions: Shaped[Array, "B ..."],
    embeddings: Shaped[Array, "B K"],
    stats: ClassStatistics,
    *,
    weights: Shaped[Array, "B"] | None = None,
) -> Float[Array, ""]:
    """NC4: weighted share of examples that the network and `nearest_class_mean` label differently.

    Args:
      predictions: (B,) integer labels, or (B, C) logits whose argmax is taken (the lowest at ties).
        A label of a class that is absent from `stats`, or that does not exist, always differs.
      embeddings: (B, K) embeddings of the same examples.
      stats: class statistics with the class means, usually those of the training set.
      weights: (B,) weights that are not negative, 1 each by default. A row of weight 0 may contain
        anything.

    Returns:
      Scalar in [0, 1]. NaN if an example of positive weight has an embedding that is not finite or
      a logit that is NaN or +inf (-inf masks a class), or if a weight is invalid under jit.

    Raises:
      ValueError: shapes do not fit, there are no examples, labels are not integers, weights are
        invalid or (outside jit; under jit NaN) all 0, or fewer than two classes are present
        (outside jit; under jit NaN).
    """
    stats = as_statistics(stats)
    num_classes = stats.counts.size
    nearest = nearest_class_mean(embeddings, stats)
    batch = nearest.size
    if batch == 0:
        raise ValueError("nc4 got no examples; at least 1 is needed")
    predictions = as_numbers(predictions, "predictions")
    if predictions.shape not in ((batch,), (batch, num_classes)):
        raise ValueError(
            f"predictions of shape {predictions.shape} for {batch} embeddings and {num_classes}"
            f" classes; ({batch},) labels or ({batch}, {num_classes}) logits are needed"
        )
    known = nearest >= 0
    if predictions.ndim == 2:
        logits = as_floating(predictions, "predictions")
        # -inf masks a class; only NaN and +inf leave the decision open.
        known = known & (jnp.max(logits, axis=1) < jnp.inf)
        labels = jnp.argmax(logits, axis=1).astype(jnp.int32)
    elif jnp.issubdtype(predictions.dtype, jnp.integer):
        # Compared before the cast, so that neither a 64-bit label nor C in 8 bits wraps around.
        if isinstance(predictions, jax.Array):
            predictions = predictions.astype(jnp.promote_types(predictions.dtype, jnp.int32))
        exists = (predictions >= 0) & (predictions < num_classes)
        labels = jnp.where(exists, predictions, -1).astype(jnp.int32)
    else:
        raise ValueError(f"predictions are {predictions.dtype}; integers or logits are needed")
    weights = jnp.ones(batch, jnp.float32) if weights is None else as_weights(weights, batch)
    any_counts = jnp.any(weights > 0)
    if is_known(any_counts) and not bool(any_counts):
        raise ValueError("all weights are 0, so no example counts; give one a weight above 0")
    # Scaled by a power of two whose reciprocal is not flushed to 0, since XLA may multiply by it.
    shares = weights / power_of_two_near(jnp.max(weights))
    total = jnp.sum(shares)
    value = jnp.sum(jnp.where(labels != nearest, shares, 0)) / jnp.where(total == 0, 1, total)
    return with_nan(~jnp.all(known | (weights == 0)) | (total == 0), value)
