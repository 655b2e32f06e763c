"""Hashes of labels and some images, which tell a set from another one of the same size."""

import hashlib

import numpy as np

from gc_nc.data.class_splits import HELD_PARTS, ClassImages, TransferDataset
from gc_nc.data.datasets import ImageSplit

_SAMPLE = 64


def with_fingerprint(data: TransferDataset) -> TransferDataset:
    """The same data with their fingerprint, which is computed unless they have one."""
    return data if data.fingerprint else data._replace(fingerprint=fingerprint(data))


def fingerprint(data: TransferDataset) -> dict[str, dict[str, str]]:
    """{part of the set: {"labels": hash, "pixels": hash}}, the same for streamed and resident sets.

    The parts are "train", "test", and "val" and "target" if they exist. All labels of a part are
    hashed, and all pixels of at most 64 images, whose rows depend only on the number of images.

    Raises:
      InputError: a streamed image in the sample cannot be read.
    """
    parts: dict[str, ImageSplit | ClassImages] = {
        "train": data.source.train,
        "test": data.source.test,
    }
    held = {part: getattr(data, part) for part in HELD_PARTS}
    parts |= {part: images for part, images in held.items() if images is not None}
    return {
        name: {
            "labels": _hash(np.asarray(part.labels, "<i8")),
            "pixels": _hash(part.images[sample_rows(len(part.labels))]),
        }
        for name, part in parts.items()
    }


def sample_rows(num_examples: int) -> np.ndarray:
    """At most 64 of N rows, ascending: one from each of 64 equal stretches, or all rows.

    The place within a stretch varies from stretch to stretch, since classes may repeat regularly.
    """
    count = min(num_examples, _SAMPLE)
    starts = np.arange(count + 1) * num_examples // count
    # Multiples of the golden ratio, as fractions of 2**32.
    fractions = np.arange(count) * 2654435769 % 2**32
    return starts[:-1] + (fractions * np.diff(starts) >> 32)


def _hash(array: np.ndarray) -> str:
    digest = hashlib.sha256(str(array.shape).encode())
    digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:32]
