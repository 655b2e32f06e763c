"""Reads the archives in which CIFAR, MNIST and Fashion-MNIST are published."""

import gzip
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gc_nc.data.idx import find_file, read_idx
from gc_nc.errors import InputError

_CIFAR_IMAGE_BYTES = 3 * 32 * 32


class Split(NamedTuple):
    """Images (N, H, W, C) in uint8, and the values (N,) of each kind of label."""

    images: np.ndarray
    labels: dict[str, np.ndarray]


class Archive(NamedTuple):
    """The splits in the archive's order, and the class names if the archive contains them."""

    splits: dict[str, Split]
    class_names: dict[str, list[str]]


def locate_files(archive: Path, names: Sequence[str]) -> dict[str, Path]:
    """Finds the official files in a folder, or takes a single file as the only one needed.

    The files in a folder may be unpacked, under the names that `find_file` knows.

    Args:
        archive: the path of a file or a folder.
        names: the official names of the files.

    Returns:
        {official name: path}.

    Raises:
        InputError: `archive` or a file in it is missing, or is a file where a folder is needed.
    """
    if not archive.exists():
        raise InputError(f"{archive} does not exist: pass the official {' and '.join(names)}")
    if archive.is_file():
        if len(names) > 1:
            raise InputError(f"{archive} is a file: pass the folder with {', '.join(names)}")
        return {names[0]: archive}
    return {name: find_file(archive, name) for name in names}


def read_cifar10(files: Mapping[str, Path]) -> Archive:
    """Reads CIFAR-10's binary tar archive; labels are named `label`.

    Args:
        files: {official name: path}, as `locate_files` returns it.

    Returns:
        Splits `train` and `test` with the ten class names.

    Raises:
        InputError: the archive is corrupt, or lacks a file, or a file or label in it is wrong.
    """
    return _read_cifar(
        files["cifar-10-binary.tar.gz"],
        folder="cifar-10-batches-bin",
        split_files={
            "train": [f"data_batch_{i}.bin" for i in range(1, 6)],
            "test": ["test_batch.bin"],
        },
        name_files={"label": "batches.meta.txt"},
        num_classes={"label": 10},
    )


def read_cifar100(files: Mapping[str, Path]) -> Archive:
    """Reads CIFAR-100's binary tar archive; labels are named `coarse_label` and `label`.

    Args:
        files: {official name: path}, as `locate_files` returns it.

    Returns:
        Splits `train` and `test` with the names of the 20 coarse and 100 fine classes.

    Raises:
        InputError: the archive is corrupt, or lacks a file, or a file or label in it is wrong.
    """
    return _read_cifar(
        files["cifar-100-binary.tar.gz"],
        folder="cifar-100-binary",
        split_files={"train": ["train.bin"], "test": ["test.bin"]},
        # This is the order of the label bytes before each image.
        name_files={"coarse_label": "coarse_label_names.txt", "label": "fine_label_names.txt"},
        num_classes={"coarse_label": 20, "label": 100},
    )


def read_mnist(files: Mapping[str, Path]) -> Archive:
    """Reads MNIST's or Fashion-MNIST's four IDX files.

    Args:
        files: {official name: path}, as `locate_files` returns it.

    Returns:
        Splits `train` and `test`, with images (N, 28, 28, 1) and without class names.

    Raises:
        InputError: a file is corrupt or has the wrong shape, the counts of images and labels
            differ, or a label is not in 0..9.
    """
    return Archive(
        {
            split: _read_mnist_split(
                files[f"{prefix}-images-idx3-ubyte.gz"], files[f"{prefix}-labels-idx1-ubyte.gz"]
            )
            for split, prefix in (("train", "train"), ("test", "t10k"))
        },
        class_names={},
    )


READERS = {
    "cifar10": read_cifar10,
    "cifar100": read_cifar100,
    "mnist": read_mnist,
    "fashion_mnist": read_mnist,
}


def _read_mnist_split(image_path: Path, label_path: Path) -> Split:
    images, labels = read_idx(image_path), read_idx(label_path)
    if images.ndim != 3 or images.shape[1:] != (28, 28) or len(images) == 0:
        raise InputError(
            f"{image_path} has shape {images.shape}, expected (N, 28, 28): get a new copy"
        )
    if labels.shape != images.shape[:1]:
        raise InputError(
            f"{label_path} has shape {labels.shape}, expected ({len(images)},), one label for "
            f"each image of {image_path.name}: get a new copy"
        )
    _check_labels(label_path, labels, 10)
    return Split(images[..., None], {"label": labels})


def _read_cifar(
    path: Path,
    *,
    folder: str,
    split_files: dict[str, list[str]],
    name_files: dict[str, str],
    num_classes: dict[str, int],
) -> Archive:
    wanted = [name for file_names in split_files.values() for name in file_names]
    wanted += name_files.values()
    contents = _read_tar_members(path, [f"{folder}/{name}" for name in wanted])

    class_names = {}
    for label, file_name in name_files.items():
        lines = contents[f"{folder}/{file_name}"].decode("utf-8", "replace").split("\n")
        class_names[label] = [line for line in lines if line]
        if len(set(class_names[label])) != num_classes[label]:
            raise InputError(
                f"{path}: {file_name} has {len(set(class_names[label]))} class names, "
                f"expected {num_classes[label]}: get a new copy"
            )

    splits = {}
    for split, file_names in split_files.items():
        records = np.concatenate(
            [
                _cifar_records(path, name, contents[f"{folder}/{name}"], len(num_classes))
                for name in file_names
            ]
        )
        labels = {label: records[:, i] for i, label in enumerate(num_classes)}
        for label, values in labels.items():
            _check_labels(path, values, num_classes[label])
        # The archive stores an image channel by channel.
        images = records[:, len(labels) :].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        splits[split] = Split(images, labels)
    return Archive(splits, class_names)


def _cifar_records(path: Path, name: str, content: bytes, num_labels: int) -> np.ndarray:
    record_bytes = num_labels + _CIFAR_IMAGE_BYTES
    if not content or len(content) % record_bytes:
        raise InputError(
            f"{path}: {name} has {len(content)} bytes, expected a multiple of {record_bytes}: "
            "get a new copy"
        )
    return np.frombuffer(content, np.uint8).reshape(-1, record_bytes)


def _read_tar_members(path: Path, names: Sequence[str]) -> dict[str, bytes]:
    """Reads the members with exactly these names into memory; extracts nothing to the disk."""
    contents = {}
    try:
        # Reading it as a stream takes one pass; seeking back in a gzip file decompresses it again.
        with tarfile.open(path, "r|*") as tar:
            for member in tar:
                if member.isreg() and member.name in names:
                    file = tar.extractfile(member)
                    assert file is not None  # It is None only if the member is not a file.
                    contents[member.name] = file.read()
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        message = f"{path} is not a tar archive or is corrupt ({error}): get a new copy"
        raise InputError(message) from error
    for name in names:
        if name not in contents:
            raise InputError(f"{path} lacks {name}: pass the official binary version, undamaged")
    return contents


def _check_labels(path: Path, labels: np.ndarray, num_classes: int) -> None:
    if labels.max() >= num_classes:
        raise InputError(
            f"{path} has the label {labels.max()}, expected 0 to {num_classes - 1}: get a new copy"
        )
