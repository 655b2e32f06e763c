"""Class statistics of embeddings, gathered in one pass over batches and merged in any order.

Per class i: n_i = sum w,  mu_i = sum w z / n_i,  S_i = sum w |z - mu_i|^2,  v_i = S_i / n_i.

Centred throughout (Chan, Golub, LeVeque 1983; Welford 1962): E[z^2] - E[z]^2 loses everything when
the mean is large against the spread. Means are held as offsets from an origin near the data, so
that float32 resolves the distance of two close means whatever their norm.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from gc_nc.array_types import Array, as_floating, as_weights


class ClassStatistics(NamedTuple):
    """Sufficient statistics of C classes of K-dimensional embeddings; a pytree.

    Attributes:
      counts: (C,) summed weights n_i.
      origin: (K,) reference point; the mean of the first batch.
      mean_offsets: (C, K) mu_i - origin; 0 for classes without an example.
      squared_deviations: (C,) S_i = sum w |z - mu_i|^2.
      scatter: (K, K) sum over all classes of w (z - mu_i)(z - mu_i)^T, or None.
      num_out_of_range: rows of positive weight whose label is not in 0..C-1; they count nowhere
        else.
    """

    counts: Float[Array, "C"]
    origin: Float[Array, "K"]
    mean_offsets: Float[Array, "C K"]
    squared_deviations: Float[Array, "C"]
    scatter: Float[Array, "K K"] | None
    num_out_of_range: Int[Array, ""]

    @property
    def present(self) -> Bool[Array, "C"]:
        """Which classes have an example."""
        return self.counts > 0

    @property
    def num_present(self) -> Int[Array, ""]:
        """The k of every formula: the number of classes that have an example."""
        return jnp.sum(self.present)

    @property
    def means(self) -> Float[Array, "C K"]:
        """Class means mu_i; NaN for classes without an example."""
        return jnp.where(self.present[:, None], self.origin[None] + self.mean_offsets, jnp.nan)

    @property
    def variances(self) -> Float[Array, "C"]:
        """Class variances v_i, population, summed over dimensions; NaN without an example."""
        safe_counts = jnp.where(self.present, self.counts, 1)
        return jnp.where(self.present, self.squared_deviations / safe_counts, jnp.nan)


def init_class_statistics(
    num_classes: int, embedding_dim: int, *, scatter: bool = False
) -> ClassStatistics:
    """Statistics of nothing.

    Args:
      num_classes: C, at least 1; labels are 0..C-1.
      embedding_dim: K, at least 1.
      scatter: whether to gather the pooled (K, K) scatter too.

    Raises:
      ValueError: `num_classes` or `embedding_dim` below 1.
    """
    for name, value in (("num_classes", num_classes), ("embedding_dim", embedding_dim)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    return ClassStatistics(
        counts=jnp.zeros(num_classes),
        origin=jnp.zeros(embedding_dim),
        mean_offsets=jnp.zeros((num_classes, embedding_dim)),
        squared_deviations=jnp.zeros(num_classes),
        scatter=jnp.zeros((embedding_dim, embedding_dim)) if scatter else None,
        num_out_of_range=jnp.zeros((), jnp.int32),
    )


def update_class_statistics(
    stats: ClassStatistics,
    embeddings: Shaped[Array, "B K"],
    labels: Shaped[Array, "B"],
    *,
    weights: Shaped[Array, "B"] | None = None,
) -> ClassStatistics:
    """Adds a batch.

    Args:
      stats: what was gathered so far.
      embeddings: (B, K); half precision and integers are cast to float32.
      labels: (B,) integers in 0..C-1.
      weights: (B,) not negative, 1 each by default. A row of weight 0 counts nowhere and may hold
        any label and any embedding, NaN included.

    Raises:
      ValueError: shapes that do not fit, labels that are not integers, or (outside jit) a label out
        of range. Under jit such rows count in `num_out_of_range` and nowhere else.
    """
    num_classes, embedding_dim = stats.mean_offsets.shape
    embeddings = as_floating(embeddings, "embeddings")
    if not isinstance(labels, jax.Array):
        labels = np.asarray(labels)
    if embeddings.ndim != 2 or embeddings.shape[1] != embedding_dim:
        raise ValueError(f"embeddings of shape {embeddings.shape}; (B, {embedding_dim}) is needed")
    if labels.shape != embeddings.shape[:1]:
        raise ValueError(f"labels of shape {labels.shape} for {embeddings.shape[0]} embeddings")
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"labels are {labels.dtype}; integers in 0..{num_classes - 1} are needed")
    weights = jnp.ones(labels.shape) if weights is None else as_weights(weights, labels.size)
    weights = weights.astype(embeddings.dtype)

    # In the labels' own dtype: 2**32 + 1 is not 1.
    in_range = (labels >= 0) & (labels < num_classes)
    out_of_range = ~in_range & (weights > 0)
    if not isinstance(out_of_range, jax.core.Tracer) and bool(jnp.any(out_of_range)):
        raise ValueError(
            f"label {int(labels[int(jnp.argmax(out_of_range))])} is outside 0..{num_classes - 1}"
            f" (num_classes={num_classes})"
        )
    counted = in_range & (weights > 0)
    weights = jnp.where(counted, weights, 0)
    labels = jnp.where(counted, jnp.asarray(labels), 0)

    safe_total = jnp.where(jnp.any(counted), jnp.sum(weights), 1)
    embeddings = jnp.where(counted[:, None], embeddings, 0)
    batch_mean = jnp.sum(embeddings * weights[:, None], axis=0) / safe_total
    origin = jnp.where(jnp.any(stats.present), stats.origin, batch_mean)
    offsets = jnp.where(counted[:, None], embeddings - origin[None], 0)

    def class_sums(values):
        return jax.ops.segment_sum(values, labels, num_classes)

    counts = class_sums(weights)
    safe_counts = jnp.where(counts > 0, counts, 1)
    means = class_sums(weights[:, None] * offsets) / safe_counts[:, None]
    deviations = jnp.where(counted[:, None], offsets - means[labels], 0)
    # What rounding left in the means shows as the mean of the deviations; taking it out once
    # makes the means as exact as their format and S_i second order in the rounding.
    remainder = class_sums(weights[:, None] * deviations) / safe_counts[:, None]
    deviations = jnp.where(counted[:, None], deviations - remainder[labels], 0)
    batch = ClassStatistics(
        counts=counts,
        origin=origin,
        mean_offsets=means + remainder,
        squared_deviations=class_sums(weights * jnp.sum(deviations**2, axis=1)),
        scatter=None
        if stats.scatter is None
        else _outer_sum(deviations * weights[:, None], deviations),
        num_out_of_range=jnp.sum(out_of_range, dtype=jnp.int32),
    )
    return merge_class_statistics(stats, batch)


def merge_class_statistics(a: ClassStatistics, b: ClassStatistics) -> ClassStatistics:
    """Statistics of the union of two disjoint sets of examples (Chan, Golub, LeVeque 1983).

    n = n_a + n_b,  d = mu_b - mu_a,  mu = mu_a + d n_b / n,  S = S_a + S_b + |d|^2 n_a n_b / n.

    Raises:
      ValueError: another number of classes or dimensions, or only one of the two has the scatter.
    """
    if a.mean_offsets.shape != b.mean_offsets.shape:
        raise ValueError(
            f"cannot merge statistics of (C, K) = {a.mean_offsets.shape} and {b.mean_offsets.shape}"
        )
    if (a.scatter is None) != (b.scatter is None):
        raise ValueError("cannot merge statistics with scatter and without")
    origin = jnp.where(jnp.any(a.present), a.origin, b.origin)
    offsets_a, offsets_b = (
        jnp.where(s.present[:, None], s.mean_offsets + (s.origin - origin)[None], 0) for s in (a, b)
    )
    counts = a.counts + b.counts
    safe_counts = jnp.where(counts > 0, counts, 1)
    share_b = b.counts / safe_counts
    both = a.counts * share_b
    # Where one side is empty the other's mean passes through untouched.
    delta = jnp.where((both > 0)[:, None], offsets_b - offsets_a, 0)
    offsets = jnp.where(a.present[:, None], offsets_a + delta * share_b[:, None], offsets_b)
    scatter = None
    if a.scatter is not None:
        scatter = a.scatter + b.scatter + _outer_sum(delta * both[:, None], delta)
    return ClassStatistics(
        counts=counts,
        origin=origin,
        mean_offsets=offsets,
        squared_deviations=a.squared_deviations
        + b.squared_deviations
        + both * jnp.sum(delta**2, axis=1),
        scatter=scatter,
        num_out_of_range=a.num_out_of_range + b.num_out_of_range,
    )


def _outer_sum(left: Array, right: Array) -> Array:
    return jnp.matmul(left.T, right, precision="highest")
