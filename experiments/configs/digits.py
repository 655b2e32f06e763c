"""VGG-11 (width 0.5) on scikit-learn's digits, into the terminal phase.

This reproduces none of the paper's figures. It is a small run that shows how every metric changes:
39 s on 2 CPU cores. docs/reproducing.md has the results.

    python -m experiments.train --config=experiments/configs/digits.py --workdir=runs/digits

Its sweep has four learning rates with three seeds each:

    python -m experiments.sweep --config=experiments/configs/digits.py --workdir=runs/digits_sweep
        --max_parallel=2
"""

from typing import Any

from ml_collections import ConfigDict

from gc_nc.runs.configuration import default_config
from gc_nc.sweeps import grid


def get_config() -> ConfigDict:
    """The defaults with a wider network and a higher learning rate."""
    config = default_config()
    config.model.width = 0.5
    config.optimizer.learning_rate = 0.1
    config.num_steps = 1000
    config.evaluation.every_steps = 100
    config.checkpoint.every_steps = 500
    return config


def get_sweep() -> list[dict[str, Any]]:
    """All combinations of learning rate and seed."""
    return grid({"optimizer.learning_rate": (0.025, 0.05, 0.1, 0.2), "seed": range(3)})
