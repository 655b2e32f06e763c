"""Class statistics of embeddings, gathered in one pass over batches and merged in any order.

Per class i: n_i = sum w,  mu_i = sum w z / n_i,  S_i = sum w |z - mu_i|^2,  v_i = S_i / n_i.

All sums are centred (Chan, Golub, LeVeque 1983; Welford 1962), because E[z^2] - E[z]^2 loses all
digits when the mean is much larger than the spread. Running totals are kept as the unevaluated sum
of two floats (Dekker 1971), a value and its residual. So the distance between two close means is
right whatever their norm and whichever examples came first, and counts can exceed 2^24.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, Shaped

from gc_nc.array_types import (
    Array,
    as_floating,
    check_whole,
    described,
    replicated,
    with_nan,
)
from gc_nc.metrics.argument_checks import check_flag, check_rows, counted_rows

#: The least number of rows that the CPU takes at a time. What is computed from them stays in its
#: cache; a (B, K) array for every step would cost more time in page faults than in arithmetic.
_CPU_BLOCK_ROWS = 2048


class ClassStatistics(NamedTuple):
    """Sufficient statistics of C classes of K-dimensional embeddings; a pytree.

    Attributes:
      counts: (C,) summed weights n_i.
      origin: (K,) reference point; the mean of the first batch.
      mean_offsets: (C, K) mu_i - origin; 0 for classes without an example.
      squared_deviations: (C,) S_i = sum w |z - mu_i|^2.
      scatter: (K, K) sum over all classes of w (z - mu_i)(z - mu_i)^T, or None.
      num_out_of_range: number of rows of positive weight whose label is not in 0..C-1; no other
        field includes them.
      count_residuals: (C,) what rounding took from `counts`.
      mean_offset_residuals: (C, K) what rounding took from `mean_offsets`. Differences of means
        need both: (a - b) + (residual of a - residual of b).
      squared_deviation_residuals: (C,) what rounding took from `squared_deviations`.
      scatter_residual: (K, K) what rounding took from `scatter`, or None.
    """

    counts: Float[Array, "C"]
    origin: Float[Array, "K"]
    mean_offsets: Float[Array, "C K"]
    squared_deviations: Float[Array, "C"]
    scatter: Float[Array, "K K"] | None
    num_out_of_range: Int[Array, ""]
    count_residuals: Float[Array, "C"]
    mean_offset_residuals: Float[Array, "C K"]
    squared_deviation_residuals: Float[Array, "C"]
    scatter_residual: Float[Array, "K K"] | None

    @property
    def present(self) -> Bool[Array, "C"]:
        """Which classes have an example; includes those whose count is NaN (invalid weight)."""
        return self.counts != 0

    @property
    def num_present(self) -> Int[Array, ""]:
        """The k of every formula: the number of classes that have an example."""
        return jnp.sum(self.present, dtype=jnp.int32)

    @property
    def means(self) -> Float[Array, "C K"]:
        """Class means mu_i; NaN for classes without an example."""
        means = self.origin[None] + self.mean_offsets + self.mean_offset_residuals
        return with_nan(~self.present[:, None], means)

    @property
    def variances(self) -> Float[Array, "C"]:
        """Population class variances v_i, summed over dimensions; NaN without an example."""
        return with_nan(~self.present, self.known_variances)

    @property
    def known_variances(self) -> Float[Array, "C"]:
        """`variances` with 0 for classes without an example."""
        safe_counts = jnp.where(self.present, self.counts, 1)
        return jnp.where(self.present, self.squared_deviations / safe_counts, 0)


def init_class_statistics(
    num_classes: int, embedding_dim: int, *, scatter: bool = False
) -> ClassStatistics:
    """Statistics of no examples, to which batches are added.

    Args:
      num_classes: C, at least 1; labels are 0..C-1.
      embedding_dim: K, at least 1.
      scatter: whether to gather the pooled (K, K) scatter too.

    Raises:
      ValueError: `num_classes` or `embedding_dim` is below 1 or not a whole number.
    """
    num_classes = check_whole(num_classes, 1, "num_classes")
    embedding_dim = check_whole(embedding_dim, 1, "embedding_dim")
    check_flag(scatter, "scatter")

    def zeros(*shape):
        return jnp.zeros(shape, jnp.float32)

    return ClassStatistics(
        counts=zeros(num_classes),
        origin=zeros(embedding_dim),
        mean_offsets=zeros(num_classes, embedding_dim),
        squared_deviations=zeros(num_classes),
        scatter=zeros(embedding_dim, embedding_dim) if scatter else None,
        num_out_of_range=jnp.zeros((), jnp.int32),
        count_residuals=zeros(num_classes),
        mean_offset_residuals=zeros(num_classes, embedding_dim),
        squared_deviation_residuals=zeros(num_classes),
        scatter_residual=zeros(embedding_dim, embedding_dim) if scatter else None,
    )


def as_statistics(stats: ClassStatistics, name: str = "stats") -> ClassStatistics:
    """Returns class statistics in float32, whatever their dtype was.

    Raises:
      ValueError: `stats` is not a ClassStatistics.
    """
    if not isinstance(stats, ClassStatistics):
        raise ValueError(
            f"{name} is {described(stats)}; ClassStatistics are needed, which"
            " update_class_statistics gathers from embeddings and labels"
        )
    count = stats.num_out_of_range
    count = replicated(count.astype(jnp.int32)) if isinstance(count, jax.Array) else count
    as_float32 = {
        field: None if value is None else as_floating(value, f"{name}.{field}")
        for field, value in stats._asdict().items()
        if field != "num_out_of_range"
    }
    return ClassStatistics(num_out_of_range=jnp.asarray(count, jnp.int32), **as_float32)


def update_class_statistics(
    stats: ClassStatistics,
    embeddings: Shaped[Array, "B K"],
    labels: Shaped[Array, "B"],
    *,
    weights: Shaped[Array, "B"] | None = None,
) -> ClassStatistics:
    """Returns the statistics with a batch of examples added.

    Args:
      stats: class statistics of the examples so far.
      embeddings: (B, K) embeddings; all real numbers are cast to float32.
      labels: (B,) integers in 0..C-1.
      weights: (B,) weights that are not negative, 1 each by default. A row of weight 0 is ignored
        and may have any label and any embedding, NaN included.

    Raises:
      ValueError: shapes do not fit, labels are not integers, or (outside jit) a label is out of
        range or a weight is negative or not finite. Under jit a row whose label is out of range is
        only counted in `num_out_of_range`, and an invalid weight gives NaN for its class. An
        embedding that is not finite gives NaN for its own class.

    jit narrows 64-bit labels to 32 bits before this function sees them: check those outside jit.
    """
    stats = as_statistics(stats)
    num_classes, embedding_dim = stats.mean_offsets.shape
    embeddings = as_floating(embeddings, "embeddings")
    check_rows(embeddings, embedding_dim)
    labels, weights, out_of_range = counted_rows(labels, weights, num_classes, len(embeddings))
    stats = _add_rows(stats, embeddings, labels, weights)
    num_out_of_range = stats.num_out_of_range + jnp.sum(out_of_range, dtype=jnp.int32)
    return stats._replace(num_out_of_range=num_out_of_range)


def merge_class_statistics(a: ClassStatistics, b: ClassStatistics) -> ClassStatistics:
    """Statistics of the union of two disjoint sets of examples (Chan, Golub, LeVeque 1983).

    n = n_a + n_b,  d = mu_b - mu_a,  mu = mu_a + d n_b / n,  S = S_a + S_b + |d|^2 n_a n_b / n.

    Raises:
      ValueError: the numbers of classes or dimensions differ, or only one of the two has a scatter.
    """
    a, b = as_statistics(a, "a"), as_statistics(b, "b")
    if a.mean_offsets.shape != b.mean_offsets.shape:
        raise ValueError(
            f"cannot merge statistics of (C, K) = {a.mean_offsets.shape} and {b.mean_offsets.shape}"
        )
    if (a.scatter is None) != (b.scatter is None):
        raise ValueError("cannot merge statistics with scatter and without")
    origin = jnp.where(jnp.any(a.present), a.origin, b.origin)
    return _merge_about_one_origin(_about(origin, a), _about(origin, b))


def _merge_about_one_origin(a: ClassStatistics, b: ClassStatistics) -> ClassStatistics:
    means_a, means_b = ((stats.mean_offsets, stats.mean_offset_residuals) for stats in (a, b))
    counts = _add((a.counts, a.count_residuals), (b.counts, b.count_residuals))
    share_b = b.counts / jnp.where(counts[0] != 0, counts[0], 1)
    both = a.counts * share_b
    # Where one side is empty, the mean of the other is kept unchanged.
    delta = (means_b[0] - means_a[0]) + (means_b[1] - means_a[1])
    delta = jnp.where((both != 0)[:, None], delta, 0)
    present_a = a.present[:, None]
    start = tuple(jnp.where(present_a, *parts) for parts in zip(means_a, means_b, strict=True))
    means = _add(start, (_rounded(delta * share_b[:, None]), 0))
    between = _rounded(both * jnp.sum(delta**2, axis=1))
    squares = _add(
        (a.squared_deviations, a.squared_deviation_residuals),
        _add((b.squared_deviations, b.squared_deviation_residuals), (between, 0)),
    )
    scatter = None, None
    if a.scatter is not None:
        between = _rounded(_outer_sum(delta * both[:, None], delta))
        scatter = _add(
            (a.scatter, a.scatter_residual), _add((b.scatter, b.scatter_residual), (between, 0))
        )
    return ClassStatistics(
        counts=counts[0],
        origin=a.origin,
        mean_offsets=means[0],
        squared_deviations=squares[0],
        scatter=scatter[0],
        num_out_of_range=a.num_out_of_range + b.num_out_of_range,
        count_residuals=counts[1],
        mean_offset_residuals=means[1],
        squared_deviation_residuals=squares[1],
        scatter_residual=scatter[1],
    )


# Jitted for callers outside jit, where each operation of a block would be run on its own.
@jax.jit
def _add_rows(
    stats: ClassStatistics,
    embeddings: Float[Array, "B K"],
    labels: Int[Array, "B"],
    weights: Float[Array, "B"],
) -> ClassStatistics:
    """Adds rows whose labels are in range; on the CPU, a block at a time."""
    num_rows, num_classes = labels.size, stats.counts.size
    if num_rows == 0:
        return stats
    # Every block is merged into (C, K) arrays, so it should have several times C rows. Accelerators
    # take all rows at once: they reuse memory, and a loop would gather a sharded batch.
    on_cpu = jax.default_backend() == "cpu"
    most = max(_CPU_BLOCK_ROWS, 4 * num_classes) if on_cpu else num_rows
    num_blocks = -(-num_rows // most)
    size = -(-num_rows // num_blocks)
    first = num_rows - (num_blocks - 1) * size

    def add_block(stats, start, size):
        block = [
            jax.lax.dynamic_slice_in_dim(rows, start, size)
            for rows in (embeddings, labels, weights)
        ]
        block = _block_statistics(*block, stats)
        return _merge_about_one_origin(stats._replace(origin=block.origin), block)

    # The first block is added outside the loop, so that the statistics enter the loop with the
    # type of the data: its dtype and, under shard_map, the axes along which it varies.
    stats = add_block(stats, 0, first)
    if num_blocks == 1:
        return stats
    return jax.lax.fori_loop(
        0, num_blocks - 1, lambda i, stats: add_block(stats, first + i * size, size), stats
    )


def _block_statistics(
    embeddings: Float[Array, "B K"],
    labels: Int[Array, "B"],
    weights: Float[Array, "B"],
    so_far: ClassStatistics,
) -> ClassStatistics:
    num_classes = so_far.counts.size
    # Rows of weight 0 may contain anything, NaN included.
    embeddings = jnp.where((weights != 0)[:, None], embeddings, 0)

    def class_sums(values):
        return jax.ops.segment_sum(values, labels, num_classes)

    def of_rows(values):
        # Labels are known to be in range, and checking every element would double the time.
        return values.at[labels].get(mode="promise_in_bounds")

    counts = class_sums(weights)
    present = (counts != 0)[:, None]
    safe_counts = jnp.where(present, counts[:, None], 1)
    # Any centre near the class will do, so it needs no gradient. Differences from a near centre are
    # almost exact, so centre + correction is the mean to far more digits than one float has, and
    # S_i is second order in the rounding. The centre is the mean so far, which saves a pass over
    # the rows. It is a member of the class if there is no mean yet, or if the two differ by no more
    # than the rounding of a long sum; so the mean of equal embeddings is exactly their value.
    means = so_far.origin[None] + (so_far.mean_offsets + so_far.mean_offset_residuals)
    rows = jnp.where(weights != 0, jnp.arange(labels.size, dtype=jnp.int32), labels.size)
    first = jax.ops.segment_min(rows, labels, num_classes)
    members = embeddings[jnp.minimum(first, labels.size - 1)]
    known = so_far.present[:, None] & (jnp.abs(members - means) > 1e-5 * jnp.abs(members))
    centers = jax.lax.stop_gradient(jnp.where(known, means, members))
    # The barrier keeps them one array, which is summed and squared in one pass while in cache.
    deviations = jax.lax.optimization_barrier(embeddings - of_rows(centers))
    corrections = _rounded(class_sums(deviations * weights[:, None]) / safe_counts)

    def centred():
        return deviations - of_rows(corrections)

    def sum_of_squares(deviations):
        return class_sums(weights * jnp.sum(deviations**2, axis=1))

    if so_far.scatter is not None:
        deviations = centred()
        squares = sum_of_squares(deviations)
        scatter = _outer_sum(deviations * weights[:, None], deviations)
    else:
        # S_i = sum w |z - c|^2 - n_i |mu_i - c|^2 saves a pass if the centre is near enough for
        # the difference to keep its digits (Chan, Golub, LeVeque 1983, section 3).
        about_centers = sum_of_squares(deviations)
        shifts = counts * jnp.sum(corrections**2, axis=1)
        squares = jax.lax.cond(
            jnp.any(shifts > 0.5 * about_centers),
            lambda: sum_of_squares(centred()),
            lambda: about_centers - shifts,
        )
        scatter = None

    known_counts = jnp.where(jnp.isfinite(counts), counts, 0)
    safe_total = jnp.where(jnp.any(known_counts != 0), jnp.sum(known_counts), 1)
    # A class that is not finite must not affect the others.
    means = centers + corrections
    finite = jnp.where(jnp.isfinite(means) & present, means, 0)
    origin = _rounded(jnp.sum(finite * known_counts[:, None], axis=0) / safe_total)
    origin = jnp.where(jnp.any(so_far.present), so_far.origin, jax.lax.stop_gradient(origin))
    offsets, residuals = _add((centers, corrections), (-origin[None], 0))
    return ClassStatistics(
        counts=counts,
        origin=origin,
        mean_offsets=jnp.where(present, offsets, 0),
        squared_deviations=squares,
        scatter=scatter,
        num_out_of_range=jnp.zeros((), jnp.int32),
        count_residuals=jnp.zeros_like(counts),
        mean_offset_residuals=jnp.where(present, residuals, 0),
        squared_deviation_residuals=jnp.zeros_like(counts),
        scatter_residual=None if scatter is None else jnp.zeros_like(scatter),
    )


def _about(origin: Float[Array, "K"], stats: ClassStatistics) -> ClassStatistics:
    """Returns the same statistics with the means as offsets from another origin."""
    shift, shift_residual = two_sum(stats.origin, -origin)
    moved = _add(
        (stats.mean_offsets, stats.mean_offset_residuals), (shift[None], shift_residual[None])
    )
    high, low = (jnp.where(stats.present[:, None], part, 0) for part in moved)
    return stats._replace(origin=origin, mean_offsets=high, mean_offset_residuals=low)


def _rounded(x: Array) -> Array:
    """Rounds a product or quotient to one bit less than its format, so that all its uses agree.

    XLA may compute a product again in each kernel that uses it and fuse it, unrounded, with an
    addition (FMA); then value - rounded(value) is not the rounding error. XLA does not remove an
    explicit rounding, unless it is to the format itself.
    """
    format_ = jnp.finfo(x.dtype)
    return jax.lax.reduce_precision(x, format_.nexp, format_.nmant - 1)


def _add(a: tuple, b: tuple) -> tuple[Array, Array]:
    """Returns the sum of two (value, residual) pairs as such a pair."""
    total, residual = two_sum(a[0], b[0])
    return two_sum(total, residual + (a[1] + b[1]))


def two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """Returns a + b rounded, and its exact rounding error (Knuth, TAOCP 2, 4.2.2, theorem B).

    A term that is a product must first be passed through `_rounded`.
    """
    total = a + b
    b_rounded = total - a
    return total, (a - (total - b_rounded)) + (b - b_rounded)


def _outer_sum(left: Array, right: Array) -> Array:
    """Returns left^T right, which must be symmetric: the lower left quarter is not computed."""
    half = right.shape[1] // 2

    def product(rows, columns):
        return jnp.matmul(left[:, rows].T, right[:, columns], precision="highest")

    low, high = slice(0, half), slice(half, None)
    corner = product(low, high)
    return jnp.block([[product(low, low), corner], [corner.T, product(high, high)]])
