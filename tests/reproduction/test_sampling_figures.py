"""Verdicts on samples: of trials whose bias, rate and spread are known."""

import math

import numpy as np
import pytest

from gc_nc.reproduction.claims import FAILS, HOLDS, UNDECIDED
from gc_nc.reproduction.sampling_figures import _cheaper, _rate, _small_enough, _unbiased

RNG = np.random.default_rng(0)
SIZES = (1, 2, 4, 8, 16)


def trials(exponent=-0.5, bias=0.0):
    return {size: 100 + bias + RNG.normal(size=20) * 10 * size**exponent for size in SIZES}


def test_the_mean_of_unbiased_trials_is_the_exact_value():
    assert _unbiased("examples", trials(), 100.0).verdict == HOLDS
    biased = _unbiased("examples", trials(bias=-20), 100.0)
    assert biased.verdict == FAILS
    assert biased.numbers["num_true"] < 5


@pytest.mark.parametrize(
    ("exponent", "verdict"), [(-0.5, HOLDS), (-1.2, FAILS), (0.0, FAILS), (0.5, FAILS)]
)
def test_the_rate_is_the_slope_of_the_spread(exponent, verdict):
    finding = _rate("examples", trials(exponent), math.inf)
    assert finding.verdict == verdict
    assert finding.numbers["exponent"] == pytest.approx(exponent, abs=0.25)


def test_the_rate_allows_for_samples_without_replacement():
    values = RNG.normal(size=400)
    drawn = {n: [RNG.permutation(values)[:n].mean() for _ in range(60)] for n in (25, 100, 300)}
    drawn = {n: 5 + np.array(means) for n, means in drawn.items()}
    assert _rate("examples", drawn, 400.0).verdict == HOLDS
    assert _rate("examples", drawn, math.inf).verdict == FAILS


def test_a_sample_is_large_enough_by_its_spread():
    assert _small_enough("examples", trials(), 100.0).verdict == HOLDS
    assert _small_enough("examples", trials(0.5), 100.0).verdict == FAILS
    assert _small_enough("examples", trials(0.5), 400.0).verdict == UNDECIDED


def test_trials_that_are_all_alike_have_no_rate():
    same = {1: np.full(20, 3.0), 2: np.r_[np.full(19, 3.0), 4.0]}
    with np.errstate(divide="ignore"):
        assert _rate("examples", same, math.inf).verdict == UNDECIDED


def test_the_smaller_error_at_equal_cost():
    errors = {
        name: {p: RNG.normal(size=64) * scale / p for p in SIZES}
        for name, scale in (("near", 0.1), ("far", 0.3), ("as far", 0.3))
    }
    assert _cheaper("near", "far", errors).verdict == HOLDS
    assert _cheaper("far", "near", errors).verdict == FAILS
    assert _cheaper("far", "as far", errors, only=4).verdict == UNDECIDED
    assert _cheaper("near", "far", errors).numbers["ratio"] == pytest.approx(1 / 3, rel=0.3)
