"""Writes official archives as the ArrayRecord directories that TFDS makes, without TensorFlow.

TFDS's own builder does the work, from the features and metadata to the order of the examples, the
sharding and the rename at the end. Only reading the archive, which needs TensorFlow, is replaced.
"""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import tensorflow_datasets as tfds
from array_record.python import array_record_module
from PIL import Image

from gc_nc.data.official_archives import Archive, Split
from gc_nc.errors import InputError


class OfficialFile(NamedTuple):
    """Where an official file is published, its number of bytes and its SHA-256."""

    url: str
    size: int
    sha256: str


def official_files(name: str) -> dict[str, OfficialFile]:
    """{file name: its record in TFDS} of the files in which a data set is published."""
    return {
        url.rpartition("/")[2]: OfficialFile(url, int(info.size), info.checksum)
        for url, info in tfds.builder_cls(name).url_infos.items()
    }


def dataset_dir(name: str, data_dir: Path) -> Path:
    """The directory `<data_dir>/<name>/<version>` of the version that TFDS defines."""
    return data_dir / name / str(tfds.builder_cls(name).VERSION)


def count_examples(name: str, data_dir: Path) -> dict[str, int]:
    """The number of examples in each split of a complete set.

    Args:
        name: TFDS's name of the data set.
        data_dir: the folder above `<name>/<version>`.

    Returns:
        {split: number of examples}; empty if the directory does not exist.

    Raises:
        InputError: the directory exists but does not contain a complete set of ArrayRecord files.
    """
    path = dataset_dir(name, data_dir)
    if not path.exists():
        return {}
    try:
        info = tfds.builder_from_directory(path).info
        if info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
            raise ValueError(f"its format is {info.file_format.value}")
        for split in info.splits.values():
            for file, length in zip(split.filepaths, split.shard_lengths, strict=True):
                _check_shard(Path(file), length)
        return {name: split.num_examples for name, split in info.splits.items()}
    # TFDS raises errors of many kinds for a directory that it cannot read.
    except Exception as error:
        raise InputError(
            f"{path} exists but is not a complete ArrayRecord set"
            f" ({' '.join(str(error).split())}): move it away or choose another --data_dir"
        ) from error


def write_dataset(name: str, archive: Archive, data_dir: Path) -> None:
    """Writes `<data_dir>/<name>/<version>`, which `tfds.data_source` can read.

    Everything is written to a directory beside it, which is renamed at the end, so that an
    interrupted run leaves no half-written set. The examples are in TFDS's own order (by the hash of
    their index), not in the archive's; their ids, if any, count in the archive's order.

    Args:
        name: TFDS's name of the data set.
        archive: the content of its official archive.
        data_dir: the folder above `<name>/<version>`.

    Raises:
        OSError: the directory cannot be written.
    """
    builder = tfds.builder_cls(name)(data_dir=data_dir, file_format="array_record")
    for label, class_names in archive.class_names.items():
        builder.info.features[label].names = class_names
    with_ids = "id" in builder.info.features

    def split_generators(dl_manager):
        # The metadata must state the size of the official files, as after a download by TFDS.
        dl_manager._recorded_url_infos.update(builder.url_infos)
        return {split: _examples(split, data, with_ids) for split, data in archive.splits.items()}

    # This is TFDS's hook for reading an archive. It is replaced on this one builder, because a
    # subclass would put its own name and module into the metadata.
    builder._split_generators = split_generators
    # TFDS would print that it downloads an unknown size, and then that it downloaded nothing.
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            builder.download_and_prepare()
        # array_record raises this if the disk is full.
        except RuntimeError as error:
            raise OSError(" ".join(str(error).split())) from error


def _examples(split: str, data: Split, with_ids: bool) -> Iterator[tuple[int, dict[str, Any]]]:
    for index, image in enumerate(data.images):
        # The image is given as a file because TFDS would encode an array with TensorFlow.
        png = io.BytesIO()
        Image.fromarray(image.squeeze()).save(png, "PNG")
        png.seek(0)
        example = {"image": png}
        example |= {label: int(values[index]) for label, values in data.labels.items()}
        if with_ids:
            example["id"] = f"{split}_{index:05d}"
        yield index, example


def _check_shard(path: Path, length: int) -> None:
    if not path.exists():
        raise FileNotFoundError(f"{path.name} is missing")
    reader = array_record_module.ArrayRecordReader(str(path))
    found = reader.num_records()
    reader.close()
    if found != length:
        raise ValueError(f"{path.name} has {found} records, expected {length}")
