"""GNC2 and GNC3: closed forms, a float64 oracle, what has no direction."""

import jax.numpy as jnp
import numpy as np
import pytest

from gc_nc import metrics
from tests.rounding import assert_same_numbers, rounding


def statistics(means):
    means = np.asarray(means, np.float32)
    stats = metrics.init_class_statistics(*means.shape)
    return metrics.update_class_statistics(stats, means, np.arange(len(means)))


def directions(means):
    m = means - means.mean(axis=0)
    return m / np.linalg.norm(m, axis=1, keepdims=True)


@pytest.mark.parametrize("k", [5, *(pytest.param(k, marks=pytest.mark.slow) for k in (2, 3))])
def test_a_simplex_has_the_least_energy(k):
    energy, variance = metrics.gnc2(statistics(3 * np.eye(k, 6) + 1))
    np.testing.assert_allclose(energy, -np.log(2 * k / (k - 1)) / 2, rtol=rounding())
    assert variance < 1e-12


@pytest.mark.slow
def test_polygons_in_the_plane_are_as_uniform_as_there_is_room_for():
    # The product of a point's distances to the other corners of a regular k-gon is k.
    k = 9
    angles = 2 * np.pi * np.arange(k) / k
    energy, _ = metrics.gnc2(statistics(np.stack([np.cos(angles), np.sin(angles)], axis=1)))
    np.testing.assert_allclose(energy, -np.log(k) / (k - 1), rtol=rounding())
    rng = np.random.default_rng(0)
    crooked = metrics.gnc2(statistics(rng.normal(size=(k, 2))))
    assert crooked.energy > energy


def test_float64_oracle_with_more_classes_than_dimensions():
    rng = np.random.default_rng(0)
    means, head = rng.normal(size=(7, 3)), rng.normal(size=(3, 7))
    u = directions(np.asarray(means, np.float32).astype(float))
    pairs = ~np.eye(7, dtype=bool)
    energies = -np.log(np.linalg.norm(u[:, None] - u[None], axis=2)[pairs])
    stats = statistics(means)
    assert_same_numbers(tuple(metrics.gnc2(stats)), (energies.mean(), energies.var()))
    w = head.T / np.linalg.norm(head.T, axis=1, keepdims=True)
    duality = np.mean(np.sum((u - w) ** 2, axis=1))
    assert_same_numbers(metrics.gnc3(stats, head.astype(np.float32)), duality)


@pytest.mark.slow
def test_dual_heads_of_any_lengths():
    rng = np.random.default_rng(0)
    means = rng.normal(size=(6, 4))
    head = (directions(means) * np.logspace(-8, 8, 6)[:, None]).T.astype(np.float32)
    assert metrics.gnc3(statistics(means), head) < 1e-10
    np.testing.assert_allclose(metrics.gnc3(statistics(means), -head), 4, rtol=rounding())
    # Equal lengths: nc3.
    stats, even = statistics(np.eye(4)), rng.normal(size=(4, 4))
    even = jnp.asarray(even / np.linalg.norm(even, axis=0), jnp.float32)
    assert_same_numbers(metrics.gnc3(stats, even), metrics.nc3(stats, even))


@pytest.mark.slow
def test_what_has_no_direction():
    with pytest.warns(RuntimeWarning, match="has no direction"):
        values = metrics.gnc2(statistics([[1.0, 0], [-1, 0], [0, 0]]))
    assert np.isnan(values).all()
    # Equal directions, of other lengths.
    energy, variance = metrics.gnc2(statistics([[1.0, 0], [2, 0], [-3, 0]]))
    assert energy == np.inf
    assert np.isnan(variance)
    assert np.isnan(metrics.gnc3(statistics(np.eye(3)), np.zeros((3, 3), np.float32)))
    with pytest.raises(ValueError, match="so transpose it"):
        metrics.gnc3(statistics(np.eye(3, 2)), np.ones((3, 2)))
