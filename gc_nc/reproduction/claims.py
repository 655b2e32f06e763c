"""Whether runs support a claim: rank correlations with an interval, a p-value and a verdict."""

import math
from typing import Any, NamedTuple

from gc_nc.rank_statistics import ALPHA, RankTest

HOLDS, FAILS, UNDECIDED = "holds", "fails", "cannot be told"


class Finding(NamedTuple):
    """A claim and what the runs say about it.

    Attributes:
      claim: one sentence that could be wrong.
      verdict: HOLDS, FAILS or UNDECIDED.
      evidence: the evidence in words and numbers.
      numbers: the same numbers for programs.
    """

    claim: str
    verdict: str
    evidence: str
    numbers: dict[str, Any]


def rank_finding(claim: str, sign: int, test: RankTest) -> Finding:
    """The verdict on a claim that x and y rise together (sign 1) or against each other (-1).

    The claim holds if the 95% interval and the rho of what is permuted are on the claimed side of
    0 and the p-value is below 0.05. It fails if both are on the other side and the p-value is below
    0.05. Anything else cannot be told from these runs.
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
    """The verdict on a claim about `total` cases, which holds if it holds in every case."""
    verdict = UNDECIDED if not total else HOLDS if num_true == total else FAILS
    counted = f"in {num_true} of {total}"
    return Finding(
        claim,
        verdict,
        f"{counted}; {evidence}" if evidence else counted,
        {"num_true": num_true, "total": total},
    )
