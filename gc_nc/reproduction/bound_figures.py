"""Figures of the bounds on the nearest-mean error, and of the two bounds on NC."""

import math
import statistics

from gc_nc.drawing import COLORS, new_panels, save, set_logarithmic
from gc_nc.measurement.checkpoint_measurements import measure_checkpoints
from gc_nc.reproduction.claims import counted_finding
from gc_nc.reproduction.figure_result import (
    Context,
    FigureResult,
    correlate,
    require_runs,
    settings_table,
)
from gc_nc.reproduction.panels import Scatter, draw_scatters, draw_seeds
from gc_nc.reproduction.run_table import Run, setting_name

_MOST_STEPS = 5
_GC_EXAMPLES, _GC_PROBES = 256, 2

_ERROR = "test/nearest_mean_error"
_FROM_NC, _FROM_GC = "bound_from_nc", "bound_from_gc"

# This is proved in docs/proofs.md.
_RATIO = (
    "The paper's bound is at least twice the one by class, and k times it where classes are"
    " balanced and of equal GC."
)


def error_bound_figure(context: Context) -> FigureResult:
    """The error of the nearest class mean, with its bounds from NC and from GC."""
    require_runs(context)
    sweep = context.sweep
    base_runs = sweep.base_runs or sweep.runs[:1]
    over_training = [_bounds_of(context, run, _MOST_STEPS) for run in base_runs]
    last = _last_measurements(context)
    groups = grouped(context, last)

    figure, [[over_time, beside]] = new_panels(1, 2)
    for metric, title, color in (
        (_ERROR, "test error of the nearest mean", COLORS[1]),
        (_FROM_NC, "bound from NC (Prop. 5.1)", COLORS[0]),
        (_FROM_GC, "bound from GC", COLORS[2]),
    ):
        lines = [
            [(run.epochs(step), values) for step, values in of_run.items()]
            for run, of_run in zip(base_runs, over_training, strict=True)
        ]
        draw_seeds(over_time, lines, metric, color, title)
        if metric != _ERROR:
            over_time.axhline(1, color="#999999", lw=0.8, ls=":")
    set_logarithmic(over_time)
    over_time.set(xlabel="Epoch", title=f"Over training, {len(base_runs)} seeds")
    # Placed between the bounds and the error.
    over_time.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0, 0.5))
    for i, (name, values) in enumerate(groups.items()):
        beside.plot(
            [v[_FROM_GC] for v in values],
            [v[_ERROR] for v in values],
            "os^vDP"[i % 6],
            color=COLORS[i % len(COLORS)],
            ms=5,
            alpha=0.8,
            label=name,
        )
    set_logarithmic(beside, "x")
    beside.set(xlabel="Bound from GC, uncapped", ylabel="Test error of the nearest mean")
    beside.set(title="At the end, all runs")
    beside.legend(frameon=False, fontsize=8)
    save(figure, context.image)

    cases = [values for of_run in over_training for values in of_run.values()]
    cases += [last[run.workdir] for run in sweep.runs if run not in base_runs]
    telling = sum(values[_FROM_NC] < 1 for values in cases)
    findings = [
        counted_finding(
            "The bound from NC is never below the error",
            sum(values[_FROM_NC] >= values[_ERROR] for values in cases),
            len(cases),
            f"it is below 1, and so says anything, in {telling}",
        ),
        counted_finding(
            "The bound from GC is never below the bound from NC",
            sum(values[_FROM_GC] >= values[_FROM_NC] for values in cases),
            len(cases),
            "Poincare constant from the training images",
        ),
    ]
    for metric, name in ((_FROM_NC, "NC"), (_FROM_GC, "GC")):
        findings.append(
            correlate(
                f"A lower bound from {name} goes with a lower error",
                1,
                sweep.runs,
                lambda run, metric=metric: last[run.workdir][metric],
                lambda run: last[run.workdir][_ERROR],
                permute="settings",
            )
        )
    table = settings_table(
        sweep.rows,
        (
            (_ERROR, "nearest-mean test error"),
            ("test/neural_collapse", "test NC"),
            (_FROM_NC, "bound from NC"),
            (_FROM_GC, "bound from GC"),
            ("train/poincare_constant", "Poincare constant (train)"),
        ),
        lambda run, metric: last[run.workdir][metric],
    )
    caption = (
        "Left: error of the nearest training class mean on test images, and the bounds of"
        " Proposition 5.1, 16 (k - 1) (1 + 2 / n) NC of the test images with n training images a"
        " class, and with NC replaced by its bound from GC; not capped at 1 (dotted). Bands: lowest"
        " to highest seed. Right: the error against the bound from GC, a dot a run."
    )
    notes = [
        "A bound above 1 is vacuous: no error can exceed it.",
        "Proposition 5.1 is of class means of examples from the distribution that is classified;"
        " here they are of the training images, which the network was fitted to.",
        f"GC of the bounds on {_GC_EXAMPLES} random images of each split (or all, if there are"
        f" fewer), {_GC_PROBES} products each.",
    ]
    return FigureResult(caption, findings, *table, notes)


def neural_collapse_bounds_figure(context: Context) -> FigureResult:
    """NC of the test images against its two bounds from GC."""
    require_runs(context)
    last = _last_measurements(context)
    paper, own = "test/neural_collapse_bound_paper", "test/neural_collapse_bound_per_class"
    nc = "test/neural_collapse"
    draw_scatters(
        grouped(context, last),
        (
            Scatter(paper, nc, "Bound of the paper", "NC, test images", diagonal=True),
            Scatter(own, nc, "Bound by class", "NC, test images", diagonal=True),
            Scatter(paper, "ratio", "Bound of the paper", "Bound of the paper / by class"),
        ),
        context.image,
    )
    values = [last[run.workdir] for run in context.sweep.runs]
    total = len(values)
    findings = [
        counted_finding(
            f"NC is at most the {name}",
            sum(v[nc] <= v[metric] for v in values),
            total,
            f"the bound is {statistics.median(v[looseness] for v in values):.3g} times NC at the"
            " median",
        )
        for metric, name, looseness in (
            (paper, "paper's bound", "looseness"),
            (own, "bound by class", "looseness_by_class"),
        )
    ]
    findings.append(
        counted_finding(
            "The bound by class is sharper than the paper's",
            sum(v["ratio"] > 1 for v in values),
            total,
            f"{min(v['ratio'] for v in values):.3g} to {max(v['ratio'] for v in values):.3g} times"
            " sharper",
        )
    )
    for metric, name in ((paper, "paper's bound"), (own, "bound by class")):
        findings.append(
            correlate(
                f"A lower {name} goes with lower NC",
                1,
                context.sweep.runs,
                lambda run, metric=metric: last[run.workdir][metric],
                lambda run: last[run.workdir][nc],
                permute="settings",
            )
        )
    table = settings_table(
        context.sweep.rows,
        ((nc, "test NC"), (paper, "paper's bound"), (own, "bound by class"), ("ratio", "ratio")),
        lambda run, metric: last[run.workdir][metric],
    )
    caption = (
        "NC of the test images against its bounds from GC at the end of each run, dotted where they"
        " are equal: c times geometric collapse (Proposition 4.1) and, by class,"
        " c / (k (k - 1)) times the sum over pairs of GC_i / d_ij^2. c is the smallest that holds"
        " on the training images, so the test images may break the bound."
    )
    return FigureResult(caption, findings, *table, [_RATIO])


def grouped(context: Context, values: dict) -> dict[str, list[dict[str, float]]]:
    """Values of the runs, grouped by the setting that is varied; the config itself is one group."""
    groups: dict[str, list] = {}
    for run in context.sweep.runs:
        names = [setting_name(key) for key, _ in run.setting]
        groups.setdefault(", ".join(names) or "as configured", []).append(values[run.workdir])
    return groups


def _last_measurements(context: Context) -> dict:
    last = {}
    for run in context.sweep.runs:
        [last[run.workdir]] = _bounds_of(context, run, 1).values()
    return last


def _bounds_of(context: Context, run: Run, most_steps: int) -> dict[int, dict[str, float]]:
    context.report(f"measuring {run.workdir.name}")
    smoke = context.scale == "smoke"
    measured = measure_checkpoints(
        run.workdir,
        context.open_run,
        most_steps=most_steps,
        gc_examples=40 if smoke else _GC_EXAMPLES,
        gc_probes=1 if smoke else _GC_PROBES,
        num_train=run.metadata["data"]["num_train"],
    )
    num_classes = run.metadata["data"]["num_classes"]
    shots = run.metadata["data"]["num_train"] / num_classes
    factor = 16 * (num_classes - 1) * (1 + 2 / shots)
    paper, own = "test/neural_collapse_bound_paper", "test/neural_collapse_bound_per_class"
    return {
        step: {
            **values,
            _FROM_NC: factor * values["test/neural_collapse"],
            _FROM_GC: factor * values[paper],
            "ratio": _ratio(values[paper], values[own]),
            "looseness": _ratio(values[paper], values["test/neural_collapse"]),
            "looseness_by_class": _ratio(values[own], values["test/neural_collapse"]),
        }
        for step, values in measured.items()
    }


def _ratio(bound: float, value: float) -> float:
    return bound / value if value else math.nan
