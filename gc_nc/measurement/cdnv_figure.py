"""The picture of all pairs of classes, which shows which are mixed and which have collapsed."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gc_nc.drawing import new_panels, save

#: The largest number of classes that are named on the axes.
_MOST_NAMED = 40
_LONGEST_NAME = 24
_GREY = "#bdbdbd"


def draw_cdnv(matrix: np.ndarray, class_names: Sequence[str], path: Path, title: str) -> None:
    """Draws V_ij as a heatmap with logarithmic colours; undefined values (NaN) are grey.

    Args:
      matrix: (C, C) from `metrics.cdnv_matrix`. 0 (collapsed) and inf (equal means) get separate
        colours beyond the ends of the colour bar.
      class_names: C names, shown on both axes if there are at most 40 classes.
      path: the PNG to write; its folder is made.
      title: what was measured.
    """
    import matplotlib
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import LogFormatter

    class _PlainLogFormatter(LogFormatter):
        """Labels the same ticks as LogFormatter, but as 0.06 and not as 6e-02."""

        def __call__(self, x, pos=None):
            return f"{x:g}" if super().__call__(x, pos) else ""

    matrix = np.asarray(matrix, float)
    num_classes = len(class_names)
    if matrix.shape != (num_classes, num_classes):
        raise ValueError(f"matrix of shape {matrix.shape} for {num_classes} class names")
    regular = matrix[np.isfinite(matrix) & (matrix > 0)]
    low, high = (regular.min(), regular.max()) if regular.size else (0.1, 1.0)
    if high < low * 1.2:
        low, high = low / 1.1, high * 1.1
    zeros, infinite = matrix == 0, np.isposinf(matrix)
    shown = np.where(zeros, low / 10, np.where(infinite, high * 10, matrix))
    extend = {(0, 0): "neither", (1, 0): "min", (0, 1): "max", (1, 1): "both"}
    colors = matplotlib.colormaps["viridis"].with_extremes(bad=_GREY, under="white", over="red")

    side = 6.4 if num_classes <= 20 else 8.5
    figure, [[ax]] = new_panels(1, 1, panel=(side + 0.9, side))
    ax.grid(False)
    image = ax.imshow(np.ma.masked_invalid(shown), cmap=colors, norm=LogNorm(low, high))
    bar = figure.colorbar(
        image,
        ax=ax,
        label="CDNV V_ij",
        shrink=0.85,
        extend=extend[int(zeros.any()), int(infinite.any())],
    )
    # Plain numbers, also between the powers of ten if few of those are visible.
    bar.ax.yaxis.set_major_formatter("{x:g}")
    bar.ax.yaxis.set_minor_formatter(
        _PlainLogFormatter(labelOnlyBase=False, minor_thresholds=(1.5, 0.6))
    )
    if num_classes <= _MOST_NAMED:
        names = [
            name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"
            for name in class_names
        ]
        # A row's height in points, minus some space.
        size = min(10.0, 0.6 * side * 72 * 0.75 / num_classes)
        upright = max(map(len, names)) > 2
        ax.set_xticks(range(num_classes), names, fontsize=size, rotation=90 if upright else 0)
        ax.set_yticks(range(num_classes), names, fontsize=size)
        for text in (*ax.get_xticklabels(), *ax.get_yticklabels()):
            text.set_parse_math(False)
    else:
        ax.set_xticks([])
        ax.set_yticks([])
    counted = "" if num_classes <= _MOST_NAMED else f" (0 to {num_classes - 1})"
    ax.set_xlabel(f"Class j{counted}")
    ax.set_ylabel(f"Class i{counted}")
    ax.set_title(title, fontsize=11, parse_math=False)
    save(figure, path)
