"""A run's transfer.json with its table and picture, and the ranking of several runs."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from gc_nc.errors import InputError
from gc_nc.files import locked, read_json_object, to_json, write_atomically
from gc_nc.measurement.transfer_evaluation import SPLITS, Protocol
from gc_nc.measurement.transfer_figures import draw_checkpoints, draw_runs
from gc_nc.rank_statistics import rank_correlation
from gc_nc.runs.finished_run import FinishedRun
from gc_nc.runs.run_directory import read_stored_config

#: Keys of a result that say what was measured, as opposed to the measured values.
IDENTITY = ("step", *Protocol._fields, "num_ways", "num_shots")


class RunRecord(NamedTuple):
    """What one call measured of a run.

    Attributes:
      workdir: the run's directory.
      config: the run's config.
      source: {step: source metrics}.
      results: one result for each setting, as `evaluate_checkpoint` returns them.
    """

    workdir: Path
    config: ConfigDict
    source: dict[int, dict[str, float]]
    results: list[dict[str, Any]]


def read_results(workdir: Path) -> dict[str, Any]:
    """transfer.json, {"source": {step: metrics}, "results": [...]}; both empty if it is missing.

    Raises:
      InputError: the file cannot be read, or its folder cannot be written to.
    """
    if not os.access(workdir, os.W_OK | os.X_OK):
        raise InputError(f"workdir {workdir} cannot be written to, and the results go there")
    if (workdir / "figures").exists() and not os.access(workdir / "figures", os.W_OK | os.X_OK):
        raise InputError(f"{workdir / 'figures'} cannot be written to, and the pictures go there")
    path = workdir / "transfer.json"
    if not path.exists():
        return {"source": {}, "results": []}
    stored = read_json_object(path, hint="; move the file away")
    if not isinstance(stored.get("source"), dict) or not isinstance(stored.get("results"), list):
        raise InputError(f"{path} lacks source or results; move the file away")
    return stored


def add_results(
    workdir: Path, step: int, source: Mapping[str, Any], results: Sequence[Mapping[str, Any]]
) -> Path:
    """Merges what was measured at a step into transfer.json and keeps its other results.

    Source metrics from more GC examples are not replaced by ones from fewer.
    """
    path = workdir / "transfer.json"
    # Commands with different heads may run at the same time.
    with locked(workdir / ".transfer.lock"):
        stored = read_results(workdir)
        before = stored["source"].get(str(step))
        if before is None or _precision(before) <= _precision(source):
            stored["source"][str(step)] = source
        new = {_identity(result) for result in results}
        kept = [result for result in stored["results"] if _identity(result) not in new]
        merged = {
            "source": {name: stored["source"][name] for name in sorted(stored["source"], key=int)},
            "results": [*kept, *results],
        }
        write_atomically(path, to_json(merged))
    return path


def _precision(source: Mapping[str, Any]) -> tuple[float | int, float | int]:
    return source["gc_examples"], source["gc_probes"]


def _identity(result: Mapping[str, Any]) -> tuple:
    return tuple((key, result.get(key)) for key in IDENTITY)


def draw(record: RunRecord, run: FinishedRun, protocol: Protocol) -> Path:
    """Draws all checkpoints for which transfer.json has results of this protocol."""
    stored = read_results(record.workdir)
    facts = protocol.facts()
    results = [
        result
        for result in stored["results"]
        if {key: result[key] for key in Protocol._fields if key in result} == facts
    ]
    source = {int(step): values for step, values in stored["source"].items()}
    path = record.workdir / "figures" / f"transfer_{_file_part(protocol)}.png"
    title = f"{run.config.model.name} on {run.dataset.name}, {_described(protocol)}"
    draw_checkpoints(source, results, path, title)
    return path


def table(record: RunRecord) -> str:
    """A table with one line for each setting."""
    lines = [
        f"{record.workdir}",
        f"{'step':>7} {'setting':16} {'source GC':>16} {'source NC':>10} {'target NC':>10}"
        f" {'episode NC':>10} {'accuracy':>17} {'error':>7} {'bound':>6}",
    ]
    for result in record.results:
        source = record.source[result["step"]]
        gc = f"{source['geometric_complexity']:.4g} +- {source['geometric_complexity_sem']:.2g}"
        accuracy = f"{result['accuracy']:.4f} +- {result['accuracy_half_width']:.4f}"
        setting = f"{result['num_ways']}-way {result['num_shots']}-shot"
        bound = result["nearest_mean_error_bound"]
        lines.append(
            f"{result['step']:7} {setting:16} {gc:>16} {source['neural_collapse']:10.4g}"
            f" {result['target_neural_collapse']:10.4g} {result['episode_neural_collapse']:10.4g}"
            f" {accuracy:>17} {result['error']:7.4f} {'-' if bound is None else f'{bound:.4f}':>6}"
        )
    lines.append(f"written: {record.workdir / 'transfer.json'} and figures/")
    return "\n".join(lines)


def find_runs(folder: Path) -> list[Path]:
    """The runs directly below a folder.

    Raises:
      InputError: the folder does not exist, cannot be written to, or has fewer than 3 runs.
    """
    if not folder.is_dir():
        raise InputError(f"runs {folder} is not a folder; name one with directories of runs in it")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"runs {folder} cannot be written to, and the ranking goes there")
    runs = sorted(path.parent for path in folder.glob("*/config.json"))
    if len(runs) < 3:
        raise InputError(f"{folder} contains {len(runs)} runs; a ranking needs at least 3")
    return runs


def rank_runs(records: Sequence[RunRecord], folder: Path, protocol: Protocol) -> str:
    """Ranks runs by source GC, lowest first; writes selection_SPLIT_HEAD.json and .png.

    Returns:
      The table and the correlations, to be printed. Runs whose GC or target NC is NaN are named and
      left out.

    Raises:
      InputError: fewer than 3 runs are left.
    """
    groups = _groups([record.workdir for record in records])
    runs = []
    for record, group in zip(records, groups, strict=True):
        (step, source), results = next(iter(record.source.items())), record.results
        runs.append(
            {
                "run": record.workdir.name,
                "group": group,
                "step": step,
                "source_geometric_complexity": source["geometric_complexity"],
                "source_geometric_complexity_sem": source["geometric_complexity_sem"],
                "source_neural_collapse": source["neural_collapse"],
                "source_accuracy": source["accuracy"],
                "target_neural_collapse": results[0]["target_neural_collapse"],
                "accuracy": {
                    f"{r['num_ways']}-way {r['num_shots']}-shot": (
                        r["accuracy"],
                        r["accuracy_half_width"],
                    )
                    for r in results
                },
            }
        )
    ranked = [
        run
        for run in runs
        if not math.isnan(run["source_geometric_complexity"] + run["target_neural_collapse"])
    ]
    left_out = [run["run"] for run in runs if run not in ranked]
    if len(ranked) < 3:
        raise InputError(
            f"{folder}: GC or target NC is NaN in {', '.join(left_out)}; {len(ranked)} runs are"
            " left and a ranking needs 3"
        )
    runs = sorted(ranked, key=lambda run: run["source_geometric_complexity"])
    gc = [run["source_geometric_complexity"] for run in runs]
    against = {"target NC": [run["target_neural_collapse"] for run in runs]}
    for task in runs[0]["accuracy"]:
        against[f"accuracy, {task}"] = [run["accuracy"][task][0] for run in runs]
    correlations = {name: rank_correlation(gc, values) for name, values in against.items()}
    written = {
        "protocol": protocol.facts(),
        "runs": runs,
        "spearman_of_source_gc": {name: c._asdict() for name, c in correlations.items()},
    }
    path = folder / f"selection_{_file_part(protocol)}.json"
    write_atomically(path, to_json(written))
    title = f"Source GC of {len(runs)} runs and transfer, {_described(protocol)}"
    draw_runs(runs, path.with_suffix(".png"), title)
    tasks = list(runs[0]["accuracy"])
    width = max(len(run["run"]) for run in runs)
    lines = [
        f"rank {'run':{width}} {'source GC':>10} {'source acc.':>11} {'target NC':>10}"
        + "".join(f" {task:>14}" for task in tasks)
    ]
    for rank, run in enumerate(runs, 1):
        lines.append(
            f"{rank:4} {run['run']:{width}} {run['source_geometric_complexity']:10.4g}"
            f" {run['source_accuracy']:11.4f} {run['target_neural_collapse']:10.4g}"
            + "".join(f" {run['accuracy'][task][0]:14.4f}" for task in tasks)
        )
    if left_out:
        lines.append(f"left out, GC or target NC is NaN: {', '.join(left_out)}")
    lines.append(
        "Spearman's rho of source GC over runs, 95% bootstrap interval (too narrow where runs"
        " differ only in their seed):"
    )
    for name, c in correlations.items():
        lines.append(f"  with {name:22} {c.rho:6.2f}  [{c.low:.2f}, {c.high:.2f}]")
    lines.append(f"written: {path} and {path.with_suffix('.png')}")
    return "\n".join(lines)


def _groups(workdirs: Sequence[Path]) -> list[str]:
    """How each run's settings differ from the others', apart from seeds: "learning_rate=0.1"."""
    configs = [read_stored_config(workdir / "config.json") for workdir in workdirs]
    differing = [
        key
        for key in configs[0]
        if key not in ("seed", "data.data_dir") and any(c[key] != configs[0][key] for c in configs)
    ]
    return [
        ", ".join(f"{key.rpartition('.')[2]}={config[key]}" for key in differing) or "all"
        for config in configs
    ]


def check_comparable(runs: Sequence[FinishedRun], split: str) -> None:
    """Checks that runs have the same classes, images and input units, and so may be ranked.

    Raises:
      InputError: two runs differ; the message names the first two and the difference.
    """
    first, part = runs[0], SPLITS[split]
    for run in runs[1:]:
        there, here = first.held_classes[part], run.held_classes[part]
        differing = [
            what
            for what, same in (
                (f"{split} classes", there.class_names == here.class_names),
                (f"images of the {split} classes", np.array_equal(there.labels, here.labels)),
                ("normalization of the inputs", first.normalization == run.normalization),
            )
            if not same
        ]
        if differing:
            raise InputError(
                f"{first.workdir} and {run.workdir} differ in the {differing[0]}, so their GC and"
                " accuracy are not comparable; keep such runs in separate folders"
            )


def _file_part(protocol: Protocol) -> str:
    features = "" if protocol.features == "none" else f"_{protocol.features}"
    return f"{protocol.split}_{protocol.head}{features}"


def _described(protocol: Protocol) -> str:
    features = "" if protocol.features == "none" else f" on {protocol.features} features"
    return f"{protocol.head}{features}, {protocol.split} classes"
