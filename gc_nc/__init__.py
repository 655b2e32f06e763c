"""Geometric complexity and neural collapse of neural networks, measured and controlled in JAX.

Importing this package starts no JAX backend and reads no data; `gc_nc.metrics` and `gc_nc.transfer`
are imported when they are first asked for.
"""

import importlib

__version__ = "0.1.0"


def __getattr__(name: str):
    if name in ("metrics", "transfer"):
        return importlib.import_module(f"gc_nc.{name}")
    raise AttributeError(f"module 'gc_nc' has no attribute {name!r}")


def __dir__():
    return [*globals(), "metrics", "transfer"]
