"""Arrays kept on the disk under a key that identifies what they were computed from."""

import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from absl import logging

from gc_nc.data.streamed_images import StreamedImages
from gc_nc.files import replacing


def checksum(arrays: Iterable, text: str = "") -> int:
    """CRC-32 of a text and of the bytes of arrays, which shows whether they changed."""
    value = zlib.crc32(text.encode())
    for array in arrays:
        streamed = isinstance(array, StreamedImages)
        for block in array.blocks("comparing images") if streamed else (array,):
            value = zlib.crc32(np.ascontiguousarray(block).view(np.uint8), value)
    return value


def cached_arrays(
    path: Path, key: tuple[int, ...], compute: Callable[[], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """The arrays stored under the key, or else those computed and stored now."""
    expected = np.asarray(key, np.int64)
    try:
        # Opened here, because NumPy leaves the file of a broken archive open.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            if np.array_equal(stored["key"], expected):
                return {name: stored[name] for name in stored.files if name != "key"}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass
    arrays = compute()
    try:
        path.parent.mkdir(exist_ok=True)
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, key=expected, **arrays)
    except OSError as error:
        logging.warning("%s was not written (%s): it is computed again next time", path, error)
    return arrays
