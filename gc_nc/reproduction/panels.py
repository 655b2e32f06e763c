"""Pictures of sweeps: rows of curves with a band over seeds, and scatter plots of runs."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gc_nc.drawing import COLORS, GREY, MARKERS, new_panels, save, set_logarithmic
from gc_nc.reproduction.run_table import Row, Run, setting_name

#: Points of a run: the position on the horizontal axis, and metrics by name.
Curves = Sequence[tuple[float, Mapping[str, Any]]]


class Column(NamedTuple):
    """A metric in a column of panels: its name, title, and whether its axis is logarithmic."""

    metric: str
    title: str
    logarithmic: bool = True


def draw_rows(
    rows: Sequence[Row],
    columns: Sequence[Column],
    curves_of: Callable[[Run], Curves],
    path: Path,
) -> None:
    """Draws a row of panels for each setting, a column for each metric and a colour for each value.

    Thick lines are means over the seeds up to where the first run ends, with a band from the lowest
    to the highest; thin lines are the whole runs.

    Args:
      rows: at least one row, each with at least one run.
      columns: the metrics to draw.
      curves_of: returns the points (epoch, {metric: value}) of a run.
      path: the PNG to write; its folder is made.
    """
    figure, axes = new_panels(len(rows), len(columns))
    for row, row_axes in zip(rows, axes, strict=True):
        colors = _shades(len(row.runs))
        curves = {value: [curves_of(run) for run in runs] for value, runs in row.runs.items()}
        for column, ax in zip(columns, row_axes, strict=True):
            for color, (value, of_runs) in zip(colors, curves.items(), strict=True):
                draw_seeds(ax, of_runs, column.metric, color, f"{value:g}")
            ax.set_xlabel("Epoch")
            if column.logarithmic:
                set_logarithmic(ax)
            if row is rows[0]:
                ax.set_title(column.title, fontsize=11)
        row_axes[0].set_ylabel(setting_name(row.key), fontweight="bold")
        row_axes[-1].legend(
            title=setting_name(row.key),
            frameon=False,
            fontsize=8,
            title_fontsize=8,
            # Beside the panels, where it does not hide a line.
            loc="upper left",
            bbox_to_anchor=(1.0, 1.0),
        )
    save(figure, path)


def draw_seeds(ax, of_runs: Sequence[Curves], metric: str, color: Any, label: str) -> None:
    """Draws runs as thin lines, and their mean and range up to where the first run ends.

    Runs are measured at different steps, between which they are interpolated linearly.
    """
    lines = []
    for curve in of_runs:
        points = [(x, values.get(metric, math.nan)) for x, values in curve]
        points = [(x, y) for x, y in points if math.isfinite(y)]
        if points:
            lines.append(np.transpose(points))
            ax.plot(*lines[-1], color=color, lw=0.6, alpha=0.5)
    if not lines or len(lines) < len(of_runs):
        # An empty line, so that the legend has an entry.
        ax.plot([], [], color=color, lw=2, label=label)
        return
    first, last = max(x[0] for x, _ in lines), min(x[-1] for x, _ in lines)
    common = np.unique(np.concatenate([x for x, _ in lines]))
    common = common[(common >= first) & (common <= last)]
    values = np.array([np.interp(common, x, y) for x, y in lines])
    ax.plot(common, values.mean(axis=0), color=color, lw=2, label=label)
    low, high = values.min(axis=0), values.max(axis=0)
    ax.fill_between(common, low, high, color=color, alpha=0.18, lw=0)


class Scatter(NamedTuple):
    """A panel of runs: the metric on each axis, and their titles."""

    x: str
    y: str
    x_title: str
    y_title: str
    diagonal: bool = False


def draw_scatters(
    groups: Mapping[str, Sequence[Mapping[str, float]]],
    panels: Sequence[Scatter],
    path: Path,
    *,
    columns: int = 3,
) -> None:
    """A panel for each pair of metrics, a dot for each run, a colour and marker for each group."""
    count = len(panels)
    columns = min(columns, count)
    figure, axes = new_panels(-(-count // columns), columns)
    flat = [ax for row in axes for ax in row]
    for panel, ax in zip(panels, flat, strict=False):
        for i, (name, runs) in enumerate(groups.items()):
            ax.plot(
                [run[panel.x] for run in runs],
                [run[panel.y] for run in runs],
                MARKERS[i % len(MARKERS)],
                color=COLORS[i % len(COLORS)],
                ms=5,
                alpha=0.8,
                label=name,
            )
        set_logarithmic(ax)
        set_logarithmic(ax, "x")
        if panel.diagonal:
            low = max(ax.get_xlim()[0], ax.get_ylim()[0])
            high = min(ax.get_xlim()[1], ax.get_ylim()[1])
            if low < high:
                ax.plot([low, high], [low, high], color=GREY, lw=1, ls=":")
        ax.set(xlabel=panel.x_title, ylabel=panel.y_title)
    for ax in flat[count:]:
        ax.remove()
    flat[0].legend(frameon=False, fontsize=8)
    save(figure, path)


def _shades(count: int) -> list[Any]:
    """Colours from light to dark, the highest value darkest; none is too light for white paper."""
    from matplotlib import colormaps

    return [colormaps["viridis"](0.88 - 0.88 * i / max(1, count - 1)) for i in range(count)]
