"""The life of a run on disk: configuration, directory, checkpoints, logs and the training loop."""

from gc_nc.errors import require_extra

require_extra("train", "flax", "optax", "orbax", "ml_collections", "absl", "filelock", "tqdm")
