"""The size of an embedding and GC relative to it: oracle, closed form, invariances, degenerate."""

import jax
import numpy as np
import pytest

from gc_nc.metrics import (
    geometric_collapse,
    init_class_statistics,
    relative_geometric_complexity,
    squared_class_distance,
    squared_embedding_norm,
    update_class_statistics,
)
from tests.rounding import assert_same_numbers

update_jitted = jax.jit(update_class_statistics)


def statistics(z, labels, num_classes):
    z = np.asarray(z, np.float32)
    return update_jitted(init_class_statistics(num_classes, z.shape[1]), z, np.asarray(labels))


def example(scale=1.0, shift=0.0):
    """Four of five classes, of unequal frequency."""
    rng = np.random.default_rng(0)
    labels = rng.choice([0, 1, 3, 4], 60, p=[0.4, 0.3, 0.2, 0.1])
    z = rng.normal(size=(60, 6)) + 4 * rng.normal(size=(5, 6))[labels]
    return (scale * z + shift).astype(np.float32), labels


@pytest.mark.parametrize("shift", [0.0, 100.0])
def test_equals_a_float64_oracle(shift):
    z, labels = example(shift=shift)
    stats = statistics(z, labels, 5)
    z = z.astype(np.float64)
    means = np.array([z[labels == c].mean(0) for c in (0, 1, 3, 4)])
    distances = [np.sum((a - b) ** 2) for i, a in enumerate(means) for b in means[:i]]
    assert_same_numbers(squared_embedding_norm(stats), (z**2).sum(1).mean())
    assert_same_numbers(squared_class_distance(stats), np.mean(distances))
    np.testing.assert_allclose(
        relative_geometric_complexity(7.0, stats), 7 / np.mean(distances), rtol=1e-5
    )


def test_equal_distances_make_it_geometric_collapse_over_k():
    # Unit vectors: every two of them lie sqrt(2) apart.
    stats = statistics(np.eye(5), np.arange(5), 5)
    assert_same_numbers(squared_class_distance(stats), 2.0)
    assert_same_numbers(squared_embedding_norm(stats), 1.0)
    np.testing.assert_allclose(
        5 * relative_geometric_complexity(3.0, stats), geometric_collapse(3.0, stats), rtol=1e-5
    )
    # Otherwise it is less, as an arithmetic mean is more than a harmonic one.
    stats = statistics(*example(), 5)
    assert 4 * relative_geometric_complexity(3.0, stats) < geometric_collapse(3.0, stats)


def test_a_larger_embedding_has_the_same_relative_gc():
    # Its Jacobian is 8 times as large too; a power of 2 rounds nothing.
    small, large = (statistics(*example(scale), 5) for scale in (1.0, 8.0))
    np.testing.assert_array_equal(
        relative_geometric_complexity(3.0, small), relative_geometric_complexity(64 * 3.0, large)
    )
    np.testing.assert_array_equal(64 * squared_embedding_norm(small), squared_embedding_norm(large))


def test_a_sum_that_float32_cannot_hold_is_averaged():
    stats = statistics(np.diag([1.2e19] * 8), np.arange(8), 8)
    assert_same_numbers(squared_class_distance(stats), 2 * 1.2e19**2)
    assert_same_numbers(squared_embedding_norm(stats), 1.2e19**2)


def test_equal_means_and_too_few_classes():
    stats = statistics(np.ones((4, 2)), [0, 0, 1, 1], 2)
    assert squared_class_distance(stats) == 0
    assert np.isinf(relative_geometric_complexity(1.0, stats))
    assert np.isnan(relative_geometric_complexity(0.0, stats))
    one = statistics(np.ones((4, 2)), [1, 1, 1, 1], 3)
    assert squared_embedding_norm(one) == 2
    assert np.isnan(jax.jit(squared_class_distance)(one))
    with pytest.raises(ValueError, match="1 of 3 classes have an example"):
        squared_class_distance(one)
    with pytest.raises(ValueError, match=r"gc=-1.0 must be 0 or more"):
        relative_geometric_complexity(-1.0, stats)
    assert np.isnan(squared_embedding_norm(init_class_statistics(3, 2)))
