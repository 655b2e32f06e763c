"""Bounds of docs/proofs.md: hand values and degenerate inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gc_nc.metrics import (
    class_geometric_complexity,
    geometric_collapse,
    init_class_statistics,
    nearest_mean_error_bound,
    neural_collapse,
    neural_collapse_bound,
    poincare_constant,
    update_class_statistics,
)
from tests.metrics.metric_table import C, K, jit
from tests.metrics.padded_statistics import filled_up
from tests.rounding import assert_same_numbers

# One program instead of the many small ones of eager execution.
bound_jitted = jax.jit(neural_collapse_bound)
class_gc_jitted = jax.jit(class_geometric_complexity, static_argnums=2)


def statistics(means, variances, counts):
    """Class statistics of a population, without batch axes filled up to C absent classes and to K.

    Classes with count 0 are absent. Batch axes in front.
    """
    means, variances, counts = (np.asarray(a, np.float32) for a in (means, variances, counts))
    if means.ndim == 2:
        means = filled_up(means, C, K)
        variances, counts = filled_up(variances, C), filled_up(counts, C)
    *batch, num_classes, embedding_dim = means.shape
    empty = init_class_statistics(num_classes, embedding_dim)
    empty = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (*batch, *leaf.shape)), empty)
    return empty._replace(
        counts=jnp.asarray(counts),
        mean_offsets=jnp.asarray(means),
        squared_deviations=jnp.asarray(counts * variances),
    )


def of_classes(gc):
    """GC_i of these classes, and NaN for those that `statistics` adds."""
    return filled_up(np.asarray(gc, np.float32), C, value=np.nan)


def unwrapped(function):
    """The function without the type checks of tests/conftest.py, which users do not have."""
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function


# Squared distances 1, 9 and 4; frequencies 0.5, 0.3 and 0.2; the last class is absent.
HAND = statistics([[0.0], [1], [3], [7]], [1, 2, 4, 0], [5, 3, 2, 0])
HAND_GC = of_classes([2.0, 8, 3])


def test_class_geometric_complexity_by_hand():
    gc = class_geometric_complexity(np.array([1, 3, 8, 2]), np.array([0, 0, 3, 3]), 5)
    np.testing.assert_allclose(gc, [2, np.nan, np.nan, 5, np.nan], rtol=1e-6)
    norms = np.array([1, 3, 8, np.nan], np.float32)
    labels = np.array([0, 0, 3, -7])
    gc = class_geometric_complexity(norms, labels, 5, weights=np.array([1, 3, 1, 0]))
    np.testing.assert_allclose(gc, [2.5, np.nan, np.nan, 8, np.nan], rtol=1e-6)


def test_class_geometric_complexity_of_a_million_norms():
    rng = np.random.default_rng(0)
    norms = rng.uniform(900, 1100, 10**6).astype(np.float32)
    labels = rng.integers(0, 2, norms.size)
    # One class 10^9 times below the other must not feel it.
    norms[labels == 1] *= 1e-9
    expected = [norms[labels == i].mean(dtype=np.float64) for i in range(2)]
    np.testing.assert_allclose(class_gc_jitted(norms, labels, 2), expected, rtol=1e-6)


def test_class_geometric_complexity_jit_weights_and_gradient():
    norms, labels = np.array([1.0, 4, 6, 2, np.nan], np.float32), np.array([0, 0, 2, 9, 1])
    weights = np.array([1.0, 2, 1, 1, 0], np.float32)
    gc = class_gc_jitted(norms, labels, 3, weights=weights)
    np.testing.assert_allclose(gc, [3, np.nan, 6], rtol=1e-6)
    with pytest.raises(ValueError, match=r"label 9 is outside 0\.\.2 \(num_classes=3\)"):
        class_geometric_complexity(norms, labels, 3, weights=weights)
    labels[3] = 2
    gc = class_gc_jitted(norms, labels, 3, weights=weights)
    np.testing.assert_allclose(gc, [3, np.nan, 4], rtol=1e-6)
    gradient = jax.grad(lambda n: jnp.nansum(class_gc_jitted(n, labels, 3, weights=weights)))(norms)
    np.testing.assert_allclose(gradient, [1 / 3, 2 / 3, 1 / 2, 1 / 2, 0], rtol=1e-6)


@pytest.mark.parametrize(
    ("norms", "labels", "num_classes", "match"),
    [
        (np.zeros(0), np.zeros(0, int), 2, r"shape \(0,\)"),
        (np.zeros((2, 1)), np.zeros(2, int), 2, r"shape \(2, 1\)"),
        (np.zeros(2), np.zeros(2), 2, "labels are float64"),
        (np.zeros(2), np.zeros(2, int), 0, "num_classes=0"),
        (np.zeros(1), np.array([2**32 + 1]), 2, "label 4294967297 is outside"),
    ],
)
def test_class_geometric_complexity_refuses(norms, labels, num_classes, match):
    with pytest.raises(ValueError, match=match):
        unwrapped(class_geometric_complexity)(norms, labels, num_classes)


def test_poincare_constant_by_hand():
    traced = jax.jit(poincare_constant)
    np.testing.assert_allclose(poincare_constant(HAND_GC, HAND), 4 / 3, rtol=1e-6)
    np.testing.assert_allclose(traced(HAND_GC, HAND), 4 / 3, rtol=1e-6)
    stats = statistics([[0.0], [1]], [0, 6], [1, 1])
    assert traced(of_classes([0.0, 2]), stats) == 3
    assert traced(of_classes([1.0, 0]), stats) == np.inf
    assert np.isnan(traced(of_classes([np.nan, 1]), stats))
    assert np.isnan(traced(of_classes([0.0]), statistics([[0.0]], [0], [3])))
    with pytest.raises(ValueError, match=r"class_gc=-1.0 must be 0 or more"):
        poincare_constant(of_classes([2.0, -1]), stats)
    assert np.isnan(traced(of_classes([2.0, -1]), stats))
    with pytest.raises(ValueError, match=r"class_gc of shape \(3,\) for 5 classes"):
        unwrapped(poincare_constant)(np.ones(3), stats)


def test_neural_collapse_bound_by_hand():
    bound = neural_collapse_bound(HAND_GC, HAND, poincare_constant=6.0)
    # sum over j of 1 / d_ij^2 is 10/9, 5/4, 13/36; GC = 0.5 * 2 + 0.3 * 8 + 0.2 * 3 = 4.
    per_class = 6 / 6 * (2 * 10 / 9 + 8 * 5 / 4 + 3 * 13 / 36)
    paper = 6 / 6 * 4 / 0.2 * (10 / 9 + 5 / 4 + 13 / 36)
    np.testing.assert_allclose(bound.per_class, per_class, rtol=1e-6)
    np.testing.assert_allclose(bound.paper, paper, rtol=1e-6)
    traced = bound_jitted(HAND_GC, HAND, poincare_constant=6.0)
    assert_same_numbers(traced, bound)


def test_balanced_classes_give_the_paper_s_geometric_collapse():
    stats = HAND._replace(counts=np.array([7.0, 7, 7, 0, 0], np.float32))
    bound = bound_jitted(HAND_GC, stats, poincare_constant=0.5)
    mean_gc = float(np.mean(HAND_GC[:3]))
    assert_same_numbers(bound.paper, 0.5 * geometric_collapse(mean_gc, stats))


def test_the_mean_gc_alone_does_not_bound_unequal_classes():
    # A map that is flat on the frequent class: v = (0, 1), GC_i = (0, 1), d = 1, c = 1.
    stats = statistics([[0.0], [1]], [0, 1], [9, 1])
    bound = bound_jitted(of_classes([0.0, 1]), stats, poincare_constant=1.0)
    assert neural_collapse(stats) == 0.5
    assert neural_collapse(stats) > geometric_collapse(0.1, stats)
    np.testing.assert_allclose(bound, (1.0, 0.5), rtol=1e-6)


def test_the_two_forms_are_twice_to_any_number_of_times_apart():
    means = [[0.0], [1], [100]]
    stats = statistics(means, [0, 0, 0], [1, 1, 1])

    def ratio(gc):
        bound = bound_jitted(of_classes(gc), stats, poincare_constant=1.0)
        return bound.paper / bound.per_class

    np.testing.assert_allclose(ratio([5.0, 5, 5]), 3, rtol=1e-5)
    np.testing.assert_allclose(ratio([5.0, 0, 0]), 2, rtol=1e-3)
    assert ratio([0.0, 0, 5]) > 9000


def test_neural_collapse_bound_of_degenerate_classes():
    equal = statistics([[1.0], [1]], [0, 1], [1, 1])
    for c in (1.0, np.inf):
        bound = bound_jitted(of_classes([0.0, 1]), equal, poincare_constant=c)
        assert bound == (np.inf, np.inf)
    bound = bound_jitted(of_classes([0.0, 0]), equal, poincare_constant=1.0)
    assert np.isnan(bound).all()
    apart = statistics([[1.0], [2]], [0, 0], [1, 1])
    assert bound_jitted(of_classes([0.0, 0]), apart, poincare_constant=1.0) == (0, 0)
    for gc, c in (([np.nan, 1.0], 1.0), ([1.0, 1.0], np.nan)):
        assert np.isnan(bound_jitted(of_classes(gc), apart, poincare_constant=c)).all()


@pytest.mark.parametrize(
    ("gc", "constant", "counts", "match"),
    [
        ([1.0, 1], 1.0, [1, 0], "1 of 5 classes"),
        ([1.0, 1], 1.0, [0, 0], "0 of 5 classes"),
        ([1.0, 1], -2.0, [1, 1], "poincare_constant=-2.0 must be 0 or more"),
        ([-3.0, 1], 1.0, [1, 1], "class_gc=-3.0 must be 0 or more"),
    ],
)
def test_neural_collapse_bound_refuses(gc, constant, counts, match):
    stats = statistics([[0.0], [1]], [1, 1], counts)
    with pytest.raises(ValueError, match=match):
        neural_collapse_bound(of_classes(gc), stats, poincare_constant=constant)
    traced = bound_jitted(of_classes(gc), stats, poincare_constant=constant)
    assert np.isnan(traced).all()


def test_gradients_are_finite_with_absent_and_collapsed_classes():
    rng = np.random.default_rng(0)
    labels = np.array([0, 0, 0, 1, 1, 1, 3, 3])
    z = rng.normal(size=(8, 3)).astype(np.float32)
    z[6:] = 1  # class 3 has v = GC = 0, class 2 no example
    norms = np.array([1.0, 2, 3, 4, 5, 6, 0, 0], np.float32)

    def error(z, norms):
        stats = update_class_statistics(init_class_statistics(4, 3), z, jnp.asarray(labels))
        gc = class_geometric_complexity(norms, jnp.asarray(labels), 4)
        constant = poincare_constant(gc, stats)
        bound = neural_collapse_bound(gc, stats, poincare_constant=constant)
        # Small, so that the cap at 1 stays out of the way.
        return sum(nearest_mean_error_bound(1e-4 * nc, 3) for nc in bound) + constant

    value, gradients = jit(jax.value_and_grad(error, argnums=(0, 1)))(z, norms)
    assert value < 2
    for gradient in gradients:
        assert np.isfinite(gradient).all()
        assert np.abs(gradient).max() > 0


def test_nearest_mean_error_bound_by_hand():
    np.testing.assert_allclose(nearest_mean_error_bound(0.001, 5), 0.016, rtol=1e-6)
    np.testing.assert_allclose(nearest_mean_error_bound(0.001, 5, 1), 0.192, rtol=1e-6)
    np.testing.assert_allclose(nearest_mean_error_bound(0.001, 5, 5), 0.0896, rtol=1e-6)
    traced = jax.jit(nearest_mean_error_bound, static_argnums=(1, 2))
    for nc, expected in ((0.0, 0), (0.5, 1), (np.inf, 1), (np.nan, np.nan)):
        np.testing.assert_equal(float(nearest_mean_error_bound(nc, 2, 5)), float(expected))
        np.testing.assert_equal(float(traced(nc, 2, 5)), float(expected))
    assert np.isnan(traced(-1.0, 2, None))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((-0.1, 2), "nc=-0.1 must be 0 or more"),
        ((0.1, 1), "num_classes=1 must be at least 2"),
        ((0.1, 2, 0), "num_shots=0 must be at least 1"),
    ],
)
def test_nearest_mean_error_bound_refuses(arguments, match):
    with pytest.raises(ValueError, match=match):
        nearest_mean_error_bound(*arguments)
