"""ResNet-50 on CIFAR-100: an appendix figure of arXiv 2405.15706, A4 here.

The rows of the figure change learning rate, batch size and L2, one at a time. All values are ours,
because the paper's grids are not public.

    python -m experiments.reproduce --figure=A4 --scale=paper --data_dir=DATA --workdir=DIR

paper: full width, all images, 5 seeds. We have not run it.
smoke: checks the pipeline; its numbers mean nothing.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments.configs.figures import resnet18_cifar10
from experiments.configs.figures.scales import check_scale, smoke_config

_SCALES = ("paper", "smoke")


def get_config(scale: str = "paper") -> ConfigDict:
    """As ResNet-18 on CIFAR-10."""
    check_scale(scale, _SCALES)
    if scale == "smoke":
        return smoke_config()
    config = resnet18_cifar10.get_config()
    config.data.name = "cifar100"
    config.model.name = "resnet50"
    return config


def get_sweep(scale: str = "paper") -> list[dict[str, Any]]:
    """The rows of ResNet-18 on CIFAR-10."""
    check_scale(scale, _SCALES)
    return resnet18_cifar10.get_sweep(scale)
