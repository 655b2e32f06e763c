"""Every setting of a run in one table: its key, default, allowed values and meaning."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from gc_nc.data.class_splits import CLASS_SPLITS
from gc_nc.data.sources import SOURCES
from gc_nc.metrics import PENALTY_METHODS
from gc_nc.models import MODEL_NAMES

SCHEDULES = ("constant", "step", "cosine")
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

#: What a value of each type is called.
TYPE_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    tuple: "a tuple, as in (0.5, 0.75) or ()",
}

#: A bound below the largest float32, which is the number type on the device.
MAX_FLOAT = 3e38


class Rule(NamedTuple):
    """The values that a setting may have.

    Attributes:
      allowed: the allowed values in words, to follow "must be".
      holds: tells whether a value of the right type is allowed.
    """

    allowed: str
    holds: Callable[[Any], bool]


class Setting(NamedTuple):
    """A setting of a run.

    Attributes:
      default: its default value, or its type if it may be left out (None).
      meaning: what it means, in whole sentences.
      rule: the values of the type that are allowed; None for all.
    """

    default: Any
    meaning: str
    rule: Rule | None = None

    @property
    def is_optional(self) -> bool:
        """Whether the setting may be left out."""
        return isinstance(self.default, type)

    @property
    def type(self) -> type:
        """The type of its value, unless it is left out."""
        return self.default if isinstance(self.default, type) else type(self.default)


def is_number(value: Any) -> bool:
    """Whether the value is a whole or real number, and not true or false."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _one_of(names: Sequence[str]) -> Rule:
    return Rule(f"one of {', '.join(map(repr, names))}", lambda value: value in names)


def _in_range(least: float | int, most: float | int = math.inf) -> Rule:
    allowed = f"at least {least}" if most == math.inf else f"at least {least} and at most {most}"
    return Rule(allowed, lambda value: least <= value <= most)


def _ascending(allowed: str, in_range: Callable[[float | int], bool]) -> Rule:
    return Rule(
        f"fractions of num_steps {allowed}, ascending, such as (0.5, 0.75)",
        lambda values: (
            all(is_number(value) and in_range(value) for value in values)
            and list(values) == sorted(set(values))
        ),
    )


_POSITIVE = Rule("above 0", lambda value: value > 0)
_NAMES = Rule("names of classes", lambda names: all(isinstance(name, str) for name in names))

#: The settings in the order of config.json.
SETTINGS: Mapping[str, Setting] = {
    "seed": Setting(
        0, "Seeds initialisation, order of images, augmentation and probes.", _in_range(0)
    ),
    "data.source": Setting("digits", "Where the images come from.", _one_of(SOURCES)),
    "data.name": Setting(str, 'A TFDS set ("cifar10", "cifar10:3.0.2"); elsewhere a label.'),
    "data.data_dir": Setting(
        str, "The folder of TFDS directories, IDX files or class folders, or the NPZ file."
    ),
    "data.num_classes": Setting(
        int,
        "The number of classes, if the source does not say. Default: one more than the largest"
        " label.",
        _in_range(2, 10**6),
    ),
    "data.memory_limit_gib": Setting(
        float, "The memory for images. Default: half of the device's free memory.", _in_range(0)
    ),
    "data.streaming": Setting(
        bool,
        'Whether images of "tfds" and "image_folder" are read while they are used. Default: if'
        " they do not fit.",
    ),
    "data.standardize": Setting(
        True,
        "Gives each channel mean 0 and variance 1; False leaves pixels in [0, 1]. GC scales with"
        " it.",
    ),
    "data.crop_padding": Setting(
        0, "Random crops after padding by this number of pixels.", _in_range(0)
    ),
    "data.flip": Setting(False, "Random left-right flips."),
    "data.classes.split": Setting(
        "all",
        "Which classes are trained on; experiments.transfer uses the others. Training and test"
        " images of a class are merged, unless all classes are trained on.",
        _one_of(CLASS_SPLITS),
    ),
    "data.classes.source": Setting(
        (), 'For split "names": the classes that are trained on.', _NAMES
    ),
    "data.classes.val": Setting((), 'For split "names": the validation classes.', _NAMES),
    "data.classes.target": Setting(
        (), 'For split "names": the target classes; () for all other classes.', _NAMES
    ),
    "data.classes.counts": Setting(
        (), 'For split "random": numbers of (source, target) or (source, val, target) classes.'
    ),
    "data.classes.seed": Setting(
        0,
        'Seeds the split "random" and which images are held out or left out, apart from the run\'s'
        " seed.",
        _in_range(0),
    ),
    "data.classes.images_per_class": Setting(
        int, "The number of images that every class must have. Default: any.", _in_range(2)
    ),
    "data.holdout": Setting(
        0.2,
        "Share of each source class that is the test split, if classes are divided or the source"
        " has no test split.",
        Rule("between 0 and 1", lambda value: 0 < value < 1),
    ),
    **{
        f"data.{part}_images_per_class": Setting(
            int, f"Random images of each class {use}, by classes.seed. Default: all.", _in_range(1)
        )
        for part, use in (
            ("train", "to train on"),
            ("test", "to test on"),
            ("held", "that is kept for transfer"),
        )
    },
    "data.image_size": Setting(
        int, "Height and width that an image folder's images are resized to.", _in_range(4, 1024)
    ),
    "model.name": Setting("vgg11", "The network.", _one_of(MODEL_NAMES)),
    "model.width": Setting(
        0.25,
        "Multiplies the channels of every layer.",
        Rule("above 0 and at most 100", lambda value: 0 < value <= 100),
    ),
    "model.batch_norm": Setting(
        bool, "Whether the network has BatchNorm. Default: only ResNets have it."
    ),
    "model.dtype": Setting(
        "float32",
        "The dtype of the computation in training. Parameters, running statistics and everything"
        " that is measured are float32.",
        _one_of(("float32", "bfloat16")),
    ),
    "precision": Setting(
        "default",
        'The precision of matmuls and convolutions in training; "default" is TF32 on NVIDIA GPUs'
        " and float32 on a CPU. Metrics are always measured in full float32.",
        _one_of(("default", "high", "highest")),
    ),
    "batch_size": Setting(32, "The number of images in a step.", _in_range(1)),
    "num_steps": Setting(2000, "The number of steps of the run.", _in_range(1)),
    "optimizer.learning_rate": Setting(0.05, "The learning rate of SGD.", _POSITIVE),
    "optimizer.momentum": Setting(
        0.0, "The momentum of SGD.", Rule("in [0, 1)", lambda value: 0 <= value < 1)
    ),
    "optimizer.l2": Setting(
        0.0,
        "The loss gains l2 / 2 times the sum of all squared parameters: coupled decay, whose"
        " gradient goes through the momentum.",
        _in_range(0),
    ),
    "optimizer.decoupled_decay": Setting(
        0.0,
        "Each step also subtracts learning_rate * decoupled_decay times the parameters from them,"
        " outside of loss, gradient and momentum (SGDW, arXiv 1711.05101).",
        _in_range(0),
    ),
    "gc_penalty.weight": Setting(
        0.0, "The loss gains weight times the GC of the batch. 0 costs nothing.", _in_range(0)
    ),
    "gc_penalty.of": Setting(
        "embedding", "The function whose GC is penalised.", _one_of(("embedding", "logits"))
    ),
    "gc_penalty.method": Setting(
        "output_probes", "How the penalised GC is computed.", _one_of(PENALTY_METHODS)
    ),
    "gc_penalty.num_probes": Setting(
        1, 'Jacobian products for each example; "exact" takes all.', _in_range(1)
    ),
    "gc_penalty.batch_fraction": Setting(
        1.0,
        "Share of each batch that is penalised.",
        Rule("in (0, 1]", lambda value: 0 < value <= 1),
    ),
    "gc_penalty.every_steps": Setting(
        1,
        "Only one step in this many is penalised, with a weight that is this many times larger.",
        _in_range(1),
    ),
    "gc_penalty.boundaries": Setting(
        (),
        "The weight's factor is linear between these fractions of num_steps, as in (0.1, 0.5), and"
        " constant outside; () for a factor of 1 throughout.",
        _ascending("from 0 to 1", lambda value: 0 <= value <= 1),
    ),
    "gc_penalty.factors": Setting((), "The factors at these fractions, as in (0.0, 1.0)."),
    "schedule.name": Setting(
        "constant",
        'The learning-rate schedule: "constant", "step" (times factor at each boundary) or'
        ' "cosine" (to 0).',
        _one_of(SCHEDULES),
    ),
    "schedule.boundaries": Setting(
        (0.5, 0.75),
        'The boundaries of "step".',
        _ascending("between 0 and 1", lambda value: 0 < value < 1),
    ),
    "schedule.factor": Setting(0.1, 'The factor of "step".', _in_range(0)),
    "schedule.warmup_steps": Setting(
        0, "The learning rate first rises linearly from 0 for this number of steps.", _in_range(0)
    ),
    "evaluation.every_steps": Setting(
        200, "Steps between evaluations. Steps 0 and the last one always have one.", _in_range(0)
    ),
    "evaluation.batch_size": Setting(500, "Images at a time.", _in_range(1)),
    "evaluation.gc_examples": Setting(
        256, "GC is estimated on this many fixed random images of each split.", _in_range(2)
    ),
    "evaluation.gc_probes": Setting(4, "Random Jacobian products for each of them.", _in_range(1)),
    "monitor.every_steps": Setting(
        100,
        "Steps between estimates of GC on a few training images, if no evaluation is due; they"
        " take about 1% of the training time. 0: never.",
        _in_range(0),
    ),
    "monitor.examples": Setting(32, "The number of these images.", _in_range(2)),
    "monitor.probes": Setting(1, "Random Jacobian products for each of them.", _in_range(1)),
    "log_every_steps": Setting(
        50, "Steps between records of the current batch's loss. 0: never.", _in_range(0)
    ),
    "checkpoint.every_steps": Setting(
        1000,
        "Steps between checkpoints. There is always one at the end and when interrupted.",
        _in_range(0),
    ),
    "checkpoint.keep": Setting(2, "Keep the N newest checkpoints and the best one.", _in_range(1)),
    "checkpoint.best_metric": Setting(
        "test/accuracy",
        "What makes a checkpoint the best: the highest accuracy, or the lowest value of another"
        ' metric, at an evaluation; "" keeps no best one. A checkpoint is also written at each'
        " evaluation that is better than all before it.",
        _one_of(("", *BEST_METRICS)),
    ),
    "on_divergence": Setting(
        "stop",
        "What happens once the loss or a parameter is infinite or NaN.",
        _one_of(("stop", "continue")),
    ),
    "stop_after_epochs_at_full_accuracy": Setting(
        float,
        "Stop once training accuracy was 1.0 at every evaluation for this number of epochs.",
        _in_range(0),
    ),
    "stop_at_train_loss": Setting(
        float,
        "Stop at the first evaluation after step 0 whose train/loss, the mean cross-entropy of all"
        " training images, is at most this: for runs that are to be compared at equal fit. A run"
        " that never gets there ends after num_steps; results.json says which it was.",
        _POSITIVE,
    ),
}


def _allowed(setting: Setting) -> str:
    kind = TYPE_NAMES[setting.type].partition(",")[0]
    return kind if setting.rule is None else f"{kind}, {setting.rule.allowed}"


def _default(setting: Setting) -> str:
    return "left out" if setting.is_optional else repr(setting.default)


def settings_table() -> str:
    """All settings as a Markdown table, for docs/settings.md."""
    lines = ["| key | default | allowed | meaning |", "| --- | --- | --- | --- |"]
    for key, setting in SETTINGS.items():
        cells = f"`{key}`", f"`{_default(setting)}`", _allowed(setting), setting.meaning
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def settings_help() -> str:
    """All settings as flags, for --help."""
    return "\n".join(
        f"--config.{key} (default {_default(setting)}; {_allowed(setting)})\n    {setting.meaning}"
        for key, setting in SETTINGS.items()
    )
