"""The nearest class mean and NC4: oracle, ties, close means, scales, widths of labels."""

import jax.numpy as jnp
import numpy as np
import pytest

from gc_nc import metrics
from tests.metrics.padded_statistics import nc4, nearest_class_mean, statistics
from tests.metrics.test_collapse_geometry import example


def test_nearest_class_mean_equals_an_oracle_and_leaves_absent_classes_out():
    z, labels, _ = example(dim=6)
    stats = statistics(z, labels, 5)
    means = np.stack([z[labels == c].mean(0) if c != 2 else np.full(6, np.inf) for c in range(5)])
    queries = np.random.default_rng(3).normal(size=(100, 6)).astype(np.float32) * 4
    expected = ((queries[:, None] - means[None]) ** 2).sum(2).argmin(1)
    assert set(expected) == {0, 1, 3, 4}
    np.testing.assert_array_equal(nearest_class_mean(queries, stats), expected)
    # The origin, where an absent class would sit, belongs to the classes present.
    assert nearest_class_mean(np.asarray(stats.origin)[None], stats) != 2


def test_nearest_class_mean_takes_the_lowest_label_at_ties():
    stats = statistics([[1.0], [-1.0], [1.0]], [1, 2, 3], 4)
    np.testing.assert_array_equal(
        nearest_class_mean(np.array([[0.0], [2], [-2]]), stats), [1, 1, 2]
    )


def test_nearest_class_mean_tells_close_means_apart_at_a_large_norm():
    # Squared norms of 6e8 resolve 64; the distances here are of order 1.
    base = np.full(6, 1e4)
    z = base + np.eye(6)[:3]
    stats = statistics(z, [0, 1, 2], 3)
    np.testing.assert_array_equal(nearest_class_mean(z.astype(np.float32), stats), [0, 1, 2])


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_nearest_class_mean_is_scale_free(scale):
    z, labels, _ = example()
    plain = nearest_class_mean(z, statistics(z, labels, 5))
    scaled = (z * np.float32(scale)).astype(np.float32)
    np.testing.assert_array_equal(nearest_class_mean(scaled, statistics(scaled, labels, 5)), plain)


def test_nc4_counts_disagreements_by_weight():
    stats = statistics([[0.0], [1.0], [5.0]], [0, 1, 2], 4)
    z = np.array([[0.1], [0.9], [4.0], [np.nan]], np.float32)  # Padded to 5 classes.
    # Nearest: 0, 1, 2. Class 3 is absent: predicting it always differs.
    weights = np.array([1.0, 2.0, 5.0, 0.0])
    for labels, share in (([0, 1, 2, 9], 0), ([0, 0, 2, 0], 2 / 8), ([3, 1, 1, 0], 6 / 8)):
        labels = np.array(labels)
        np.testing.assert_allclose(nc4(labels, z, stats, weights=weights), share, rtol=1e-6)
        logits = np.where(np.arange(5)[None] == labels[:, None], 1.0, -np.inf)
        logits[3] = np.nan
        np.testing.assert_allclose(nc4(logits, z, stats, weights=weights), share, rtol=1e-6)
    # Without weights all count; what is not known is not agreement.
    z = np.pad(z, ((0, 0), (0, 5)))
    third = metrics.nc4(np.array([0, 0, 2]), z[:3], stats)
    np.testing.assert_allclose(third, 1 / 3, rtol=1e-6)
    assert np.isnan(nc4(np.array([0, 1, 2, 0]), z, stats))
    assert np.isnan(nc4(np.full((4, 5), np.nan), z, stats, weights=weights))


@pytest.mark.parametrize(
    "dtype",
    [
        np.uint8,
        *(pytest.param(d, marks=pytest.mark.slow) for d in (np.int64, jnp.uint8, jnp.int32)),
    ],
)
def test_nc4_takes_labels_of_any_width(dtype):
    z = np.repeat(np.arange(300.0), 2)[:, None]
    stats = statistics(z, np.repeat(np.arange(300), 2), 300)
    labels = np.array([0, 1, 255])
    labels = jnp.asarray(labels, dtype) if dtype in (jnp.uint8, jnp.int32) else labels.astype(dtype)
    z = np.pad(z[[0, 2, 510]], ((0, 0), (0, 5)))
    assert metrics.nc4(labels, z, stats) == 0
    # 2^32 + 1 is not 1.
    wide = metrics.nc4(np.array([1, 2**32 + 1, 2]), z[[1, 1, 1]], stats)
    np.testing.assert_allclose(wide, 2 / 3, rtol=1e-6)
