"""Absl launchers: python -m experiments.NAME."""

import sys

from gc_nc.errors import require_extra

try:
    require_extra(
        "train,data,sweeps",
        *("flax", "optax", "orbax", "ml_collections", "absl", "matplotlib", "sklearn"),
        *("tensorflow_datasets", "array_record", "requests", "jinja2"),
    )
except ModuleNotFoundError as error:
    sys.exit(f"error: {error}")
