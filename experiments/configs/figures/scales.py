"""What the configs of the figures share: the names of the scales, and the smallest one."""

from typing import Any

from ml_collections import ConfigDict

from gc_nc.errors import InputError
from gc_nc.runs.configuration import default_config
from gc_nc.sweeps import one_at_a_time

SCALES = ("paper", "small", "demo", "smoke")


def check_scale(scale: str, has: tuple[str, ...]) -> None:
    """Raises InputError where the argument of a config file names no scale that it has."""
    if scale not in has:
        raise InputError(f"scale {scale!r} is not one of {', '.join(has)}")


def smoke_config() -> ConfigDict:
    """A narrow one-layer network on a few of the embedded digits, for a few steps.

    It checks the pipeline of every figure; the numbers mean nothing.
    """
    config = default_config()
    config.data.classes.split = "random"
    config.data.classes.counts = (5, 5)
    config.data.train_images_per_class = 16
    config.data.test_images_per_class = 8
    config.data.held_images_per_class = 30
    config.model.name = "mlp"
    config.model.width = 0.1
    config.batch_size = 16
    config.num_steps = 12
    config.evaluation.every_steps = 6
    config.evaluation.batch_size = 40
    config.evaluation.gc_examples = 16
    config.evaluation.gc_probes = 1
    config.monitor.every_steps = 0
    config.log_every_steps = 0
    config.checkpoint.every_steps = 6
    return config


def smoke_sweep() -> list[dict[str, Any]]:
    """Two learning rates with two seeds each."""
    return one_at_a_time({"optimizer.learning_rate": (0.05, 0.2)}, range(2))
