"""IDX files written here byte by byte, right and wrong, and the folder that holds four of them."""

import gzip
import struct

import numpy as np
import pytest

from gc_nc.data.idx import find_file, find_idx_files, read_idx
from gc_nc.errors import InputError

OFFICIAL_NAMES = {
    "train_images": "train-images-idx3-ubyte",
    "train_labels": "train-labels-idx1-ubyte",
    "test_images": "t10k-images-idx3-ubyte",
    "test_labels": "t10k-labels-idx1-ubyte",
}


def _idx_bytes(array):
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def _assert_one_line(error, *contained):
    message = str(error.value)
    assert "\n" not in message
    for text in contained:
        assert str(text) in message


@pytest.mark.parametrize("shape", [(5,), (3, 4, 6), (2, 1, 3, 2), (0, 28, 28)])
@pytest.mark.parametrize("compress", [bytes, gzip.compress], ids=["plain", "gz"])
def test_read_idx_of_any_rank(tmp_path, shape, compress):
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    # The content tells, not the name.
    path = tmp_path / "file"
    path.write_bytes(compress(_idx_bytes(array)))
    read = read_idx(path)
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, array, strict=True)


@pytest.mark.parametrize("compress", [bytes, gzip.compress], ids=["plain", "gz"])
@pytest.mark.parametrize("change", [lambda c: c[:-1], lambda c: c + b"x"], ids=["short", "long"])
def test_read_idx_of_another_length_than_its_header_says(tmp_path, compress, change):
    path = tmp_path / "file"
    path.write_bytes(compress(change(_idx_bytes(np.zeros((3, 4), np.uint8)))))
    with pytest.raises(InputError) as error:
        read_idx(path)
    _assert_one_line(error, path, "3 x 4 = 12")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00\x00\x08",
        b"\x00\x00\x08\x00",
        b"\x00\x00\x08\x03\x00\x00\x00\x01",
        b"\x00\x00\x0d\x01\x00\x00\x00\x01\x00\x00\x00\x00",
        b"\x01\x00\x08\x01\x00\x00\x00\x01\x00",
        b"<!DOCTYPE html><html></html>",
    ],
    ids=["empty", "cut", "rank 0", "cut dimensions", "float", "magic", "html"],
)
def test_read_idx_of_something_else(tmp_path, content):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        read_idx(path)
    _assert_one_line(error, path, "not an IDX file")


def test_read_idx_of_every_truncation_and_of_corrupt_gz(tmp_path):
    path = tmp_path / "file.gz"
    content = gzip.compress(_idx_bytes(np.arange(50, dtype=np.uint8).reshape(2, 5, 5)))
    broken = [content[:length] for length in range(len(content))]
    broken.append(content[:40] + bytes([content[40] ^ 255]) + content[41:])
    for bad in broken:
        path.write_bytes(bad)
        with pytest.raises(InputError) as error:
            read_idx(path)
        _assert_one_line(error, path)


def test_read_idx_of_a_path_that_cannot_be_read(tmp_path):
    for path, reason in ((tmp_path / "absent", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(InputError) as error:
            read_idx(path)
        _assert_one_line(error, path, reason)


@pytest.mark.parametrize("spelling", ["{}", "{}.gz", "dotted", "dotted.gz"])
def test_find_idx_files(tmp_path, spelling):
    expected = {}
    for key, name in OFFICIAL_NAMES.items():
        dotted = name.replace("-idx", ".idx")
        expected[key] = tmp_path / spelling.replace("dotted", dotted).format(name)
        expected[key].touch()
    assert find_idx_files(tmp_path) == expected


@pytest.mark.parametrize("name", OFFICIAL_NAMES.values())
def test_find_idx_files_names_the_missing_file(tmp_path, name):
    for other in set(OFFICIAL_NAMES.values()) - {name}:
        (tmp_path / other).touch()
    # A folder of that name, as some programs unpack it, is no file.
    (tmp_path / name).mkdir()
    with pytest.raises(InputError) as error:
        find_idx_files(tmp_path)
    _assert_one_line(error, tmp_path, f"has no {name}.gz")


def test_find_idx_files_of_no_folder(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "absent", tmp_path / "file"):
        with pytest.raises(InputError) as error:
            find_idx_files(path)
        _assert_one_line(error, path, "is not a folder", "t10k-labels-idx1-ubyte")


def test_find_file_prefers_the_compressed_one(tmp_path):
    for name in ("a-idx1-ubyte", "a.idx1-ubyte", "a.idx1-ubyte.gz"):
        (tmp_path / name).touch()
    assert find_file(tmp_path, "a-idx1-ubyte.gz") == tmp_path / "a.idx1-ubyte.gz"
