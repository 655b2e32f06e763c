"""Every key of a run's configuration with its default, and the checks of its values."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict, config_dict

from gc_nc.data.sources import SOURCES
from gc_nc.errors import InputError
from gc_nc.models import MODEL_NAMES

SCHEDULES = ("constant", "step", "cosine")

# What the device's int32 and float32 hold.
_MAX_INT = 2**31 - 1
_MAX_FLOAT = 3e38


def default_config() -> ConfigDict:
    """A run on the embedded digits; config files change what they need and lock the rest."""
    # Locked: a key misspelt in a config file is an error, as it is on the command line.
    return ConfigDict(
        {
            "seed": 0,
            "data": {
                # One of gc_nc.data.sources.SOURCES.
                "source": "digits",
                # Of a TFDS set ("cifar10", "cifar10:3.0.2"); a label for logs elsewhere.
                "name": config_dict.placeholder(str),
                # Folder of TFDS directories, folder of IDX files, or an NPZ file.
                "data_dir": config_dict.placeholder(str),
                # Where the source does not say: default one more than the largest label.
                "num_classes": config_dict.placeholder(int),
                # Default half of the device's free memory.
                "memory_limit_gib": config_dict.placeholder(float),
                # Mean 0, variance 1 a channel; False leaves pixels in [0, 1]. GC scales with it.
                "standardize": True,
                # Random crops after padding by so many pixels, and left-right flips.
                "crop_padding": 0,
                "flip": False,
            },
            "model": {
                # One of gc_nc.models.MODEL_NAMES.
                "name": "vgg11",
                # Multiplies all channels.
                "width": 0.25,
                # Default none in VGG, BatchNorm in ResNet.
                "batch_norm": config_dict.placeholder(bool),
            },
            "batch_size": 32,
            "num_steps": 2000,
            "optimizer": {
                # Plain SGD unless momentum is above 0.
                "learning_rate": 0.05,
                "momentum": 0.0,
                # The loss gains l2 / 2 times the sum of all squared parameters.
                "l2": 0.0,
            },
            "schedule": {
                # "constant", "step" (times factor at each boundary) or "cosine" (to 0).
                "name": "constant",
                # Fractions of num_steps.
                "boundaries": (0.5, 0.75),
                "factor": 0.1,
                # Linear from 0.
                "warmup_steps": 0,
            },
            "evaluation": {
                # Also at step 0 and at the end. 0: only there.
                "every_steps": 200,
                "batch_size": 500,
                # GC is estimated on a fixed random subset of so many examples of each split, by so
                # many random Jacobian products an example.
                "gc_examples": 256,
                "gc_probes": 4,
            },
            # Loss of the current batch. 0: never.
            "log_every_steps": 50,
            "checkpoint": {
                # Also at the end and when interrupted. 0: only there.
                "every_steps": 1000,
                "keep": 2,
            },
            # Stop once training accuracy was 1.0 at every evaluation for so many epochs.
            "stop_after_epochs_at_full_accuracy": config_dict.placeholder(float),
        }
    ).lock()


def flatten(config: Mapping[str, Any] | ConfigDict, prefix: str = "") -> dict[str, Any]:
    """{"data.name": ...} of a nested mapping, in its order."""
    flat = {}
    for key in config:
        value = config[key]
        if isinstance(value, (Mapping, ConfigDict)):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def check_config(config: ConfigDict) -> None:
    """Checks every value before any work starts.

    Raises:
      InputError: names the key, its value and what is allowed.
    """
    flat, known = flatten(config), flatten(default_config())
    for key in flat.keys() ^ known.keys():
        state = "missing" if key in known else "not a known key"
        raise InputError(f"config.{key} is {state}; start from default_config()")
    for key, value in flat.items():
        if isinstance(value, float) and not abs(value) <= _MAX_FLOAT:
            raise InputError(
                f"config.{key}={value} must be a finite number of at most {_MAX_FLOAT:g}"
            )
        if isinstance(value, int) and value > _MAX_INT:
            raise InputError(f"config.{key}={value} must be at most {_MAX_INT}")

    def require(key: str, allowed: bool, what: str) -> None:
        if not allowed:
            raise InputError(f"config.{key}={flat[key]!r} must be {what}")

    for key, names in (
        ("data.source", SOURCES),
        ("model.name", MODEL_NAMES),
        ("schedule.name", SCHEDULES),
    ):
        require(key, flat[key] in names, f"one of {', '.join(names)}")
    for key in (
        "batch_size",
        "num_steps",
        "evaluation.batch_size",
        "evaluation.gc_probes",
        "checkpoint.keep",
    ):
        require(key, flat[key] >= 1, "at least 1")
    for key in (
        "seed",
        "data.crop_padding",
        "optimizer.l2",
        "schedule.factor",
        "schedule.warmup_steps",
        "evaluation.every_steps",
        "log_every_steps",
        "checkpoint.every_steps",
    ):
        require(key, flat[key] >= 0, "at least 0")
    require(
        "schedule.warmup_steps",
        flat["schedule.warmup_steps"] < flat["num_steps"],
        f"below config.num_steps={flat['num_steps']}",
    )
    require("evaluation.gc_examples", flat["evaluation.gc_examples"] >= 2, "at least 2")
    require("optimizer.learning_rate", flat["optimizer.learning_rate"] > 0, "above 0")
    require("model.width", 0 < flat["model.width"] <= 100, "above 0 and at most 100")
    require("optimizer.momentum", 0 <= flat["optimizer.momentum"] < 1, "in [0, 1)")
    boundaries = flat["schedule.boundaries"]
    require(
        "schedule.boundaries",
        all(isinstance(b, (int, float)) and 0 < b < 1 for b in boundaries)
        and list(boundaries) == sorted(set(boundaries)),
        "fractions of num_steps between 0 and 1, ascending, such as (0.5, 0.75)",
    )
    for key, least in (
        ("data.num_classes", 2),
        ("data.memory_limit_gib", 0),
        ("stop_after_epochs_at_full_accuracy", 0),
    ):
        require(key, flat[key] is None or flat[key] >= least, f"at least {least}, or left out")
    require("data.num_classes", (flat["data.num_classes"] or 0) <= 10**6, "at most 1000000")
