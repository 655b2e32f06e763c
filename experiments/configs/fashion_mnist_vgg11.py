"""VGG-11 on Fashion-MNIST, plain SGD: the network and data of an appendix figure of 2405.15706.

Learning rate, batch size and length are ours, because the paper's are not public. The config reads
the four IDX files (on Debian: apt-get install dataset-fashion-mnist) or, with
--config.data.source=tfds, what experiments.prepare writes:

    python -m experiments.train --config=experiments/configs/fashion_mnist_vgg11.py \\
        --config.data.data_dir=/usr/share/datasets/fashion-mnist --workdir=runs/fashion_mnist_vgg11
"""

from ml_collections import ConfigDict

from gc_nc.runs.configuration import default_config


def get_config() -> ConfigDict:
    """100 epochs at full width; add --config.model.width=0.25 for a CPU."""
    config = default_config()
    config.data.source = "idx"
    config.data.name = "fashion_mnist"
    config.model.name = "vgg11"
    config.model.width = 1.0
    config.batch_size = 32
    config.optimizer.learning_rate = 0.05
    config.num_steps = 100 * 60_000 // 32
    config.evaluation.every_steps = 3750
    config.log_every_steps = 100
    config.checkpoint.every_steps = 3750
    config.stop_after_epochs_at_full_accuracy = 20.0
    return config
