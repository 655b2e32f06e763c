"""Pictures of transfer: over the checkpoints of a run, and over runs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gc_nc.drawing import COLORS, MARKERS, finite, new_panels, save, set_logarithmic

_SOURCE, _TARGET = COLORS[:2]


def draw_checkpoints(
    source: Mapping[int, Mapping[str, float]],
    results: Sequence[Mapping[str, Any]],
    path: Path,
    title: str,
) -> None:
    """Source GC, source and target NC, and few-shot accuracy against the step.

    Args:
      source: {step: source metrics}.
      results: results of `evaluate_checkpoint` with one protocol.
      path: the PNG to write; its folder is made.
      title: the title of the picture.
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
    for (ways, shots), color in zip(_tasks(results), COLORS * 9, strict=False):
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
    figure.suptitle(title, fontsize=12)
    save(figure, path)


def draw_runs(runs: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Target NC and few-shot accuracy of runs against their source GC.

    Args:
      runs: each has group (a label shared by runs that differ only in their seed),
        source_geometric_complexity, source_geometric_complexity_sem, target_neural_collapse and
        accuracy {task: (mean, half-width)}.
      path: the PNG to write; its folder is made.
      title: the title of the picture.
    """
    tasks = list(runs[0]["accuracy"])
    figure, axes = _panels(1 + len(tasks))
    groups = list(dict.fromkeys(run["group"] for run in runs))
    for i, group in enumerate(groups):
        chosen = [run for run in runs if run["group"] == group]
        gc = [run["source_geometric_complexity"] for run in chosen]
        sem = [1.96 * run["source_geometric_complexity_sem"] for run in chosen]
        style = {
            "fmt": MARKERS[i % len(MARKERS)],
            "color": COLORS[i % len(COLORS)],
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
    figure.suptitle(title, fontsize=12)
    save(figure, path)


def _tasks(results) -> list[tuple[int, int]]:
    return sorted({(result["num_ways"], result["num_shots"]) for result in results})


def _panels(count: int):
    columns = min(count, 3)
    figure, rows = new_panels(-(-count // columns), columns, panel=(4.0, 3.6))
    axes = [ax for row in rows for ax in row]
    for ax in axes[count:]:
        ax.remove()
    return figure, axes[:count]


def _line(ax, steps, values, half_widths, *, color, label=None) -> None:
    values = finite(values)
    ax.plot(steps, values, color=color, marker="o", markersize=4, label=label)
    if half_widths is not None:
        half = np.asarray(half_widths, float)
        ax.fill_between(steps, values - half, values + half, color=color, alpha=0.2, lw=0)
