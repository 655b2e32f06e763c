"""ResNet-18 on CIFAR-FS: the network and data of figure 4 of arXiv 2405.15706.

CIFAR-FS divides the classes of CIFAR-100 by name into 64 source, 16 validation and 20 target
classes (arXiv 1805.08136). All 600 images of each class are used, and a sixth of each source class
is held out. Learning rate, batch size, schedule and length are ours, because the paper's are not
public. We have not run this config yet.

    python -m experiments.prepare --dataset=cifar100 --data_dir=DATA
    python -m experiments.train --config=experiments/configs/cifar_fs_resnet18.py \\
        --config.data.data_dir=DATA --config.seed=0 --workdir=runs/cifar_fs/0
    python -m experiments.transfer --workdir=runs/cifar_fs/0 --step=all
"""

from ml_collections import ConfigDict

from gc_nc.runs.configuration import default_config


def get_config() -> ConfigDict:
    """100 epochs at full width."""
    config = default_config()
    config.data.source = "tfds"
    config.data.name = "cifar100"
    config.data.classes.split = "cifar_fs"
    config.data.classes.images_per_class = 600
    config.data.holdout = 1 / 6
    config.data.crop_padding = 4
    config.data.flip = True
    config.model.name = "resnet18"
    config.model.width = 1.0
    config.batch_size = 128
    config.optimizer.learning_rate = 0.05
    config.optimizer.momentum = 0.9
    config.optimizer.l2 = 5e-4
    config.schedule.name = "step"
    config.schedule.boundaries = (0.6, 0.8)
    config.num_steps = 100 * 32_000 // 128
    config.evaluation.every_steps = 2500
    config.log_every_steps = 100
    config.checkpoint.every_steps = 2500
    config.checkpoint.keep = 10
    return config
