"""A figure from its sweep: what is missing is run, the rest drawn, judged and written down."""

import contextlib
import datetime
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from gc_nc.data.class_splits import TransferDataset
from gc_nc.reproduction.catalogue import Figure
from gc_nc.reproduction.figure_result import Context, FigureResult
from gc_nc.reproduction.run_table import Sweep, collect
from gc_nc.sweeps.members import Member
from gc_nc.sweeps.sweep_directory import is_done, log_path, open_sweep, run_path
from gc_nc.sweeps.sweep_status import start_line
from gc_nc.training import loop
from gc_nc.training.checkpoints import StorageError
from gc_nc.training.finished_run import FinishedRun, open_run
from gc_nc.training.run_data import load_run_data
from gc_nc.training.run_directory import RunInUseError, to_json, write_atomically

#: A run that did not end well: the sweep goes on, and the figure names it as missing.
_RUN_ERRORS = (loop.DivergedError, StorageError, RunInUseError)


def missing_members(sweep_dir: Path, members: Sequence[Member]) -> list[Member]:
    """The members whose runs are not finished."""
    return [member for member in members if not is_done(sweep_dir, member.name)]


def prepare(sweep_dir: Path, members: Sequence[Member], base: ConfigDict) -> None:
    """Checks the data and the directory before anything is run.

    Raises:
      InputError: data that cannot be read, or a directory that holds something else.
    """
    if missing_members(sweep_dir, members):
        load_run_data(base)
    open_sweep(sweep_dir, members)


def run_here(sweep_dir: Path, members: Sequence[Member]) -> None:
    """Trains members one after the other in this process, what they print in their logs.

    For runs that are shorter than the start of a process.

    Raises:
      Interrupted: by a signal; the run's state is saved.
    """
    for member in missing_members(sweep_dir, members):
        with log_path(sweep_dir, member.name).open("a", encoding="utf-8") as log:
            log.write(start_line("in the process of experiments.reproduce"))
            with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
                try:
                    loop.train(member.config, run_path(sweep_dir, member.name))
                except _RUN_ERRORS as error:
                    print(f"error: {error}")


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
      figure: of the catalogue.
      scale: of its runs.
      workdir: the figure goes to its figures/; the sweep's runs are in its folder of that name.
      members: of the sweep.
      base: the config that they vary.
      data_dir: where their data are now; None for where they were.
      report: called with what is being done.

    Returns:
      What figures/figure_NUMBER.json holds; see docs/reproducing.md.

    Raises:
      InputError: no run is finished.
    """
    sweep_dir = workdir / figure.sweep_at(scale)
    sweep = collect(sweep_dir, members, base)
    datasets: dict[str, TransferDataset] = {}

    def opener(run_dir: Path) -> FinishedRun:
        return open_run(run_dir, data_dir, datasets=datasets)

    image = workdir / "figures" / f"figure_{figure.number}.png"
    started = time.monotonic()
    result = figure.make(Context(sweep, image, scale, opener, report))
    drawing_seconds = time.monotonic() - started
    record = _record(figure, scale, sweep, result, image)
    record["run_seconds"] = _run_seconds(sweep_dir, sweep)
    record["drawing_seconds"] = drawing_seconds
    record["seconds"] = record["run_seconds"] + drawing_seconds
    write_atomically(image.with_suffix(".json"), to_json(record))
    return record


def _record(
    figure: Figure, scale: str, sweep: Sweep, result: FigureResult, image: Path
) -> dict[str, Any]:
    runs = sweep.runs
    metadata = runs[0].metadata
    data = metadata["data"]
    # Where the data lie is no part of what was done, and none of other people's business.
    config = {key: value for key, value in sweep.base.items() if key != "data.data_dir"}
    return {
        "number": figure.number,
        "title": figure.title,
        "scale": scale,
        "caption": result.caption,
        "image": image.name,
        "findings": [finding._asdict() for finding in result.findings],
        "table": {"columns": result.columns, "rows": result.rows},
        "notes": result.notes,
        "missing": [f"{name}: {why}" for name, why in sweep.missing.items()],
        "command": _command(figure, scale, sweep),
        "sweep": figure.sweep_at(scale),
        "num_runs": len(runs),
        "config": config,
        "varied": {row.key: list(row.runs) for row in sweep.rows},
        "seeds": sorted({run.seed for run in runs}),
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


def _hardware(metadata: dict[str, Any]) -> str:
    devices = metadata["devices"]
    if devices["kind"] == "cpu":
        return f"CPU with {metadata['cpu_count']} cores ({platform.machine()})"
    return f"{devices['count']} x {devices['kind']}"


def _run_seconds(sweep_dir: Path, sweep: Sweep) -> float:
    """Sum over the runs from their first start to their end, pauses between starts included."""
    total = 0.0
    for run in sweep.runs:
        log = log_path(sweep_dir, run.workdir.name)
        words = log.read_text("utf-8", "replace").split(maxsplit=3) if log.exists() else []
        with contextlib.suppress(ValueError, IndexError):
            start = datetime.datetime.fromisoformat(words[2]).timestamp()
            total += max(0.0, (run.workdir / "results.json").stat().st_mtime - start)
    return total
