"""VGG-11 on Fashion-MNIST: an appendix figure of arXiv 2405.15706, A3 here.

The rows of the figure change learning rate, batch size and L2, one at a time. All values are ours,
because the paper's grids are not public. DATA contains the four IDX files (on Debian: apt-get
install dataset-fashion-mnist).

    python -m experiments.reproduce --figure=A3 --scale=small --data_dir=DATA --workdir=DIR

paper: full width, all images, 5 seeds. We have not run it.
small: width 0.25 on 1,000 images, only learning rates, 3 seeds. docs/results/ has the results.
smoke: checks the pipeline; its numbers mean nothing.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments.configs import fashion_mnist_vgg11
from experiments.configs.figures.scales import check_scale, smoke_config, smoke_sweep
from gc_nc.sweeps import one_at_a_time

_SCALES = ("paper", "small", "smoke")


def get_config(scale: str = "paper") -> ConfigDict:
    """Plain SGD, into the terminal phase."""
    check_scale(scale, _SCALES)
    if scale == "smoke":
        return smoke_config()
    config = fashion_mnist_vgg11.get_config()
    if scale == "small":
        config.data.train_images_per_class = 100
        config.data.test_images_per_class = 100
        config.model.width = 0.25
        config.optimizer.learning_rate = 0.04
        config.num_steps = 6000
        config.evaluation.every_steps = 200
        config.evaluation.gc_probes = 2
        config.checkpoint.every_steps = 1000
        config.stop_after_epochs_at_full_accuracy = 15.0
    return config


def get_sweep(scale: str = "paper") -> list[dict[str, Any]]:
    """One row of values for each setting, with every seed."""
    check_scale(scale, _SCALES)
    if scale == "smoke":
        return smoke_sweep()
    if scale == "small":
        return one_at_a_time({"optimizer.learning_rate": (0.01, 0.02, 0.04, 0.08)}, range(3))
    values = {
        "optimizer.learning_rate": (0.01, 0.02, 0.05, 0.1),
        "batch_size": (16, 32, 64, 128),
        "optimizer.l2": (0.0, 1e-5, 1e-4, 1e-3),
    }
    return one_at_a_time(values, range(5))
