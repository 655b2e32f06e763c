"""Trains every member of a config's sweep, on this machine or on a Slurm cluster.

    python -m experiments.sweep --config=experiments/configs/digits.py --workdir=DIR
        [--executor=inline] [--max_parallel=N] [--gpus=N] [--config.KEY=VALUE ...]
    python -m experiments.sweep --config=FILE --workdir=DIR --executor=slurm --partition=NAME
        --time=MINUTES --gpus=N --max_parallel=N [--sbatch=KEY=VALUE ...]

The config file has, beside get_config(), a get_sweep() that returns a list of overrides, such as
gc_nc.sweeps.grid makes. Each member is a run in DIR/NAME, named by its overrides, and its output is
in DIR/logs/NAME.log. Given again, the same command runs only what is missing.

Exit codes: 0, all members are done; 1, some are not, and the table says why; 2, bad input, and
nothing was started; 128 + the signal's number, stopped by a signal (130 Ctrl-C, 143 SIGTERM). On
this machine the members have then saved their state; on a cluster they keep running.
"""

import sys
from functools import partial
from pathlib import Path

import jax
from absl import flags
from ml_collections import config_flags

from experiments import launcher
from gc_nc.errors import InputError
from gc_nc.sweeps.inline_executor import count_programs, run_inline
from gc_nc.sweeps.local_executor import make_slots, run_locally
from gc_nc.sweeps.members import make_members, read_sweep
from gc_nc.sweeps.slurm_executor import SlurmOptions, run_on_slurm
from gc_nc.sweeps.sweep_directory import open_sweep
from gc_nc.sweeps.sweep_status import State, outcome_table

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "Config file with get_sweep(); --config.KEY=VALUE changes all members.",
    lock_config=True,
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Directory of the sweep, with a folder for each run."
)
_EXECUTOR = flags.DEFINE_enum(
    "executor",
    "local",
    ("inline", "local", "slurm"),
    "Where the runs run: one after another in this process, each in a process of its own on this"
    " machine, or as jobs of a Slurm cluster.",
    allow_override=True,
)
_MAX_PARALLEL = flags.DEFINE_integer(
    "max_parallel", 1, "Number of runs at the same time.", lower_bound=1
)
_GPUS = flags.DEFINE_integer("gpus", 0, "Number of GPUs for each run.", lower_bound=0)
_SLURM_FLAGS = (
    flags.DEFINE_string("partition", None, "Slurm: partition of the jobs."),
    flags.DEFINE_integer(
        "time", None, "Slurm: minutes for each job; a longer run takes several jobs.", lower_bound=1
    ),
    flags.DEFINE_integer("cpus", None, "Slurm: number of cores for each run.", lower_bound=1),
    flags.DEFINE_string("account", None, "Slurm: account to charge."),
    flags.DEFINE_list(
        "sbatch", None, "Slurm: other options of sbatch, as in mem=32G,constraint=a100."
    ),
)


def main(argv: list[str]) -> None:
    """Runs what is missing and prints the table."""
    del argv
    base = launcher.read_config(_CONFIG)
    if not _WORKDIR.value:
        raise InputError("--workdir is missing; name the folder of this sweep, as in runs/sweep")
    workdir = Path(_WORKDIR.value).expanduser()
    flag = flags.FLAGS["config"]
    members = make_members(base, read_sweep(flag.config_filename), fixed=flag.override_values)
    executors = {"inline": _inline, "local": _here, "slurm": _on_slurm}
    outcomes, signal_number = executors[_EXECUTOR.value](members, workdir)
    print(outcome_table(outcomes))
    if signal_number is not None:
        sys.exit(128 + signal_number)
    sys.exit(any(outcome.state is not State.DONE for outcome in outcomes.values()))


def _inline(members, workdir):
    _refuse_slurm_flags()
    for flag, unused in ((_MAX_PARALLEL, 1), (_GPUS, 0)):
        if flag.value != unused:
            raise InputError(f"--{flag.name} is for --executor=local and --executor=slurm")
    open_sweep(workdir, members)
    print(f"{len(members)} runs; training programs to compile: {count_programs(members)}")
    return run_inline(members, workdir, jax.devices)


def _refuse_slurm_flags():
    for flag in _SLURM_FLAGS:
        if flag.value is not None:
            raise InputError(f"--{flag.name} is for --executor=slurm")


def _here(members, workdir):
    _refuse_slurm_flags()
    slots = make_slots(_MAX_PARALLEL.value, _GPUS.value)
    open_sweep(workdir, members)
    return run_locally(members, workdir, launcher.train_command(workdir), slots)


def _on_slurm(members, workdir):
    partition, minutes, cpus, account, sbatch = (flag.value for flag in _SLURM_FLAGS)
    options = {}
    for option in sbatch or ():
        key, has_value, value = option.partition("=")
        options[key.lstrip("-")] = value if has_value else True
    job = SlurmOptions(partition, minutes or 60, _GPUS.value, cpus, account, options)
    open_sweep(workdir, members)
    prepare = partial(launcher.use_compilation_cache, flags.FLAGS.compilation_cache_dir)
    return run_on_slurm(members, workdir, job, max_parallel=_MAX_PARALLEL.value, prepare=prepare)


if __name__ == "__main__":
    launcher.run(main)
