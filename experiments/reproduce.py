"""Reproduces a figure of the paper: its runs, its picture, and a verdict on each of its claims.

    python -m experiments.reproduce --list
    python -m experiments.reproduce --figure=1 --scale=demo --workdir=DIR
    python -m experiments.reproduce --figure=1,3,5 --scale=small --data_dir=DATA --workdir=DIR

Trains the missing runs of the figure's sweep in DIR/SWEEP (experiments.sweep can make them in the
same folder, for example on a cluster), draws DIR/figures/figure_1.png, judges the claims in
figure_1.json, and writes all figures in DIR/figures/ to DIR/report.html, one page that works
offline. The same command resumes if it was stopped.

    python -m experiments.reproduce --figure=4 --scale=small --data_dir=DATA --workdir=DIR \\
        --rows=docs/results/runs

trains one run after the other instead, and measures each as soon as it ends. All results of a run
go into one small file, ROWS/SWEEP/RUN.json. Several such commands may share a folder.

Exit codes: 0, drawn from all runs; 1, some runs or figures are missing, and the output says why; 2,
bad input; 128 + the signal's number, stopped by a signal (130 Ctrl-C, 143 SIGTERM), and the runs
have saved their state.
"""

import os
import shutil
import sys
from pathlib import Path

import jax
from absl import flags
from tqdm import tqdm

from experiments import launcher
from gc_nc.errors import InputError
from gc_nc.reproduction import member_rows, reproduce
from gc_nc.reproduction.catalogue import FIGURES, find_figure, listing
from gc_nc.reproduction.report import write_report
from gc_nc.runs.loop import Interrupted
from gc_nc.sweeps.inline_executor import run_inline
from gc_nc.sweeps.local_executor import make_slots, run_locally
from gc_nc.sweeps.members import Member, make_members, read_sweep
from gc_nc.sweeps.sweep_status import outcome_table

# Other commands have flags of the same names, and tests import several commands.
_FIGURE = flags.DEFINE_list(
    "figure", None, "Figure to make, several as in 1,3, or all.", allow_override=True
)
_SCALE = flags.DEFINE_enum(
    "scale", "demo", ("paper", "small", "demo", "smoke"), "Size of the runs; see --list."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for runs and figures.", allow_override=True)
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Where the images are.", allow_override=True)
_MAX_PARALLEL = flags.DEFINE_integer(
    "max_parallel",
    None,
    "Number of runs at the same time. Default: one on a GPU, otherwise one for each core, up to 4.",
    lower_bound=1,
    allow_override=True,
)
_GPUS = flags.DEFINE_integer(
    "gpus", 0, "Number of GPUs for each run.", lower_bound=0, allow_override=True
)
_ROWS = flags.DEFINE_string(
    "rows",
    None,
    "Folder for a file with everything that is measured of each run.",
    allow_override=True,
)
_EXECUTOR = flags.DEFINE_enum(
    "executor",
    None,
    ("inline", "local"),
    "Where the runs run: one after another in this process, or each in a process of its own."
    " Default: inline for smoke, demo and on GPUs.",
    allow_override=True,
)
_LIST = flags.DEFINE_bool("list", False, "Lists the figures, their claims and what they cost.")
_CONFIGS = Path(__file__).parent / "configs" / "figures"


def main(argv: list[str]) -> None:
    """Lists the figures, or makes those that were asked for."""
    del argv
    if _LIST.value:
        print(listing())
        return
    scale = _SCALE.value
    if not _FIGURE.value:
        raise InputError("--figure is missing; --list shows which there are")
    if not _WORKDIR.value:
        raise InputError("--workdir is missing; name a folder for it, as in runs/figure1")
    numbers = _FIGURE.value
    if numbers == ["all"]:
        numbers = [number for number, figure in FIGURES.items() if scale in figure.cost]
    figures = [find_figure(number, scale) for number in dict.fromkeys(numbers)]
    workdir = Path(_WORKDIR.value).expanduser()
    names = dict.fromkeys(figure.sweep for figure in figures)
    sweeps = {name: _members(workdir, name, scale) for name in names}
    for figure in figures:
        reproduce.read_figure(workdir, figure, scale)
    for name, (base, members) in sweeps.items():
        reproduce.prepare(workdir / name, members, base)
    complete = True
    for name, (_, members) in sweeps.items():
        if _ROWS.value:
            complete &= _write_rows(workdir / name, members, name)
        else:
            _run(workdir / name, members)
    with tqdm(total=0, bar_format="{desc}", disable=None) as bar:
        for figure in figures:
            base, members = sweeps[figure.sweep]
            try:
                record = reproduce.make_figure(
                    figure,
                    scale,
                    workdir,
                    members,
                    base,
                    data_dir=_DATA_DIR.value,
                    report=bar.set_description_str,
                )
            except InputError as error:
                # The other figures are still worth drawing.
                print(f"figure {figure.number} could not be made: {error}", file=sys.stderr)
                complete = False
                continue
            bar.clear()
            print(_verdicts(record))
            complete &= not record["missing"]
    print(f"report: {write_report(workdir)}")
    sys.exit(not complete)


def _members(workdir: Path, sweep: str, scale: str):
    file = f"{_CONFIGS / sweep}.py:{scale}"
    base = launcher.config_of_file(file)
    if base.data.source != "digits":
        # Runs that are there know where their data were, which is part of their config.
        begun = reproduce.stored_data_dir(workdir / sweep)
        base.data.data_dir = begun or _DATA_DIR.value
        if not base.data.data_dir:
            raise InputError(
                f"--data_dir is missing: {sweep} at scale {scale} needs {base.data.name}; see"
                f" {os.path.relpath(_CONFIGS / sweep)}.py"
            )
    return base.lock(), make_members(base, read_sweep(file))


def _run(sweep_dir: Path, members: list[Member]) -> None:
    missing = reproduce.missing_members(sweep_dir, members)
    if not missing:
        return
    print(f"{sweep_dir.name}: {len(missing)} of {len(members)} runs are to be made")
    if _executor() == "inline":
        outcomes, signal_number = run_inline(members, sweep_dir, jax.devices)
    else:
        slots = make_slots(_MAX_PARALLEL.value or _default_parallel(), _GPUS.value)
        outcomes, signal_number = run_locally(
            members, sweep_dir, launcher.train_command(sweep_dir), slots
        )
    if signal_number is not None:
        print(outcome_table(outcomes))
        sys.exit(128 + signal_number)


def _write_rows(sweep_dir: Path, members: list[Member], sweep: str) -> bool:
    """Whether all members have a row now."""
    numbers = [n for n in FIGURES if FIGURES[n].sweep == sweep]
    data = "" if members[0].config.data.source == "digits" else " --data_dir=DATA"
    command = (
        f"python -m experiments.reproduce --figure={numbers[0]} --scale={_SCALE.value}{data}"
        " --workdir=DIR --rows=ROWS"
    )
    try:
        missing = member_rows.write_rows(
            sweep_dir,
            members,
            Path(_ROWS.value).expanduser(),
            _SCALE.value,
            data_dir=_DATA_DIR.value,
            command=command,
            say=lambda line: print(line, flush=True),
        )
    except Interrupted as stop:
        launcher.fail(str(stop), 128 + stop.signal_number)
    return not missing


def _executor() -> str:
    if _EXECUTOR.value:
        return _EXECUTOR.value
    # Runs of seconds are shorter than the start of a process.
    return "inline" if _SCALE.value in ("smoke", "demo") or shutil.which("nvidia-smi") else "local"


def _default_parallel() -> int:
    if shutil.which("nvidia-smi") or not hasattr(os, "sched_getaffinity"):
        return 1
    return min(4, len(os.sched_getaffinity(0)))


def _verdicts(record: dict) -> str:
    lines = [f"figure {record['number']}, {record['scale']}: {record['title']}"]
    width = max(len(finding["verdict"]) for finding in record["findings"])
    lines += [
        f"  {finding['verdict']:{width}}  {finding['claim']}: {finding['evidence']}"
        for finding in record["findings"]
    ]
    lines += [f"  missing: {run}" for run in record["missing"]]
    return "\n".join(lines)


if __name__ == "__main__":
    launcher.run(main)
