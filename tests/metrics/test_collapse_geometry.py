"""NC1 to NC4: closed forms, oracle, invariances, degenerate and extreme inputs."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gc_nc.metrics import (
    init_class_statistics,
    nc1,
    nc2,
    nc3,
    nc4,
    nearest_class_mean,
    update_class_statistics,
)
from tests.metrics import padded_statistics
from tests.metrics.metric_table import jit
from tests.metrics.padded_statistics import filled_up, merge, statistics, update
from tests.rounding import assert_same_numbers

# One program instead of the many small ones of eager execution. A traced call cannot warn.
nc1_jitted, nc2_jitted, nc3_jitted, nc4_jitted = (
    getattr(padded_statistics, name) for name in ("nc1", "nc2", "nc3", "nc4")
)


def simplex(k):
    return np.sqrt(k / (k - 1)) * (np.eye(k) - 1 / k)


def rotation(dim, seed=1):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(dim, dim)))[0]


def example(seed=0, num_present=4, dim=6, shift=0.0):
    """Unbalanced classes; class 2 of num_present + 1 is absent."""
    rng = np.random.default_rng(seed)
    present = np.delete(np.arange(num_present + 1), 2)
    labels = np.concatenate([present, rng.choice(present, 15 * num_present)])
    z = rng.normal(size=(labels.size, dim)) * rng.uniform(0.5, 2, dim)
    z = z + 3 * rng.normal(size=(num_present + 1, dim))[labels] + shift
    head = rng.normal(size=(dim, num_present + 1))
    return z.astype(np.float32), labels, head.astype(np.float32)


def oracle(z, labels, head, rcond=1e-9):
    """NC1, the four fields of NC2, NC3, in float64 and by the explicit pseudo-inverse."""
    z, classes = z.astype(np.float64), np.unique(labels)
    k = classes.size
    means = np.stack([z[labels == c].mean(0) for c in classes])
    within = sum(
        (z[labels == c] - m).T @ (z[labels == c] - m) for c, m in zip(classes, means, strict=True)
    ) / len(z)
    m = means - means.mean(0)
    nc1_value = np.trace(within @ np.linalg.pinv(m.T @ m / k, rcond=rcond)) / k
    norms = np.linalg.norm(m, axis=1)
    cosines = (m / norms[:, None]) @ (m / norms[:, None]).T
    cosines = cosines[~np.eye(k, dtype=bool)]
    gram = m @ m.T
    ideal = (np.eye(k) - 1 / k) / np.sqrt(k - 1)
    nc2_value = (
        norms.std() / norms.mean(),
        cosines.std(),
        np.abs(cosines + 1 / (k - 1)).mean(),
        np.linalg.norm(gram / np.linalg.norm(gram) - ideal),
    )
    w = head[:, classes].astype(np.float64)
    difference = m.T / np.linalg.norm(m) - w / np.linalg.norm(w)
    return nc1_value, nc2_value, (difference**2).sum()


@pytest.mark.parametrize(
    ("num_present", "dim", "shift"), [(4, 6, 0.0), (4, 6, 1000.0), (4, 2, 0.0)]
)
def test_equals_a_float64_oracle(num_present, dim, shift):
    z, labels, head = example(num_present=num_present, dim=dim, shift=shift)
    expected = oracle(z, labels, head)
    stats = statistics(z, labels, num_present + 1)
    # rtol 2e-5: NC1 takes inverse squares of singular values that span a factor of ten.
    np.testing.assert_allclose(nc1_jitted(stats), expected[0], rtol=2e-5)
    np.testing.assert_allclose(nc2_jitted(stats), expected[1], rtol=1e-5)
    np.testing.assert_allclose(nc3_jitted(stats, head), expected[2], rtol=1e-5)


@pytest.mark.parametrize("k", [2, 3, 5])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_simplex_etf_is_complete_collapse(k, scale):
    etf = scale * np.pad(simplex(k), ((0, 0), (0, 6 - k))) @ rotation(6) + scale
    z, labels = np.repeat(etf, 3, axis=0).astype(np.float32), np.repeat(np.arange(k), 3)
    stats = statistics(z, labels, k)
    # Squares of float32's rounding of the points themselves.
    np.testing.assert_allclose(nc1_jitted(stats), 0, atol=1e-12)
    np.testing.assert_allclose(nc2_jitted(stats), 0, atol=2e-6)
    head = np.pad(1e4 * (etf - etf.mean(0)).T, ((0, 0), (0, 5 - k)))
    np.testing.assert_allclose(nc3_jitted(stats, head), 0, atol=1e-12)
    np.testing.assert_allclose(nc3_jitted(stats, -head), 4, rtol=1e-5)
    assert nc4_jitted(labels, z, stats) == 0


def test_hand_values():
    # Variance 1 in x, the only direction in which the means (0, 0), (4, 0) differ; that in y does
    # not count. S_W = diag(1, 9), S_B = diag(4, 0): NC1 = 1/4 / 2.
    z = np.array([[-1, 3], [1, -3], [3, 3], [5, -3]])
    stats = statistics(z, [0, 0, 1, 1], 2)
    np.testing.assert_allclose(nc1_jitted(stats), 1 / 8, rtol=1e-6)
    np.testing.assert_allclose(nc2_jitted(stats), 0, atol=1e-6)
    # M = [(-2, 0), (2, 0)], W = [(0, 1), (0, 0)]: orthogonal.
    np.testing.assert_allclose(nc3_jitted(stats, np.eye(2, 5, -1)), 2, rtol=1e-6)
    # Three means on a right angle, centred: (-1, -1), (2, -1), (-1, 2).
    stats = statistics([[0, 0], [3, 0], [0, 3]], [0, 1, 2], 3)
    norms = np.sqrt([2, 5, 5])
    cosines = np.array([-1 / np.sqrt(10), -1 / np.sqrt(10), -4 / 5])
    result = nc2_jitted(stats)
    np.testing.assert_allclose(result.equinorm, norms.std() / norms.mean(), rtol=1e-5)
    np.testing.assert_allclose(result.equiangle, cosines.std(), rtol=1e-5)
    np.testing.assert_allclose(result.maximal_angle, np.abs(cosines + 0.5).mean(), rtol=1e-5)
    # G = [[2, -1, -1], [-1, 5, -4], [-1, -4, 5]], |G| = sqrt(90); <G, I - 11^T/3> = 12.
    expected = np.sqrt(2 - 2 * 12 / np.sqrt(90) / np.sqrt(2))
    np.testing.assert_allclose(result.etf_error, expected, rtol=1e-5)


def test_s4_equal_means_are_not_collapse():
    stats = statistics([[-1.0], [1.0], [-1.0], [1.0]], [0, 0, 1, 1], 2)
    with pytest.warns(RuntimeWarning, match="two class means coincide: nc1"):
        assert np.isposinf(nc1(stats))
    with pytest.warns(RuntimeWarning, match="all class means coincide: nc2"):
        assert np.isposinf(nc2(stats)).all()
    with pytest.warns(RuntimeWarning, match="all class means coincide: nc3"):
        assert np.isposinf(nc3(stats, np.ones((6, 5))))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert np.isposinf(nc1_jitted(stats))
    assert not caught


def test_s8_means_are_centred_around_their_unweighted_mean():
    # S_B = 4: with S_W from a spread of 1 in class 0, NC1 = (2/4) / 4 / 2.
    stats = statistics([[-1.0], [0.0], [1.0], [4.0]], [0, 0, 0, 1], 2)
    np.testing.assert_allclose(nc1_jitted(stats), 0.5 / 4 / 2, rtol=1e-6)


@pytest.mark.parametrize("value", [0.0, 3.0, 1000.3])
def test_constant_embedding_is_undefined(value):
    z = np.full((6, 3), value)
    for labels in ([0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1]):
        stats = statistics(z, labels, 2)
        assert np.isnan(nc1_jitted(stats))
        assert np.isposinf(nc2_jitted(stats)).all()


@pytest.mark.parametrize("dim", [1, 6])
def test_means_on_a_line_are_legitimate(dim):
    # -1 and 1 around the means 0, 2, 9.5 along one direction: S_W = 1, S_B = 16.7222.
    direction = rotation(dim)[0]
    z = np.array([-1, 1, 1, 3, 8.5, 10.5])[:, None] * direction + 3
    stats = statistics(z, [0, 0, 1, 1, 2, 2], 3)
    # rtol: positions near 10 with a spread of 1.
    np.testing.assert_allclose(nc1_jitted(stats), 1 / np.var([0, 2, 9.5]) / 3, rtol=1e-5)


def test_a_mean_at_the_centre_has_no_direction():
    stats = statistics([[-1.0], [0.0], [1.0]], [0, 1, 2], 3)
    with pytest.warns(RuntimeWarning, match="no direction"):
        result = nc2(stats)
    np.testing.assert_allclose(result.equinorm, np.sqrt(2 / 9) / (2 / 3), rtol=1e-6)
    assert np.isposinf(result.equiangle)
    assert np.isposinf(result.maximal_angle)
    # G = diag-like [[1, 0, -1], [0, 0, 0], [-1, 0, 1]] of norm 2; <G, I - 11^T/3> = 2.
    np.testing.assert_allclose(result.etf_error, np.sqrt(2 - 2 / np.sqrt(2)), rtol=1e-5)


def test_dead_units_count_nowhere():
    z, labels, head = example()
    wide = np.pad(z, ((0, 0), (0, 200)))
    stats, wider = statistics(z, labels, 5), statistics(wide, labels, 5)
    measure = jit(lambda stats, head: (nc1(stats), nc2(stats), nc3(stats, head)))
    expected = nc1_jitted(stats), nc2_jitted(stats), nc3_jitted(stats, head)
    assert_same_numbers(measure(wider, np.pad(head, ((0, 200), (0, 0)))), expected)


def test_one_example_a_class_does_not_vary():
    z = np.random.default_rng(0).normal(size=(5, 6))
    assert nc1_jitted(statistics(z, np.arange(5), 5)) == 0


def test_invariances():
    z, labels, head = example()
    stats = statistics(z, labels, 5)
    turn = rotation(6).astype(np.float32)
    order = np.array([3, 0, 4, 1, 2])
    new_labels = np.argsort(order)[labels]
    for moved, moved_labels, moved_head in (
        (z @ turn, labels, turn.T @ head),
        (z + 5, labels, head),
        (3 * z, labels, 7 * head),
        (z, new_labels, head[:, order]),
    ):
        other = statistics(moved, moved_labels, 5)
        assert_same_numbers(nc1_jitted(other), nc1_jitted(stats))
        assert_same_numbers(nc2_jitted(other), nc2_jitted(stats))
        assert_same_numbers(nc3_jitted(other, moved_head), nc3_jitted(stats, head))


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e-15, 1e-8, 1e15, 1e18, 1e25, 1e36])
def test_extreme_scales_are_right_or_nan(scale):
    z, labels, head = example()
    expected = oracle(z, labels, head)
    stats = statistics(z * np.float32(scale), labels, 5)
    value = nc1_jitted(stats)
    if 1e-15 <= scale <= 1e15:
        assert np.isfinite(value)
    if not np.isnan(value):
        np.testing.assert_allclose(value, expected[0], rtol=2e-5)
    for value, wanted in (
        (np.array(nc2_jitted(stats)), np.array(expected[1])),
        (np.array(nc3_jitted(stats, head)), np.array(expected[2])),
    ):
        assert np.isfinite(value).all() or not 1e-15 <= scale <= 1e15
        if not np.isnan(value).any():
            np.testing.assert_allclose(value, wanted, rtol=1e-5)
    for head_scale in (1e-30, 1e30):
        value = nc3_jitted(statistics(z, labels, 5), head * np.float32(head_scale))
        np.testing.assert_allclose(value, expected[2], rtol=1e-5)


def test_scatter_too_small_for_float32_is_unknown_not_collapse():
    # Deviations of 1e-21 square to 0; the means are 1e-20 apart.
    z = np.array([[0.0], [2], [10], [12]]) * 1e-21
    assert np.isnan(nc1_jitted(statistics(z, [0, 0, 1, 1], 2)))


def test_batched_equals_merged_equals_padded():
    z, labels, head = example()
    whole = statistics(z, labels, 5)
    batched = statistics(z, labels, 5, batch=16)
    merged = merge(statistics(z[:31], labels[:31], 5), statistics(z[31:], labels[31:], 5))
    # `statistics` pads.
    plain = update(init_class_statistics(5, 6, scatter=True), z, labels)
    for stats in (batched, merged, plain):
        assert_same_numbers(nc1_jitted(stats), nc1_jitted(whole))
        assert_same_numbers(nc2_jitted(stats), nc2_jitted(whole))
        assert_same_numbers(nc3_jitted(stats, head), nc3_jitted(whole, head))
        assert nc4_jitted(labels, z, stats) == nc4_jitted(labels, z, whole)


def test_an_origin_far_from_all_means_costs_no_accuracy():
    z, labels, head = example()
    expected = oracle(z, labels, head)
    near = statistics(z, labels, 5)
    # The same means as two floats each, held against a point 10^5 away.
    far = np.asarray(near.mean_offsets, np.float64) + np.asarray(near.origin, np.float64) + 123456.7
    high = far.astype(np.float32)
    far_stats = near._replace(
        origin=np.full(6, -123456.7, np.float32),
        mean_offsets=jnp.asarray(high),
        mean_offset_residuals=jnp.asarray((far - high).astype(np.float32)),
    )
    # rtol 2e-5: as in the oracle test.
    np.testing.assert_allclose(nc1_jitted(far_stats), expected[0], rtol=2e-5)
    np.testing.assert_allclose(nc2_jitted(far_stats), expected[1], rtol=1e-5)
    np.testing.assert_allclose(nc3_jitted(far_stats, head), expected[2], rtol=1e-5)


def test_the_head_of_an_absent_class_counts_nowhere():
    z, labels, head = example()
    stats = statistics(z, labels, 5)
    other = head.copy()
    other[:, 2] = np.nan
    np.testing.assert_array_equal(nc3_jitted(stats, other), nc3_jitted(stats, head))
    assert np.isnan(nc3_jitted(stats, np.zeros_like(head)))
    other[0, 0] = np.inf
    assert np.isnan(nc3_jitted(stats, other))


@jit
def total_and_gradient(z, labels, head):
    """NC1 to NC3 added up, and the gradient by the embeddings."""

    def total(z):
        stats = update_class_statistics(init_class_statistics(5, 6, scatter=True), z, labels)
        return nc1(stats) + sum(nc2(stats)) + nc3(stats, head)

    return jax.value_and_grad(total)(z)


@pytest.mark.parametrize("dim", [6, 2])
def test_gradients_against_central_differences(dim):
    z, labels, head = example(dim=dim)
    _, gradient = total_and_gradient(filled_up(z, 0, 6), labels, filled_up(head, 6, 5))
    direction = np.random.default_rng(2).normal(size=z.shape)

    def oracle_value(t):
        one, two, three = oracle(z + t * direction, labels, head)
        return one + sum(two) + three

    slope = (oracle_value(1e-5) - oracle_value(-1e-5)) / 2e-5
    # rtol: second order in the step, and float32 sums of terms of both signs.
    np.testing.assert_allclose(np.sum(gradient[:, :dim] * direction), slope, rtol=1e-3)


def test_gradients_at_a_simplex_etf_are_finite():
    # All singular values are equal there, where a differentiated SVD divides by 0.
    labels = np.repeat(np.arange(4), 16)
    z = np.repeat(simplex(4), 16, axis=0) + np.tile([[0.1], [-0.1]], (32, 4))
    z = filled_up(z.astype(np.float32), 0, 6)
    _, gradient = total_and_gradient(z, labels, filled_up(simplex(4), 6, 5).astype(np.float32))
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("num_present", [0, 1])
def test_fewer_than_two_classes(num_present):
    stats = init_class_statistics(5, 6, scatter=True)
    if num_present:
        stats = statistics(np.ones((2, 2)), np.ones(2, int))
    for measure in (
        nc1,
        nc2,
        lambda s: nc3(s, np.ones((6, 5))),
        lambda s: nc4(np.zeros(1, int), np.zeros((1, 6)), s),
        lambda s: nearest_class_mean(np.zeros((1, 6)), s),
    ):
        with pytest.raises(ValueError, match=f"{num_present} of 5 classes"):
            measure(stats)
    assert np.isnan(nc1_jitted(stats))
    assert np.isnan(nc2_jitted(stats)).all()
    assert np.isnan(nc3_jitted(stats, np.ones((6, 5))))
    assert np.isnan(nc4_jitted(np.zeros(1, int), np.zeros((1, 6)), stats))
    assert padded_statistics.nearest_class_mean(np.zeros((1, 6)), stats) == -1


def test_wrong_arguments_are_named():
    z, labels, head = example()
    stats = statistics(z, labels, 5)
    with pytest.raises(ValueError, match="scatter=True"):
        nc1(stats._replace(scatter=None))
    with pytest.raises(ValueError, match=r"\(5, 6\); \(K, C\) = \(6, 5\) is needed, so transpose"):
        nc3(stats, head.T)
    with pytest.raises(ValueError, match=r"shape \(6, 4\); \(K, C\) = \(6, 5\) is needed$"):
        nc3(stats, head[:, :4])
    with pytest.raises(ValueError, match=r"embeddings of shape \(64, 5\)"):
        nearest_class_mean(z[:, :5], stats)
    with pytest.raises(ValueError, match=r"predictions of shape \(64, 4\)"):
        nc4(np.zeros((64, 4)), z, stats)
    with pytest.raises(ValueError, match="predictions are float32"):
        nc4(labels.astype(np.float32), z, stats)
    with pytest.raises(ValueError, match="no examples"):
        nc4(labels[:0], z[:0], stats)
    with pytest.raises(ValueError, match="must be 0 or more"):
        nc4(labels, z, stats, weights=-np.ones(64))
    with pytest.raises(ValueError, match="all weights are 0"):
        nc4(labels, z, stats, weights=np.zeros(64))
    assert np.isnan(nc4_jitted(labels, z, stats, weights=np.zeros(64)))
