"""Reads images and labels of prepared TFDS directories apart, without TensorFlow."""

import numpy as np
import tensorflow_datasets as tfds

from gc_nc.errors import InputError

_READ_BLOCK = 1000


class TfdsImages:
    """The images of one split, decoded when they are read.

    Attributes:
      shape: (N, H, W, c).
    """

    def __init__(self, builder: tfds.core.DatasetBuilder, split: str):
        """`builder` is of a directory with images of one size."""
        self._records = _Records(builder, split, "image")
        self.shape = (len(self._records), *builder.info.features["image"].shape)

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Images (n, H, W, c) uint8; InputError names one that cannot be read."""
        return self._records.read(rows, np.empty((len(rows), *self.shape[1:]), np.uint8))


def read_labels(builder: tfds.core.DatasetBuilder, split: str) -> np.ndarray:
    """Labels (N,) int64 of a split; its images are read over but not decoded."""
    records = _Records(builder, split, "label")
    return records.read(np.arange(len(records)), np.empty(len(records), np.int64))


class _Records:
    """One feature of the examples of a split."""

    def __init__(self, builder: tfds.core.DatasetBuilder, split: str, feature: str):
        self._name = f"of split {split!r} in {builder.data_dir}"
        self._feature = feature
        # Of the raw records, so that only this feature is parsed and decoded.
        self._parser = tfds.features.FeaturesDict({feature: builder.info.features[feature]})
        try:
            self._records = builder.as_data_source(
                split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
            )
        # TFRecord, which has no random access, and whatever else TFDS cannot open.
        except Exception as error:
            raise InputError(
                f"{builder.data_dir} holds no ArrayRecord files that can be read"
                f" ({_one_line(error)}); prepare it again with: python -m experiments.prepare"
            ) from error

    def __len__(self) -> int:
        return len(self._records)

    def read(self, rows: np.ndarray, into: np.ndarray) -> np.ndarray:
        for start in range(0, len(rows), _READ_BLOCK):
            numbers = rows[start : start + _READ_BLOCK].tolist()
            try:
                records = self._records.__getitems__(numbers)
            # array_record and TFDS raise errors of many kinds for what they cannot read.
            except Exception:
                # One by one, to learn which it is.
                records = [self._record(number) for number in numbers]
            for i, record in enumerate(records):
                try:
                    example = self._parser.deserialize_example_np(record)
                    into[start + i] = example[self._feature]
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
