"""Trains every member of a config's sweep, on this machine or on a Slurm cluster.

    python -m experiments.sweep --config=experiments/configs/digits.py --workdir=DIR
        [--max_parallel=N] [--gpus=N] [--config.KEY=VALUE ...]
    python -m experiments.sweep --config=FILE --workdir=DIR --executor=slurm --partition=NAME
        --time=MINUTES --gpus=N --max_parallel=N [--sbatch=KEY=VALUE ...]

The config file has, beside get_config(), a get_sweep() that returns a list of overrides; see
gc_nc.sweeps.grid. Each member is a run in DIR/NAME, named by its overrides, with its output in
DIR/logs/NAME.log. The same command again does what is missing, and only that.

Exit codes: 0 all members are done; 1 some are not, and the table says why; 2 bad input, nothing was
started; 128 + its number stopped by a signal (130 Ctrl-C, 143 SIGTERM): here the members have saved
their state, on a cluster they go on.
"""

import os
import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from experiments import launcher, stored_config
from gc_nc.errors import InputError
from gc_nc.sweeps.local_executor import make_slots, run_locally
from gc_nc.sweeps.members import Member, make_members, read_sweep
from gc_nc.sweeps.sweep_directory import config_path, open_sweep, run_path
from gc_nc.sweeps.sweep_status import State, outcome_table

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "Config file with get_sweep(); --config.KEY=VALUE changes all members.",
    lock_config=True,
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the sweep, with one for each run.")
_MAX_PARALLEL = flags.DEFINE_integer("max_parallel", 1, "Runs at once.")
_GPUS = flags.DEFINE_integer("gpus", 0, "GPUs of each run; 0 shares the cores.")


def main(argv: list[str]) -> None:
    """Runs what is missing and prints the table."""
    del argv
    base = launcher.read_config(_CONFIG)
    if not _WORKDIR.value:
        raise InputError("--workdir is missing; name the folder of this sweep, as in runs/sweep")
    workdir = Path(_WORKDIR.value).expanduser()
    flag = flags.FLAGS["config"]
    # Of a tuple's element ("boundaries[0]") the tuple.
    fixed = {key.partition("[")[0] for key in flag.override_values}
    members = make_members(base, read_sweep(flag.config_filename), fixed)
    slots = make_slots(_MAX_PARALLEL.value, _GPUS.value)
    open_sweep(workdir, members)

    def command(member: Member) -> list[str]:
        # Not the config file itself: it may change while the sweep runs.
        config = f"{os.path.relpath(stored_config.__file__)}:{config_path(workdir, member.name)}"
        run = run_path(workdir, member.name)
        return [sys.executable, "-m", "experiments.train", f"--config={config}", f"--workdir={run}"]

    outcomes, signal_number = run_locally(members, workdir, command, slots)
    print(outcome_table(outcomes))
    if signal_number is not None:
        sys.exit(128 + signal_number)
    sys.exit(any(outcome.state is not State.DONE for outcome in outcomes.values()))


if __name__ == "__main__":
    launcher.run(main)
