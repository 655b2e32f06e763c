"""Reads images or labels of prepared TFDS directories without TensorFlow."""

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

from gc_nc.errors import InputError

_READ_BLOCK = 1000


class TfdsImages:
    """The images of one split, decoded when they are read.

    Attributes:
      shape: the shape (N, H, W, c) of all images.
    """

    def __init__(self, builder: tfds.core.DatasetBuilder, split: str):
        """Opens a directory whose images all have the same size.

        Raises:
          InputError: it has no random access, or its images are not encoded or not of 8 bits.
        """
        self._records = _Records(builder, split)
        self._feature = feature = builder.info.features["image"]
        if not isinstance(feature, tfds.features.Image) or feature.np_dtype != np.uint8:
            raise InputError(
                f"{builder.data_dir} has images as {type(feature).__name__} of"
                f" {np.dtype(feature.np_dtype).name}; PNG or JPEG images of uint8 are needed"
            )
        self.shape = (len(self._records), *feature.shape)

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Reads images (n, H, W, c) uint8; InputError names one that cannot be read."""

        def decode(features):
            return self._feature.decode_example_np(features["image"].bytes_list.value[0])

        into = np.empty((len(rows), *self.shape[1:]), np.uint8)
        return self._records.read(rows, decode, into)


def read_labels(builder: tfds.core.DatasetBuilder, split: str) -> np.ndarray:
    """Reads the labels (N,) int64 of a split; its images are read but not decoded."""
    records = _Records(builder, split)
    rows = np.arange(len(records))
    return records.read(
        rows, lambda features: features["label"].int64_list.value[0], np.empty(len(rows), np.int64)
    )


class _Records:
    """The examples of a split in the form in which they are stored."""

    def __init__(self, builder: tfds.core.DatasetBuilder, split: str):
        self._name = f"of split {split!r} in {builder.data_dir}"
        try:
            self._records = builder.as_data_source(
                split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
            )
        # TFRecord files have no random access, and TFDS may fail to open others, too.
        except Exception as error:
            raise InputError(
                f"{builder.data_dir} contains no ArrayRecord files that can be read"
                f" ({_one_line(error)}); prepare it again with: python -m experiments.prepare"
            ) from error

    def __len__(self) -> int:
        return len(self._records)

    def read(self, rows: np.ndarray, decode: Callable[[Any], Any], into: np.ndarray) -> np.ndarray:
        """Decodes the features of each example in `rows` into the array `into`, and returns it."""
        for start in range(0, len(rows), _READ_BLOCK):
            numbers = rows[start : start + _READ_BLOCK].tolist()
            try:
                records = self._records.__getitems__(numbers)
            # array_record and TFDS raise errors of many kinds for unreadable examples.
            except Exception:
                # They are read one by one to find the unreadable one.
                records = [self._record(number) for number in numbers]
            for i, record in enumerate(records):
                try:
                    # Only the wanted feature is decoded; TFDS's own way takes twice as long.
                    example = tf_example_pb2.Example.FromString(record)
                    into[start + i] = decode(example.features.feature)
                except Exception as error:
                    raise self._unreadable(numbers[i], error) from error
        return into

    def _record(self, number: int) -> bytes:
        try:
            return self._records[number]
        except Exception as error:
            raise self._unreadable(number, error) from error

    def _unreadable(self, number: int, error: Exception) -> InputError:
        return InputError(
            f"example {number} {self._name} cannot be read ({_one_line(error)}); remove the"
            " directory and prepare it again"
        )


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
