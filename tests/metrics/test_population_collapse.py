"""NC of a distribution from samples: closed forms, bias on Gaussians, and what is unknown."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gc_nc import metrics
from tests.rounding import assert_same_numbers

C, K, N = 4, 6, 10
MEANS = 2 * np.random.default_rng(3).normal(size=(C, K))
DEVIATIONS = np.array([0.5, 1, 1, 1.5])
LABELS = np.repeat(np.arange(C), N)


def gaussians(num_samples):
    """(num_samples, C N, K)"""
    noise = np.random.default_rng(0).normal(size=(num_samples, C * N, K))
    return (MEANS[LABELS] + DEVIATIONS[LABELS, None] * noise).astype(np.float32)


def known_cdnv():
    variances = K * DEVIATIONS**2
    distances = np.sum((MEANS[:, None] - MEANS[None]) ** 2, axis=2)
    return (variances[:, None] + variances[None]) / 2 / (distances + np.diag([np.nan] * C))


@jax.jit
def statistics(z):
    return metrics.update_class_statistics(metrics.init_class_statistics(C, K), z, LABELS)


@pytest.mark.slow
def test_gaussians_of_known_nc():
    known = np.nanmean(known_cdnv())
    stats = jax.vmap(statistics)(gaussians(2000))
    of_samples = jax.vmap(metrics.neural_collapse)(stats)
    corrected = jax.vmap(metrics.population_neural_collapse)(stats)
    sampling = np.std(corrected) / np.sqrt(2000)
    assert sampling < 0.01 * known
    # What is left is 4/n times both directional CDNV, a few hundredths, not an eighth.
    factor = (1 - 1 / N) / (1 + 2 * known / N)
    np.testing.assert_allclose(np.mean(of_samples) / known, factor, atol=0.04)
    assert factor < 0.9
    assert abs(np.mean(corrected) - known) < 4 * sampling + 0.04 * known


def test_float64_oracle():
    z = gaussians(1)[0].astype(np.float64)
    groups = [z[c == LABELS] for c in range(C)]
    u = np.array([g.var(axis=0, ddof=1).sum() for g in groups])
    expected = np.full((C, C), np.nan)
    for i in range(C):
        for j in set(range(C)) - {i}:
            d = np.sum((groups[i].mean(0) - groups[j].mean(0)) ** 2) - (u[i] + u[j]) / N
            expected[i, j] = (u[i] + u[j]) / 2 / d
    stats = statistics(z.astype(np.float32))
    assert_same_numbers(metrics.population_cdnv_matrix(stats), expected)
    assert_same_numbers(metrics.population_neural_collapse(stats), np.nanmean(expected))


def test_what_a_sample_cannot_tell():
    z = np.array([[0.0, 0], [2, 0], [10, 0], [1, 3], [1, -3]], np.float32)
    stats = metrics.update_class_statistics(
        metrics.init_class_statistics(4, 2), z, np.array([0, 0, 1, 2, 2])
    )
    found = metrics.population_cdnv_matrix(stats)
    assert found[0, 2] == found[2, 0] == np.inf  # equal means
    # One example, and none.
    assert np.isnan(found[1]).all()
    assert np.isnan(found[3]).all()
    assert np.isnan(metrics.population_neural_collapse(stats))
    with pytest.raises(ValueError, match="1 of 4 classes"):
        metrics.population_neural_collapse(
            metrics.update_class_statistics(
                metrics.init_class_statistics(4, 2), z[:2], jnp.zeros(2, int)
            )
        )
