"""ResNet-18 on CIFAR-FS: figure 4 of arXiv 2405.15706.

CIFAR-100 is divided into 64 source, 16 validation and 20 target classes. The rows of the figure
change learning rate, batch size and L2. All settings and grids are ours, because the paper's are
not public.

    python -m experiments.reproduce --figure=4 --scale=small --data_dir=DATA --workdir=DIR \\
        --rows=docs/results/runs

paper: full width, all images, 5 seeds. We have not run it.
small: width 0.25, with 150 training and 50 held-out images of each source class and 200 images of
each other class; momentum 0.9 and a constant learning rate. A run ends when its training loss is
0.5, so that all runs that get there are compared at equal fit. There is no augmentation, with which
a run of this size takes more than twice as long to reach that loss. There are 14 settings with 2
seeds; seed 0 of all rows comes first, and the learning rates come before the other rows.
smoke: checks the pipeline; its numbers mean nothing.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments.configs import cifar_fs_resnet18
from experiments.configs.figures.scales import check_scale, smoke_config, smoke_sweep
from gc_nc.sweeps import one_at_a_time

_SCALES = ("paper", "small", "smoke")


def get_config(scale: str = "paper") -> ConfigDict:
    """100 epochs at full width, or until all runs fit equally well."""
    check_scale(scale, _SCALES)
    if scale == "smoke":
        return smoke_config()
    config = cifar_fs_resnet18.get_config()
    if scale == "small":
        config.data.train_images_per_class = 150
        config.data.test_images_per_class = 50
        config.data.held_images_per_class = 200
        config.data.crop_padding = 0
        config.data.flip = False
        config.model.width = 0.25
        config.batch_size = 64
        config.optimizer.learning_rate = 0.04
        config.optimizer.l2 = 0.0
        config.schedule.name = "constant"
        config.stop_at_train_loss = 0.5
        # 20 epochs with the smallest batch, 80 with the base one.
        config.num_steps = 12_000
        # One epoch of the base config; an evaluation takes as long as 50 of its steps.
        config.evaluation.every_steps = 150
        config.evaluation.gc_probes = 2
        config.monitor.every_steps = 0
        config.checkpoint.every_steps = 600
        config.checkpoint.keep = 30
        # The best checkpoint is not used here and would be one more to write at each evaluation.
        config.checkpoint.best_metric = ""
    return config


def get_sweep(scale: str = "paper") -> list[dict[str, Any]]:
    """One row of values for each setting, with every seed."""
    check_scale(scale, _SCALES)
    if scale == "smoke":
        return smoke_sweep()
    if scale == "small":
        values = {
            "optimizer.learning_rate": (0.005, 0.01, 0.02, 0.04, 0.08, 0.16),
            "batch_size": (16, 32, 64, 96, 128),
            "optimizer.l2": (0.0, 1e-4, 3e-4, 1e-3, 2e-3),
        }
        # Seed by seed, so that a sweep that is cut short has whole rows.
        return [overrides for seed in range(2) for overrides in one_at_a_time(values, (seed,))]
    values = {
        "optimizer.learning_rate": (0.01, 0.025, 0.05, 0.1),
        "batch_size": (32, 64, 128, 256),
        "optimizer.l2": (0.0, 1e-4, 5e-4, 1e-3),
    }
    return one_at_a_time(values, range(5))
