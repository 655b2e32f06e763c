"""VGG-13 on CIFAR-10: figures 1, 3 and 5 of arXiv 2405.15706, and ours on bounds and flatness.

Each of the three rows changes one setting: learning rate, batch size or L2. All values are ours,
because the paper's grids are not public.

    python -m experiments.reproduce --figure=1 --scale=small --data_dir=DATA --workdir=DIR

makes the figure. To make only the runs, perhaps on a cluster:

    python -m experiments.sweep --config=experiments/configs/figures/vgg13_cifar10.py:paper \\
        --config.data.data_dir=DATA --workdir=DIR/vgg13_cifar10

paper: full width, all images, 5 seeds. We have not run it.
small: width 0.25 on 1,000 images of 5 classes, with the other 5 kept for transfer; 3 seeds for each
setting and 5 for the config itself. docs/results/ has the results.
demo: width 0.25 on scikit-learn's digits, only learning rates.
smoke: checks the pipeline; its numbers mean nothing.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments.configs import cifar10_vgg13
from experiments.configs.figures.scales import SCALES, check_scale, smoke_config, smoke_sweep
from gc_nc.sweeps import one_at_a_time


def get_config(scale: str = "paper") -> ConfigDict:
    """Without momentum or BatchNorm, into the terminal phase."""
    check_scale(scale, SCALES)
    if scale == "smoke":
        return smoke_config()
    config = cifar10_vgg13.get_config()
    config.checkpoint.keep = 60
    if scale == "small":
        config.data.classes.split = "random"
        config.data.classes.counts = (5, 5)
        config.data.train_images_per_class = 200
        config.data.test_images_per_class = 200
        config.data.held_images_per_class = 500
        config.model.width = 0.25
        config.optimizer.learning_rate = 0.04
        config.num_steps = 6000
        config.evaluation.every_steps = 200
        config.evaluation.gc_probes = 2
        config.checkpoint.every_steps = 400
        config.stop_after_epochs_at_full_accuracy = 15.0
    elif scale == "demo":
        config.data.source = "digits"
        config.data.name = None
        config.model.width = 0.25
        config.optimizer.learning_rate = 0.03
        config.num_steps = 4000
        config.evaluation.every_steps = 200
        config.checkpoint.every_steps = 1000
        config.stop_after_epochs_at_full_accuracy = 15.0
    return config


def get_sweep(scale: str = "paper") -> list[dict[str, Any]]:
    """One row of values for each setting, with every seed."""
    check_scale(scale, SCALES)
    if scale == "demo":
        return one_at_a_time({"optimizer.learning_rate": (0.01, 0.03, 0.1)}, range(3))
    if scale == "smoke":
        rest = {"batch_size": (8, 16), "optimizer.l2": (0.0, 1e-2)}
        return [*smoke_sweep(), *one_at_a_time(rest, range(1))]
    if scale == "small":
        values = {
            "optimizer.learning_rate": (0.01, 0.02, 0.04, 0.08),
            "batch_size": (8, 16, 32, 64),
            "optimizer.l2": (0.0, 1e-4, 1e-3, 3e-3),
        }
        return [*one_at_a_time(values, range(3)), {"seed": 3}, {"seed": 4}]
    values = {
        "optimizer.learning_rate": (0.01, 0.02, 0.05, 0.1),
        "batch_size": (16, 32, 64, 128),
        "optimizer.l2": (0.0, 1e-5, 1e-4, 1e-3),
    }
    return one_at_a_time(values, range(5))
