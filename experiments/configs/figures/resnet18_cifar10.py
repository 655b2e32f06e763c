"""ResNet-18 on CIFAR-10: an appendix figure of arXiv 2405.15706, A1 here.

The rows of the figure change learning rate, batch size and L2, one at a time. All values are ours,
because the paper's grids are not public.

    python -m experiments.reproduce --figure=A1 --scale=paper --data_dir=DATA --workdir=DIR

paper: full width, all images, 5 seeds. We have not run it.
smoke: checks the pipeline; its numbers mean nothing.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments.configs.figures.scales import check_scale, smoke_config, smoke_sweep
from gc_nc.runs.configuration import default_config
from gc_nc.sweeps import one_at_a_time

_SCALES = ("paper", "smoke")


def get_config(scale: str = "paper") -> ConfigDict:
    """100 epochs without augmentation, SGD with momentum."""
    check_scale(scale, _SCALES)
    if scale == "smoke":
        return smoke_config()
    config = default_config()
    config.data.source = "tfds"
    config.data.name = "cifar10"
    config.model.name = "resnet18"
    config.model.width = 1.0
    config.batch_size = 128
    config.optimizer.learning_rate = 0.05
    config.optimizer.momentum = 0.9
    config.num_steps = 100 * 50_000 // 128
    config.evaluation.every_steps = 1955
    config.log_every_steps = 100
    config.checkpoint.every_steps = 3910
    config.stop_after_epochs_at_full_accuracy = 20.0
    return config


def get_sweep(scale: str = "paper") -> list[dict[str, Any]]:
    """One row of values for each setting, with every seed."""
    check_scale(scale, _SCALES)
    if scale == "smoke":
        return smoke_sweep()
    values = {
        "optimizer.learning_rate": (0.0125, 0.025, 0.05, 0.1),
        "batch_size": (32, 64, 128, 256),
        "optimizer.l2": (0.0, 1e-5, 1e-4, 5e-4),
    }
    return one_at_a_time(values, range(5))
