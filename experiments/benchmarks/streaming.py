"""Streamed input compared with the training that it feeds, and with the same images in memory.

    python -m experiments.benchmarks.streaming --data_dir=DIR [--json] [--sets=WORD]

DIR contains CIFAR-10 as experiments.prepare writes it. Image folders are made from its first images
in a temporary folder. Their files are then in the system's cache, so decoding is measured and not
the disk. Each set has two rows. The first compares the seconds for the input of 1,000 images with
those for training on resident images, the second a training step with streamed input and one with
resident input. The sides take turns of many steps with a new stream each; seconds are medians.
"""

import tempfile
import time
from collections.abc import Iterable
from contextlib import closing
from functools import partial
from pathlib import Path
from statistics import median

import jax
import numpy as np
import optax
from absl import flags
from PIL import Image

from experiments import launcher
from experiments.benchmarks import reporting
from gc_nc.compilation import jit_for_device
from gc_nc.data.datasets import ImageDataset, ImageSplit
from gc_nc.data.device_batches import Augmentation, ExampleOrder, identity_normalization
from gc_nc.data.sources import load_dataset
from gc_nc.data.streaming import stream_batches
from gc_nc.errors import InputError
from gc_nc.models import build_model
from gc_nc.training.step import init_state, train_step, train_step_at

_DATA_DIR = flags.DEFINE_string(
    "data_dir", None, "Folder of TFDS directories with CIFAR-10.", allow_override=True
)
_SETS = flags.DEFINE_string("sets", "", "Only sets whose name contains this.")

_BATCH_SIZE, _WIDTH = 32, 0.25
_REPETITIONS, _STEPS, _FOLDER_IMAGES = 5, 16, 2000
_INPUT_GOAL, _STEP_GOAL = 1.0, 1.05

# name: (network, suffix and size of the files or None for TFDS, size of the images)
_KINDS = {
    "TFDS, 32 px, VGG-13": ("vgg13", None, None),
    "TFDS, 32 px, VGG-11": ("vgg11", None, None),
    "32x32 JPEG files, 64 px, VGG-13": ("vgg13", ("jpg", (32, 32)), 64),
    "32x32 PNG files, 64 px, VGG-13": ("vgg13", ("png", (32, 32)), 64),
    "500x375 JPEG files, 84 px, VGG-13": ("vgg13", ("jpg", (500, 375)), 84),
}


def main(argv: list[str]) -> None:
    """Times the sets one after the other."""
    del argv
    if not _DATA_DIR.value:
        raise InputError("--data_dir is missing; name one with cifar10 from experiments.prepare")
    kinds = {name: kind for name, kind in _KINDS.items() if _SETS.value in name}
    if not kinds:
        raise InputError(f"--sets={_SETS.value!r} is in none of: {'; '.join(_KINDS)}")
    cifar = partial(load_dataset, "tfds", "cifar10", _DATA_DIR.value)
    rows = []
    for name, (network, files, image_size) in kinds.items():
        with tempfile.TemporaryDirectory() as folder:
            load = cifar
            if files:
                _write_folder(cifar(streaming=True).train, Path(folder), *files)
                load = partial(load_dataset, "image_folder", "", folder, image_size=image_size)
            rows += _compare(name, network, load(streaming=True), load(streaming=False))
    reporting.print_rows(rows)


def _write_folder(split: ImageSplit, folder: Path, suffix: str, size: tuple[int, int]) -> None:
    images = split.images[:_FOLDER_IMAGES]
    for i, (image, label) in enumerate(zip(images, split.labels, strict=False)):
        path = folder / str(label) / f"{i}.{suffix}"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image).resize(size, Image.Resampling.BICUBIC).save(path)


def _compare(
    name: str, network: str, streamed: ImageDataset, resident: ImageDataset
) -> list[reporting.Row]:
    training = _Training(network, streamed, resident)
    sides = training.input_alone, training.streamed_steps, training.resident_steps
    for side in sides:
        side()
    seconds = [[side() for side in sides] for _ in range(_REPETITIONS)]
    alone, with_streamed, with_resident = map(median, zip(*seconds, strict=True))
    thousand = 1000 / _BATCH_SIZE
    return [
        reporting.Row(
            f"{name}: input of 1,000 images, against training on them",
            alone * thousand,
            with_resident * thousand,
            _INPUT_GOAL,
        ),
        reporting.Row(
            f"{name}: step with streamed input, against resident",
            with_streamed,
            with_resident,
            _STEP_GOAL,
        ),
    ]


class _Training:
    """Training with batches from one set or the other; methods return seconds per step."""

    def __init__(self, network: str, streamed: ImageDataset, resident: ImageDataset):
        model, optimizer = build_model(network, resident.num_classes, width=_WIDTH), optax.sgd(1e-3)
        self._streamed, self._resident = streamed.train, jax.device_put(resident.train)
        image_shape = resident.train.images.shape[1:]
        self._order = ExampleOrder(0, len(resident.train.labels), _BATCH_SIZE)
        self._next_step = 0
        self._key = jax.random.key(0)
        self._state = init_state(0, model, optimizer, image_shape)
        step = partial(
            train_step,
            model=model,
            optimizer=optimizer,
            normalization=identity_normalization(image_shape[2]),
            augmentation=Augmentation(),
        )
        self._train_step = jit_for_device(
            partial(train_step_at, batch_size=_BATCH_SIZE, step=step), donate_argnames="state"
        )

    def input_alone(self) -> float:
        with closing(self._stream()) as batches:
            return _seconds_each(map(jax.device_put, batches))

    def streamed_steps(self) -> float:
        whole = jax.device_put(np.arange(_BATCH_SIZE, dtype=np.int32))
        with closing(self._stream()) as batches:
            return _seconds_each(self._step(jax.device_put(batch), whole, 0) for batch in batches)

    def resident_steps(self) -> float:
        steps = range(self._next_step, self._next_step + _STEPS + 1)
        return _seconds_each(self._step(self._resident, *self._order.locate(i)) for i in steps)

    def _stream(self):
        self._next_step += _STEPS + 1
        start = self._next_step
        return stream_batches(self._streamed, self._order, start, start + _STEPS + 1)

    def _step(self, split: ImageSplit, order: jax.Array, offset: int):
        self._state, metrics = self._train_step(self._state, split, order, offset, self._key)
        return metrics


def _seconds_each(results: Iterable) -> float:
    """Seconds for each result except the first, which waits for everything that ran before."""
    results = iter(results)
    jax.block_until_ready(next(results))
    start = time.perf_counter()
    rest = jax.block_until_ready(list(results))
    return (time.perf_counter() - start) / len(rest)


if __name__ == "__main__":
    launcher.run(main)
