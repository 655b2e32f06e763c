"""What the configs of the figures share: the names of the scales, and the smallest one."""

from ml_collections import ConfigDict

from gc_nc.errors import InputError

SCALES = ("paper", "small", "demo", "smoke")


def check_scale(scale: str, has: tuple[str, ...]) -> None:
    """Raises InputError where the argument of a config file names no scale that it has."""
    if scale not in has:
        raise InputError(f"scale {scale!r} is not one of {', '.join(has)}")


def use_smoke_scale(config: ConfigDict) -> None:
    """A narrow VGG-11 on few of the embedded digits for a few steps: no result, only the way."""
    smoke = {
        "data.source": "digits",
        "data.name": None,
        "data.image_size": None,
        "data.classes.split": "random",
        "data.classes.counts": (5, 5),
        "data.classes.images_per_class": None,
        "data.holdout": 0.2,
        "data.train_images_per_class": 16,
        "data.test_images_per_class": 8,
        "data.held_images_per_class": 30,
        "data.crop_padding": 0,
        "data.flip": False,
        "model.name": "vgg11",
        "model.width": 0.1,
        "model.batch_norm": None,
        "batch_size": 16,
        "num_steps": 12,
        "schedule.name": "constant",
        "evaluation.every_steps": 6,
        "evaluation.batch_size": 40,
        "evaluation.gc_examples": 16,
        "evaluation.gc_probes": 1,
        "monitor.every_steps": 0,
        "log_every_steps": 0,
        "checkpoint.every_steps": 6,
        "stop_after_epochs_at_full_accuracy": None,
    }
    config.update_from_flattened_dict(smoke)
