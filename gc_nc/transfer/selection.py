"""Which of several runs transfers best: ranks by source GC and what they are worth."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import rankdata

from gc_nc.errors import InputError

_RESAMPLES = 10_000


class RankCorrelation(NamedTuple):
    """Spearman's rho with the 95% percentile interval of a bootstrap over runs.

    Attributes:
      rho: in [-1, 1]; NaN where one side is constant.
      low: of the interval.
      high: of the interval.
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
    rho and are left out. It is wide for few runs, and too narrow where runs that differ only in
    their seed count as if they were independent settings.

    Args:
      x: one number a run, such as source GC.
      y: one number a run, such as accuracy.
      seed: of the resampling.

    Raises:
      InputError: fewer than 3 runs, different lengths, or values that are NaN (infinite ones have
        their rank).
    """
    x, y = (np.asarray(values, np.float64) for values in (x, y))
    if x.shape != y.shape or x.ndim != 1 or len(x) < 3:
        raise InputError(f"a rank correlation of {len(x)} and {len(y)} runs; at least 3 are needed")
    if np.isnan(x).any() or np.isnan(y).any():
        raise InputError("a run has a metric that is NaN, which has no rank; leave the run out")
    rows = np.random.default_rng(seed).integers(0, len(x), (_RESAMPLES, len(x)))
    resampled = spearman(x[rows], y[rows])
    known = resampled[np.isfinite(resampled)]
    low, high = np.quantile(known, [0.025, 0.975]) if known.size else (math.nan, math.nan)
    rho = float(spearman(x[None], y[None])[0])
    return RankCorrelation(rho, float(low), float(high), len(x))


def spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """rho of each row; NaN where a side is constant."""
    x, y = (rankdata(values, axis=1) for values in (x, y))
    x, y = (values - values.mean(axis=1, keepdims=True) for values in (x, y))
    norm = np.sqrt(np.sum(x**2, axis=1) * np.sum(y**2, axis=1))
    return np.where(norm > 0, np.sum(x * y, axis=1) / np.where(norm > 0, norm, 1), np.nan)
