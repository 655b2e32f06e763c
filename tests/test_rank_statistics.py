"""Rank correlation of runs with its bootstrap interval."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from gc_nc.errors import InputError
from gc_nc.rank_statistics import rank_correlation


@pytest.mark.parametrize("ties", [False, True])
def test_equals_scipy(ties):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 12))
    if ties:
        x, y = np.round(x), np.round(y)
    found = rank_correlation(x, y)
    assert found.rho == pytest.approx(spearmanr(x, y).statistic, abs=1e-12)
    assert found.low < found.rho < found.high
    assert found.num_runs == 12


def test_any_increasing_map_changes_nothing():
    x = np.array([3.0, 1, 8, 5, 2, 13])
    y = np.array([2.0, 1, 9, 3, 4, 7])
    # Equal ranks are equal inputs of what follows.
    assert rank_correlation(x, y) == rank_correlation(np.exp(x), y**3)
    assert rank_correlation(x, -x).rho == -1
    assert rank_correlation(x, [np.inf, 1, 2, 3, 4, 5]).rho == pytest.approx(
        rank_correlation(x, [9, 1, 2, 3, 4, 5]).rho
    )


def test_the_interval_covers():
    """Of pairs with a known rank correlation, about 95% of the intervals hold it."""
    rng = np.random.default_rng(1)
    # Bivariate normal: Spearman's rho is 6 / pi asin(r / 2).
    r, trials = 0.6, 30
    truth = 6 / np.pi * np.arcsin(r / 2)
    held = 0
    for seed in range(trials):
        x, e = rng.normal(size=(2, 30))
        found = rank_correlation(x, r * x + np.sqrt(1 - r * r) * e, seed)
        held += found.low <= truth <= found.high
    assert held >= 0.85 * trials


def test_a_constant_side_has_no_correlation():
    found = rank_correlation([1, 2, 3], [5, 5, 5])
    assert np.isnan([found.rho, found.low, found.high]).all()


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ([1, 2], [1, 2], "at least 3"),
        ([1, 2, 3], [1, 2], "3, 2 and 3 values"),
        ([1, 2, np.nan], [1, 2, 3], "NaN"),
    ],
)
def test_bad_input_is_one_line(x, y, message):
    with pytest.raises(InputError, match=message):
        rank_correlation(x, y)
