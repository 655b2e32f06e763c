"""Rows: everything that is measured of a run, in one JSON file that outlives its checkpoints.

A member of a sweep is trained and, as soon as it ends, measured; then its row is written to
ROWS/SWEEP/MEMBER.json. A row has the small files of the run's directory unchanged: config,
metadata, results, evaluations, measurements.json and transfer.json.
"""

import contextlib
import datetime
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from gc_nc import metrics
from gc_nc.data.class_splits import ClassImages, TransferDataset
from gc_nc.files import read_json_object, to_json, write_atomically
from gc_nc.measurement import transfer_evaluation, transfer_results
from gc_nc.measurement.checkpoint_measurements import (
    chosen_steps,
    measure_checkpoints,
    measure_flatness,
)
from gc_nc.measurement.measurements_file import add_measurements, read_measurements
from gc_nc.measurement.transfer_evaluation import FINE_TUNING, SPLITS, Protocol
from gc_nc.runs import loop
from gc_nc.runs.checkpoints import StorageError
from gc_nc.runs.configuration import flatten
from gc_nc.runs.finished_run import FinishedRun, open_run
from gc_nc.runs.run_directory import (
    RunInUseError,
    check_same_config,
    git_revision,
    hold_run,
    read_records,
)
from gc_nc.sweeps.members import Member
from gc_nc.sweeps.sweep_directory import is_done, log_path, run_path
from gc_nc.sweeps.sweep_status import start_line

_MOST_WAYS = 5
_DIRECTIONAL = "train/directional_cdnv"


class RowPlan(NamedTuple):
    """What is measured of a run besides its evaluations.

    Attributes:
      most_checkpoints: the largest number of checkpoints whose transfer is measured, evenly chosen
        and including the last.
      num_shots: shots of the episodes, which are 5-way if there are that many classes.
      num_episodes: episodes for nearest means, on validation and on target classes.
      fine_tuning_episodes: episodes with the most shots, on target classes, only at the last
        checkpoint.
      fine_tuning_steps: steps in each, of a new head and all parameters (arXiv 2410.05612).
      gc_examples: examples on which GC is estimated at the checkpoints.
      gc_probes: Jacobian products for each of these.
      flatness_examples: examples for flatness, only at the last checkpoint.
    """

    most_checkpoints: int = 3
    num_shots: tuple[int, ...] = (1, 5)
    num_episodes: int = 2000
    fine_tuning_episodes: int = 20
    fine_tuning_steps: int = 100
    gc_examples: int = 256
    gc_probes: int = 4
    flatness_examples: int = 64


#: Enough to check the pipeline; the numbers mean nothing.
SMOKE_PLAN = RowPlan(2, (1, 5), 20, 2, 2, 16, 1, 8)


def plan_of(scale: str) -> RowPlan:
    """The plan for a scale."""
    return SMOKE_PLAN if scale == "smoke" else RowPlan()


def row_path(rows_dir: Path, sweep: str, name: str) -> Path:
    """The path of a member's row."""
    return rows_dir / sweep / f"{name}.json"


def has_row(rows_dir: Path, sweep: str, member: Member) -> bool:
    """Whether a member's row has been written.

    Raises:
      InputError: it cannot be read, or is from a run of another config.
    """
    path = row_path(rows_dir, sweep, member.name)
    if not path.exists():
        return False
    stored = read_json_object(path, hint="; move the file away").get("config", {})
    check_same_config(f"row {path}", stored, _without_place(member.config))
    return True


def write_rows(
    sweep_dir: Path,
    members: Sequence[Member],
    rows_dir: Path,
    scale: str,
    *,
    data_dir: str | None = None,
    command: str = "",
    say: Callable[[str], None] = print,
) -> dict[str, str]:
    """Trains the members one after the other, and measures each and writes its row once it ends.

    Members that have a row, or that another process is running, are skipped, so several processes
    may share a sweep. If it is stopped at any point, the next call resumes there.

    Args:
      sweep_dir: a directory written by `open_sweep`, with the name of the sweep.
      members: members of the sweep, the most important first.
      rows_dir: the folder in which a folder with the sweep's name is made.
      scale: the scale of the sweep.
      data_dir: where the data are now; None if they were not moved.
      command: the command that makes the rows, which is recorded in them.
      say: prints a line.

    Returns:
      {name: reason} for the members that have no row.

    Raises:
      Interrupted: a signal stopped the training; the run's state is saved.
      InputError: a row is of another config, or a run cannot be measured.
    """
    missing: dict[str, str] = {}
    datasets: dict[str, TransferDataset] = {}
    waiting = [m for m in members if not has_row(rows_dir, sweep_dir.name, m)]
    for number, member in enumerate(waiting, 1):
        if has_row(rows_dir, sweep_dir.name, member):
            continue
        try:
            _train(sweep_dir, member)
            with hold_run(run_path(sweep_dir, member.name)):
                # Another process may have measured it in the meantime.
                if has_row(rows_dir, sweep_dir.name, member):
                    continue
                started = time.process_time()
                run_dir = run_path(sweep_dir, member.name)
                measure_member(
                    run_dir,
                    plan_of(scale),
                    lambda path: open_run(path, data_dir, datasets=datasets),
                )
                row = _row(sweep_dir, member, scale, command)
                row["cpu_seconds_measuring"] = time.process_time() - started
                path = row_path(rows_dir, sweep_dir.name, member.name)
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(path, to_json(row))
        except (loop.DivergedError, StorageError, RunInUseError) as error:
            missing[member.name] = str(error)
            say(f"{number}/{len(waiting)} no row: {member.name}: {error}")
            continue
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        say(f"{now} {number}/{len(waiting)} row written: {member.name}")
        # Each run compiles its own programs, which would otherwise accumulate.
        jax.clear_caches()
    return missing


def _train(sweep_dir: Path, member: Member) -> None:
    """Trains in this process, with the output in the member's log."""
    if is_done(sweep_dir, member.name):
        return
    with log_path(sweep_dir, member.name).open("a", encoding="utf-8") as log:
        log.write(start_line("in the process that writes its row"))
        log.flush()
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            started = time.process_time()
            try:
                loop.train(member.config, run_path(sweep_dir, member.name))
            except (loop.DivergedError, StorageError, RunInUseError) as error:
                print(f"error: {error}")
                raise
            print(f"CPU seconds of this start: {time.process_time() - started:.0f}")


def measure_member(run_dir: Path, plan: RowPlan, open_it: Callable[[Path], FinishedRun]) -> None:
    """Adds what is missing to the measurements.json and transfer.json of a finished run.

    At some checkpoints it measures directional CDNV of the training images, GC and NC of the source
    classes, and NC and nearest-mean accuracy on the validation and target classes. At the last one
    it measures fine-tuning, flatness and everything else in `measure_run`.

    Args:
      run_dir: the run's directory.
      plan: what to measure.
      open_it: opens the run.

    Raises:
      InputError: the run has no checkpoint, or cannot be measured.
    """
    run = open_it(run_dir)
    num_train = len(run.dataset.train.labels)
    plan = plan._replace(
        gc_examples=min(plan.gc_examples, num_train),
        flatness_examples=min(plan.flatness_examples, num_train),
    )
    steps = chosen_steps(run_dir, plan.most_checkpoints)
    for step in steps:
        if _DIRECTIONAL not in read_measurements(run_dir).get(str(step), {}):
            add_measurements(run_dir, step, {_DIRECTIONAL: _directional_cdnv(run, step)})
    for split, part in SPLITS.items():
        if part in run.held_classes:
            nearest_mean = Protocol(split=split, num_episodes=plan.num_episodes)
            _measure_transfer(run, steps, nearest_mean, plan.num_shots, plan)
    if SPLITS["test"] in run.held_classes:
        fine_tuning = Protocol(
            num_episodes=plan.fine_tuning_episodes,
            head=FINE_TUNING,
            fine_tuning_steps=plan.fine_tuning_steps,
        )
        _measure_transfer(run, steps[-1:], fine_tuning, plan.num_shots[-1:], plan)
    measure_checkpoints(
        run_dir,
        lambda path: run,
        most_steps=1,
        gc_examples=plan.gc_examples,
        gc_probes=plan.gc_probes,
        num_train=num_train,
    )
    measure_flatness(run_dir, lambda path: run, flatness_examples=plan.flatness_examples)


def _directional_cdnv(run: FinishedRun, step: int) -> float:
    """The mean over ordered pairs of source classes, from all training images."""
    train, num_classes = run.dataset.train, run.dataset.num_classes
    images = ClassImages(train.images, train.labels, run.dataset.class_names)
    embeddings = transfer_evaluation.embed_images(run, run.variables(step), images)
    return float(_mean_directional_cdnv(embeddings, train.labels, num_classes))


@partial(jax.jit, static_argnums=2)
def _mean_directional_cdnv(embeddings, labels, num_classes):
    stats = metrics.init_class_statistics(num_classes, embeddings.shape[1])
    stats = metrics.update_class_statistics(stats, embeddings, labels)
    return jnp.nanmean(metrics.directional_cdnv(embeddings, labels, stats))


def _measure_transfer(
    run: FinishedRun,
    steps: Sequence[int],
    protocol: Protocol,
    num_shots: Sequence[int],
    plan: RowPlan,
) -> None:
    images = run.held_classes[SPLITS[protocol.split]]
    ways = min(_MOST_WAYS, len(images.class_names))
    sizes = [(ways, shots) for shots in num_shots]
    tasks = None
    for step in steps:
        stored = transfer_results.read_results(run.workdir)
        wanted = [
            {**protocol.facts(), "step": step, "num_ways": ways, "num_shots": shots}
            for _, shots in sizes
        ]
        if all(
            any(want.items() <= result.items() for result in stored["results"]) for want in wanted
        ):
            continue
        tasks = tasks or transfer_evaluation.sample_tasks(run, protocol, sizes)
        transfer_evaluation.evaluate_checkpoint(
            run,
            step,
            protocol,
            tasks,
            gc_examples=plan.gc_examples,
            gc_probes=plan.gc_probes,
            save=lambda source, result, step=step: transfer_results.add_results(
                run.workdir, step, source, [result]
            ),
        )


def _row(sweep_dir: Path, member: Member, scale: str, command: str) -> dict[str, Any]:
    run_dir = run_path(sweep_dir, member.name)
    evaluations = [record for record in read_records(run_dir) if "train/accuracy" in record]
    transfer = transfer_results.read_results(run_dir)
    return {
        "sweep": sweep_dir.name,
        "scale": scale,
        "member": member.name,
        "setting": {key: value for key, value in member.overrides.items() if key != "seed"},
        "seed": member.config.seed,
        "command": command,
        "trained_by": read_json_object(run_dir / "metadata.json")["git_revision"],
        "measured_by": git_revision(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "config": flatten(_without_place(member.config)),
        "metadata": read_json_object(run_dir / "metadata.json"),
        "results": read_json_object(run_dir / "results.json"),
        "evaluations": evaluations,
        "measurements": read_measurements(run_dir),
        "transfer": transfer,
    }


def _without_place(config: ConfigDict) -> ConfigDict:
    """The config without the place of the data, which does not affect the results."""
    config = config.copy_and_resolve_references().unlock()
    config.data.data_dir = None
    return config
