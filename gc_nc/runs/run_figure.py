"""The picture of a run: accuracy, GC, geometric collapse and NC against the step."""

from pathlib import Path

import numpy as np

from gc_nc.drawing import COLORS, GREY, finite, new_panels, save, set_logarithmic
from gc_nc.files import read_json_object
from gc_nc.runs.run_directory import read_records

_COLORS = dict(zip(("train", "test"), COLORS, strict=False))
_PANELS = (
    ("accuracy", "Accuracy", False),
    ("geometric_complexity", "Geometric complexity (95% interval)", True),
    ("geometric_collapse", "Geometric collapse", True),
    ("neural_collapse", "Neural collapse", True),
)


def figure_path(workdir: Path) -> Path:
    """The path of a run's picture."""
    return workdir / "figures" / "run.png"


def draw_finished_run(workdir: Path) -> None:
    """Draws the picture of a run whose last evaluation is in its metrics.jsonl."""
    config = read_json_object(workdir / "config.json")
    data = read_json_object(workdir / "metadata.json")["data"]
    examples = data["gc_examples"]
    draw_run(
        [record for record in read_records(workdir) if "train/accuracy" in record],
        figure_path(workdir),
        title=f"{config['model']['name']} (width {config['model']['width']:g}) on {data['name']}",
        subtitle=(
            f"GC of the embedding on {examples['train']} fixed training and {examples['test']} test"
            " images, in model-input units"
        ),
    )


def draw_run(evaluations: list[dict], path: Path, *, title: str, subtitle: str) -> None:
    """Draws the evaluations of a run.

    Args:
      evaluations: the records of metrics.jsonl that contain an evaluation.
      path: the PNG to write; its folder is made.
      title: what was trained on what.
      subtitle: how GC was measured.
    """
    figure, axes = new_panels(2, 2, panel=(4.5, 3.2))
    steps = [record["step"] for record in evaluations]
    panels = [ax for row in axes for ax in row]
    for ax, (name, label, logarithmic) in zip(panels, _PANELS, strict=True):
        for split, color in _COLORS.items():
            values = finite([record[f"{split}/{name}"] for record in evaluations])
            style = "-" if split == "train" else "--"
            ax.plot(steps, values, style, color=color, label=split, marker=".", markersize=4)
            if name == "geometric_complexity":
                sem = finite([record[f"{split}/{name}_sem"] for record in evaluations])
                low = np.maximum(values - 1.96 * sem, values * 1e-3)
                ax.fill_between(steps, low, values + 1.96 * sem, color=color, alpha=0.2, lw=0)
        if logarithmic:
            set_logarithmic(ax)
        ax.set_title(label, fontsize=11)
        ax.set_xlabel("Step")
    panels[0].legend(frameon=False)
    figure.suptitle(f"{title}\n", fontsize=13)
    figure.text(0.5, 0.945, subtitle, ha="center", va="center", fontsize=9, color=GREY)
    save(figure, path)
