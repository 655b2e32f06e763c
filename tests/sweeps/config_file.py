"""A config file of the tiny run for the processes of sweeps."""

CONFIG = """
from gc_nc.sweeps import grid
from gc_nc.runs.configuration import default_config

def get_config():
    config = default_config()
    config.data.source = "npz"
    config.data.data_dir = {data!r}
    config.model.name = "mlp"
    config.model.width = 0.02
    config.batch_size = 2
    config.optimizer.learning_rate = 0.1
    config.num_steps = {num_steps}
    config.evaluation.every_steps = 0
    config.monitor.every_steps = 0
    config.log_every_steps = 20
    config.checkpoint.every_steps = 0
    return config

def get_sweep():
    return {sweep}
"""
