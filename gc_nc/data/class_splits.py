"""Divides a set by class: source classes to train on, other classes to transfer to."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gc_nc.data.class_names import canonical_name
from gc_nc.data.datasets import ImageDataset, make_dataset
from gc_nc.data.published_splits import PUBLISHED_SPLITS
from gc_nc.data.streamed_images import StreamedImages, concatenate_images, take_images
from gc_nc.errors import InputError, suggestion
from gc_nc.random_streams import stream_generator

#: The values that `ClassSplit.kind` may have.
CLASS_SPLITS = ("all", *PUBLISHED_SPLITS, "from_file", "names", "random")

#: The parts of a split that are never trained on.
HELD_PARTS = ("val", "target")


class ClassSplit(NamedTuple):
    """Which classes are trained on and which are kept for transfer.

    Attributes:
      kind: "all": every class is a source class. "cifar_fs", "mini_imagenet": the published
        split of that name. "from_file": the set's training classes are the source and its test
        classes the target (Omniglot's background and evaluation). "names": the classes named below.
        "random": a random split with the counts and the seed below.
      source: the names of the source classes, for "names".
      val: the names of the validation classes, for "names".
      target: the names of the target classes, for "names"; if empty, all remaining classes.
      counts: the numbers of (source, target) or (source, val, target) classes, for "random".
      seed: the seed of "random" and of the choice of the images that are held out.
      images_per_class: the number of images that every class must have; None allows any number.
      holdout: the share of each source class that is not trained on; it is at least one image.
    """

    kind: str = "all"
    source: tuple[str, ...] = ()
    val: tuple[str, ...] = ()
    target: tuple[str, ...] = ()
    counts: tuple[int, ...] = ()
    seed: int = 0
    images_per_class: int | None = None
    holdout: float = 0.2


class ClassImages(NamedTuple):
    """All images of some classes, ordered by class and then by their place in the set.

    Attributes:
      images: (N, H, W, c) uint8, in memory or streamed.
      labels: (N,) int32 in 0..C-1.
      class_names: the names of the C classes.
    """

    images: np.ndarray | StreamedImages
    labels: np.ndarray
    class_names: tuple[str, ...]


class TransferDataset(NamedTuple):
    """A set divided by class.

    Attributes:
      source: the classes that the network is trained on; `test` is their held-out images.
      val: the classes for choosing settings; None if the split has none.
      target: the classes that are never trained on; None if all classes are source classes.
      fingerprint: the fingerprint of all parts (gc_nc.data.fingerprints), once it was computed.
    """

    source: ImageDataset
    val: ClassImages | None
    target: ClassImages | None
    fingerprint: dict[str, dict[str, str]] | None = None


def held_class_names(data: TransferDataset) -> dict[str, tuple[str, ...]]:
    """The class names of each part that is never trained on."""
    parts = {part: getattr(data, part) for part in HELD_PARTS}
    return {part: images.class_names for part, images in parts.items() if images is not None}


def needed_classes(split: ClassSplit) -> tuple[str, ...] | None:
    """The names of the classes that the split needs; None if they depend on the set."""
    if split.kind in PUBLISHED_SPLITS:
        return tuple(name for part in PUBLISHED_SPLITS[split.kind].values() for name in part)
    if split.kind == "names" and split.target:
        return (*split.source, *split.val, *split.target)
    return None


def divide_by_class(dataset: ImageDataset, split: ClassSplit) -> TransferDataset:
    """Divides a set by class; training and test images of a class are merged.

    Labels are numbered anew within each part. `source.test` is the held-out share of the source
    classes, drawn class by class from the seed. Streamed images are not read.

    Args:
      dataset: the set to divide.
      split: which classes belong to which part.

    Raises:
      InputError: a class is unknown (the message suggests the nearest name), is in two parts, or
        has no images or not `images_per_class` of them; a part has fewer than 2 classes; or the
        counts add up to more classes than the set has.
    """
    if split.kind == "all":
        return TransferDataset(dataset, None, None)
    images = concatenate_images(dataset.train.images, dataset.test.images)
    labels = np.concatenate([dataset.train.labels, dataset.test.labels])
    parts = _parts(dataset, split)
    counts = np.bincount(labels, minlength=dataset.num_classes)
    _check_parts(dataset, parts, counts, split.images_per_class)

    def gather(classes: Sequence[int]) -> ClassImages:
        rows = np.concatenate([np.flatnonzero(labels == c) for c in classes])
        renumbered = np.repeat(np.arange(len(classes)), counts[list(classes)])
        names = tuple(dataset.class_names[c] for c in classes)
        return ClassImages(take_images(images, rows), renumbered.astype(np.int32), names)

    source = gather(parts["source"])
    train, test = hold_out(source.labels, source.class_names, split.holdout, split.seed)
    source_set = make_dataset(
        f"{dataset.name} ({len(parts['source'])} source classes)",
        (take_images(source.images, train), source.labels[train]),
        (take_images(source.images, test), source.labels[test]),
        len(parts["source"]),
        source.class_names,
    )._replace(census=dataset.census)
    val, target = (gather(parts[part]) if parts[part] else None for part in HELD_PARTS)
    return TransferDataset(source_set, val, target)


def hold_out(
    labels: np.ndarray, class_names: Sequence[str], share: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the images to train on and of those held out, class by class.

    round(share n) of the n images of a class are held out, at least 1 and at most n - 1.

    Raises:
      InputError: a class has only one image.
    """
    held = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        if len(rows) < 2:
            raise InputError(
                f"class {class_names[label]!r} has 1 image; one to train on and one to hold out are"
                " needed"
            )
        count = min(max(round(share * len(rows)), 1), len(rows) - 1)
        rng = stream_generator(seed, "held-out images of a class", int(label))
        held[rng.permutation(rows)[:count]] = True
    return np.flatnonzero(~held), np.flatnonzero(held)


def _parts(dataset: ImageDataset, split: ClassSplit) -> dict[str, list[int]]:
    """The classes of each part, as labels of the set."""
    if split.kind == "random":
        return _random_parts(dataset, split)
    if split.kind == "from_file":
        present = {
            "source": np.unique(dataset.train.labels),
            "val": [],
            "target": np.unique(dataset.test.labels),
        }
        return {part: [int(label) for label in labels] for part, labels in present.items()}
    if split.kind == "names":
        names = {
            part: tuple(map(canonical_name, getattr(split, part)))
            for part in ("source", *HELD_PARTS)
        }
        if not names["target"]:
            taken = {*names["source"], *names["val"]}
            every = map(canonical_name, dataset.class_names)
            names["target"] = tuple(name for name in every if name not in taken)
    else:
        names = PUBLISHED_SPLITS[split.kind]
    labels = {canonical_name(name): label for label, name in enumerate(dataset.class_names)}
    if len(labels) < len(dataset.class_names):
        raise InputError(f"{dataset.name} has two classes with the same name; divide it at random")
    for name in (name for part in names.values() for name in part):
        if name not in labels:
            hint = suggestion(name, labels) or f"; it has {_some(dataset.class_names)}"
            raise InputError(f"{dataset.name} has no class {name!r}{hint}")
    return {part: [labels[name] for name in part_names] for part, part_names in names.items()}


def _random_parts(dataset: ImageDataset, split: ClassSplit) -> dict[str, list[int]]:
    source, *val, target = split.counts
    wanted = {"source": source, "val": sum(val), "target": target}
    if sum(wanted.values()) > dataset.num_classes:
        raise InputError(
            f"config.data.classes.counts={split.counts} are {sum(split.counts)} classes in all, but"
            f" {dataset.name} has {dataset.num_classes}; lower the counts"
        )
    rng = stream_generator(split.seed, "random class split")
    order, start, parts = rng.permutation(dataset.num_classes), 0, {}
    for part, count in wanted.items():
        parts[part] = sorted(int(label) for label in order[start : start + count])
        start += count
    return parts


def _check_parts(
    dataset: ImageDataset,
    parts: dict[str, list[int]],
    counts: np.ndarray,
    images_per_class: int | None,
) -> None:
    part_of: dict[int, str] = {}
    for part, classes in parts.items():
        if len(classes) < 2 and (classes or part != "val"):
            raise InputError(
                f"{dataset.name} divided by class needs at least 2 {part} classes, but the split"
                f" has {len(classes)}"
            )
        for label in classes:
            name = dataset.class_names[label]
            if label in part_of:
                raise InputError(
                    f"class {name!r} of {dataset.name} is in {part_of[label]} and in {part}; put"
                    " every class into one part only"
                )
            part_of[label] = part
            wrong = counts[label] != (images_per_class or counts[label])
            if not counts[label] or wrong:
                needed = images_per_class or "at least 1"
                raise InputError(
                    f"class {name!r} of {dataset.name} has {counts[label]} images; {needed} are"
                    " needed"
                )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
