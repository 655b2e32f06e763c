"""CDNV, NC and geometric collapse: closed forms, oracle, invariances, degenerate inputs."""

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

# One program instead of the many small ones of eager execution.
update_jitted = jax.jit(update_class_statistics)


def statistics(z, labels, num_classes):
    z = np.asarray(z, np.float32)
    return update_jitted(init_class_statistics(num_classes, z.shape[1]), z, np.asarray(labels))


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
    center, step = rng.normal(size=(2, 64))
    center *= 1e3 / np.linalg.norm(center)
    step *= 1e-3 / np.linalg.norm(step)
    labels = np.repeat([2, 0, 1], 50)
    z = np.stack([center, center + step, first * center])[labels]
    z = (z + 1e-3 * rng.normal(size=z.shape)).astype(np.float32)
    order = np.r_[:5, 5 + rng.permutation(145)] if shuffled else np.arange(150)
    z, labels = z[order], labels[order]
    stats = init_class_statistics(3, 64)
    for rows in (slice(0, 5), *(slice(i, i + (batch or 145)) for i in range(5, 150, batch or 145))):
        stats = update_jitted(stats, z[rows], labels[rows])
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
    stats = init_class_statistics(3, 2)
    if num_present:
        stats = update_class_statistics(stats, np.ones((2, 2)), np.ones(2, int))
    for measure in (neural_collapse, lambda s: geometric_collapse(1.0, s)):
        with pytest.raises(ValueError, match=f"{num_present} of 3 classes"):
            measure(stats)
        assert np.isnan(jax.jit(measure)(stats))


def test_jit_equals_eager_and_gradients_are_finite_with_absent_classes():
    z, labels = example()

    def nc(z):
        stats = update_class_statistics(init_class_statistics(5, 6), z, jnp.asarray(labels))
        return neural_collapse(stats) + geometric_collapse(1.0, stats)

    np.testing.assert_allclose(jax.jit(nc)(z), nc(z), rtol=1e-5)
    gradient = jax.jit(jax.grad(nc))(z)
    assert np.isfinite(gradient).all()
    # Against central differences in float64 arithmetic of the oracle.
    direction = np.random.default_rng(2).normal(size=z.shape)

    def oracle_value(t):
        cdnv, distances = oracle(z + t * direction, labels)
        return np.mean(list(cdnv.values())) + sum(1 / d for d in distances.values()) / 3

    slope = (oracle_value(1e-4) - oracle_value(-1e-4)) / 2e-4
    np.testing.assert_allclose(np.sum(gradient * direction), slope, rtol=1e-3)


def test_second_derivative_as_a_penalty_needs_it():
    z, labels = example()
    direction = np.random.default_rng(2).normal(size=z.shape).astype(np.float32)

    def nc(z):
        stats = update_class_statistics(init_class_statistics(5, 6), z, jnp.asarray(labels))
        return neural_collapse(stats)

    def slope(z):
        return jnp.sum(jax.grad(nc)(z) * direction)

    curvature = np.sum(jax.jit(jax.grad(slope))(z) * direction)

    def oracle_value(t):
        return np.mean(list(oracle(z + t * direction.astype(np.float64), labels)[0].values()))

    expected = (oracle_value(1e-3) - 2 * oracle_value(0) + oracle_value(-1e-3)) / 1e-6
    np.testing.assert_allclose(curvature, expected, rtol=1e-3)
