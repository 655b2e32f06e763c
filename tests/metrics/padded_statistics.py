"""Class statistics of a test's rows by few compiled programs, and the collapse metrics compiled.

A program is compiled for each shape. So rows, classes and dimensions are filled up to common ones,
by rows of weight 0, classes without an example and dimensions at 0, which must change nothing.
"""

import jax
import jax.numpy as jnp
import numpy as np

from gc_nc import metrics
from tests.metrics.metric_table import C, K

ROWS = 100

update, merge = jax.jit(metrics.update_class_statistics), jax.jit(metrics.merge_class_statistics)
neural_collapse = jax.jit(metrics.neural_collapse)
geometric_collapse = jax.jit(metrics.geometric_collapse)
nc1, nc2 = jax.jit(metrics.nc1), jax.jit(metrics.nc2)
_nc3, _nc4 = jax.jit(metrics.nc3), jax.jit(metrics.nc4)
_nearest_class_mean = jax.jit(metrics.nearest_class_mean)


def filled_up(array, *shape, value=0.0):
    """`array` with `value` after its entries up to this shape, on axes that are shorter."""
    array = np.asarray(array)
    missing = [(0, max(0, n - m)) for n, m in zip(shape, array.shape, strict=True)]
    return np.pad(array, missing, constant_values=value)


def statistics(
    z, labels, num_classes=C, *, weights=None, batch=None, scatter=True, rows=ROWS, so_far=None
):
    """Statistics of rows (n, dim), given in batches of `batch`, each filled up to `rows` rows."""
    z, labels = np.asarray(z, np.float32), np.asarray(labels)
    weights = np.ones(len(z)) if weights is None else np.asarray(weights)
    shape = max(num_classes, C), max(z.shape[1], K)
    stats = so_far or metrics.init_class_statistics(*shape, scatter=scatter)
    for start in range(0, len(z), batch or len(z)):
        own = slice(start, start + (batch or len(z)))
        given = filled_up(z[own], 0, K)
        stats = update(
            stats,
            filled_up(given, rows, 0, value=np.nan).astype(np.float32),
            filled_up(labels[own], rows, value=99),
            weights=filled_up(weights[own], rows),
        )
    return stats


def nc3(stats, head):
    """As the metric's, of a head (dim, classes) filled up as the statistics are."""
    return _nc3(stats, filled_up(head, K, C))


def nearest_class_mean(queries, stats):
    """As the metric's, of (n, dim) queries filled up to ROWS rows."""
    filled = filled_up(np.asarray(queries, np.float32), ROWS, K)
    return np.asarray(_nearest_class_mean(filled, stats))[: len(queries)]


def nc4(predictions, z, stats, weights=None):
    """As the metric's, of rows filled up to ROWS rows of weight 0."""
    weights = np.ones(len(z)) if weights is None else np.asarray(weights)
    return _nc4(
        jnp.asarray(filled_up(predictions, ROWS, *np.shape(predictions)[1:])),
        filled_up(np.asarray(z, np.float32), ROWS, K),
        stats,
        weights=filled_up(weights, ROWS),
    )
