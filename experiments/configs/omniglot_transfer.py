"""VGG-11 with BatchNorm on Omniglot's background characters, for transfer to its evaluation ones.

This reproduces none of the figures of arXiv 2405.15706. It asks the paper's question, whether lower
source GC goes with better few-shot accuracy, at a scale that fits two cores. DATA is an NPZ file
with images (N, 28, 28) in uint8, labels, and split (0 for background, 1 for evaluation).
docs/results/transfer.md has the results.

    python -m experiments.train --config=experiments/configs/omniglot_transfer.py \\
        --config.data.data_dir=DATA --config.optimizer.learning_rate=0.03 --config.seed=0 \\
        --workdir=runs/omniglot/0.03_0
    python -m experiments.transfer --workdir=runs/omniglot/0.03_0 --num_ways=5,20 --num_shots=1,5
"""

from ml_collections import ConfigDict

from gc_nc.runs.configuration import default_config


def get_config() -> ConfigDict:
    """964 source classes of 16 training images, 8 epochs."""
    config = default_config()
    config.data.source = "npz"
    config.data.name = "omniglot"
    config.data.classes.split = "from_file"
    config.data.classes.images_per_class = 20
    config.model.name = "vgg11"
    config.model.width = 0.25
    config.model.batch_norm = True
    config.batch_size = 64
    config.optimizer.learning_rate = 0.03
    config.optimizer.momentum = 0.9
    config.num_steps = 8 * 964 * 16 // 64
    config.evaluation.every_steps = 482
    config.checkpoint.every_steps = 482
    config.checkpoint.keep = 5
    return config
