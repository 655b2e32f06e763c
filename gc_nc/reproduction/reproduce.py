"""Makes a figure from its sweep: runs what is missing, draws it, judges claims, writes a record."""

import concurrent.futures
import contextlib
import datetime
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from gc_nc.data.class_splits import TransferDataset
from gc_nc.errors import InputError
from gc_nc.files import read_json_object, to_json, write_atomically
from gc_nc.reproduction.catalogue import Figure
from gc_nc.reproduction.figure_result import Context, FigureResult
from gc_nc.reproduction.run_table import Sweep, collect
from gc_nc.runs.configuration import default_config
from gc_nc.runs.finished_run import FinishedRun, open_run
from gc_nc.runs.run_data import load_run_data
from gc_nc.runs.run_directory import git_revision, read_stored_config
from gc_nc.sweeps.members import Member
from gc_nc.sweeps.sweep_directory import is_done, log_path, open_sweep


def missing_members(sweep_dir: Path, members: Sequence[Member]) -> list[Member]:
    """The members whose runs are not finished."""
    return [member for member in members if not is_done(sweep_dir, member.name)]


def stored_data_dir(sweep_dir: Path) -> str | None:
    """Where the data of a sweep were when it started; None if it has not started."""
    for path in sorted((sweep_dir / "configs").glob("*.json")):
        return read_stored_config(path).get("data.data_dir")
    return None


def prepare(sweep_dir: Path, members: Sequence[Member], base: ConfigDict) -> None:
    """Checks the data and the directory before anything is run.

    Raises:
      InputError: the data cannot be read, or the directory contains something else.
    """
    if missing_members(sweep_dir, members):
        try:
            check_data(base)
        except InputError as error:
            if begun := stored_data_dir(sweep_dir):
                raise InputError(
                    f"{error}; the runs in {sweep_dir} started with data_dir={begun}, which is part"
                    " of their config: put the data back there, or choose another workdir"
                ) from error
            raise
    open_sweep(sweep_dir, members)


def check_data(config: ConfigDict) -> None:
    """Raises InputError if the data of a config cannot be read.

    This is checked in a separate process on the CPU, because this process must not occupy an
    accelerator that the runs need.
    """
    if config.data.source == "digits":
        return
    with concurrent.futures.ProcessPoolExecutor(
        1, mp_context=multiprocessing.get_context("spawn")
    ) as pool:
        message = pool.submit(_data_fault, config.to_dict()).result()
    if message:
        raise InputError(message)


def _data_fault(values: dict[str, Any]) -> str:
    jax.config.update("jax_platforms", "cpu")
    config = default_config()
    config.update(values)
    try:
        load_run_data(config)
    except InputError as error:
        return str(error)
    return ""


def make_figure(
    figure: Figure,
    scale: str,
    workdir: Path,
    members: Sequence[Member],
    base: ConfigDict,
    *,
    data_dir: str | None = None,
    report: Callable[[str], None] = lambda doing: None,
) -> dict[str, Any]:
    """Draws a figure from the runs that are finished, judges its claims and writes both down.

    Args:
      figure: a figure of the catalogue.
      scale: the scale of its runs.
      workdir: the folder with the sweep's folder; the figure is written to its figures/.
      members: the members of the sweep.
      base: the config that they vary.
      data_dir: where their data are now; None if they were not moved.
      report: called with what is being done.

    Returns:
      The content of figures/figure_NUMBER.json; see docs/reproducing.md.

    Raises:
      InputError: no run is finished, a run cannot be measured, or the folder has the figure at
        another scale.
    """
    sweep_dir = workdir / figure.sweep
    sweep = collect(sweep_dir, members, base)
    datasets: dict[str, TransferDataset] = {}

    def opener(run_dir: Path) -> FinishedRun:
        return open_run(run_dir, data_dir, datasets=datasets)

    before = read_figure(workdir, figure, scale)
    stored = _record_path(workdir, figure)
    image = stored.with_suffix(".png")
    # Both are replaced at the end, so that a picture never stands beside another one's verdicts.
    drawn = image.with_name(f".{image.name}")
    started = time.monotonic()
    result = figure.make(Context(sweep, drawn, scale, opener, report))
    record = _record(figure, scale, sweep, result, image)
    places = {str(workdir): "DIR", str(data_dir or base.data.data_dir): "DATA"}
    record["missing"] = [_without(places, line) for line in record["missing"]]
    # Measurements are kept, so drawing again takes only seconds; record the longest time.
    drawing_seconds = time.monotonic() - started
    record["drawing_seconds"] = max(drawing_seconds, before.get("drawing_seconds", 0.0))
    record["run_seconds"] = _run_seconds(sweep_dir, sweep)
    record["seconds"] = record["run_seconds"] + record["drawing_seconds"]
    os.replace(drawn, image)
    write_atomically(stored, to_json(record))
    return record


def read_figure(workdir: Path, figure: Figure, scale: str) -> dict[str, Any]:
    """The record of a figure that was made before; {} if there is none.

    Raises:
      InputError: the record is of another scale, or cannot be read.
    """
    path = _record_path(workdir, figure)
    record = read_json_object(path) if path.exists() else {}
    if record.get("scale", scale) != scale:
        raise InputError(
            f"{path} is of scale {record['scale']}; choose another workdir for scale {scale}"
        )
    return record


def _record_path(workdir: Path, figure: Figure) -> Path:
    return workdir / "figures" / f"figure_{figure.number}.json"


def _without(places: dict[str, str], text: str) -> str:
    for place, name in places.items():
        text = text.replace(place, name)
    return text


def _record(
    figure: Figure, scale: str, sweep: Sweep, result: FigureResult, image: Path
) -> dict[str, Any]:
    runs = sweep.runs
    metadata = runs[0].metadata
    data = metadata["data"]
    # The place of the data does not affect the results, and may be private.
    config = {key: value for key, value in sweep.base.items() if key != "data.data_dir"}
    return {
        "number": figure.number,
        "title": f"{figure.title}: {_network(sweep.base)} on {data['name']}",
        "scale": scale,
        "caption": result.caption,
        "image": image.name,
        "findings": [finding._asdict() for finding in result.findings],
        "table": {"columns": result.columns, "rows": result.rows},
        "notes": result.notes,
        "missing": [f"{name}: {why}" for name, why in sweep.missing.items()],
        "command": _command(figure, scale, sweep),
        "sweep": figure.sweep,
        "num_runs": len(runs),
        "config": config,
        "varied": {row.key: list(row.runs) for row in sweep.rows},
        "seeds": sorted({run.seed for run in runs}),
        "drawn_by": git_revision(),
        "commits": sorted({str(run.metadata["git_revision"]) for run in runs}),
        "versions": {"python": metadata["python"], **metadata["packages"]},
        "devices": sorted({_hardware(run.metadata) for run in runs}),
        "data": f"{data['name']}, {data['num_train']:,} to train, {data['num_test']:,} to test",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "runs": [
            {
                "setting": dict(run.setting),
                "seed": run.seed,
                **{k: v for k, v in run.final.items() if not k.endswith("_per_sec")},
            }
            for run in runs
        ],
    }


def _command(figure: Figure, scale: str, sweep: Sweep) -> str:
    data = " --data_dir=DATA" if sweep.base["data.source"] != "digits" else ""
    return (
        f"python -m experiments.reproduce --figure={figure.number} --scale={scale}{data}"
        " --workdir=DIR"
    )


def _network(config: dict[str, Any]) -> str:
    name = config["model.name"].replace("vgg", "VGG-").replace("resnet", "ResNet-")
    width = config["model.width"]
    return name if width == 1 else f"{name}, width {width:g},"


def _hardware(metadata: dict[str, Any]) -> str:
    devices = metadata["devices"]
    if devices["kind"] == "cpu":
        return f"CPU with {metadata['cpu_count']} cores, {metadata['platform']}"
    return f"{devices['count']} x {devices['kind']}"


def _run_seconds(sweep_dir: Path, sweep: Sweep) -> float:
    """Seconds from the first start to the end, summed over runs and including pauses."""
    total = 0.0
    for run in sweep.runs:
        log = log_path(sweep_dir, run.workdir.name)
        words = log.read_text("utf-8", "replace").split(maxsplit=3) if log.exists() else []
        with contextlib.suppress(ValueError, IndexError):
            start = datetime.datetime.fromisoformat(words[2]).timestamp()
            total += max(0.0, (run.workdir / "results.json").stat().st_mtime - start)
    return total
