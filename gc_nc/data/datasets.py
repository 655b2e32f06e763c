"""Image classification sets, in memory or streamed, checked once when they are loaded."""

from typing import NamedTuple

import numpy as np

from gc_nc.data.class_names import canonical_name
from gc_nc.data.folder_census import FolderCensus
from gc_nc.data.streamed_images import StreamedImages
from gc_nc.errors import InputError

_MAX_CLASSES = 10**6


class ImageSplit(NamedTuple):
    """Images (N, H, W, c) in uint8, in memory or streamed, and labels (N,) in int32."""

    images: np.ndarray | StreamedImages
    labels: np.ndarray


class ImageDataset(NamedTuple):
    """A training and a test split of the same classes.

    Attributes:
      name: the name of the set, for logs.
      train: the examples that the network is trained on.
      test: the examples that it is not trained on.
      num_classes: the number C of classes; labels are 0..C-1.
      class_names: C names in composed Unicode, or the labels as text if the source has no names.
      census: what was read from a folder of images; None for other sources.
    """

    name: str
    train: ImageSplit
    test: ImageSplit
    num_classes: int
    class_names: tuple[str, ...]
    census: FolderCensus | None = None


def make_dataset(
    name: str,
    train: tuple[np.ndarray | StreamedImages, np.ndarray],
    test: tuple[np.ndarray | StreamedImages, np.ndarray],
    num_classes: int | None = None,
    class_names: tuple[str, ...] | None = None,
) -> ImageDataset:
    """Checks the arrays and puts them into one format; streamed images are not read.

    Args:
      name: the name of the set, for logs and errors.
      train: uint8 or streamed images (N, H, W) or (N, H, W, c), and integer labels (N,) or (N, 1).
      test: the same for the test split.
      num_classes: the number C of classes; by default one more than the largest label.
      class_names: the names of the C classes; by default the labels as text.

    Raises:
      InputError: there are no examples, a rank or dtype is wrong, a label is outside 0..C-1, or
        there are fewer than 2 classes.
    """
    splits = {
        split: _check_split(name, split, *arrays)
        for split, arrays in (("train", train), ("test", test))
    }
    if splits["train"].images.shape[1:] != splits["test"].images.shape[1:]:
        shapes = " and ".join(str(s.images.shape[1:]) for s in splits.values())
        raise InputError(f"{name}: train and test images differ in shape: {shapes}")
    if num_classes is None:
        num_classes = int(max(split.labels.max() for split in splits.values())) + 1
    if num_classes > _MAX_CLASSES:
        raise InputError(
            f"{name}: num_classes={num_classes} (one more than the largest label, if not set) is"
            f" more than {_MAX_CLASSES}; number the classes from 0"
        )
    for split, (_, labels) in splits.items():
        outside = labels[(labels < 0) | (labels >= num_classes)]
        if outside.size:
            raise InputError(
                f"{name}: {split} label {outside[0]} is outside 0..{num_classes - 1}"
                f" (num_classes={num_classes}); correct the labels or set --config.data.num_classes"
            )
        present = np.unique(labels).size
        if present < 2:
            raise InputError(
                f"{name}: {present} class among the {split} labels; neural collapse compares at"
                " least 2"
            )
    if class_names is not None and len(class_names) != num_classes:
        raise InputError(
            f"{name}: num_classes={num_classes}, but the source names {len(class_names)} classes;"
            " leave --config.data.num_classes out"
        )
    if class_names is None:
        class_names = tuple(str(label) for label in range(num_classes))
    train, test = (
        ImageSplit(images, labels.astype(np.int32)) for images, labels in splits.values()
    )
    names = tuple(map(canonical_name, class_names))
    return ImageDataset(name, train, test, num_classes, names)


def flat_labels(labels: np.ndarray) -> np.ndarray:
    """Flattens labels (N, 1), as Keras stores them, to (N,); other shapes are kept."""
    return labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels


def _check_split(
    name: str, split: str, images: np.ndarray | StreamedImages, labels: np.ndarray
) -> ImageSplit:
    where = f"{name}: {split}"
    if images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] not in (1, 3)):
        channels_first = images.ndim == 4 and images.shape[1] in (1, 3)
        hint = "; with channels first, store images.transpose(0, 2, 3, 1)" if channels_first else ""
        raise InputError(
            f"{where} images have shape {images.shape}; (N, H, W), (N, H, W, 1) or (N, H, W, 3)"
            f" is needed{hint}"
        )
    if images.dtype != np.uint8:
        hint = "if they are whole numbers in that range, store images.astype('uint8')"
        if np.issubdtype(images.dtype, np.floating):
            hint = "if they are fractions in 0..1, store (255 * images).round().astype('uint8')"
        raise InputError(f"{where} images are {images.dtype}; uint8 in 0..255 is needed; {hint}")
    if images.size == 0:
        raise InputError(f"{where} has no examples (shape {images.shape}); at least 1 is needed")
    if not np.issubdtype(labels.dtype, np.integer):
        hint = "number the classes from 0, or convert whole numbers with labels.astype(int)"
        if labels.dtype.kind in "US":
            hint = "number the classes from 0, as np.unique(labels, return_inverse=True) does"
        raise InputError(f"{where} labels are {labels.dtype}; integers are needed: {hint}")
    labels = flat_labels(labels)
    if labels.shape != images.shape[:1]:
        one_hot = labels.ndim == 2 and len(labels) == len(images)
        hint = "; if they are one-hot rows, store labels.argmax(axis=1)" if one_hot else ""
        raise InputError(
            f"{where} has labels of shape {labels.shape} for {len(images)} images; one class number"
            f" per image is needed, shape ({len(images)},) or ({len(images)}, 1){hint}"
        )
    if images.ndim == 3:
        images = images[..., None]
    if isinstance(images, np.ndarray):
        images = np.ascontiguousarray(images)
    # Labels keep their dtype until their range is checked: as int32, 2**32 + 1 would become 1.
    return ImageSplit(images, labels)
