"""Intervals of geometric complexity: hand values, bad input, coverage of known populations."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gc_nc.metrics import geometric_complexity_interval
from tests.metrics.test_bounds_of_populations import mixtures
from tests.rounding import assert_same_numbers


def test_intervals_by_hand():
    norms = np.array([1.0, 3, 5, 7], np.float32)  # mean 4, unbiased variance 20 / 3
    half = 1000 * math.sqrt(math.log(20) / 8)
    wide = geometric_complexity_interval(norms, value_range=1000.0, delta=0.1, method="hoeffding")
    np.testing.assert_allclose(wide, (0, 4 + half), rtol=1e-6)
    many = np.tile(norms, 250)
    half = 8 * math.sqrt(math.log(2 / 0.05) / 2000)
    np.testing.assert_allclose(
        geometric_complexity_interval(many, value_range=8.0, method="hoeffding"),
        (4 - half, 4 + half),
        rtol=1e-5,
    )
    log_term = math.log(4 / 0.05)
    half = math.sqrt(2 * 5 * 1000 / 999 * log_term / 1000) + 7 * 8 * log_term / (3 * 999)
    interval = geometric_complexity_interval(many, value_range=8.0)
    np.testing.assert_allclose(interval, (4 - half, 4 + half), rtol=1e-5)
    traced = jax.jit(lambda n, r: geometric_complexity_interval(n, value_range=r))(many, 8.0)
    assert_same_numbers(traced, interval)
    assert geometric_complexity_interval(norms, value_range=8.0) == (0, 8)
    assert geometric_complexity_interval(norms, value_range=np.inf) == (0, np.inf)
    assert geometric_complexity_interval(np.zeros(3), value_range=0.0) == (0, 0)
    # Few large norms: the variance is small against R^2 and Bernstein is the narrower.
    narrow = geometric_complexity_interval(np.tile(norms, 500), value_range=100.0)
    wide = geometric_complexity_interval(np.tile(norms, 500), value_range=100.0, method="hoeffding")
    assert narrow.upper - narrow.lower < 0.5 * (wide.upper - wide.lower)


@pytest.mark.parametrize(
    ("norms", "options", "match"),
    [
        ([1.0, 9.0], {}, r"norm=9.0 must be in 0..value_range=8.0"),
        ([1.0, -1.0], {}, "norm=-1.0 must be in"),
        ([1.0, np.nan], {}, "norm=nan must be in"),
        ([1.0, np.inf], {"value_range": np.inf}, "norm=inf must be in"),
        ([1.0, 2.0], {"value_range": -1.0}, "value_range=-1.0 must be 0 or more"),
        ([1.0, 2.0], {"value_range": np.nan}, "value_range=nan must be 0 or more"),
        ([1.0], {}, "B of 2 or more"),
        ([], {"method": "hoeffding"}, "B of 1 or more"),
        ([1.0, 2.0], {"delta": 0.0}, "delta=0.0 must be between 0 and 1"),
        ([1.0, 2.0], {"delta": 1.0}, "delta=1.0 must be between 0 and 1"),
        ([1.0, 2.0], {"method": "normal"}, "'normal' is not one of hoeffding, emp"),
    ],
)
def test_intervals_refuse(norms, options, match):
    norms = np.array(norms, np.float32)
    interval = functools.partial(geometric_complexity_interval, **{"value_range": 8.0} | options)
    with pytest.raises(ValueError, match=match):
        interval(norms)
    if "must be in" in match or "value_range=" in match:
        traced = jax.jit(lambda norms, limit: interval(norms, value_range=limit))
        assert np.isnan(traced(norms, interval.keywords["value_range"])).all()


@functools.partial(jax.jit, static_argnames="method")
def intervals(norms, value_range, method):
    """Intervals of many samples, (trials, n) norms with a range each, at delta = 0.05."""
    return jax.vmap(lambda n, r: geometric_complexity_interval(n, value_range=r, method=method))(
        norms, jnp.broadcast_to(value_range, norms.shape[:1])
    )


def misses(norms, value_range, true_gc, method, shrink=1.0):
    """Share of samples whose interval, shrunk around its mean, does not hold the true GC."""
    lower, upper = intervals(norms.astype(np.float32), np.float32(value_range), method)
    mean = norms.mean(1)
    return np.mean(
        (mean - shrink * (mean - lower) > true_gc * (1 + 1e-6))
        | (mean + shrink * (upper - mean) < true_gc * (1 - 1e-6))
    )


TRIALS = 2000
ALLOWED = 0.05 + 3 * math.sqrt(0.05 * 0.95 / TRIALS)


@pytest.mark.parametrize("method", ["hoeffding", "empirical_bernstein"])
def test_intervals_hold_the_gc_of_sine_features(method):
    rng = np.random.default_rng(4)
    mixture = [m for m in mixtures() if m.kind == "sine"][7]
    true_gc = mixture.frequencies @ mixture.population()[2]
    squared_rows = (mixture.kernel**2).sum(1)
    labels = rng.choice(len(mixture.roots), (TRIALS, 40), p=mixture.frequencies)
    normal = rng.normal(size=(*labels.shape, mixture.roots.shape[-1]))
    x = mixture.input_means[labels] + np.einsum("tnde,tne->tnd", mixture.roots[labels], normal)
    norms = np.cos(x @ mixture.kernel.T + mixture.bias) ** 2 @ squared_rows
    # The true GC is the one that these samples scatter around.
    assert abs(norms.mean() - true_gc) < 5 * norms.std() / math.sqrt(norms.size)
    assert misses(norms, squared_rows.sum(), true_gc, method) <= ALLOWED


@pytest.mark.parametrize("method", ["hoeffding", "empirical_bernstein"])
def test_half_an_interval_is_not_enough(method):
    # Norms 0 or 2, equally often: the largest variance in a range of 2.
    norms = 2.0 * np.random.default_rng(5).integers(0, 2, (TRIALS, 4000))
    assert misses(norms, 2.0, 1.0, method) <= ALLOWED
    assert misses(norms, 2.0, 1.0, method, shrink=0.5) > ALLOWED


@pytest.mark.parametrize("method", ["hoeffding", "empirical_bernstein"])
def test_the_largest_norm_of_the_sample_is_no_range(method):
    # One input in 80 has norm 9, the others 0: 60% of samples of 40 see none of the large norms.
    norms = 9.0 * (np.random.default_rng(6).random((TRIALS, 40)) < 1 / 80)
    assert misses(norms, 9.0, 9 / 80, method) <= ALLOWED
    assert misses(norms, norms.max(1), 9 / 80, method) > 0.5
