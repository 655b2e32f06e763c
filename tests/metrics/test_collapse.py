"""CDNV, NC and geometric collapse: closed forms, oracle, invariances, degenerate inputs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gc_nc.metrics import (
    cdnv_matrix,
    geometric_collapse,
    init_class_statistics,
    neural_collapse,
    update_class_statistics,
)
from tests.metrics import padded_statistics
from tests.metrics.metric_table import jit

statistics = functools.partial(padded_statistics.statistics, scatter=False)


def oracle(z, labels):
    """CDNV of ordered pairs of present classes, and their squared distances, in float64."""
    classes = np.unique(labels)
    z = z.astype(np.float64)
    means = {c: z[labels == c].mean(0) for c in classes}
    variances = {c: ((z[labels == c] - means[c]) ** 2).sum(1).mean() for c in classes}
    distances = {
        (i, j): ((means[i] - means[j]) ** 2).sum() for i in classes for j in classes if i != j
    }
    cdnv = {(i, j): (variances[i] + variances[j]) / (2 * d) for (i, j), d in distances.items()}
    return cdnv, distances


def example(seed=0, shift=0.0):
    rng = np.random.default_rng(seed)
    labels = rng.choice([0, 1, 3, 4], 60)
    z = rng.normal(size=(60, 6)) + 4 * rng.normal(size=(5, 6))[labels] + shift
    return z.astype(np.float32), labels


@pytest.mark.parametrize("shift", [0.0, 1000.0])
def test_equals_a_float64_oracle(shift):
    z, labels = example(shift=shift)
    cdnv, distances = oracle(z, labels)
    stats = statistics(z, labels, 5)
    matrix = np.asarray(cdnv_matrix(stats))
    for (i, j), value in cdnv.items():
        np.testing.assert_allclose(matrix[i, j], value, rtol=1e-5)
    assert np.isnan(np.diag(matrix)).all()
    assert np.isnan(matrix[2]).all()
    np.testing.assert_allclose(neural_collapse(stats), np.mean(list(cdnv.values())), rtol=1e-5)
    expected = 7.0 / 3 * sum(1 / d for d in distances.values())
    np.testing.assert_allclose(geometric_collapse(7.0, stats), expected, rtol=1e-5)


def test_simplex_etf_is_complete_collapse():
    k = 4
    etf = np.sqrt(k / (k - 1)) * (np.eye(k) - 1 / k)
    stats = statistics(np.repeat(etf, 3, axis=0), np.repeat(np.arange(k), 3), k)
    assert neural_collapse(stats) == 0
    # |mu_i - mu_j|^2 = 2 k / (k - 1), so GC / (k - 1) * k (k - 1) / d^2 = GC (k - 1) / 2.
    np.testing.assert_allclose(geometric_collapse(1.0, stats), (k - 1) / 2, rtol=1e-5)


def test_s5_one_example_has_variance_zero():
    np.testing.assert_allclose(
        neural_collapse(statistics([[0.0], [2.0], [10.0]], [0, 0, 1], 2)), 1 / 162, rtol=1e-6
    )


def test_s6_a_class_without_an_example_is_no_class():
    stats = statistics([[0.0], [2.0], [10.0], [12.0]], [0, 0, 2, 2], 3)
    np.testing.assert_allclose(neural_collapse(stats), 0.01, rtol=1e-6)
    # GC / (2 - 1) * 2 / 100.
    np.testing.assert_allclose(geometric_collapse(5.0, stats), 0.1, rtol=1e-6)


def test_s4_equal_means_are_not_collapse():
    stats = statistics([[-1.0], [1.0], [-1.0], [1.0]], [0, 0, 1, 1], 2)
    assert np.isinf(neural_collapse(stats))
    assert np.isinf(cdnv_matrix(stats)[0, 1])
    assert np.isinf(geometric_collapse(1.0, stats))


def test_constant_embedding_is_undefined():
    stats = statistics(np.full((4, 2), 3.0), [0, 0, 1, 1], 2)
    assert np.isnan(neural_collapse(stats))
    assert np.isnan(geometric_collapse(0.0, stats))


def test_distances_past_float32_are_unknown_not_infinite():
    stats = statistics(np.array([[1e20], [-1e20], [0], [1]]), [0, 1, 2, 2], 3)
    assert np.isnan(geometric_collapse(1.0, stats))
    assert np.isnan(neural_collapse(stats))


@pytest.mark.parametrize("first", [0.0, -1.0])
@pytest.mark.parametrize("batch", [None, 7])
@pytest.mark.parametrize("shuffled", [False, True])
def test_close_means_far_from_the_origin(first, batch, shuffled):
    """1e-3 apart at norm 1e3; the first batch is a class at 0 or at the opposite end."""
    rng = np.random.default_rng(0)
    center, step = rng.normal(size=(2, 6))
    center *= 1e3 / np.linalg.norm(center)
    step *= 1e-3 / np.linalg.norm(step)
    labels = np.repeat([2, 0, 1], 35)
    z = np.stack([center, center + step, first * center])[labels]
    z = (z + 1e-3 * rng.normal(size=z.shape)).astype(np.float32)
    order = np.r_[:5, 5 + rng.permutation(100)] if shuffled else np.arange(105)
    z, labels = z[order], labels[order]
    stats = statistics(z[5:], labels[5:], batch=batch, so_far=statistics(z[:5], labels[:5]))
    _, distances = oracle(z, labels)
    expected = sum(1 / d for d in distances.values()) / 2
    np.testing.assert_allclose(geometric_collapse(1.0, stats), expected, rtol=1e-5)


def test_memory_has_no_difference_of_every_pair():
    stats = jax.eval_shape(lambda: init_class_statistics(300, 512))
    for measure in (neural_collapse, jax.grad(neural_collapse, allow_int=True)):
        compiled = jax.jit(measure).lower(stats).compile()
        assert compiled.memory_analysis().temp_size_in_bytes <= 4 * 4 * (300 * 512 + 300**2)


def test_invariances():
    z, labels = example()
    stats = statistics(z, labels, 5)
    rotation, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(6, 6)))
    for moved, scale in ((z @ rotation.astype(np.float32), 1), (z + 5, 1), (3 * z, 3)):
        other = statistics(moved, labels, 5)
        np.testing.assert_allclose(neural_collapse(other), neural_collapse(stats), rtol=1e-5)
        np.testing.assert_allclose(
            geometric_collapse(1.0, other), geometric_collapse(1.0, stats) / scale**2, rtol=1e-5
        )
    relabelled = statistics(z, (labels + 2) % 5, 5)
    np.testing.assert_allclose(neural_collapse(relabelled), neural_collapse(stats), rtol=1e-5)


@pytest.mark.parametrize("num_present", [0, 1])
def test_fewer_than_two_classes(num_present):
    stats = statistics(np.ones((2, 2)), [1, 1]) if num_present else init_class_statistics(5, 6)
    for measure in (neural_collapse, lambda s: geometric_collapse(1.0, s)):
        with pytest.raises(ValueError, match=f"{num_present} of 5 classes"):
            measure(stats)
    assert np.isnan(padded_statistics.neural_collapse(stats))
    assert np.isnan(padded_statistics.geometric_collapse(1.0, stats))


def test_derivatives_are_right_and_finite_with_absent_classes():
    z, labels = example()
    direction = np.random.default_rng(2).normal(size=z.shape).astype(np.float32)

    def collapse(z):
        stats = update_class_statistics(init_class_statistics(5, 6), z, jnp.asarray(labels))
        return neural_collapse(stats), geometric_collapse(1.0, stats)

    def slope(z):
        """Of NC along the direction; a penalty needs its derivative."""
        return jnp.sum(jax.grad(lambda z: collapse(z)[0])(z) * direction)

    @jit
    def derivatives(z):
        return jax.grad(lambda z: sum(collapse(z)))(z), jax.grad(slope)(z)

    gradient, curvature = derivatives(z)
    assert np.isfinite(gradient).all()

    # Against central differences in float64 arithmetic of the oracle.
    def oracle_values(t):
        cdnv, distances = oracle(z + t * direction.astype(np.float64), labels)
        nc = np.mean(list(cdnv.values()))
        return nc, nc + sum(1 / d for d in distances.values()) / 3

    expected = (oracle_values(1e-4)[1] - oracle_values(-1e-4)[1]) / 2e-4
    np.testing.assert_allclose(np.sum(gradient * direction), expected, rtol=1e-3)
    expected = (oracle_values(1e-3)[0] - 2 * oracle_values(0)[0] + oracle_values(-1e-3)[0]) / 1e-6
    np.testing.assert_allclose(np.sum(curvature * direction), expected, rtol=1e-3)
