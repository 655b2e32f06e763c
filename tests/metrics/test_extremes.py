"""Inputs made to make the metrics lie: scales, ties, outliers, dtypes of labels, bad weights."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from gc_nc import metrics
from gc_nc.metrics import class_statistics
from tests.metrics import padded_statistics
from tests.metrics.metric_table import jit
from tests.rounding import assert_same_numbers

KEY = jax.random.key(0)


statistics = partial(padded_statistics.statistics, scatter=False)


@pytest.mark.parametrize("wrap", [lambda f: f, jit])
@pytest.mark.parametrize(("dtype", "labels"), [(jnp.uint8, [0, 100, 255]), (jnp.int8, [0, 1, 127])])
def test_the_number_of_classes_need_not_fit_the_labels_dtype(wrap, dtype, labels):
    # In 8 bits 300 is 44.
    num_classes = 300

    def measure(labels):
        empty = metrics.init_class_statistics(num_classes, 2)
        stats = metrics.update_class_statistics(empty, jnp.ones((3, 2)), labels)
        norms_of_classes = metrics.class_geometric_complexity(jnp.ones(3), labels, num_classes)
        return stats.counts, stats.num_out_of_range, norms_of_classes

    counts, num_out_of_range, class_gc = wrap(measure)(jnp.array(labels, dtype))
    assert num_out_of_range == 0
    np.testing.assert_array_equal(np.flatnonzero(counts), labels)
    np.testing.assert_array_equal(np.flatnonzero(class_gc == 1), labels)


@pytest.mark.parametrize(("num_rows", "block_rows", "batch"), [(301, 64, None), (303, 999, 7)])
def test_equal_embeddings_do_not_vary_whatever_their_weights(
    monkeypatch, num_rows, block_rows, batch
):
    # 301 rows are a shape of this test alone: no program compiled for other blocks is taken.
    monkeypatch.setattr(class_statistics, "_CPU_BLOCK_ROWS", block_rows)
    rng = np.random.default_rng(0)
    embeddings = np.tile(rng.normal(size=6), (num_rows, 1))
    labels, weights = rng.integers(0, 5, num_rows), rng.uniform(0.1, 2, num_rows)
    rows = padded_statistics.ROWS if batch else num_rows
    stats = statistics(embeddings, labels, weights=weights, batch=batch, rows=rows)
    np.testing.assert_array_equal(stats.squared_deviations, 0)
    # 0 / 0, not the noise of one over that of the other.
    assert np.isnan(metrics.neural_collapse(stats))
    assert np.isnan(metrics.poincare_constant(np.zeros(5), stats))


@pytest.mark.parametrize(
    ("outlier", "separation"), [(1e6, 4e-3), (-1e7, 2e-2), (1e9, 1.0), (0.0, 4e-3)]
)
def test_nearest_mean_whatever_came_first(outlier, separation):
    rng = np.random.default_rng(0)
    means = (1e4 + separation * rng.normal(size=(9, 16))).astype(np.float32)
    labels = np.concatenate([[9], np.repeat(np.arange(9), 4)])
    embeddings = np.concatenate([np.full((1, 16), outlier, np.float32), np.repeat(means, 4, 0)])
    stats = statistics(embeddings, labels, 10, batch=1)
    nearest = padded_statistics.nearest_class_mean(means, stats)
    np.testing.assert_array_equal(nearest, np.arange(9))


def test_nearest_mean_of_values_far_apart():
    stats = statistics([[1.0], [2.0], [1e25]], [0, 1, 2], 3)
    nearest = padded_statistics.nearest_class_mean([[2], [1], [1e25], [1e24], [1.5]], stats)
    # 1.5 is a tie, which the lowest label wins.
    np.testing.assert_array_equal(nearest, [1, 0, 2, 0, 0])
    tiny = statistics([[1e-30], [2e-30], [1.0]], [0, 1, 2], 3)
    assert padded_statistics.nearest_class_mean([[2e-30]], tiny) == 1


@pytest.mark.parametrize("bad_first", [True, False])
def test_one_bad_row_spoils_its_own_class_only(bad_first):
    rng = np.random.default_rng(0)
    embeddings = rng.normal(size=(60, 6)).astype(np.float32)
    labels = np.arange(60) % 3
    row = 0 if bad_first else 57
    embeddings[row] = np.nan
    stats = statistics(embeddings, labels, 3, batch=30)
    for class_ in (1, 2):
        own = embeddings[labels == class_].astype(np.float64)
        assert_same_numbers(stats.means[class_], own.mean(0))
        assert_same_numbers(stats.variances[class_], own.var(0).sum())
    assert np.isnan(stats.means[0]).all()
    assert np.isnan(stats.variances[0])
    assert np.isnan(metrics.neural_collapse(stats))


def test_scatter_of_very_many_small_batches():
    num_batches = 200_000
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(64, 3)).astype(np.float32)
    stats = metrics.init_class_statistics(1, 3, scatter=True)

    @jax.jit
    def add_all(stats):
        def add(i, stats):
            row = jax.lax.dynamic_slice_in_dim(jnp.asarray(rows), i % 64, 1)
            return metrics.update_class_statistics(stats, row, jnp.zeros(1, jnp.int32))

        return jax.lax.fori_loop(0, num_batches, add, stats)

    scatter = add_all(stats).scatter
    drawn = rows.astype(np.float64)
    # Single floats were off by 5e-5 here; the bias grows with the number of batches.
    np.testing.assert_allclose(scatter, np.cov(drawn.T, bias=True) * num_batches, rtol=1e-6)


@pytest.mark.parametrize(
    ("spread", "distance", "expected"),
    [
        # 2 d^2 is past float32, d^2 is not.
        (1e18, 1.5e19, (1e18 / 1.5e19) ** 2),
        (1e-12, 1e-10, 1e-4),
        # d^2 would be flushed: unknown, neither collapse nor equal means.
        (1e-20, 1e-17, np.nan),
        (1e-18, 1e-19, np.nan),
        (1.0, 1e25, np.nan),
        (1.0, 0.0, np.inf),
    ],
)
def test_cdnv_at_the_ends_of_float32(spread, distance, expected):
    embeddings = [[-spread], [spread], [distance - spread], [distance + spread]]
    stats = statistics(embeddings, [0, 0, 1, 1], 2)
    np.testing.assert_allclose(metrics.neural_collapse(stats), expected, rtol=1e-4)
    assert np.isnan(metrics.geometric_collapse(1.0, stats)) == np.isnan(expected)


@pytest.mark.parametrize("noise", [1e-2, 1e-3, 1e-4, 0.0])
def test_nc1_says_when_float32_cannot_tell(noise):
    """Most of the variance lies outside of what the class means span."""
    rng = np.random.default_rng(0)
    means = rng.normal(size=(4, 6))
    labels = np.arange(96) % 4
    basis = np.linalg.svd(means - means.mean(0))[2][3:]
    across = rng.normal(size=(12, 4, 3)) @ basis
    across = 30 * np.concatenate([across, -across]).reshape(96, 6)
    z = means[labels] + noise * rng.normal(size=(96, 6)) + across
    value = float(padded_statistics.nc1(statistics(z, labels, scatter=True)))
    z = z.astype(np.float32).astype(np.float64)
    centres = np.stack([z[labels == i].mean(0) for i in range(4)])
    within = (z - centres[labels]).T @ (z - centres[labels]) / 96
    between = np.cov(centres.T, bias=True)
    expected = np.trace(within @ np.linalg.pinv(between, rcond=1e-10)) / 4
    assert np.isnan(value) or abs(value - expected) < 0.3 * expected
    assert np.isnan(value) == (noise < 1e-2)


X, LABELS = np.arange(24, dtype=np.float32).reshape(4, 6), np.array([0, 0, 1, 1])
OF_WEIGHTS = {
    "update_class_statistics": lambda w: metrics.update_class_statistics(
        metrics.init_class_statistics(5, 6), X, LABELS, weights=w
    ),
    "geometric_complexity": lambda w: metrics.geometric_complexity(jnp.sin, X, weights=w),
    "estimate": lambda w: metrics.estimate_geometric_complexity(jnp.sin, X, KEY, weights=w).mean,
    "class_gc": lambda w: metrics.class_geometric_complexity(X[:, 0], LABELS, 5, weights=w)[0],
    "nc4": lambda w: metrics.nc4(LABELS, X, statistics(X, LABELS), weights=w),
}
of_weights = jit(lambda w: {name: call(w) for name, call in OF_WEIGHTS.items()})


@pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf])
def test_a_bad_weight_is_refused_and_shows_under_jit(bad):
    weights = np.array([1.0, bad, 1.0, 1.0], np.float32)
    for call in OF_WEIGHTS.values():
        with pytest.raises(ValueError, match="must be 0 or more and finite"):
            call(weights)
    found = of_weights(weights)
    stats = found.pop("update_class_statistics")
    for name, value in found.items():
        assert np.isnan(value), name
    np.testing.assert_allclose(stats.means[1], [15, 16, 17, 18, 19, 20], rtol=1e-6)
    assert np.isnan(stats.variances[0])
    assert np.isnan(metrics.neural_collapse(stats))


@pytest.mark.parametrize("scale", [1e9, 1e-12, 1e18, 1e-18])
def test_standard_errors_whose_squares_are_out_of_range(scale):
    x = np.array([[1.0], [3], [5], [7]])
    estimate = metrics.estimate_geometric_complexity(
        jax.tree_util.Partial(lambda s, x: s * x[:, :1] ** 2, jnp.float32(scale)), x, KEY
    )
    norms = (2 * scale * x[:, 0]) ** 2
    np.testing.assert_allclose(estimate.mean, norms.mean(), rtol=1e-5)
    np.testing.assert_allclose(estimate.sem, norms.std(ddof=1) / 2, rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-30, 1e30, 1e36])
def test_weights_of_any_scale(scale):
    x = np.array([[1.0, 2], [3, 4], [5, 6]], np.float32)
    weights = np.array([1.0, 2, 1], np.float32)
    square = jax.tree_util.Partial(jnp.square)
    expected = metrics.geometric_complexity(square, x, weights=weights)
    found = metrics.geometric_complexity(square, x, weights=scale * weights)
    assert_same_numbers(found, expected)


def test_norms_near_the_largest_float():
    x = np.ones((3, 2), np.float32)
    large = metrics.geometric_complexity(lambda x: 1.2e19 * x[:, :1], x)
    np.testing.assert_allclose(large, 1.44e38, rtol=1e-6)


def test_the_gradient_of_a_standard_error_is_finite_without_spread():
    def sem(weight):
        embed = jax.tree_util.Partial(lambda w, x: x @ w, weight)
        return metrics.estimate_geometric_complexity(embed, jnp.ones((4, 2)), KEY).sem

    np.testing.assert_array_equal(jit(jax.grad(sem))(jnp.eye(2)), 0)


@functools.cache
def norms_with_a_number_missing():
    """By method, and exact by None, of four examples of which the third is NaN."""
    x = np.ones((4, 3), np.float32)
    x[2] = np.nan

    def embed(x):
        # ReLU maps NaN to slope 0.
        return jax.nn.relu(x @ jnp.ones((3, 3)))

    def measure(x):
        estimates = [
            metrics.estimate_squared_jacobian_norms(embed, x, KEY, method=method, num_probes=3)
            for method in metrics.ESTIMATION_METHODS
        ]
        return metrics.squared_jacobian_norms(embed, x), *estimates

    return dict(zip([None, *metrics.ESTIMATION_METHODS], jit(measure)(x), strict=True))


@pytest.mark.parametrize("method", [None, *metrics.ESTIMATION_METHODS])
def test_an_embedding_that_is_not_a_number_is_not_flat(method):
    is_nan = np.isnan(norms_with_a_number_missing()[method])
    np.testing.assert_array_equal(is_nan, [False, False, True, False])


def test_an_interval_of_norms_near_the_largest_float():
    interval = metrics.geometric_complexity_interval(
        np.full(1000, 1e36, np.float32), value_range=2e36, method="hoeffding"
    )
    assert interval.lower < 1e36 < interval.upper < 2e36
    everything = metrics.geometric_complexity_interval(np.ones(5), value_range=np.inf)
    assert everything == (0, np.inf)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.nearest_mean_error_bound(0.1, 2.5), "num_classes=2.5 must be a whole"),
        (lambda: metrics.nearest_mean_error_bound(0.1, 3, np.nan), "num_shots=nan must be a whole"),
        (lambda: metrics.nearest_mean_error_bound(np.ones(2), 3), "nc has shape"),
        (lambda: metrics.init_class_statistics(2.5, 3), "num_classes=2.5 must be a whole"),
        (
            lambda: metrics.geometric_collapse(-1.0, statistics(np.eye(2), [0, 1], 2)),
            "gc=-1.0 must be 0 or more",
        ),
        (
            lambda: metrics.geometric_complexity_interval(np.ones(5), value_range=np.ones(2)),
            "value_range has shape",
        ),
    ],
)
def test_what_is_no_number_is_refused(call, message):
    # Users do not have the tests' type checks, which would come first.
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        with pytest.raises(ValueError, match=message):
            call()
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
