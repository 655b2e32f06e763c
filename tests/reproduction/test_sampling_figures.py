"""Verdicts on samples: of trials whose bias, rate and spread are known."""

import numpy as np
import pytest

from gc_nc.reproduction.claims import FAILS, HOLDS, UNDECIDED
from gc_nc.reproduction.sampling_figures import _cheaper, _rate, _unbiased

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
    ("exponent", "verdict"), [(-0.5, HOLDS), (-1.2, FAILS), (0.0, UNDECIDED), (0.5, FAILS)]
)
def test_the_rate_is_the_slope_of_the_spread(exponent, verdict):
    finding = _rate("examples", trials(exponent))
    assert finding.verdict == verdict
    assert finding.numbers["exponent"] == pytest.approx(exponent, abs=0.25)


def test_the_smaller_error_at_equal_cost():
    errors = {
        name: {p: RNG.normal(size=64) * scale / p for p in SIZES}
        for name, scale in (("near", 0.1), ("far", 0.3), ("as far", 0.3))
    }
    assert _cheaper("near", "far", errors).verdict == HOLDS
    assert _cheaper("far", "near", errors).verdict == FAILS
    assert _cheaper("far", "as far", errors, only=4).verdict == UNDECIDED
    assert _cheaper("near", "far", errors).numbers["ratio"] == pytest.approx(1 / 3, rel=0.3)
