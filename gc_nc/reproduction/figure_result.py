"""The input and the result of a figure, and the steps that figures share."""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gc_nc.errors import InputError
from gc_nc.rank_statistics import rank_test
from gc_nc.reproduction.claims import UNDECIDED, Finding, rank_finding
from gc_nc.reproduction.run_table import Row, Run, Sweep, setting_name
from gc_nc.runs.finished_run import FinishedRun


class Context(NamedTuple):
    """What a figure is made from.

    Attributes:
      sweep: the sweep with its runs.
      image: the PNG to write.
      scale: the scale of the runs.
      open_run: opens a run to measure it.
      report: called with what is being done.
    """

    sweep: Sweep
    image: Path
    scale: str
    open_run: Callable[[Path], FinishedRun]
    report: Callable[[str], None] = lambda doing: None


class FigureResult(NamedTuple):
    """The result of a figure; its picture is in the context's file.

    Attributes:
      caption: what is drawn.
      findings: the verdict on each claim.
      columns: the titles of the table's columns.
      rows: the rows of the table, with a cell for each column.
      notes: what a reader must know.
    """

    caption: str
    findings: list[Finding]
    columns: list[str]
    rows: list[list[Any]]
    notes: list[str]


#: How each setting is claimed to lower GC, in words, and the sign of its correlation with GC.
CLAIMED = {
    "optimizer.learning_rate": ("A higher learning rate", -1),
    "batch_size": ("A smaller batch size", 1),
    "optimizer.l2": ("Stronger L2", -1),
    "gc_penalty.weight": ("A larger GC penalty", -1),
}


def correlate(
    claim: str,
    sign: int,
    runs: Sequence[Run],
    x_of: Callable[[Run], float],
    y_of: Callable[[Run], float],
    *,
    permute: str,
) -> Finding:
    """The verdict on a claim that x and y of runs rise together (sign 1) or oppositely (-1)."""
    try:
        test = rank_test(
            [float(x_of(run)) for run in runs],
            [float(y_of(run)) for run in runs],
            [run.setting for run in runs],
            permute=permute,
        )
    except InputError as error:
        return Finding(claim, UNDECIDED, str(error), {"num_runs": len(runs)})
    return rank_finding(claim, sign, test)


def setting_claims(
    row: Row, metrics: Sequence[tuple[str, str, int]], value_of: Callable[[Run, str], float]
) -> list[Finding]:
    """Whether a setting changes metrics as claimed.

    Args:
      row: the runs of the setting.
      metrics: (metric, its title, 1 if it falls with GC or -1 if it rises as GC falls).
      value_of: returns a run's metric.
    """
    what, sign = CLAIMED[row.key]
    runs = [run for of_value in row.runs.values() for run in of_value]
    return [
        correlate(
            f"{what} {'lowers' if way > 0 else 'raises'} {title}",
            sign * way,
            runs,
            lambda run: run.config[row.key],
            lambda run, metric=metric: value_of(run, metric),
            permute="runs",
        )
        for metric, title, way in metrics
    ]


def settings_table(
    rows: Sequence[Row],
    columns: Sequence[tuple[str, str]],
    value_of: Callable[[Run, str], float],
) -> tuple[list[str], list[list[Any]]]:
    """Means and ranges over the seeds, for each value of each setting.

    Args:
      rows: the rows of a sweep.
      columns: (metric, title) of each column.
      value_of: returns a run's metric.
    """
    lines = []
    for row in rows:
        for value, runs in row.runs.items():
            cells: list[Any] = [f"{setting_name(row.key)} {value:g}", len(runs)]
            for metric, _ in columns:
                values = [value_of(run, metric) for run in runs]
                mean = statistics.fmean(values)
                cells.append(
                    mean
                    if len(values) == 1
                    else f"{mean:.4g} ({min(values):.4g} to {max(values):.4g})"
                )
            lines.append(cells)
    return ["setting", "seeds", *(title for _, title in columns)], lines


def require_runs(context: Context) -> None:
    """Raises InputError if no run is finished, since then there is nothing to draw."""
    if not context.sweep.runs:
        (name, why), *others = context.sweep.missing.items()
        more = f", and {len(others)} more" if others else ""
        raise InputError(f"no run is finished ({name}: {why}{more})")
