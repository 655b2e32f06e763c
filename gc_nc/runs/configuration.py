"""Every key of a run's configuration with its default, and the checks of its values."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict, config_dict

from gc_nc.data.class_splits import CLASS_SPLITS
from gc_nc.data.sources import SOURCES
from gc_nc.errors import InputError
from gc_nc.models import MODEL_NAMES
from gc_nc.training.penalties import PENALTY_METHODS

SCHEDULES = ("constant", "step", "cosine")
DTYPES = ("float32", "bfloat16")
PRECISIONS = ("default", "high", "highest")
PENALISED = ("embedding", "logits")
ON_DIVERGENCE = ("stop", "continue")
BEST_METRICS = tuple(
    f"{split}/{metric}"
    for split in ("train", "test")
    for metric in (
        "accuracy",
        "loss",
        "geometric_complexity",
        "geometric_collapse",
        "neural_collapse",
    )
)

#: What a value of each type is called in an error.
TYPE_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    tuple: "a tuple, as in (0.5, 0.75) or ()",
}

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
                # Folder of TFDS directories, of IDX files or of a folder a class, or an NPZ file.
                "data_dir": config_dict.placeholder(str),
                # Where the source does not say: default one more than the largest label.
                "num_classes": config_dict.placeholder(int),
                # What the images may take. Default half of the device's free memory.
                "memory_limit_gib": config_dict.placeholder(float),
                # Whether images are read while they are used (of "tfds" and "image_folder").
                # Default where they do not fit.
                "streaming": config_dict.placeholder(bool),
                # Mean 0, variance 1 a channel; False leaves pixels in [0, 1]. GC scales with it.
                "standardize": True,
                # Random crops after padding by so many pixels, and left-right flips.
                "crop_padding": 0,
                "flip": False,
                # Which classes are trained on; experiments.transfer uses the others. Training and
                # test images of a class are merged.
                "classes": {
                    # One of gc_nc.data.class_splits.CLASS_SPLITS, explained there.
                    "split": "all",
                    # For "names": class names; target () for all that are in neither of the others.
                    "source": (),
                    "val": (),
                    "target": (),
                    # For "random": (source, target) or (source, val, target) numbers of classes.
                    "counts": (),
                    # Of "random" and of the images that are held out or left out, apart from the
                    # run's seed.
                    "seed": 0,
                    # What every class must have; default any number.
                    "images_per_class": config_dict.placeholder(int),
                },
                # Share of each source class that is the test split, where classes are divided or
                # the source has none.
                "holdout": 0.2,
                # So many random images of each class, by classes.seed, to train on, to test on, and
                # of each class that is kept for transfer. Default all.
                "train_images_per_class": config_dict.placeholder(int),
                "test_images_per_class": config_dict.placeholder(int),
                "held_images_per_class": config_dict.placeholder(int),
                # Height and width that an image folder's images are resized to.
                "image_size": config_dict.placeholder(int),
            },
            "model": {
                # One of gc_nc.models.MODEL_NAMES.
                "name": "vgg11",
                # Multiplies all channels.
                "width": 0.25,
                # Default none in VGG, BatchNorm in ResNet.
                "batch_norm": config_dict.placeholder(bool),
                # Of the computation while training: "float32" or "bfloat16". Parameters, running
                # statistics and everything that is measured are float32.
                "dtype": "float32",
            },
            # Of matmuls and convolutions while training: "default" (TF32 on NVIDIA GPUs, float32 on
            # a CPU), "high" or "highest". Metrics are always measured in full float32.
            "precision": "default",
            "batch_size": 32,
            "num_steps": 2000,
            "optimizer": {
                # Plain SGD unless momentum is above 0.
                "learning_rate": 0.05,
                "momentum": 0.0,
                # The loss gains l2 / 2 times the sum of all squared parameters: coupled decay,
                # whose gradient goes through the momentum.
                "l2": 0.0,
                # Each step also takes learning_rate * decoupled_decay times the parameters off
                # them, outside of loss, gradient and momentum (SGDW, arXiv 1711.05101).
                "decoupled_decay": 0.0,
            },
            "gc_penalty": {
                # The loss gains weight times the GC of the batch. 0: no penalty, at no cost.
                "weight": 0.0,
                # GC of the "embedding" or of the "logits".
                "of": "embedding",
                # One of gc_nc.training.penalties.PENALTY_METHODS.
                "method": "output_probes",
                # Jacobian products an example; "exact" takes all.
                "num_probes": 1,
                # Share of each batch that is penalised, and every how many steps: the weight of a
                # penalised step is that many times larger.
                "batch_fraction": 1.0,
                "every_steps": 1,
                # The weight's factor, linear between these fractions of num_steps and constant
                # outside, as in (0.1, 0.5) with (0.0, 1.0); () for 1 throughout.
                "boundaries": (),
                "factors": (),
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
            "monitor": {
                # GC on so many of the evaluation's training examples, by so many products each,
                # every so many steps (0: never) that have no evaluation: about 1% of the training
                # time by default.
                "every_steps": 100,
                "examples": 32,
                "probes": 1,
            },
            # Loss of the current batch. 0: never.
            "log_every_steps": 50,
            "checkpoint": {
                # Also at the end and when interrupted. 0: only there.
                "every_steps": 1000,
                # Keep the N newest checkpoints and the best one: of the highest accuracy, or the
                # lowest value of another metric, at an evaluation; "" keeps no best one. One is
                # also written at each evaluation that is better than all before.
                "keep": 2,
                "best_metric": "test/accuracy",
            },
            # Once the loss or a parameter is infinite or NaN: "stop" or "continue".
            "on_divergence": "stop",
            # Stop once training accuracy was 1.0 at every evaluation for so many epochs.
            "stop_after_epochs_at_full_accuracy": config_dict.placeholder(float),
            # Stop at the first evaluation after step 0 whose train/loss, the mean cross-entropy of
            # all training images, is at most so much: runs that are to be compared at equal fit.
            # One that never gets there ends after num_steps; results.json says which it was.
            "stop_at_train_loss": config_dict.placeholder(float),
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
            flat[f"{prefix}{key}"] = value
    return flat


@functools.cache
def key_types() -> dict[str, type]:
    """The type of every key of `flatten(default_config())`; a default of None adds None to it."""

    def types(config: ConfigDict, prefix: str) -> dict[str, type]:
        found = {}
        for key, value in config.items():
            if isinstance(value, ConfigDict):
                found |= types(value, f"{prefix}{key}.")
            else:
                found[prefix + key] = config.get_type(key)
        return found

    return types(default_config(), "")


def shown(value: Any) -> str:
    """A value as an error shows it: `repr`, cut short."""
    try:
        text = repr(value)
    except ValueError:
        # Python refuses to write out an int of more than 4300 digits.
        return "(thousands of digits)"
    return text if len(text) <= 100 else f"{text[:100]}..."


def check_config(config: ConfigDict) -> None:
    """Checks every value before any work starts.

    Raises:
      InputError: names the key, its value and what is allowed.
    """
    flat, known = flatten(config), flatten(default_config())
    for key in flat.keys() ^ known.keys():
        state = "missing" if key in known else "not a known key"
        raise InputError(f"config.{key} is {state}; start from default_config()")

    def require(key: str, allowed: bool, what: str) -> None:
        if not allowed:
            raise InputError(f"config.{key}={shown(flat[key])} must be {what}")

    for key, allowed in key_types().items():
        value = flat[key]
        if value is None and known[key] is None:
            continue
        # A dict that replaces a group of keys brings types of its own.
        fits = _is_number(value) if allowed is float else isinstance(value, allowed)
        require(key, fits and (allowed is bool) == isinstance(value, bool), TYPE_NAMES[allowed])
        if allowed is float:
            what = f"a finite number of at most {_MAX_FLOAT:g}"
            require(key, abs(value) <= _MAX_FLOAT, what)
        elif allowed is int:
            require(key, value <= _MAX_INT, f"at most {_MAX_INT}")

    for key, names in (
        ("data.source", SOURCES),
        ("data.classes.split", CLASS_SPLITS),
        ("model.name", MODEL_NAMES),
        ("model.dtype", DTYPES),
        ("precision", PRECISIONS),
        ("gc_penalty.of", PENALISED),
        ("gc_penalty.method", PENALTY_METHODS),
        ("schedule.name", SCHEDULES),
        ("checkpoint.best_metric", ("", *BEST_METRICS)),
        ("on_divergence", ON_DIVERGENCE),
    ):
        require(key, flat[key] in names, f"one of {', '.join(map(repr, names))}")
    for key in (
        "batch_size",
        "num_steps",
        "evaluation.batch_size",
        "evaluation.gc_probes",
        "gc_penalty.num_probes",
        "gc_penalty.every_steps",
        "monitor.probes",
        "checkpoint.keep",
    ):
        require(key, flat[key] >= 1, "at least 1")
    for key in (
        "seed",
        "data.crop_padding",
        "data.classes.seed",
        "optimizer.l2",
        "optimizer.decoupled_decay",
        "gc_penalty.weight",
        "monitor.every_steps",
        "schedule.factor",
        "schedule.warmup_steps",
        "evaluation.every_steps",
        "log_every_steps",
        "checkpoint.every_steps",
    ):
        require(key, flat[key] >= 0, "at least 0")
    penalty_steps = flat["gc_penalty.every_steps"]
    most = f"at most config.num_steps={flat['num_steps']}"
    require("gc_penalty.every_steps", penalty_steps <= flat["num_steps"], most)
    require(
        "schedule.warmup_steps",
        flat["schedule.warmup_steps"] < flat["num_steps"],
        f"below config.num_steps={flat['num_steps']}",
    )
    for key in ("evaluation.gc_examples", "monitor.examples"):
        require(key, flat[key] >= 2, "at least 2")
    require("gc_penalty.batch_fraction", 0 < flat["gc_penalty.batch_fraction"] <= 1, "in (0, 1]")
    require("optimizer.learning_rate", flat["optimizer.learning_rate"] > 0, "above 0")
    require("model.width", 0 < flat["model.width"] <= 100, "above 0 and at most 100")
    require("optimizer.momentum", 0 <= flat["optimizer.momentum"] < 1, "in [0, 1)")

    def ascending(key: str, in_range: Callable[[float], bool], what: str) -> None:
        values = flat[key]
        numbers = all(_is_number(b) and in_range(b) for b in values)
        require(key, numbers and list(values) == sorted(set(values)), what)

    ascending(
        "schedule.boundaries",
        lambda b: 0 < b < 1,
        "fractions of num_steps between 0 and 1, ascending, such as (0.5, 0.75)",
    )
    ascending(
        "gc_penalty.boundaries",
        lambda b: 0 <= b <= 1,
        "fractions of num_steps from 0 to 1, ascending, such as (0.1, 0.5)",
    )
    factors, num_factors = flat["gc_penalty.factors"], len(flat["gc_penalty.boundaries"])
    require(
        "gc_penalty.factors",
        all(_is_number(f) and 0 <= f <= _MAX_FLOAT for f in factors)
        and len(factors) == num_factors,
        f"{num_factors} numbers of at least 0, one for each of config.gc_penalty.boundaries",
    )
    require(
        "gc_penalty.weight",
        flat["gc_penalty.weight"] * max([1, *factors]) * penalty_steps <= _MAX_FLOAT,
        f"at most {_MAX_FLOAT:g} after its factors and every_steps={penalty_steps}",
    )
    for key, least in (
        ("data.num_classes", 2),
        ("data.memory_limit_gib", 0),
        ("data.classes.images_per_class", 2),
        ("data.image_size", 4),
        ("data.train_images_per_class", 1),
        ("data.test_images_per_class", 1),
        ("data.held_images_per_class", 1),
        ("stop_after_epochs_at_full_accuracy", 0),
    ):
        require(key, flat[key] is None or flat[key] >= least, f"at least {least}, or left out")
    enough = flat["stop_at_train_loss"]
    require("stop_at_train_loss", enough is None or enough > 0, "above 0, or left out")
    require("data.num_classes", (flat["data.num_classes"] or 0) <= 10**6, "at most 1000000")
    require("data.image_size", (flat["data.image_size"] or 0) <= 1024, "at most 1024")
    require("data.holdout", 0 < flat["data.holdout"] < 1, "between 0 and 1")
    _check_class_split(flat, require)


def _check_class_split(flat: dict[str, Any], require: Callable[[str, bool, str], None]) -> None:
    kind = flat["data.classes.split"]
    for part in ("source", "val", "target"):
        names = flat[f"data.classes.{part}"]
        used = kind == "names"
        only = "names of classes" if used else f"() with config.data.classes.split={kind!r}"
        valid = all(isinstance(name, str) for name in names) and (used or not names)
        require(f"data.classes.{part}", valid, only)
    counts = flat["data.classes.counts"]
    if kind == "random":
        whole = all(
            isinstance(n, int) and not isinstance(n, bool) and 0 <= n <= _MAX_INT for n in counts
        )
        require(
            "data.classes.counts",
            len(counts) in (2, 3) and whole and min(counts[0], counts[-1]) >= 2,
            "(source, target) or (source, val, target) classes, as in (6, 4)",
        )
    else:
        only = f"() with config.data.classes.split={kind!r}; counts are for 'random'"
        require("data.classes.counts", not counts, only)
    if kind == "names":
        needed = "names of at least 2 classes with config.data.classes.split='names'"
        require("data.classes.source", len(flat["data.classes.source"]) >= 2, needed)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
