"""VGG-11 with BatchNorm on six classes of CIFAR-10, for transfer to the other four.

This reproduces none of the figures of arXiv 2405.15706. It asks the paper's question, whether lower
source GC goes with lower target NC and better few-shot accuracy, at a scale that fits two cores.
docs/results/transfer.md has the results.

    python -m experiments.prepare --dataset=cifar10 --data_dir=DATA
    python -m experiments.train --config=experiments/configs/cifar10_transfer.py \\
        --config.data.data_dir=DATA --config.optimizer.learning_rate=0.03 --config.seed=0 \\
        --workdir=runs/cifar10_transfer/0.03_0
    python -m experiments.transfer --workdir=runs/cifar10_transfer/0.03_0 --num_ways=4 --num_shots=5
"""

from ml_collections import ConfigDict

from gc_nc.runs.configuration import default_config


def get_config() -> ConfigDict:
    """6 source and 4 target classes drawn with seed 0, 4,800 training images each, 4 epochs."""
    config = default_config()
    config.data.source = "tfds"
    config.data.name = "cifar10"
    config.data.classes.split = "random"
    config.data.classes.counts = (6, 4)
    config.data.classes.images_per_class = 6000
    config.model.name = "vgg11"
    config.model.width = 0.25
    config.model.batch_norm = True
    config.batch_size = 64
    config.optimizer.learning_rate = 0.03
    config.optimizer.momentum = 0.9
    config.num_steps = 4 * 6 * 4800 // 64
    config.evaluation.every_steps = 450
    config.checkpoint.every_steps = 450
    config.checkpoint.keep = 5
    return config
