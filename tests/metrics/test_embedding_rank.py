"""Effective rank, participation ratio, scatter ratio and spectral norms: closed forms, oracles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gc_nc import metrics
from tests.rounding import assert_same_numbers, rounding

KEY = jax.random.key(0)


def test_equal_directions_are_counted():
    # Three directions of equal size, of five, about a mean that is far away.
    z = 100 + 0.5 * np.concatenate([np.eye(5)[:3], -np.eye(5)[:3]])
    assert_same_numbers(metrics.embedding_rank(z.astype(np.float32)), metrics.EmbeddingRank(3, 3))


def test_a_simplex_of_k_classes_has_rank_k_minus_1():
    z = np.repeat(np.eye(4, 7), 5, axis=0).astype(np.float32)
    assert_same_numbers(metrics.embedding_rank(z), metrics.EmbeddingRank(3, 3))


def test_embedding_rank_float64_oracle():
    rng = np.random.default_rng(0)
    z = (rng.normal(size=(40, 6)) * np.logspace(-2, 1, 6)).astype(np.float32)
    weights = rng.uniform(0, 2, 40).astype(np.float32)
    weights[::5] = 0
    shares = np.asarray(weights, float)[:, None] / weights.sum(dtype=float)
    centred = z - np.sum(shares * z, axis=0)
    s = np.linalg.svd(np.sqrt(shares) * centred, compute_uv=False)
    p = s / s.sum()
    expected = (np.exp(-np.sum(p * np.log(p))), np.sum(s**2) ** 2 / np.sum(s**4))
    z[::5] = np.nan
    for scale in (1, 1e-25, 1e25):
        found = metrics.embedding_rank(np.float32(scale) * z, weights=weights)
        assert_same_numbers(tuple(found), expected)


def test_nothing_that_varies_has_no_rank():
    constant, broken = np.ones((4, 3), np.float32), np.array([[0, 1], [np.inf, 0]], np.float32)
    for z in (constant, broken):
        assert np.isnan(metrics.embedding_rank(z)).all()
    with pytest.raises(ValueError, match="all weights are 0"):
        metrics.embedding_rank(constant, weights=np.zeros(4))
    with pytest.raises(ValueError, match=r"embeddings of shape \(0, 3\)"):
        metrics.embedding_rank(np.ones((0, 3)))


def test_scatter_ratio():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 60)
    z = (3 * rng.normal(size=(3, 5))[labels] + rng.normal(size=(60, 5))).astype(np.float32)
    means = np.stack([z[labels == c].mean(axis=0, dtype=float) for c in range(3)])
    within = np.mean(np.sum((z - means[labels]) ** 2, axis=1))
    between = np.mean(np.sum((means - means.mean(axis=0)) ** 2, axis=1))
    stats = metrics.init_class_statistics(4, 5)
    found = metrics.scatter_ratio(metrics.update_class_statistics(stats, z, labels))
    assert_same_numbers(found, within / between)
    coinciding = metrics.update_class_statistics(
        metrics.init_class_statistics(2, 1), np.array([[0.0], [2], [1], [1]]), np.arange(4) // 2
    )
    with pytest.warns(RuntimeWarning, match="scatter_ratio is inf"):
        found = metrics.scatter_ratio(coinciding)
    assert found == np.inf


def test_spectral_norms_of_a_linear_map_and_of_a_network():
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.normal(size=(5, 5)))[0] for _ in range(2))
    matrix = jnp.asarray(left * np.array([3, 1.5, 1, 0.5, 0]) @ right, jnp.float32)
    x = rng.normal(size=(7, 5)).astype(np.float32)

    def linear(x):
        return x @ matrix.T

    found = metrics.squared_jacobian_spectral_norms(linear, x, KEY, chunk_size=3)
    np.testing.assert_allclose(found, 9, rtol=rounding())
    # A Rayleigh quotient is never above.
    few = metrics.squared_jacobian_spectral_norms(linear, x, KEY, num_iterations=2)
    assert np.all(few < 9 * (1 + rounding()))
    assert few.max() > 8.5

    def network(x):
        return jnp.tanh(x @ matrix.T) ** 2

    jacobians = np.asarray(jax.vmap(jax.jacobian(lambda x: network(x[None])[0]))(x), float)
    expected = np.linalg.svd(jacobians, compute_uv=False)[:, 0] ** 2
    found = metrics.squared_jacobian_spectral_norms(network, x, KEY, num_iterations=200)
    np.testing.assert_allclose(found, expected, rtol=1e-3)
    traced = jax.jit(
        lambda x: metrics.squared_jacobian_spectral_norms(network, x, KEY, num_iterations=200)
    )
    np.testing.assert_allclose(traced(x), found, rtol=rounding())
    stable_rank = metrics.squared_jacobian_norms(linear, x) / 9
    np.testing.assert_allclose(stable_rank, (9 + 2.25 + 1 + 0.25) / 9, rtol=rounding())


@pytest.mark.slow
def test_spectral_norms_at_the_edges():
    x = np.ones((3, 2), np.float32)
    x[1] = np.nan
    for scale in (0, 1e-15, 1e15):
        found = metrics.squared_jacobian_spectral_norms(lambda x, s=scale: s * x, x, KEY)
        np.testing.assert_allclose(found[::2], scale**2, rtol=rounding())
        assert np.isnan(found[1])
    with pytest.raises(ValueError, match="num_iterations=0 must be at least 1"):
        metrics.squared_jacobian_spectral_norms(jnp.abs, x, KEY, num_iterations=0)
