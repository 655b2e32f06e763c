"""ResNet-18 on mini-ImageNet: an appendix figure of arXiv 2405.15706, A5 here.

There are 64 source and 20 target classes. The rows of the figure change learning rate, batch size
and L2. All values are ours, because the paper's grids are not public. DATA contains one folder for
each class, as in experiments/configs/mini_imagenet_resnet18.py.

    python -m experiments.reproduce --figure=A5 --scale=paper --data_dir=DATA --workdir=DIR

paper: full width, all images, 5 seeds. We have not run it.
smoke: checks the pipeline; its numbers mean nothing.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments.configs import mini_imagenet_resnet18
from experiments.configs.figures import resnet18_cifar_fs
from experiments.configs.figures.scales import check_scale, smoke_config

_SCALES = ("paper", "smoke")


def get_config(scale: str = "paper") -> ConfigDict:
    """100 epochs at full width."""
    check_scale(scale, _SCALES)
    if scale == "smoke":
        return smoke_config()
    config = mini_imagenet_resnet18.get_config()
    return config


def get_sweep(scale: str = "paper") -> list[dict[str, Any]]:
    """The rows of CIFAR-FS."""
    return resnet18_cifar_fs.get_sweep(scale)
