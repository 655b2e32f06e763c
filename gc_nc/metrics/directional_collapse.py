"""Directional CDNV: the variance of a class along the line to another class, over their distance.

It predicts few-shot error even where CDNV is large, because variance perpendicular to that line
causes a nearest-mean classifier few errors.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Shaped

from gc_nc.array_types import Array, as_floating, check_whole, nan_where, with_nan
from gc_nc.metrics.argument_checks import check_rows, counted_rows
from gc_nc.metrics.class_statistics import ClassStatistics, as_statistics
from gc_nc.metrics.collapse import checked_pairs, squared_distances, unless_too_few

# Values of s: the part of the squared distance that is allowed for the scatter of the own centre.
_SPLITS = np.arange(1, 64, dtype=np.float32) / 64


def directional_cdnv(
    embeddings: Shaped[Array, "B K"],
    labels: Shaped[Array, "B"],
    stats: ClassStatistics,
    *,
    weights: Shaped[Array, "B"] | None = None,
) -> Float[Array, "C C"]:
    """Entry (i, j) is the mean over class i of ((z - mu_i) . (mu_i - mu_j))^2 / |mu_i - mu_j|^4.

    That is sigma_ij^2 / d_ij^2, where sigma_ij^2 is the variance of class i along the line through
    both class means. It is dimensionless, at most v_i / d_ij^2, and not symmetric. Source: Luthra,
    Salunkhe, Galanti (arXiv 2603.03530), with population variances. Memory is O(B C).

    Args:
      embeddings: (B, K) embeddings of all examples or of a sample from each class; half precision
        and integers are cast to float32.
      labels: (B,) integers in 0..C-1.
      stats: class statistics with the class means, usually of the same embeddings.
      weights: (B,) weights that are not negative, 1 each by default. A row of weight 0 is ignored
        and may have any label and any embedding, NaN included.

    Returns:
      (C, C). NaN on the diagonal, where class i or j is absent from `stats` or class i from
      `labels`, and where the distance is out of the range of float32. Equal means give NaN, because
      there is no line between them.

    Raises:
      ValueError: in the cases in which `update_class_statistics` raises it; `stats` has fewer than
        two classes (outside jit; under jit NaN).
    """
    stats = as_statistics(stats)
    num_classes, embedding_dim = stats.mean_offsets.shape
    embeddings = as_floating(embeddings, "embeddings")
    check_rows(embeddings, embedding_dim)
    labels, weights, _ = counted_rows(labels, weights, num_classes, embeddings.shape[0])
    pairs = checked_pairs(stats)
    present = stats.present[:, None]
    means = jnp.where(present, stats.mean_offsets + stats.mean_offset_residuals, 0)
    offsets = embeddings - stats.origin[None] - means[labels]
    offsets = jnp.where(weights[:, None] > 0, offsets, 0)
    along = jnp.matmul(offsets, means.T, precision="highest")
    # This is (z - mu_y) . (mu_y - mu_j) for every j.
    along = jnp.take_along_axis(along, labels[:, None], axis=1) - along
    counts = jax.ops.segment_sum(weights, labels, num_classes)
    distances = squared_distances(stats)
    # Divided before it is squared, because its square may be out of range.
    squares = weights[:, None] * (along / distances[labels]) ** 2
    sums = jax.ops.segment_sum(squares, labels, num_classes)
    known = pairs & (counts > 0)[:, None]
    return with_nan(~known, sums / jnp.where(counts > 0, counts, 1)[:, None])


def directional_error_bound(
    directional: Shaped[Array, "C C"], stats: ClassStatistics, num_shots: int | None = None
) -> Float[Array, ""]:
    """Directional CDNV bounds the error of the nearest-class-mean classifier.

    With D_ij the directional CDNV, v_i the variances and d = |mu_i - mu_j|, the error is at most
    the mean over classes i of min(1, sum over j != i of b_ij), where

      b_ij = D_ij / (D_ij + 1/4)                                         exact class means
      b_ij = min over s in (0, 1) of  A / (A + (1 - s)^2) + v_i / (n s d^2),
             A = 4 (D_ij + D_ji / n + v_i (v_i + v_j) / (n d^4))         means of n examples each

    The error is defined as in `nearest_mean_error_bound`. Variance perpendicular to the lines
    between class means enters only divided by n. The bound is our own and is proved in
    docs/proofs.md; it follows Luthra, Salunkhe, Galanti (arXiv 2603.03530), whose constants we have
    not read. s is one of 1/64 .. 63/64.

    Args:
      directional: (C, C) directional CDNV, from `directional_cdnv`, of the distribution that
        queries and support come from.
      stats: class statistics of the same distribution.
      num_shots: n, the number of support examples per class; None for exact class means.

    Returns:
      Scalar in [0, 1]; NaN if D_ij is NaN for two classes that are present.

    Raises:
      ValueError: `num_shots` is below 1, `directional` does not have shape (C, C), a D_ij is
        negative, or there are fewer than two classes (outside jit; the last two give NaN under
        jit).
    """
    stats = as_statistics(stats)
    directional = as_floating(directional, "directional")
    shape = (stats.counts.size, stats.counts.size)
    if directional.shape != shape:
        raise ValueError(f"directional of shape {directional.shape}; (C, C) = {shape} is needed")
    directional = nan_where(directional < 0, directional, "directional", "must be 0 or more")
    pairs = checked_pairs(stats)
    along = jnp.where(pairs, directional, 0)
    if num_shots is None:
        bounds = along / (along + 0.25)
    else:
        num_shots = check_whole(num_shots, 1, "num_shots")
        own = stats.known_variances[:, None] / squared_distances(stats)
        spread = 4 * (along + (along.T + own * (own + own.T)) / num_shots)
        bounds = jnp.inf
        for split in _SPLITS.tolist():
            bound = spread / (spread + (1 - split) ** 2) + own / (num_shots * split)
            bounds = jnp.minimum(bounds, bound)
    # The NaN of a pair is kept, since a comparison with NaN is False.
    of_classes = jnp.sum(jnp.where(pairs, bounds, 0), axis=1)
    of_classes = jnp.where(of_classes > 1, 1, of_classes)
    num_present = jnp.maximum(stats.num_present, 1).astype(jnp.float32)
    return unless_too_few(jnp.sum(of_classes) / num_present, stats)
