"""GC, geometric collapse and NC against the weight of the GC penalty, over finished runs.

    python -m experiments.penalty_results --runs=DIR --out=DIR

Reads every run below --runs that is finished, all of which must have the same config but for the
weight and the seed, and writes gc_penalty.json (weight, seed and last metrics of each) and
gc_penalty.png into --out.
"""

import math
from pathlib import Path
from statistics import fmean
from typing import Any

from absl import flags

from experiments import launcher
from gc_nc.errors import InputError
from gc_nc.training.run_directory import (
    read_json_object,
    read_stored_config,
    to_json,
    write_atomically,
)

# Other commands have a flag of the same name, and tests import several commands.
_RUNS = flags.DEFINE_string("runs", None, "Folder of run directories.", allow_override=True)
_OUT = flags.DEFINE_string("out", None, "Folder to write to; it is made.")

_OWN_KEYS = ("gc_penalty.weight", "seed")
#: Metric and the title of its panel.
_PANELS = (
    ("geometric_complexity", "Geometric complexity"),
    ("geometric_collapse", "Geometric collapse"),
    ("neural_collapse", "Neural collapse"),
    ("accuracy", "Accuracy"),
)
_COLORS = {"train": "#1b6ca8", "test": "#d1495b"}


def main(argv: list[str]) -> None:
    """Collects, prints and draws."""
    del argv
    if not _RUNS.value or not _OUT.value:
        raise InputError("--runs and --out are needed: folders of runs and of results")
    runs, unfinished = collect(Path(_RUNS.value))
    out = Path(_OUT.value)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out={out} is no folder and cannot be made ({error})") from error
    write_atomically(out / "gc_penalty.json", to_json(runs))
    draw(runs, out / "gc_penalty.png")
    for name, _ in _PANELS:
        print(f"train {name}")
        for weight in sorted({run["weight"] for run in runs}):
            values = [r["metrics"][f"train/{name}"] for r in runs if r["weight"] == weight]
            print(f"  {weight:8g}  " + "  ".join(f"{value:.4g}" for value in values))
    if unfinished:
        print(f"not finished, left out: {', '.join(unfinished)}")
    print(f"wrote {out / 'gc_penalty.json'} and {out / 'gc_penalty.png'}")


def collect(folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Weight, seed and metrics of the finished runs, and the names of the others.

    Raises:
      InputError: no finished run, or configs that differ in more than weight and seed.
    """
    runs, unfinished, common = [], [], None
    for path in sorted(folder.glob("*/config.json")):
        config = read_stored_config(path)
        if not path.with_name("results.json").exists():
            unfinished.append(path.parent.name)
            continue
        shared = {key: value for key, value in config.items() if key not in _OWN_KEYS}
        common = common or (path, shared)
        differing = [
            key
            for key in sorted(shared.keys() | common[1].keys())
            if key not in shared or key not in common[1] or shared[key] != common[1][key]
        ]
        if differing:
            raise InputError(
                f"{path} and {common[0]} differ in {', '.join(differing)}; only"
                f" {' and '.join(_OWN_KEYS)} may"
            )
        results = read_json_object(path.with_name("results.json"))
        metadata = read_json_object(path.with_name("metadata.json"))
        runs.append(
            {
                "weight": config["gc_penalty.weight"],
                "seed": config["seed"],
                "step": results["step"],
                "device": metadata["devices"]["kind"],
                "metrics": results["metrics"],
            }
        )
    if not runs:
        raise InputError(f"{folder} holds no finished run, as runs/NAME/results.json")
    if all(run["weight"] == 0 for run in runs):
        raise InputError(f"{folder} holds no finished run with config.gc_penalty.weight above 0")
    return sorted(runs, key=lambda run: (run["weight"], run["seed"])), unfinished


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Each run a dot, the mean of a weight's runs a line; weight 0 stands left of the others."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    weights = sorted({run["weight"] for run in runs})
    positive = [weight for weight in weights if weight > 0]
    # A logarithmic axis has no 0: it stands a decade and a half before the first.
    places = {w: math.log10(w) if w > 0 else math.log10(positive[0]) - 1.5 for w in weights}
    figure = Figure(figsize=(9, 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    for ax, (name, title) in zip(figure.subplots(2, 2).flat, _PANELS, strict=True):
        for split, color in _COLORS.items():
            points = [(places[r["weight"]], r["metrics"][f"{split}/{name}"]) for r in runs]
            ax.plot(*zip(*points, strict=True), "o", color=color, markersize=4, alpha=0.6)
            means = [
                fmean(r["metrics"][f"{split}/{name}"] for r in runs if r["weight"] == weight)
                for weight in weights
            ]
            style = "-" if split == "train" else "--"
            ax.plot([places[w] for w in weights], means, style, color=color, label=split)
        if name != "accuracy":
            ax.set_yscale("log")
            ax.yaxis.set_major_formatter("{x:g}")
            # Between the powers of ten too where few of those are in sight.
            low, high = ax.get_ylim()
            ax.yaxis.set_minor_formatter("{x:g}" if high < 20 * low else NullFormatter())
        ax.set_xticks([places[w] for w in weights], [f"{w:g}" for w in weights])
        ax.set(title=title, xlabel="Weight of the GC penalty")
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    launcher.run(main)
