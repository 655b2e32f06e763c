"""NC1 and NC2 where two class means are the same point."""

import numpy as np
import pytest

from tests.metrics.padded_statistics import nc1, nc2, nc3, statistics


@pytest.mark.parametrize("dim", [3, 6])
@pytest.mark.parametrize("gap", [0.0, 1e-7])
def test_two_of_many_means_that_coincide_give_infinity(dim, gap):
    rng = np.random.default_rng(0)
    k = 5
    means = 5 * rng.normal(size=(k, dim))
    means[4] = means[1] * (1 + gap)
    noise = rng.normal(size=(4, dim))
    labels = np.repeat(np.arange(k), 8)
    z = np.repeat(means, 8, axis=0) + np.tile(np.concatenate([noise, -noise]), (k, 1))
    assert np.isposinf(nc1(statistics(z, labels, k)))
    # The rest of the geometry is fine.
    assert np.isfinite(nc2(statistics(z, labels, k))).all()


def test_two_classes_of_the_same_points_in_another_order_coincide():
    points = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32)
    z = np.concatenate([points, points[::-1]])
    stats = statistics(z, np.repeat([0, 1], 50), 2)
    assert np.isposinf(nc1(stats))
    assert np.isposinf(nc2(stats)).all()
    assert np.isposinf(nc3(stats, np.ones((6, 5))))
