"""Verdicts: rank correlations against SciPy's, intervals and p-values by hand, and their limits."""

import math

import numpy as np
import pytest
from scipy import stats

from gc_nc.errors import InputError
from gc_nc.rank_statistics import RankTest, rank_test
from gc_nc.reproduction.claims import FAILS, HOLDS, UNDECIDED, counted_finding, rank_finding

# Four settings, three runs each, y falling with x.
X = np.repeat([1.0, 2.0, 4.0, 8.0], 3)
Y = np.array([9.0, 8.5, 9.5, 6.0, 7.0, 6.5, 4.0, 4.5, 3.5, 2.0, 1.0, 1.5])
SETTINGS = list(X)


def test_rho_is_that_of_scipy_with_ties():
    y = Y.copy()
    y[4] = y[1]
    test = rank_test(X, y, SETTINGS, permute="runs")
    assert test.rho == pytest.approx(stats.spearmanr(X, y).statistic, abs=1e-12)
    assert (test.num_runs, test.num_settings) == (12, 4)


def test_p_value_of_few_runs_is_exact():
    x, y = [1.0, 1.0, 2.0, 2.0, 3.0, 3.0], [5.0, 4.0, 3.5, 4.5, 1.0, 2.0]
    expected = stats.permutation_test(
        (x,),
        lambda permuted: stats.spearmanr(permuted, y).statistic,
        permutation_type="pairings",
        n_resamples=math.inf,
        alternative="two-sided",
    ).pvalue
    assert rank_test(x, y, x, permute="runs").p_value == pytest.approx(expected)


def test_p_value_over_settings_permutes_their_means():
    test = rank_test(X, Y, SETTINGS, permute="settings")
    # Of the 24 orders of 4 means only the two monotone ones are as extreme.
    assert test.p_value == pytest.approx(2 / 24)
    assert rank_test(X, Y, SETTINGS, permute="runs").p_value < 1e-3


def test_p_value_is_uniform_where_there_is_nothing():
    rng = np.random.default_rng(0)
    small = [
        rank_test(X, rng.normal(size=12), SETTINGS, permute="runs").p_value < 0.05
        for _ in range(60)
    ]
    # Binomial(60, 0.05): more than 10 has a chance below 0.0003.
    assert sum(small) <= 10


def test_the_interval_resamples_within_settings_only():
    # Runs of a setting are equal, so nothing can vary, although settings differ.
    y = np.repeat([4.0, 1.0, 3.0, 2.0], 3)
    test = rank_test(X, y, SETTINGS, permute="runs")
    assert test.low == pytest.approx(test.rho)
    assert test.high == pytest.approx(test.rho)
    wide = rank_test(X, Y[::-1] * (-1) ** np.arange(12), SETTINGS, permute="runs")
    assert wide.high - wide.low > 0.3


def test_one_run_a_setting_has_no_interval_and_no_verdict():
    x = np.arange(10.0)
    test = rank_test(x, x, list(range(10)), permute="runs")
    assert test.rho == 1
    assert test.p_value < 1e-3
    assert math.isnan(test.low)
    finding = rank_finding("claim", 1, test)
    assert finding.verdict == UNDECIDED
    assert "settings with one run" in finding.evidence


def test_a_constant_side_has_no_rho():
    test = rank_test(X, np.ones(12), SETTINGS, permute="runs")
    assert math.isnan(test.rho)
    assert math.isnan(test.p_value)
    assert rank_finding("claim", 1, test).verdict == UNDECIDED


@pytest.mark.parametrize("permute", ["runs", "settings"])
def test_the_order_of_runs_and_monotone_changes_do_not_matter(permute):
    first = rank_test(X, Y, SETTINGS, permute=permute)
    order = np.random.default_rng(1).permutation(12)
    again = rank_test(np.log(X[order]), Y[order], [SETTINGS[i] for i in order], permute=permute)
    assert again.rho == pytest.approx(first.rho)
    assert again.p_value == pytest.approx(first.p_value, abs=2e-3)


def test_bad_input_is_named():
    with pytest.raises(InputError, match="2 runs"):
        rank_test([1.0, 2.0], [1.0, 2.0], [1, 2], permute="runs")
    with pytest.raises(InputError, match="NaN"):
        rank_test([1.0, 2.0, math.nan], [1.0, 2.0, 3.0], [1, 2, 3], permute="runs")
    with pytest.raises(InputError, match="3, 3 and 2"):
        rank_test([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [1, 2], permute="runs")
    with pytest.raises(ValueError, match="permute='seeds'"):
        rank_test([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [1, 2, 3], permute="seeds")
    infinite = rank_test([1.0, 2.0, math.inf], [1.0, 2.0, 3.0], [1, 1, 2], permute="runs")
    assert infinite.rho == 1


@pytest.mark.parametrize(
    ("sign", "rho", "low", "high", "p_value", "verdict"),
    [
        (1, 0.9, 0.7, 1.0, 0.01, HOLDS),
        (-1, -0.9, -1.0, -0.7, 0.01, HOLDS),
        (-1, 0.9, 0.7, 1.0, 0.01, FAILS),
        (1, -0.9, -1.0, -0.7, 0.01, FAILS),
        (1, 0.9, 0.7, 1.0, 0.06, UNDECIDED),
        (1, 0.9, -0.1, 1.0, 0.01, UNDECIDED),
        (-1, 0.9, -0.1, 1.0, 0.01, UNDECIDED),
        (1, 0.9, math.nan, math.nan, 0.01, UNDECIDED),
    ],
)
def test_verdicts(sign, rho, low, high, p_value, verdict):
    test = RankTest(rho, low, high, p_value, 12, 4, "runs", rho)
    finding = rank_finding("claim", sign, test)
    assert finding.verdict == verdict
    assert finding.numbers["rho"] == rho


def test_settings_that_go_the_other_way_than_runs_are_no_verdict():
    test = RankTest(0.9, 0.7, 1.0, 0.01, 12, 4, "settings", -0.9)
    assert rank_finding("claim", 1, test).verdict == UNDECIDED
    assert rank_finding("claim", -1, test).verdict == UNDECIDED


def test_the_rho_of_settings_is_that_of_their_means():
    means = np.array([Y[value == X].mean() for value in np.unique(X)])
    test = rank_test(X, Y, SETTINGS, permute="settings")
    expected = stats.spearmanr(np.unique(X), means).statistic
    assert test.permuted_rho == pytest.approx(expected, abs=1e-12)
    assert rank_test(X, Y, SETTINGS, permute="runs").permuted_rho == test.rho


def test_runs_that_are_alone_in_their_setting_have_no_interval():
    x = np.arange(12.0)
    alone = [0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    assert math.isnan(rank_test(x, x, alone, permute="runs").low)
    one_alone = [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 3]
    assert not math.isnan(rank_test(x, x, one_alone, permute="runs").low)


def test_too_few_settings_say_so():
    finding = rank_finding("claim", 1, rank_test(X, -Y, SETTINGS, permute="settings"))
    assert finding.verdict == UNDECIDED
    assert "4 settings cannot give less than 0.083" in finding.evidence


def test_a_count_holds_in_all_cases_only():
    assert counted_finding("c", 5, 5).verdict == HOLDS
    assert counted_finding("c", 4, 5).verdict == FAILS
    assert counted_finding("c", 0, 0).verdict == UNDECIDED
