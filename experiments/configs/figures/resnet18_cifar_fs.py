"""ResNet-18 on CIFAR-FS: figure 4 of arXiv 2405.15706.

64 source classes of CIFAR-100, 20 target classes; rows change learning rate, batch size and L2.
Settings and grids are ours: the paper's are not public.

    python -m experiments.reproduce --figure=4 --scale=small --data_dir=DATA --workdir=DIR

paper: full width, all images, 5 seeds; not run by us. smoke: the way only. The small scale of
figure 4 is that of figure 1: VGG-13 on 5 classes of CIFAR-10, whose other 5 are the target.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments.configs import cifar_fs_resnet18
from experiments.configs.figures.scales import check_scale, smoke_config, smoke_sweep
from gc_nc.sweeps import one_at_a_time

_SCALES = ("paper", "smoke")


def get_config(scale: str = "paper") -> ConfigDict:
    """100 epochs at full width."""
    check_scale(scale, _SCALES)
    if scale == "smoke":
        return smoke_config()
    config = cifar_fs_resnet18.get_config()
    return config


def get_sweep(scale: str = "paper") -> list[dict[str, Any]]:
    """A row a setting, for each seed."""
    check_scale(scale, _SCALES)
    if scale == "smoke":
        return smoke_sweep()
    values = {
        "optimizer.learning_rate": (0.01, 0.025, 0.05, 0.1),
        "batch_size": (32, 64, 128, 256),
        "optimizer.l2": (0.0, 1e-4, 5e-4, 1e-3),
    }
    return one_at_a_time(values, range(5))
