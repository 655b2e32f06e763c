"""What all pictures share: a canvas, a palette, logarithmic axes with plain numbers, and saving."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

COLORS = ("#1b6ca8", "#d1495b", "#3a7d44", "#8d5a97", "#e09f3e", "#4a4e69", "#00798c", "#6b4226")
MARKERS = "os^vDPX*"
GREY = "#555555"


def new_panels(rows: int, columns: int, *, panel: tuple[float | int, float | int] = (3.7, 2.9)):
    """A figure and its axes, as one list for each row.

    Args:
      rows: number of rows of panels.
      columns: number of columns of panels.
      panel: width and height of a panel in inches.
    """
    # Without pyplot, which would choose a window system and change global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(columns * panel[0], rows * panel[1]), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(which="both", labelsize=8)
        ax.xaxis.label.set_size(9)
        ax.yaxis.label.set_size(9)
    return figure, [list(row) for row in axes]


def finite(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """The values, with NaN in place of infinite ones, so that a line has a gap there."""
    values = np.asarray(values, float)
    return np.where(np.isfinite(values), values, np.nan)


def set_logarithmic(ax, axis: str = "y") -> None:
    """Makes an axis logarithmic; labels are plain numbers, also between powers of ten if useful."""
    from matplotlib.ticker import LogLocator

    low, high = getattr(ax, f"{axis}axis").get_data_interval()
    # Without a positive value a logarithmic axis would warn and show nothing.
    if not 0 < low <= high:
        return
    getattr(ax, f"set_{axis}scale")("log")
    ticks = getattr(ax, f"{axis}axis")
    ticks.set_major_formatter("{x:g}")
    subs = (2, 3, 5) if high > 3 * low else (1.5, 2, 2.5, 3, 4, 5, 6, 8)
    ticks.set_minor_locator(LogLocator(subs=subs if high < 100 * low else ()))
    ticks.set_minor_formatter("{x:g}")


def save(figure, path: Path, *, dpi: int = 130) -> None:
    """Writes the PNG, and makes its folder if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi)
