"""ResNet-18 on CIFAR-100: figure 2 of arXiv 2405.15706, and ours on the estimators' cost.

This is one run, whose GC is then measured exactly and from samples. All settings are ours.

    python -m experiments.reproduce --figure=2 --scale=small --data_dir=DATA --workdir=DIR

paper: full width, all images. We have not run it.
small: width 0.25 on 1,000 images of CIFAR-10, until some epochs after training accuracy 1.
docs/results/ has the results.
smoke: checks the pipeline; its numbers mean nothing.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments.configs.figures.scales import check_scale, smoke_config
from gc_nc.runs.configuration import default_config

_SCALES = ("paper", "small", "smoke")


def get_config(scale: str = "paper") -> ConfigDict:
    """100 epochs; at the small scale, until 5 epochs after training accuracy 1."""
    check_scale(scale, _SCALES)
    if scale == "smoke":
        return smoke_config()
    config = default_config()
    config.data.source = "tfds"
    config.data.name = "cifar100"
    config.model.name = "resnet18"
    config.model.width = 1.0
    config.batch_size = 128
    config.optimizer.learning_rate = 0.05
    config.optimizer.momentum = 0.9
    config.optimizer.l2 = 5e-4
    config.schedule.name = "step"
    config.schedule.boundaries = (0.6, 0.8)
    config.num_steps = 100 * 50_000 // 128
    config.evaluation.every_steps = 3910
    config.checkpoint.every_steps = 3910
    if scale == "small":
        config.data.name = "cifar10"
        config.data.train_images_per_class = 100
        config.data.test_images_per_class = 100
        config.model.width = 0.25
        config.batch_size = 32
        config.schedule.name = "constant"
        config.num_steps = 1500
        config.evaluation.every_steps = 150
        config.evaluation.gc_probes = 2
        config.checkpoint.every_steps = 600
        config.stop_after_epochs_at_full_accuracy = 5.0
    return config


def get_sweep(scale: str = "paper") -> list[dict[str, Any]]:
    """The config itself."""
    check_scale(scale, _SCALES)
    return [{"seed": 0}]
