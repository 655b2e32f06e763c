"""Trains a network and follows its geometric complexity and neural collapse.

    python -m experiments.train --config=experiments/configs/digits.py --workdir=DIR
        [--config.KEY=VALUE ...]

Writes to DIR: config.json, metadata.json, metrics.jsonl, TensorBoard events, checkpoints/,
figures/run.png and, when finished, results.json. The same command again goes on where it stopped;
on a finished run it prints the table and writes nothing.

Exit codes: 0 finished; 1 the loss diverged; 2 bad input, nothing was written; 130 and 143 stopped
by Ctrl-C and by SIGTERM, state saved.
"""

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from experiments import launcher
from gc_nc.errors import InputError
from gc_nc.training import loop
from gc_nc.training.progress import results_table

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file; --config.KEY=VALUE overrides a key.", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of this one run.")


def main(argv: list[str]) -> None:
    """Trains, or shows what a finished run found."""
    del argv
    config = launcher.read_config(_CONFIG)
    if not _WORKDIR.value:
        raise InputError("--workdir is missing; name the folder of this run, as in runs/digits")
    workdir = Path(_WORKDIR.value).expanduser()
    try:
        results = loop.train(config, workdir)
    except loop.Interrupted as stop:
        launcher.fail(str(stop), 128 + stop.signal_number)
    except loop.DivergedError as error:
        launcher.fail(str(error), 1)
    print(results_table(results))
    print(f"picture: {workdir / 'figures' / 'run.png'}")


if __name__ == "__main__":
    launcher.run(main)
