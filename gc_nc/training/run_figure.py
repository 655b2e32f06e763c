"""The picture of a run: accuracy, GC, geometric collapse and NC against the step."""

from pathlib import Path

import numpy as np

_COLORS = {"train": "#1b6ca8", "test": "#d1495b"}
_PANELS = (
    ("accuracy", "Accuracy", False),
    ("geometric_complexity", "Geometric complexity (95% interval)", True),
    ("geometric_collapse", "Geometric collapse", True),
    ("neural_collapse", "Neural collapse", True),
)


def draw_run(evaluations: list[dict], path: Path, *, title: str, subtitle: str) -> None:
    """Draws the evaluations of a run.

    Args:
      evaluations: the records of metrics.jsonl that hold an evaluation.
      path: of the PNG; its folder is made.
      title: what was trained on what.
      subtitle: how GC was measured.
    """
    # The Agg canvas by hand: pyplot would choose a window system and change global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    figure = Figure(figsize=(9, 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    steps = np.array([record["step"] for record in evaluations])
    for ax, (name, label, logarithmic) in zip(
        figure.subplots(2, 2, sharex=True).flat, _PANELS, strict=True
    ):
        for split, color in _COLORS.items():
            values = _finite(evaluations, f"{split}/{name}")
            style = "-" if split == "train" else "--"
            ax.plot(steps, values, style, color=color, label=split, marker=".", markersize=4)
            if name == "geometric_complexity":
                sem = _finite(evaluations, f"{split}/{name}_sem")
                low = np.maximum(values - 1.96 * sem, values * 1e-3)
                ax.fill_between(steps, low, values + 1.96 * sem, color=color, alpha=0.2, lw=0)
            # A logarithmic axis of nothing positive would warn and show nothing.
            if logarithmic and np.any(values > 0):
                ax.set_yscale("log")
                # Plain numbers, between the powers of ten too where few of those are in sight.
                ax.yaxis.set_major_formatter("{x:g}")
                ax.yaxis.set_minor_formatter(
                    LogFormatter(labelOnlyBase=False, minor_thresholds=(1.5, 0.6))
                )
        ax.set_title(label, fontsize=11)
        ax.grid(alpha=0.25, which="both")
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelbottom=True)
        ax.set_xlabel("Step")
    figure.axes[0].legend(frameon=False)
    figure.suptitle(f"{title}\n", fontsize=13)
    figure.text(0.5, 0.945, subtitle, ha="center", va="center", fontsize=9, color="#555555")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=150)


def _finite(evaluations: list[dict], name: str) -> np.ndarray:
    """The values of a metric; NaN, which leaves a gap, for infinite ones."""
    values = np.array([record[name] for record in evaluations], float)
    return np.where(np.isfinite(values), values, np.nan)
