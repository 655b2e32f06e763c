"""The directional bound of few-shot error: equality, Gaussians, limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gc_nc import metrics
from tests.rounding import assert_same_numbers

C, K = 3, 8


def population(means, variances):
    """Class statistics of a distribution with these means and total variances."""
    stats = metrics.init_class_statistics(*means.shape)
    return stats._replace(
        counts=jnp.ones(len(means)),
        mean_offsets=jnp.asarray(means, jnp.float32),
        squared_deviations=jnp.asarray(variances, jnp.float32),
    )


def of_gaussians(means, covariances):
    """(C, C) D_ij, 0 on the diagonal, in float64."""
    a = means[:, None] - means[None]
    d = np.sum(a**2, axis=2) + np.eye(len(means))
    return np.einsum("ijk,ikl,ijl->ij", a, covariances, a) / d**2


@pytest.mark.parametrize("p", [0.01, 0.3])
def test_two_points_reach_it(p):
    # Distance 1: p half way to the rival, the rest behind its own mean; the rival is one point.
    variance = p / 4 + (1 - p) * (p / (2 * (1 - p))) ** 2
    stats = population(np.array([[0.0], [1]]), [variance, 0])
    directional = jnp.array([[np.nan, variance], [0, np.nan]])
    # The other class is never wrong.
    assert_same_numbers(metrics.directional_error_bound(directional, stats), p / 2)


def test_few_shot_error_of_gaussians_is_below():
    """Most variance across the lines between the means, where CDNV says nothing."""
    rng = np.random.default_rng(0)
    means = np.zeros((C, K))
    means[:, :2] = 2 * rng.normal(size=(C, 2))
    deviations = np.r_[0.15, 0.15, np.full(K - 2, 0.8)]
    covariances = np.broadcast_to(np.diag(deviations**2), (C, K, K))
    stats = population(means, np.full(C, np.sum(deviations**2)))
    directional = jnp.asarray(of_gaussians(means, covariances), jnp.float32)
    bounds = []
    for shots in (1, 5, 50, 500, None):
        query, support = rng.normal(size=(2, 4000, C, K)) * deviations
        support = support / np.sqrt(shots) if shots else 0 * support
        distances = np.sum(
            (means[:, None] + query[:, :, None] - means - support[:, None]) ** 2, axis=3
        )
        error = np.mean(np.argmin(distances, axis=2) != np.arange(C))
        bounds.append(float(metrics.directional_error_bound(directional, stats, shots)))
        assert error <= bounds[-1] + 4 * np.sqrt(0.25 / 4000 / C)
    assert np.all(np.diff(bounds) <= 0)
    assert bounds[-1] < 0.1
    # The bound of CDNV does not get there.
    nc = metrics.neural_collapse(stats)
    assert metrics.nearest_mean_error_bound(nc, C) > 5 * bounds[-1]


def test_float64_oracle():
    rng = np.random.default_rng(1)
    means, variances = 5 * rng.normal(size=(C, K)), rng.uniform(0.2, 1, C)
    directional = rng.uniform(0.001, 0.01, (C, C))
    n, total = 30, 0
    for i in range(C):
        errors = 0
        for j in set(range(C)) - {i}:
            d = np.sum((means[i] - means[j]) ** 2)
            a = directional[i, j] + directional[j, i] / n
            a = 4 * (a + variances[i] * (variances[i] + variances[j]) / n / d**2)
            s = np.arange(1, 64) / 64
            errors += np.min(a / (a + (1 - s) ** 2) + variances[i] / (n * s * d))
        total += min(1, errors) / C
    found = metrics.directional_error_bound(
        jnp.asarray(directional, jnp.float32), population(means, variances), n
    )
    assert_same_numbers(found, total)


def test_edges():
    stats = population(np.array([[0.0], [1]]), [1, 1])
    nan = metrics.directional_error_bound(jnp.full((2, 2), jnp.nan), stats, 3)
    assert np.isnan(nan)
    assert metrics.directional_error_bound(jnp.full((2, 2), 1e9), stats, 1) == 1
    with pytest.raises(ValueError, match=r"directional of shape \(3, 3\); \(C, C\) = \(2, 2\)"):
        metrics.directional_error_bound(jnp.ones((3, 3)), stats)
    with pytest.raises(ValueError, match=r"directional=-1\.0 must be 0 or more"):
        metrics.directional_error_bound(-jnp.ones((2, 2)), stats)
    inside = jax.jit(metrics.directional_error_bound)(jnp.ones((2, 2)), stats)
    assert_same_numbers(inside, 0.8)
