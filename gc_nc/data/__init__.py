"""Image classification data: sources, class splits, and batches that live on the device."""

from gc_nc.errors import require_extra

require_extra("train", "absl", "PIL", "tqdm")
