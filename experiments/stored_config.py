"""Uses the config.json of a run, or of a member of a sweep, as the config of another run.

    python -m experiments.train --config=experiments/stored_config.py:runs/digits/config.json \\
        --workdir=DIR [--config.KEY=VALUE ...]
"""

from pathlib import Path

from ml_collections import ConfigDict

from gc_nc.runs.finished_run import read_config


def get_config(path: str) -> ConfigDict:
    """The config stored in a file."""
    return read_config(Path(path)).lock()
