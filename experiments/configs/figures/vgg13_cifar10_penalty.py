"""VGG-13 on CIFAR-10 with an explicit GC penalty: an appendix figure of arXiv 2405.15706, A6 here.

The only row changes the weight of the penalty. Learning rate 0.01, batch size 256 and the weights
up to 1e-4 are the paper's, as a summary of its figure reports them; the rest is ours.

    python -m experiments.reproduce --figure=A6 --scale=small --workdir=DIR

paper: full width, all images, 5 seeds. We have not run it.
small: VGG-11 on scikit-learn's digits, 3 seeds. docs/results/ has the results.
smoke: checks the pipeline; its numbers mean nothing.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments.configs import cifar10_vgg13_gc_penalty, digits
from experiments.configs.figures.scales import check_scale, smoke_config
from gc_nc.sweeps import one_at_a_time

_SCALES = ("paper", "small", "smoke")


def get_config(scale: str = "paper") -> ConfigDict:
    """Without a penalty until its weight is set."""
    check_scale(scale, _SCALES)
    if scale == "smoke":
        return smoke_config()
    if scale == "small":
        return digits.get_config()
    config = cifar10_vgg13_gc_penalty.get_config()
    return config


def get_sweep(scale: str = "paper") -> list[dict[str, Any]]:
    """One row of weights, with every seed."""
    check_scale(scale, _SCALES)
    if scale == "smoke":
        return one_at_a_time({"gc_penalty.weight": (0.0, 1e-3)}, range(2))
    if scale == "small":
        return one_at_a_time({"gc_penalty.weight": (0.0, 1e-5, 1e-4, 1e-3)}, range(3))
    weights = (0.0, 1e-7, 1e-6, 1e-4, 1e-3, 1e-2)
    return one_at_a_time({"gc_penalty.weight": weights}, range(5))
