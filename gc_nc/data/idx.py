"""IDX, the format of MNIST: a header with the shape, then the elements."""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from gc_nc.errors import InputError

# An IDX file starts with two zero bytes, the element type (8: unsigned byte) and the rank.
_UBYTE = b"\x00\x00\x08"
_GZIP_MAGIC = b"\x1f\x8b"
_OFFICIAL_NAMES = {
    "train_images": "train-images-idx3-ubyte.gz",
    "train_labels": "train-labels-idx1-ubyte.gz",
    "test_images": "t10k-images-idx3-ubyte.gz",
    "test_labels": "t10k-labels-idx1-ubyte.gz",
}


def read_idx(path: Path) -> np.ndarray:
    """Reads an IDX file of unsigned bytes, plain or gzipped (told by its content, not its name).

    Args:
        path: the path of the file.

    Returns:
        A read-only uint8 array of the shape in the file's header.

    Raises:
        InputError: the file cannot be read, is not an IDX file of unsigned bytes, is corrupt, or is
            shorter or longer than its header says.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): check the path") from error
    if content.startswith(_GZIP_MAGIC):
        try:
            content = gzip.decompress(content)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise InputError(f"{path} is corrupt ({error}): get a new copy") from error
    rank = content[3] if len(content) > 3 else 0
    header_bytes = 4 + 4 * rank
    if not content.startswith(_UBYTE) or rank == 0 or len(content) < header_bytes:
        raise InputError(
            f"{path} is not an IDX file of unsigned bytes (it starts with "
            f"0x{content[:4].hex()}, expected 0x000008 and the rank): get a new copy"
        )
    shape = tuple(int(n) for n in np.frombuffer(content, ">u4", count=rank, offset=4))
    found = len(content) - header_bytes
    if found != math.prod(shape):
        raise InputError(
            f"{path} contains {found} bytes of data, but its header says "
            f"{' x '.join(map(str, shape))} = {math.prod(shape)}: get a new copy"
        )
    return np.frombuffer(content, np.uint8, offset=header_bytes).reshape(shape)


def find_idx_files(folder: Path) -> dict[str, Path]:
    """Finds the four files of MNIST, .gz or not, in a folder.

    Args:
        folder: the folder that contains them.

    Returns:
        The paths of train_images, train_labels, test_images and test_labels.

    Raises:
        InputError: `folder` is not a folder, or lacks a file, which the message names.
    """
    if not folder.is_dir():
        raise InputError(
            f"{folder} is not a folder: pass the folder that contains "
            f"{', '.join(_OFFICIAL_NAMES.values())}"
        )
    return {key: find_file(folder, name) for key, name in _OFFICIAL_NAMES.items()}


def find_file(folder: Path, name: str) -> Path:
    """Finds an official file in a folder, compressed or unpacked.

    Args:
        folder: the folder that contains it.
        name: the official name of the file. The file may also be called this without `.gz`, and
            with `.idx` instead of `-idx`, as some programs do when they unpack it.

    Returns:
        The path; that of the compressed file if both exist, because its checksum is known.

    Raises:
        InputError: the folder does not contain the file.
    """
    for packing in (name, name.removesuffix(".gz")):
        for spelling in (packing, packing.replace("-idx", ".idx")):
            if (folder / spelling).is_file():
                return folder / spelling
    raise InputError(f"{folder} has no {name} (nor an unpacked copy of it): put it there")
