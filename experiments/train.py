"""Trains a network and tracks its geometric complexity and neural collapse.

    python -m experiments.train --config=experiments/configs/digits.py --workdir=DIR
        [--config.KEY=VALUE ...]

Writes to DIR: config.json, metadata.json, metrics.jsonl, TensorBoard events, checkpoints/,
figures/run.png and, when finished, results.json. The same command resumes a run that was stopped.
On a finished run it prints the table and writes nothing.

Exit codes: 0, the run is finished; 1, it failed (the loss diverged, or something could not be
written); 2, bad input, and nothing was written; 3, another process is training this run; 128 + the
signal's number, a signal stopped it and its state was saved (130 Ctrl-C, 138 SIGUSR1, 140 SIGUSR2,
143 SIGTERM).

Each batch is divided among all devices. Several processes train one run together, on the devices of
all of them, if Slurm's srun or a TPU slice started them, or if each is given --coordinator_address,
--num_processes and --process_id.
"""

import contextlib
import os
import sys
from pathlib import Path

import jax
from absl import flags
from ml_collections import config_flags

from experiments import launcher
from gc_nc.devices import is_main_process
from gc_nc.errors import InputError
from gc_nc.runs import hosts, loop
from gc_nc.runs.checkpoints import StorageError
from gc_nc.runs.progress import results_table
from gc_nc.runs.run_directory import EXIT_IN_USE, RunInUseError
from gc_nc.runs.settings import settings_help

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file; --config.KEY=VALUE overrides a key.", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of this run, and of no other.")
_NUM_DEVICES = flags.DEFINE_integer(
    "num_devices", None, "Number of devices to use, over all processes. Default: all."
)
_DISTRIBUTED = flags.DEFINE_enum(
    "distributed",
    "auto",
    hosts.DISTRIBUTED,
    "Whether other processes take part in this run. auto: if a scheduler's variables say so; yes:"
    " they do, and JAX finds them; no: this process is alone.",
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator_address", None, "Address of process 0, as host:port."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Number of processes of this run.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Number of this process, from 0.")


def main(argv: list[str]) -> None:
    """Trains, or shows what a finished run found."""
    del argv
    config = launcher.read_config(_CONFIG)
    if not _WORKDIR.value:
        raise InputError("--workdir is missing; name the folder of this run, as in runs/digits")
    workdir = Path(_WORKDIR.value).expanduser()
    hosts.join_processes(
        _DISTRIBUTED.value, _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value
    )
    try:
        with _ending_together():
            results = loop.train(config, workdir, _devices)
    except loop.Interrupted as stop:
        launcher.fail(str(stop), 128 + stop.signal_number)
    except RunInUseError as error:
        launcher.fail(str(error), EXIT_IN_USE)
    except (loop.DivergedError, StorageError) as error:
        launcher.fail(str(error), 1)
    if is_main_process():
        print(results_table(results))
        print(f"picture: {workdir / 'figures' / 'run.png'}")


@contextlib.contextmanager
def _ending_together():
    """Where one of several processes fails alone, ends it at once, so that the others end too.

    An orderly exit would wait minutes for the others, which wait for this one.
    """
    try:
        yield
    except (InputError, RunInUseError, StorageError) as error:
        if jax.process_count() == 1:
            raise
        print(f"error: {error}", file=sys.stderr, flush=True)
        in_use, bad = isinstance(error, RunInUseError), isinstance(error, InputError)
        os._exit(EXIT_IN_USE if in_use else launcher.EXIT_BAD_INPUT if bad else 1)


def _devices() -> list[jax.Device]:
    count, devices = _NUM_DEVICES.value, jax.devices()
    if count is None:
        return devices
    if not 1 <= count <= len(devices):
        raise InputError(f"--num_devices={count} must be from 1 to the {len(devices)} there are")
    if jax.process_count() > 1 and count != len(devices):
        raise InputError(f"--num_devices={count}: several processes use all {len(devices)} devices")
    return devices[:count]


if __name__ == "__main__":
    # What --help prints.
    __doc__ = f"{__doc__}\nSettings:\n\n{settings_help()}\n"
    launcher.run(main)
