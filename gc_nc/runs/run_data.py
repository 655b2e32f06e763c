"""The data of a run from its configuration."""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from gc_nc.data.class_splits import (
    HELD_PARTS,
    ClassSplit,
    TransferDataset,
    divide_by_class,
    needed_classes,
)
from gc_nc.data.datasets import ImageDataset, ImageSplit
from gc_nc.data.device_batches import Normalization, channel_normalization
from gc_nc.data.folder_census import shorten
from gc_nc.data.sources import STREAMED_SOURCES, load_dataset, memory_limit
from gc_nc.data.streamed_images import StreamedImages
from gc_nc.data.subsets import limit_images_per_class
from gc_nc.devices import Placement, is_main_process, largest_of_all
from gc_nc.files import read_json_object
from gc_nc.training.evaluation import on_device


class LoadedData:
    """The data of the runs of one process, which equal runs load, place and normalise only once.

    It keeps one dataset at a time, so that datasets do not accumulate in memory.
    """

    def __init__(self):
        """Starts with nothing loaded."""
        self._key: Any = None
        self._data: TransferDataset | None = None
        self._placed: dict[Any, ImageSplit] = {}
        self._normalization: Normalization | None = None

    def load(self, config: ConfigDict, workdir: Path) -> TransferDataset:
        """Does the same as `load_run_data`, unless the same data are loaded already."""
        streamed = (workdir / "metadata.json").exists() and _was_streamed(workdir)
        key = json.dumps(config.data.to_dict(), sort_keys=True), streamed
        if key != self._key:
            self.__init__()
            self._data, self._key = load_run_data(config, workdir), key
        return self._data

    def place(self, name: str, split: ImageSplit, placement: Placement) -> ImageSplit:
        """A split of the loaded dataset, by its name, on the devices of a run."""
        key = name, placement
        if key not in self._placed:
            self._placed[key] = on_device(split, placement)
        return self._placed[key]

    def normalization(self, images: np.ndarray | StreamedImages) -> Normalization:
        """`channel_normalization` of the training images of the loaded dataset."""
        if self._normalization is None:
            self._normalization = channel_normalization(images)
        return self._normalization


def _was_streamed(workdir: Path) -> bool:
    return bool(read_json_object(workdir / "metadata.json").get("data", {}).get("streamed"))


def load_run_data(config: ConfigDict, workdir: Path | None = None) -> TransferDataset:
    """Loads config.data, divides it by class and limits the images of each class as configured.

    `source` is what the network is trained on. If only some images of a dataset are used, only
    those are read.

    Args:
      config: a checked config.
      workdir: the directory of a run that may have started; if it streamed its images, it still
        does.

    Raises:
      InputError: as `load_dataset`, `divide_by_class` and `limit_images_per_class`.
    """
    data, classes = config.data, config.data.classes
    streaming, limit = data.streaming, data.memory_limit_gib
    if streaming is None and workdir is not None and (workdir / "metadata.json").exists():
        streaming = _was_streamed(workdir) or None
    if limit is None and jax.process_count() > 1:
        # Either all processes stream or none does, because they run one program.
        limit = -largest_of_all(-int(memory_limit() // 2**20)) / 2**10
    split = ClassSplit(
        classes.split,
        tuple(classes.source),
        tuple(classes.val),
        tuple(classes.target),
        tuple(classes.counts),
        classes.seed,
        classes.images_per_class,
        data.holdout,
    )
    limits = {
        "train": data.train_images_per_class,
        "test": data.test_images_per_class,
        "held": data.held_images_per_class,
    }
    # If only a part of the dataset is used, only that part is read.
    in_part = any(limit is not None for limit in limits.values())
    read_part = in_part and streaming is None and data.source in STREAMED_SOURCES
    dataset = load_dataset(
        data.source,
        data.name,
        data.data_dir,
        num_classes=data.num_classes,
        memory_limit_gib=limit,
        streaming=True if read_part else streaming,
        image_size=data.image_size,
        classes=needed_classes(split),
        images_per_class=classes.images_per_class,
        holdout=data.holdout,
        holdout_seed=classes.seed,
    )
    if split.kind == "all" and is_main_process():
        _say_which_classes_lack_images(dataset)
    divided = limit_images_per_class(divide_by_class(dataset, split), **limits, seed=classes.seed)
    return _in_memory(divided, limit) if read_part else divided


def _say_which_classes_lack_images(dataset: ImageDataset) -> None:
    """One line, as where somebody's labels count from 1 or a test set has classes of its own."""
    lacking = []
    for name in ("train", "test"):
        counts = np.bincount(getattr(dataset, name).labels, minlength=dataset.num_classes)
        missing = [dataset.class_names[label] for label in np.flatnonzero(counts == 0)]
        if missing:
            of_all = f"{len(missing)} of {dataset.num_classes} classes"
            lacking.append(f"no {name} images of {of_all} ({shorten(missing)})")
    if lacking:
        tqdm.write(f"{dataset.name}: {'; '.join(lacking)}", file=sys.stderr)


def _in_memory(divided: TransferDataset, limit_gib: float | None) -> TransferDataset:
    """Reads the streamed images into memory, unless together they exceed the limit."""
    source = divided.source
    held = {part: getattr(divided, part) for part in HELD_PARTS if getattr(divided, part)}
    parts = {"train": source.train, "test": source.test, **held}
    limit = memory_limit() if limit_gib is None else limit_gib * 2**30
    if sum(part.images.nbytes for part in parts.values()) > limit:
        return divided
    read = {name: part._replace(images=part.images[:]) for name, part in parts.items()}
    source = source._replace(train=read["train"], test=read["test"])
    return divided._replace(source=source, **{part: read[part] for part in held})
