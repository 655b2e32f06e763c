"""Rank correlations over runs: Spearman's rho, bootstrap intervals and permutation tests."""

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import permutation_test, rankdata

from gc_nc.errors import InputError

#: Significance level of the p-value, and one minus the level of the interval.
ALPHA = 0.05

_RESAMPLES = 10_000
# The largest share of runs that may be alone in their setting.
_MOST_ALONE = 0.2


class RankCorrelation(NamedTuple):
    """Spearman's rho with the 95% percentile interval of a bootstrap over runs.

    Attributes:
      rho: in [-1, 1]; NaN where one side is constant.
      low: lower end of the interval.
      high: upper end of the interval.
      num_runs: n.
    """

    rho: float
    low: float
    high: float
    num_runs: int


def rank_correlation(
    x: Sequence[float | int] | np.ndarray, y: Sequence[float | int] | np.ndarray, seed: int = 0
) -> RankCorrelation:
    """Spearman's rho = Pearson's correlation of the ranks, ties at their mean rank.

    The interval resamples runs (pairs) with replacement 10,000 times and takes the 2.5% and 97.5%
    quantiles (Efron and Tibshirani 1993, chapter 13); resamples in which a side is constant have no
    rho and are left out. It is wide for few runs, and too narrow if runs that differ only in their
    seed are counted as if they were independent settings.

    Args:
      x: one number for each run, such as source GC.
      y: one number for each run, such as accuracy.
      seed: seed of the resampling.

    Raises:
      InputError: fewer than 3 runs, different lengths, or values that are NaN (infinite values do
        have a rank).
    """
    x, y = _checked(x, y, len(x))
    rows = np.random.default_rng(seed).integers(0, len(x), (_RESAMPLES, len(x)))
    low, high = _quantiles(spearman(x[rows], y[rows]))
    return RankCorrelation(float(spearman(x, y)), low, high, len(x))


def spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Spearman's rho over the last axis; NaN where a side is constant."""
    x, y = (rankdata(values, axis=-1) for values in (x, y))
    x, y = (values - values.mean(axis=-1, keepdims=True) for values in (x, y))
    norm = np.sqrt(np.sum(x**2, axis=-1) * np.sum(y**2, axis=-1))
    return np.where(norm > 0, np.sum(x * y, axis=-1) / np.where(norm > 0, norm, 1), np.nan)


def _checked(x, y, num_runs: int) -> tuple[np.ndarray, np.ndarray]:
    x, y = (np.asarray(values, np.float64) for values in (x, y))
    if not x.shape == y.shape == (num_runs,):
        raise InputError(f"{len(x)}, {len(y)} and {num_runs} values for the same runs")
    if num_runs < 3:
        raise InputError(f"a rank correlation of {num_runs} runs; at least 3 are needed")
    if np.isnan(x).any() or np.isnan(y).any():
        raise InputError("a run has a metric that is NaN, which has no rank; leave the run out")
    return x, y


def _quantiles(rhos: np.ndarray) -> tuple[float, float]:
    """The ends of the interval; NaN if no resample has a rho."""
    rhos = rhos[np.isfinite(rhos)]
    if not rhos.size:
        return math.nan, math.nan
    low, high = np.quantile(rhos, [ALPHA / 2, 1 - ALPHA / 2])
    return float(low), float(high)


class RankTest(NamedTuple):
    """A rank correlation over runs, and how sure it is.

    Attributes:
      rho: Spearman's, in [-1, 1]; NaN where one side is constant.
      low: lower end of the 95% interval over the runs within each setting; NaN if each setting has
        a single run.
      high: its upper end.
      p_value: two-sided, from permuting runs or settings; NaN where rho is.
      num_runs: n.
      num_settings: m.
      permuted: "runs" or "settings", whichever the p-value permutes.
      permuted_rho: rho of what is permuted, which is runs or the means of settings.
    """

    rho: float
    low: float
    high: float
    p_value: float
    num_runs: int
    num_settings: int
    permuted: str
    permuted_rho: float


def rank_test(
    x: Sequence[float] | np.ndarray,
    y: Sequence[float] | np.ndarray,
    settings: Sequence[Hashable],
    *,
    permute: str,
    seed: int = 0,
) -> RankTest:
    """Spearman's rho over runs; runs with equal settings differ only in their seed.

    The interval resamples runs with replacement within each setting 10,000 times (a stratified
    bootstrap, 2.5% and 97.5% quantiles; Efron and Tibshirani 1993). It says how certain rho is for
    these settings, not for others, and it is too narrow if settings have few runs. Resamples in
    which a side is constant are left out. A run that is alone in its setting cannot vary; if more
    than a fifth of the runs are alone, there is no interval.

    The p-value is the share of permutations of y whose |rho| is at least as large. What may be
    permuted is what is exchangeable if there is no effect. If x is a setting that was chosen, these
    are the runs. If x and y were both measured, the runs of a setting belong together, so the means
    over each setting's runs are permuted and correlated. If there are at most 40,320 permutations
    (8!) all of them are tried, otherwise 10,000 random ones, and the observed one counts as one.

    Args:
      x: one number for each run.
      y: one number for each run.
      settings: what was chosen for each run, apart from its seed.
      permute: "runs" or "settings".
      seed: seed of resampling and permutations.

    Raises:
      InputError: differing lengths, fewer than 3 runs, or NaN, which has no rank.
      ValueError: `permute` is something else.
    """
    if permute not in ("runs", "settings"):
        raise ValueError(f"permute={permute!r} must be 'runs' or 'settings'")
    x, y = _checked(x, y, len(settings))
    names = list(dict.fromkeys(settings))
    group = np.array([names.index(setting) for setting in settings])
    rho = float(spearman(x, y))
    rng = np.random.default_rng(seed)
    low, high = _interval(x, y, group, rng)
    if permute == "settings":
        x, y = (np.bincount(group, values) / np.bincount(group) for values in (x, y))
    permuted_rho = float(spearman(x, y))
    p_value = _p_value(x, y, rng)
    return RankTest(rho, low, high, p_value, len(settings), len(names), permute, permuted_rho)


def _interval(x, y, group, rng) -> tuple[float, float]:
    sizes = np.bincount(group)
    if np.sum(sizes == 1) > _MOST_ALONE * len(group):
        return math.nan, math.nan
    members = [np.flatnonzero(group == g) for g in range(len(sizes))]
    rows = np.concatenate(
        [rng.choice(runs, (_RESAMPLES, len(runs)), replace=True) for runs in members], axis=1
    )
    return _quantiles(spearman(x[rows], y[rows]))


def _p_value(x, y, rng) -> float:
    if math.isnan(spearman(x, y)):
        return math.nan

    def statistic(permuted, axis):
        # Rounded, so that equal |rho| compare as equal although they are summed in another order.
        return np.round(np.abs(spearman(np.broadcast_to(x, permuted.shape), permuted)), 12)

    # SciPy tries all permutations if there are at most n_resamples, and otherwise that many random
    # ones, to which it adds the observed one.
    result = permutation_test(
        (y,),
        statistic,
        permutation_type="pairings",
        alternative="greater",
        vectorized=True,
        n_resamples=_RESAMPLES if len(y) > 8 else math.factorial(8),
        batch=_RESAMPLES,
        rng=rng,
    )
    return float(result.pvalue)
