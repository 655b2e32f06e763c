"""The jackknife: closed forms, and coverage on Gaussians of known collapse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gc_nc import metrics
from tests.rounding import assert_same_numbers

C, K, N, G = 3, 4, 80, 10
MEANS = 2 * np.random.default_rng(1).normal(size=(C, K))
DEVIATIONS = np.array([[1.0, 1, 1, 1], [2, 1, 0.5, 0.5], [0.5, 0.5, 1, 1]])
LABELS = np.repeat(np.arange(C), N)
GROUPS = np.asarray(metrics.jackknife_groups(LABELS, G))


def samples(num):
    """(num, C N, K)"""
    noise = np.random.default_rng(0).normal(size=(num, C * N, K))
    return (MEANS[LABELS] + DEVIATIONS[LABELS] * noise).astype(np.float32)


def statistics(z, labels):
    return metrics.update_class_statistics(metrics.init_class_statistics(C, K), z, labels)


def grouped(z):
    """Statistics of each group; those of all samples at once."""
    of_samples = jax.jit(jax.vmap(statistics, (0, None)))
    return [of_samples(z[:, g == GROUPS], LABELS[g == GROUPS]) for g in range(G)]


def squared_distances():
    d = np.sum((MEANS[:, None] - MEANS[None]) ** 2, axis=2)
    return d + np.diag([np.inf] * C)


def test_of_a_mean_it_is_the_standard_error():
    values = np.random.default_rng(0).normal(size=30).astype(np.float32)
    found = metrics.jackknife(
        jnp.mean, list(values[:, None]), merge=lambda a, b: jnp.concatenate([a, b])
    )
    assert_same_numbers(found.mean, values.mean(dtype=float))
    assert_same_numbers(found.sem, values.std(ddof=1, dtype=float) / np.sqrt(30))


def test_groups_share_out_every_class():
    labels = np.random.default_rng(0).integers(0, 4, 101)
    groups = np.asarray(metrics.jackknife_groups(labels, 5))
    table = np.zeros((4, 5), int)
    np.add.at(table, (labels, groups), 1)
    assert np.ptp(table, axis=1).max() <= 1


@pytest.mark.slow
def test_neural_and_geometric_collapse_cover_the_truth():
    z = samples(600)
    groups = grouped(z)
    # Norms with a known mean of 5.
    norms = 5 * np.random.default_rng(2).exponential(size=(600, C * N)).astype(np.float32)
    with_norms = [(stats, norms[:, g == GROUPS]) for g, stats in enumerate(groups)]
    merge = jax.jit(jax.vmap(metrics.merge_class_statistics))

    def merge_both(a, b):
        return merge(a[0], b[0]), np.concatenate([a[1], b[1]], axis=1)

    @jax.jit
    def values(both):
        stats, norms = both
        return (
            jax.vmap(metrics.population_neural_collapse)(stats),
            jax.vmap(metrics.geometric_collapse)(norms.mean(axis=1), stats),
        )

    mean, sem = metrics.jackknife(values, with_norms, merge=merge_both)
    variances = np.sum(DEVIATIONS**2, axis=1)
    d = squared_distances()
    nc = np.sum((variances[:, None] + variances[None]) / 2 / d) / (C * (C - 1))
    collapse = 5 / (C - 1) * np.sum(1 / d)
    # The quantile of t with 9 degrees of freedom.
    for found, error, truth in zip(mean, sem, (nc, collapse), strict=True):
        covered = np.mean(np.abs(found - truth) < 2.262 * error)
        # 600 trials tell it to 0.9%.
        assert 0.92 < covered < 0.98
        np.testing.assert_allclose(np.sqrt(np.mean(error**2)), np.std(found), rtol=0.2)


@pytest.mark.slow
def test_directional_cdnv_covers_the_truth():
    z = samples(300)
    along = MEANS[:, None] - MEANS[None]
    d = squared_distances()
    truth = np.sum(DEVIATIONS[:, None] ** 2 * along**2, axis=2) / d**2

    @jax.jit
    @jax.vmap
    def directional(z):
        """(G + 1, C, C): of all, and without each group."""

        def of(kept):
            stats = metrics.init_class_statistics(C, K)
            stats = metrics.update_class_statistics(stats, z, LABELS, weights=kept)
            return metrics.directional_cdnv(z, LABELS, stats, weights=kept)

        return jax.lax.map(of, jnp.asarray(np.arange(-1, G)[:, None] != GROUPS, jnp.float32))

    values = directional(z)
    # Groups as sets of numbers of those left: merging is taking the union.
    found = metrics.jackknife(
        lambda groups: values[:, 0 if len(groups) == G else 1 + (set(range(G)) - groups).pop()],
        [frozenset([g]) for g in range(G)],
        merge=frozenset.union,
    )
    covered = np.mean(np.abs(found.mean - truth[None]) < 2.262 * found.sem, axis=0)
    off_diagonal = covered[~np.eye(C, dtype=bool)]
    assert off_diagonal.min() > 0.88
    assert 0.91 < off_diagonal.mean() < 0.98


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="1 groups; a jackknife needs at least 2"):
        metrics.jackknife(metrics.neural_collapse, [statistics(samples(1)[0], LABELS)])
    with pytest.raises(ValueError, match="num_groups=1 must be at least 2"):
        metrics.jackknife_groups(LABELS, 1)
    with pytest.raises(ValueError, match="labels are float"):
        metrics.jackknife_groups(LABELS / 1, 2)
