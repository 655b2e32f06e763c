"""VGG-11 on MNIST: an appendix figure of arXiv 2405.15706, A2 here.

The rows of the figure change learning rate, batch size and L2, one at a time. All values are ours,
because the paper's grids are not public.

    python -m experiments.reproduce --figure=A2 --scale=paper --data_dir=DATA --workdir=DIR

paper: full width, all images, 5 seeds. We have not run it.
smoke: checks the pipeline; its numbers mean nothing.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments.configs.figures import vgg11_fashion_mnist
from experiments.configs.figures.scales import check_scale, smoke_config

_SCALES = ("paper", "smoke")


def get_config(scale: str = "paper") -> ConfigDict:
    """As on Fashion-MNIST, 50 epochs."""
    check_scale(scale, _SCALES)
    if scale == "smoke":
        return smoke_config()
    config = vgg11_fashion_mnist.get_config()
    config.data.source = "tfds"
    config.data.name = "mnist"
    config.num_steps = 50 * 60_000 // 32
    return config


def get_sweep(scale: str = "paper") -> list[dict[str, Any]]:
    """The rows of Fashion-MNIST."""
    check_scale(scale, _SCALES)
    return vgg11_fashion_mnist.get_sweep(scale)
