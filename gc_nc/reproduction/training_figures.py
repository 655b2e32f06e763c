"""Figures of how training changes GC and NC: for each setting, and in the terminal phase."""

import math
import statistics
from collections.abc import Sequence

from gc_nc.reproduction.claims import Finding, counted_finding
from gc_nc.reproduction.figure_result import (
    Context,
    FigureResult,
    correlate,
    require_runs,
    setting_claims,
    settings_table,
)
from gc_nc.reproduction.panels import Column, Curves, draw_rows
from gc_nc.reproduction.run_table import Run, only

# Keys of metrics.jsonl, whose values gc_nc.training.evaluation computes.
_GC, _GEOMETRIC, _NC = (
    "train/geometric_complexity",
    "train/geometric_collapse",
    "train/neural_collapse",
)


def final(run: Run, metric: str) -> float:
    """A metric of a run's last evaluation."""
    return float(run.final[metric])


def curves(run: Run) -> Curves:
    """The evaluations of a run by epoch."""
    return [(run.epochs(record["step"]), record) for record in run.evaluations]


def setting_figure(context: Context) -> FigureResult:
    """GC, geometric collapse and NC over training, with one row for each setting."""
    require_runs(context)
    sweep = context.sweep
    columns = (
        Column(_GC, "Geometric complexity"),
        Column(_GEOMETRIC, "Geometric collapse"),
        Column(_NC, "Neural collapse"),
    )
    draw_rows(sweep.rows, columns, curves, context.image)
    findings = [
        finding
        for row in sweep.rows
        for finding in setting_claims(
            row,
            ((_GC, "GC", 1), (_GEOMETRIC, "geometric collapse", 1), (_NC, "NC", 1)),
            final,
        )
    ]
    for x, y, claim in (
        (_GC, _GEOMETRIC, "Lower GC goes with lower geometric collapse"),
        (_GC, _NC, "Lower GC goes with lower NC"),
        (_GEOMETRIC, _NC, "Lower geometric collapse goes with lower NC"),
    ):
        findings.append(
            correlate(
                f"{claim}, over all settings" if len(sweep.rows) > 1 else claim,
                1,
                sweep.runs,
                lambda run, x=x: run.final[x],
                lambda run, y=y: run.final[y],
                permute="settings",
            )
        )
    table = settings_table(
        sweep.rows,
        (
            (_GC, "train GC"),
            (_GEOMETRIC, "geometric collapse"),
            (_NC, "train NC"),
            ("test/neural_collapse", "test NC"),
            ("train/accuracy", "train accuracy"),
            ("test/accuracy", "test accuracy"),
            ("step", "steps"),
        ),
        final,
    )
    caption = (
        "GC, geometric collapse and NC of the training images against the epoch. A colour a value"
        " of the setting, the thick line the mean over its seeds with a band from the lowest to the"
        " highest, thin lines the runs to their ends. Verdicts are of the last evaluation."
    )
    notes = [
        _fitted_note(sweep.runs),
        "Values of a setting are compared at the same number of steps, or at the same number of"
        " epochs after training accuracy 1 where runs stop by that.",
        "Claims on a setting permute runs; claims on two metrics permute settings, of which there"
        f" are {len({run.setting for run in sweep.runs})}. GC is in model-input units"
        " (per-channel mean 0 and variance 1).",
    ]
    return FigureResult(caption, findings, *table, notes)


def _fitted_note(runs: Sequence[Run]) -> str:
    others = [run for run in runs if run.final["train/accuracy"] < 1]
    if not others:
        return f"All {len(runs)} runs end at training accuracy 1."
    note = f"{len(runs) - len(others)} of {len(runs)} runs end at training accuracy 1"
    if len(others) > 10:
        return f"{note}."
    names = ", ".join(f"{run.workdir.name} ({run.final['train/accuracy']:.4g})" for run in others)
    return f"{note}. The others, which are judged with them: {names}."


def terminal_phase_figure(context: Context) -> FigureResult:
    """NC and test accuracy from the first evaluation at training accuracy 1 on."""
    require_runs(context)
    sweep = context.sweep
    columns = (
        Column(_NC, "NC, training images"),
        Column("test/neural_collapse", "NC, test images"),
        Column("test/accuracy", "Test accuracy", logarithmic=False),
    )
    terminal = [run for run in sweep.runs if _first_fitted(run) is not None]
    rows = only(sweep.rows, terminal)
    # If no run is fitted, as at the smallest scale, draw the whole of training instead.
    draw_rows(rows or sweep.rows, columns, curves, context.image)
    lasting = [run for run in terminal if _first_fitted(run) is not run.final]
    findings = [_goes_on_falling(split, lasting) for split in ("train", "test")]
    for x, name in ((_GC, "GC"), (_NC, "NC of the training images")):
        findings.append(
            correlate(
                f"Lower {name} goes with higher test accuracy, over settings in the terminal phase",
                -1,
                terminal,
                lambda run, x=x: run.final[x],
                lambda run: run.final["test/accuracy"],
                permute="settings",
            )
        )
    for row in rows:
        findings += setting_claims(row, (("test/accuracy", "test accuracy", -1),), final)
    table = settings_table(
        rows,
        (
            ("first", "epoch of train accuracy 1"),
            ("last", "last epoch"),
            ("first_nc", "train NC then"),
            (_NC, "train NC at the end"),
            ("test/neural_collapse", "test NC at the end"),
            ("test/accuracy", "test accuracy"),
        ),
        _terminal_value,
    )
    caption = (
        "NC and test accuracy against the epoch, of runs that reach training accuracy 1, into the"
        " terminal phase. Lines and bands as in figure 1."
    )
    notes = [
        f"{len(terminal)} of {len(sweep.runs)} runs reach training accuracy 1; the others are left"
        " out here.",
        "A count holds only if it does in every run: a single run decides it.",
    ]
    return FigureResult(caption, findings, *table, notes)


def _goes_on_falling(split: str, runs: Sequence[Run]) -> Finding:
    metric = f"{split}/neural_collapse"
    factors = sorted(_factor(_first_fitted(run)[metric], run.final[metric]) for run in runs)
    evidence = "from the first evaluation at training accuracy 1 to the last one"
    if factors:
        evidence += (
            f" by a factor of {statistics.median(factors):.3f} at the median,"
            f" {factors[0]:.2f} to {factors[-1]:.2f}"
        )
    return counted_finding(
        f"After training accuracy 1, NC of the {split} images goes on falling",
        sum(factor < 1 for factor in factors),
        len(factors),
        evidence,
    )


def _factor(first: float, last: float) -> float:
    """last / first, for metrics that are 0 if collapse is complete."""
    if first:
        return last / first
    return math.inf if last else 1.0


def _first_fitted(run: Run):
    """The first evaluation after which training accuracy stays at 1; None if it ends below 1."""
    first = None
    for record in run.evaluations:
        if record["train/accuracy"] < 1:
            first = None
        elif first is None:
            first = record
    return first


def _terminal_value(run: Run, metric: str) -> float:
    first = _first_fitted(run)
    if metric == "first":
        return run.epochs(first["step"])
    if metric == "last":
        return run.epochs(run.final["step"])
    return first[_NC] if metric == "first_nc" else run.final[metric]
