"""ResNet-18 on mini-ImageNet: the data of an appendix figure of arXiv 2405.15706.

The split of Ravi and Larochelle has 64 source, 16 validation and 20 target classes, given by
WordNet id, with 600 images each. The images are resized to 84x84 once, and a sixth of each source
class is held out. DATA contains one folder for each class, such as n01532829, with the 600 images
of the published list; the folders may lie below train/, val/ and test/. Learning rate, batch size,
schedule and length are ours, because the paper's are not public. We have not run this config yet.

    python -m experiments.train --config=experiments/configs/mini_imagenet_resnet18.py \\
        --config.data.data_dir=DATA --config.seed=0 --workdir=runs/mini_imagenet/0
    python -m experiments.transfer --workdir=runs/mini_imagenet/0 --step=all
"""

from ml_collections import ConfigDict

from gc_nc.runs.configuration import default_config


def get_config() -> ConfigDict:
    """100 epochs at full width."""
    config = default_config()
    config.data.source = "image_folder"
    config.data.name = "mini_imagenet"
    config.data.image_size = 84
    config.data.classes.split = "mini_imagenet"
    config.data.classes.images_per_class = 600
    config.data.holdout = 1 / 6
    config.data.crop_padding = 8
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
