"""VGG-13 on CIFAR-10 with an explicit GC penalty: the setting of the appendix of arXiv 2405.15706.

Learning rate 0.01, batch size 256 and the weights 0, 1e-7, 1e-6 and 1e-4 are the paper's, as a
summary of its figure reports them. Momentum, length and the larger weights are ours. This is one
run of the grid:

    python -m experiments.train --config=experiments/configs/cifar10_vgg13_gc_penalty.py \\
        --config.data.data_dir=DATA --config.gc_penalty.weight=1e-4 --config.seed=0 \\
        --workdir=runs/gc_penalty/1e-4_0

On one H200, with three runs at a time, a run made 62 to 83 steps a second.
docs/results/gc_penalty.md has the results and the figure.
"""

from ml_collections import ConfigDict

from gc_nc.runs.configuration import default_config


def get_config() -> ConfigDict:
    """20 epochs at full width, without a penalty until its weight is set."""
    config = default_config()
    config.data.source = "tfds"
    config.data.name = "cifar10"
    config.model.name = "vgg13"
    config.model.width = 1.0
    config.batch_size = 256
    config.optimizer.learning_rate = 0.01
    config.optimizer.momentum = 0.9
    config.num_steps = 20 * 50_000 // 256
    config.evaluation.every_steps = 781
    config.log_every_steps = 100
    config.checkpoint.every_steps = 0
    config.checkpoint.keep = 1
    return config
