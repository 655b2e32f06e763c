"""Whether runs bear a claim out: rank correlations with an interval, a p-value and a verdict."""

import itertools
import math
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np

from gc_nc.errors import InputError
from gc_nc.transfer.selection import spearman

HOLDS, FAILS, UNDECIDED = "holds", "fails", "cannot be told"

#: Of the p-value, and one minus the level of the interval.
ALPHA = 0.05

_RESAMPLES = 10_000
# So many permutations and fewer are all looked at.
_MOST_EXACT = 40_320
# Share of runs that may be alone in their setting.
_MOST_ALONE = 0.2


class RankTest(NamedTuple):
    """A rank correlation over runs, and how sure it is.

    Attributes:
      rho: Spearman's, in [-1, 1]; NaN where one side is constant.
      low: of the 95% interval over the runs within each setting; NaN with one run a setting.
      high: of it.
      p_value: two-sided, of a permutation of runs or settings; NaN where rho is.
      num_runs: n.
      num_settings: m.
      permuted: "runs" or "settings", what the p-value shuffles.
      permuted_rho: of what it shuffles, runs or the means of settings.
    """

    rho: float
    low: float
    high: float
    p_value: float
    num_runs: int
    num_settings: int
    permuted: str
    permuted_rho: float


class Finding(NamedTuple):
    """A claim and what the runs say of it.

    Attributes:
      claim: one sentence that could be wrong.
      verdict: HOLDS, FAILS or UNDECIDED.
      evidence: in words, with its numbers.
      numbers: the same for programs.
    """

    claim: str
    verdict: str
    evidence: str
    numbers: dict[str, Any]


def rank_test(
    x: Sequence[float] | np.ndarray,
    y: Sequence[float] | np.ndarray,
    settings: Sequence[Hashable],
    *,
    permute: str,
    seed: int = 0,
) -> RankTest:
    """Spearman's rho over runs; equal settings mark runs that differ in their seed alone.

    The interval resamples runs with replacement within each setting 10,000 times (a stratified
    bootstrap, 2.5% and 97.5% quantiles; Efron and Tibshirani 1993): it tells how sure rho is for
    these settings, not for others, and with few runs a setting it is too narrow. Resamples in which
    a side is constant are left out. Runs that are alone in their setting cannot vary; where they
    are more than a fifth there is no interval.

    The p-value is the share of permutations of y whose |rho| is at least as large. What may be
    permuted is what is exchangeable if there is no effect. If x is a setting that was chosen, that
    is runs. If x and y were both measured, runs of a setting belong together, so the means over
    runs of each setting are permuted and correlated. Up to 40,320 permutations (8!) are all looked
    at; of more, 10,000 random ones, and the p-value counts the observed one among them.

    Args:
      x: one number a run.
      y: one number a run.
      settings: what was chosen for each run, its seed left out.
      permute: "runs" or "settings".
      seed: of resampling and permutations.

    Raises:
      InputError: differing lengths, fewer than 3 runs or NaN, which has no rank.
      ValueError: another `permute`.
    """
    if permute not in ("runs", "settings"):
        raise ValueError(f"permute={permute!r} must be 'runs' or 'settings'")
    x, y = (np.asarray(values, np.float64) for values in (x, y))
    if not x.shape == y.shape == (len(settings),):
        raise InputError(f"{len(x)}, {len(y)} and {len(settings)} values for the same runs")
    if len(x) < 3:
        raise InputError(f"a rank correlation of {len(x)} runs; at least 3 are needed")
    if np.isnan(x).any() or np.isnan(y).any():
        raise InputError("a run has a metric that is NaN, which has no rank; leave the run out")
    names = list(dict.fromkeys(settings))
    group = np.array([names.index(setting) for setting in settings])
    rho = float(spearman(x[None], y[None])[0])
    rng = np.random.default_rng(seed)
    low, high = _interval(x, y, group, rng)
    if permute == "settings":
        x, y = (np.bincount(group, values) / np.bincount(group) for values in (x, y))
    permuted_rho = float(spearman(x[None], y[None])[0])
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
    rhos = spearman(x[rows], y[rows])
    rhos = rhos[np.isfinite(rhos)]
    if not rhos.size:
        return math.nan, math.nan
    low, high = np.quantile(rhos, [ALPHA / 2, 1 - ALPHA / 2])
    return float(low), float(high)


def _p_value(x, y, rng) -> float:
    observed = float(spearman(x[None], y[None])[0])
    if math.isnan(observed):
        return math.nan
    exact = math.factorial(len(x)) <= _MOST_EXACT
    if exact:
        orders = np.array(list(itertools.permutations(range(len(x)))))
    else:
        orders = rng.permuted(np.tile(np.arange(len(x)), (_RESAMPLES, 1)), axis=1)
    rhos = spearman(np.broadcast_to(x, orders.shape), y[orders])
    # Equal up to rounding is as large.
    extreme = int(np.sum(np.abs(rhos) >= abs(observed) - 1e-12))
    return extreme / len(orders) if exact else (1 + extreme) / (1 + len(orders))


def rank_finding(claim: str, sign: int, test: RankTest) -> Finding:
    """The verdict on a claim that x and y rise together (sign 1) or against each other (-1).

    It holds, or fails, where the 95% interval lies on that side of 0, or on the other, what is
    permuted has its rho there too, and the p-value is below 0.05. Anything else cannot be told from
    these runs.
    """
    low, high = sorted((sign * test.low, sign * test.high))
    told = test.p_value < ALPHA
    if told and low > 0 and sign * test.permuted_rho > 0:
        verdict = HOLDS
    elif told and high < 0 and sign * test.permuted_rho < 0:
        verdict = FAILS
    else:
        verdict = UNDECIDED
    evidence = f"rho {test.rho:.2f}"
    if math.isnan(test.rho):
        evidence = "one side is the same in all runs"
    elif math.isnan(test.low):
        evidence += ", no interval (settings with one run)"
    else:
        evidence += f" [{test.low:.2f}, {test.high:.2f}]"
    if test.permuted == "settings" and not math.isnan(test.permuted_rho):
        evidence += f", over settings {test.permuted_rho:.2f}"
    if not math.isnan(test.p_value):
        evidence += f", p {_shown(test)}"
    evidence += f"; {test.num_runs} runs of {test.num_settings} settings"
    return Finding(claim, verdict, evidence, {**test._asdict(), "claimed_sign": sign})


def _shown(test: RankTest) -> str:
    text = f"{test.p_value:.2g}"
    least = 2 / math.factorial(min(test.num_settings, 20))
    if test.permuted == "settings" and least >= ALPHA:
        text += f" ({test.num_settings} settings cannot give less than {min(1, least):.2g})"
    return text


def counted_finding(claim: str, num_true: int, total: int, evidence: str = "") -> Finding:
    """The verdict on a claim about each of `total` cases: it holds if it does in all of them."""
    verdict = UNDECIDED if not total else HOLDS if num_true == total else FAILS
    counted = f"in {num_true} of {total}"
    return Finding(
        claim,
        verdict,
        f"{counted}; {evidence}" if evidence else counted,
        {"num_true": num_true, "total": total},
    )
