"""Batches of a set that is read while it is used, in the same order as for a resident set."""

from collections.abc import Generator
from typing import NamedTuple

import numpy as np

from gc_nc.data.datasets import ImageSplit
from gc_nc.data.device_batches import ExampleOrder
from gc_nc.data.streamed_images import read_ahead


class PaddedBatch(NamedTuple):
    """Images (B, H, W, c) uint8, labels (B,) int32 and weights (B,) float32, 0 for padding."""

    images: np.ndarray
    labels: np.ndarray
    weights: np.ndarray


def stream_batches(
    split: ImageSplit,
    order: ExampleOrder,
    start_step: int,
    stop_step: int,
    *,
    rows: slice | None = None,
) -> Generator[ImageSplit, None, None]:
    """Yields the batches of steps start_step, ..., stop_step - 1, read ahead.

    Nothing has to be saved to resume: the examples of a step depend only on the order's seed and on
    the step. Close the generator to stop early (contextlib.closing).

    Args:
      split: the examples; their images may be streamed or in memory.
      order: the order of its examples.
      start_step: the step of the first batch.
      stop_step: the step after that of the last batch.
      rows: the part of each batch that this process loads; by default all.

    Raises:
      InputError: an image cannot be read; raised when its batch is due.
    """
    part = rows or slice(None)

    def load(step):
        indices = order.indices(step)[part]
        return ImageSplit(split.images[indices], split.labels[indices])

    return read_ahead(load, start_step, stop_step)


def stream_in_order(
    split: ImageSplit, batch_size: int, *, rows: slice | None = None
) -> Generator[PaddedBatch, None, None]:
    """Yields all examples once, in order, in batches of equal size, read ahead.

    The last batch is filled up with the last example, at weight 0.

    Args:
      split: the examples; their images may be streamed or in memory.
      batch_size: the size B of all batches.
      rows: the part of each batch that this process loads; by default all.

    Raises:
      InputError: an image cannot be read; raised when its batch is due.
    """
    part, num_examples = rows or slice(None), len(split.labels)

    def load(i):
        indices = (i * batch_size + np.arange(batch_size))[part]
        weights = (indices < num_examples).astype(np.float32)
        # The example that fills the batch is read only once.
        indices, places = np.unique(np.minimum(indices, num_examples - 1), return_inverse=True)
        return PaddedBatch(split.images[indices][places], split.labels[indices][places], weights)

    return read_ahead(load, 0, -(-num_examples // batch_size))
