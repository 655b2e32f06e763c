"""VGG-11 (width 0.25) on scikit-learn's digits."""

from ml_collections import ConfigDict

from gc_nc.training.configuration import default_config


def get_config() -> ConfigDict:
    """The whole configuration; every key has its default in gc_nc.training.configuration."""
    config = default_config()
    return config
