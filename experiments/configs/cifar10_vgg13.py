"""VGG-13 on CIFAR-10, plain SGD: the network and data of figures 1, 3 and 5 of arXiv 2405.15706.

Learning rate, batch size and length are ours, because the paper's are not public. Prepare the data
once (this does not need TensorFlow), then train:

    python -m experiments.prepare --dataset=cifar10 --data_dir=DATA
    python -m experiments.train --config=experiments/configs/cifar10_vgg13.py \\
        --config.data.data_dir=DATA --workdir=runs/cifar10_vgg13
"""

from ml_collections import ConfigDict

from gc_nc.runs.configuration import default_config


def get_config() -> ConfigDict:
    """200 epochs at full width; add --config.model.width=0.25 for a CPU."""
    config = default_config()
    config.data.source = "tfds"
    config.data.name = "cifar10"
    config.model.name = "vgg13"
    config.model.width = 1.0
    config.batch_size = 32
    config.optimizer.learning_rate = 0.05
    config.num_steps = 200 * 50_000 // 32
    config.evaluation.every_steps = 3125
    config.log_every_steps = 100
    config.checkpoint.every_steps = 3125
    config.stop_after_epochs_at_full_accuracy = 20.0
    return config
