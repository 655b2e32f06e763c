"""Chooses some images of each class, to train and measure on fewer than the set has."""

import numpy as np

from gc_nc.data.class_splits import HELD_PARTS, TransferDataset
from gc_nc.data.streamed_images import take_images
from gc_nc.errors import InputError
from gc_nc.random_streams import stream_generator

# The position of a part in this tuple numbers its random stream.
_PARTS = ("train", "test", *HELD_PARTS)


def limit_images_per_class(
    data: TransferDataset,
    *,
    train: int | None = None,
    test: int | None = None,
    held: int | None = None,
    seed: int = 0,
) -> TransferDataset:
    """Chooses the same number of random images of every class, in the order of the set.

    With the same seed, a larger number includes the images of a smaller one. Streamed images are
    not read.

    Args:
      data: the set; its classes do not change.
      train: the number of training images of each source class; None for all.
      test: the number of test images of each source class; None for all.
      held: the number of images of each class of val and target; None for all.
      seed: the seed of the choice.

    Raises:
      InputError: a class has fewer images.
    """
    source = data.source
    splits = {
        name: _limited(getattr(source, name), source.class_names, name, name, count, seed)
        for name, count in (("train", train), ("test", test))
    }
    parts = {
        part: _limited(images, images.class_names, "held", part, held, seed)
        for part in HELD_PARTS
        if (images := getattr(data, part)) is not None
    }
    return data._replace(source=source._replace(**splits), **parts)


def _limited(split, class_names, key, name, per_class, seed):
    if per_class is None:
        return split
    counts = np.bincount(split.labels, minlength=len(class_names))
    smallest = int(np.argmin(counts))
    if counts[smallest] < per_class:
        raise InputError(
            f"config.data.{key}_images_per_class={per_class}, but class {class_names[smallest]!r}"
            f" has {counts[smallest]} {name} images; set it to at most {counts[smallest]}"
        )
    order = stream_generator(seed, "images of a split", _PARTS.index(name)).permutation(
        len(split.labels)
    )
    # The rank of each image among the images of its class, in that random order.
    shuffled = split.labels[order]
    by_class = np.argsort(shuffled, kind="stable")
    starts = np.cumsum(counts) - counts
    rank = np.empty(len(order), np.int64)
    rank[by_class] = np.arange(len(order)) - starts[shuffled[by_class]]
    rows = np.sort(order[rank < per_class])
    return split._replace(images=take_images(split.images, rows), labels=split.labels[rows])
