"""Pictures of transfer: over the checkpoints of a run, and over runs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

_SOURCE, _TARGET = "#1b6ca8", "#d1495b"
_COLORS = ("#1b6ca8", "#d1495b", "#3a7d44", "#8d5a97", "#e09f3e", "#4a4e69")
_MARKERS = "os^vDP"


def draw_checkpoints(
    source: Mapping[int, Mapping[str, float]],
    results: Sequence[Mapping[str, Any]],
    path: Path,
    title: str,
) -> None:
    """Source GC, source and target NC, and few-shot accuracy against the step.

    Args:
      source: {step: source metrics}.
      results: of `evaluate_checkpoint`, of one protocol.
      path: of the PNG; its folder is made.
      title: of the picture.
    """
    figure, axes = _panels(3)
    steps = sorted(source)
    _line(
        axes[0],
        steps,
        [source[step]["geometric_complexity"] for step in steps],
        [1.96 * source[step]["geometric_complexity_sem"] for step in steps],
        color=_SOURCE,
    )
    axes[0].set(title="Source GC (95% interval)")
    set_logarithmic(axes[0])
    _line(axes[1], steps, [source[step]["neural_collapse"] for step in steps], None, color=_SOURCE)
    by_step = {result["step"]: result["target_neural_collapse"] for result in results}
    target_steps = sorted(by_step)
    _line(axes[1], target_steps, [by_step[s] for s in target_steps], None, color=_TARGET)
    axes[1].set(title="NC")
    axes[1].legend(axes[1].get_lines(), ["source classes", "target classes"], frameon=False)
    set_logarithmic(axes[1])
    for (ways, shots), color in zip(_tasks(results), _COLORS * 9, strict=False):
        chosen = sorted(
            (r for r in results if (r["num_ways"], r["num_shots"]) == (ways, shots)),
            key=lambda result: result["step"],
        )
        _line(
            axes[2],
            [result["step"] for result in chosen],
            [result["accuracy"] for result in chosen],
            [result["accuracy_half_width"] for result in chosen],
            color=color,
            label=f"{ways}-way {shots}-shot",
        )
    axes[2].set(title="Few-shot accuracy (95% interval)")
    axes[2].legend(frameon=False)
    for ax in axes:
        ax.set_xlabel("Step")
    _save(figure, path, title)


def draw_runs(runs: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Target NC and few-shot accuracy of runs against their source GC.

    Args:
      runs: each with group (a label that runs with other seeds share), source_geometric_complexity,
        source_geometric_complexity_sem, target_neural_collapse and accuracy {task: (mean, half)}.
      path: of the PNG; its folder is made.
      title: of the picture.
    """
    tasks = list(runs[0]["accuracy"])
    figure, axes = _panels(1 + len(tasks))
    groups = list(dict.fromkeys(run["group"] for run in runs))
    for i, group in enumerate(groups):
        chosen = [run for run in runs if run["group"] == group]
        gc = [run["source_geometric_complexity"] for run in chosen]
        sem = [1.96 * run["source_geometric_complexity_sem"] for run in chosen]
        style = {
            "fmt": _MARKERS[i % len(_MARKERS)],
            "color": _COLORS[i % len(_COLORS)],
            "markersize": 5,
            "elinewidth": 1,
            "label": group,
        }
        nc = [run["target_neural_collapse"] for run in chosen]
        axes[0].errorbar(gc, nc, xerr=sem, **style)
        for ax, task in zip(axes[1:], tasks, strict=True):
            mean, half = zip(*(run["accuracy"][task] for run in chosen), strict=True)
            ax.errorbar(gc, mean, xerr=sem, yerr=half, **style)
    axes[0].set(title="Target NC")
    for ax, task in zip(axes[1:], tasks, strict=True):
        ax.set(title=f"Accuracy, {task}")
    for ax in axes:
        ax.set_xlabel("Source GC (95% interval)")
        set_logarithmic(ax, "x")
    axes[0].legend(frameon=False, fontsize="small")
    _save(figure, path, title)


def _tasks(results) -> list[tuple[int, int]]:
    return sorted({(result["num_ways"], result["num_shots"]) for result in results})


def _panels(count: int):
    # The Agg canvas by hand: pyplot would choose a window system and change global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(count, 3)
    rows = -(-count // columns)
    figure = Figure(figsize=(4 * columns, 3.6 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax in axes[count:]:
        ax.remove()
    axes = axes[:count]
    for ax in axes:
        ax.grid(alpha=0.25, which="both")
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _line(ax, steps, values, half_widths, *, color, label=None) -> None:
    values = np.asarray(values, float)
    values = np.where(np.isfinite(values), values, np.nan)
    ax.plot(steps, values, color=color, marker="o", markersize=4, label=label)
    if half_widths is not None:
        half = np.asarray(half_widths, float)
        ax.fill_between(steps, values - half, values + half, color=color, alpha=0.2, lw=0)


def set_logarithmic(ax, axis: str = "y") -> None:
    """With plain numbers, between the powers of ten too where few of those are in sight."""
    from matplotlib.ticker import LogLocator

    low, high = getattr(ax, f"{axis}axis").get_data_interval()
    # A logarithmic axis of nothing positive would warn and show nothing.
    if not 0 < low <= high:
        return
    getattr(ax, f"set_{axis}scale")("log")
    ticks = getattr(ax, f"{axis}axis")
    ticks.set_major_formatter("{x:g}")
    subs = (2, 3, 5) if high > 3 * low else (1.5, 2, 2.5, 3, 4, 5, 6, 8)
    ticks.set_minor_locator(LogLocator(subs=subs if high < 100 * low else ()))
    ticks.set_minor_formatter("{x:g}")


def _save(figure, path: Path, title: str) -> None:
    figure.suptitle(title, fontsize=12)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
