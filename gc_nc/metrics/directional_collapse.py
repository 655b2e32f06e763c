"""Directional CDNV: the variance of a class along the line to another class, over their distance.

Few-shot error follows it where CDNV stays large: variance across that line costs a nearest-mean
classifier little.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Shaped

from gc_nc.array_types import Array, as_floating, with_nan
from gc_nc.metrics.argument_checks import check_rows, counted_rows
from gc_nc.metrics.class_statistics import ClassStatistics, as_statistics
from gc_nc.metrics.collapse import checked_pairs, squared_distances


def directional_cdnv(
    embeddings: Shaped[Array, "B K"],
    labels: Shaped[Array, "B"],
    stats: ClassStatistics,
    *,
    weights: Shaped[Array, "B"] | None = None,
) -> Float[Array, "C C"]:
    """Ordered pairs (i, j): mean over class i of ((z - mu_i) . (mu_i - mu_j))^2 / |mu_i - mu_j|^4.

    That is sigma_ij^2 / d_ij^2, sigma_ij^2 being the variance of class i along the line through
    both class means. Dimensionless, and at most v_i / d_ij^2; not symmetric. Source: Luthra,
    Salunkhe, Galanti (arXiv 2603.03530), population variances. Memory is O(B C).

    Args:
      embeddings: (B, K) of all examples, or as many as are to speak for their classes; half
        precision and integers are cast to float32.
      labels: (B,) integers in 0..C-1.
      stats: the class means, as a rule gathered over these embeddings.
      weights: (B,) not negative, 1 each by default. A row of weight 0 counts nowhere and may hold
        any label and any embedding, NaN included.

    Returns:
      (C, C). NaN on the diagonal, for classes absent from `stats` or, as i, from `labels`, and
      where the distance is out of the range of float32. Equal means give NaN: no line joins them.

    Raises:
      ValueError: as `update_class_statistics`; fewer than two classes in `stats` (outside jit;
        under jit NaN).
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
    # (z - mu_y) . (mu_y - mu_j) for every j.
    along = jnp.take_along_axis(along, labels[:, None], axis=1) - along
    counts = jax.ops.segment_sum(weights, labels, num_classes)
    distances = squared_distances(stats)
    # Divided before it is squared: its square may be out of range.
    squares = weights[:, None] * (along / distances[labels]) ** 2
    sums = jax.ops.segment_sum(squares, labels, num_classes)
    known = pairs & (counts > 0)[:, None]
    return with_nan(~known, sums / jnp.where(counts > 0, counts, 1)[:, None])
