"""Small archives in the official formats, written here byte by byte, right and wrong."""

import gzip
import io
import struct
import tarfile

import numpy as np
import pytest

from gc_nc.data import official_archives
from gc_nc.errors import InputError

COARSE_NAMES = [f"coarse {i}" for i in range(20)]
FINE_NAMES = [f"fine {i}" for i in range(100)]
NAMES = [f"name {i}" for i in range(10)]


def _idx_bytes(array):
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def _images(n, shape, seed):
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)


def _records(labels, images):
    """CIFAR's records: label bytes, then the image channel by channel."""
    return b"".join(
        bytes(row) + image.transpose(2, 0, 1).tobytes()
        for row, image in zip(labels, images, strict=True)
    )


def _write_tar(path, contents):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def _cifar10_contents():
    images = _images(17, (32, 32, 3), 0)
    labels = np.arange(17, dtype=np.uint8) % 10
    folder = "cifar-10-batches-bin"
    contents = {f"{folder}/batches.meta.txt": "\n".join([*NAMES, "", ""]).encode()}
    # Batch i holds i images: the order of the batches shows.
    for i, start in zip(range(1, 6), (0, 1, 3, 6, 10), strict=True):
        span = slice(start, start + i)
        contents[f"{folder}/data_batch_{i}.bin"] = _records(labels[span, None], images[span])
    contents[f"{folder}/test_batch.bin"] = _records(labels[15:, None], images[15:])
    return contents, images, labels


def _cifar100_contents():
    images = _images(7, (32, 32, 3), 1)
    coarse = np.array([19, 0, 3, 4, 5, 6, 7], np.uint8)
    fine = np.array([99, 0, 50, 51, 52, 53, 54], np.uint8)
    rows = np.stack([coarse, fine], axis=1)
    folder = "cifar-100-binary"
    contents = {
        f"{folder}/train.bin": _records(rows[:4], images[:4]),
        f"{folder}/test.bin": _records(rows[4:], images[4:]),
        f"{folder}/coarse_label_names.txt": ("\n".join(COARSE_NAMES) + "\n").encode(),
        f"{folder}/fine_label_names.txt": ("\n".join(FINE_NAMES) + "\n").encode(),
    }
    return contents, images, coarse, fine


def _read_cifar10(path):
    return official_archives.read_cifar10({"cifar-10-binary.tar.gz": path})


@pytest.fixture
def mnist_arrays():
    return {
        "train-images-idx3-ubyte.gz": _images(12, (28, 28), 2),
        "train-labels-idx1-ubyte.gz": np.arange(12, dtype=np.uint8) % 10,
        "t10k-images-idx3-ubyte.gz": _images(3, (28, 28), 3),
        "t10k-labels-idx1-ubyte.gz": np.array([9, 0, 4], np.uint8),
    }


def _write_mnist(folder, arrays, *, unpacked=()):
    folder.mkdir(exist_ok=True)
    for name, array in arrays.items():
        content = _idx_bytes(array)
        if name in unpacked:
            (folder / name.removesuffix(".gz")).write_bytes(content)
        else:
            (folder / name).write_bytes(gzip.compress(content))
    return folder


def _read_mnist(folder, arrays):
    return official_archives.read_mnist(official_archives.locate_files(folder, list(arrays)))


def _assert_one_line(error, *contained):
    message = str(error.value)
    assert "\n" not in message
    for text in contained:
        assert str(text) in message


@pytest.mark.parametrize(
    "unpacked", [(), ("train-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz")]
)
def test_mnist(tmp_path, mnist_arrays, unpacked):
    folder = _write_mnist(tmp_path / "mnist", mnist_arrays, unpacked=unpacked)
    archive = _read_mnist(folder, mnist_arrays)
    assert archive.class_names == {}
    assert list(archive.splits) == ["train", "test"]
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images = mnist_arrays[f"{prefix}-images-idx3-ubyte.gz"]
        labels = mnist_arrays[f"{prefix}-labels-idx1-ubyte.gz"]
        np.testing.assert_array_equal(archive.splits[split].images, images[..., None], strict=True)
        np.testing.assert_array_equal(archive.splits[split].labels["label"], labels, strict=True)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("train-images-idx3-ubyte.gz", np.zeros((12, 28, 27), np.uint8), "(12, 28, 27)"),
        ("train-images-idx3-ubyte.gz", np.zeros((12,), np.uint8), "(12,)"),
        ("t10k-images-idx3-ubyte.gz", np.zeros((0, 28, 28), np.uint8), "(0, 28, 28)"),
        ("train-labels-idx1-ubyte.gz", np.zeros((11,), np.uint8), "(11,)"),
        ("t10k-labels-idx1-ubyte.gz", np.zeros((3, 1), np.uint8), "(3, 1)"),
        ("t10k-labels-idx1-ubyte.gz", np.array([1, 10, 2], np.uint8), "label 10"),
    ],
)
def test_mnist_with_a_wrong_file(tmp_path, mnist_arrays, name, array, message):
    folder = _write_mnist(tmp_path / "mnist", mnist_arrays | {name: array})
    with pytest.raises(InputError) as error:
        _read_mnist(folder, mnist_arrays)
    _assert_one_line(error, folder / name, message)


def test_locate_files_names_what_is_missing(tmp_path, mnist_arrays):
    folder = _write_mnist(tmp_path / "mnist", mnist_arrays)
    (folder / "t10k-images-idx3-ubyte.gz").unlink()
    with pytest.raises(InputError) as error:
        official_archives.locate_files(folder, list(mnist_arrays))
    _assert_one_line(error, folder, "no t10k-images-idx3-ubyte.gz")

    file = folder / "train-images-idx3-ubyte.gz"
    with pytest.raises(InputError, match="is a file: pass the folder"):
        official_archives.locate_files(file, list(mnist_arrays))
    with pytest.raises(InputError, match="does not exist"):
        official_archives.locate_files(tmp_path / "absent", ["a.tar.gz"])


def test_locate_files_takes_one_file_under_any_name(tmp_path):
    path = tmp_path / "my copy"
    path.touch()
    assert official_archives.locate_files(path, ["a.tar.gz"]) == {"a.tar.gz": path}


def test_cifar10(tmp_path):
    contents, images, labels = _cifar10_contents()
    # The order in the tar file must not matter.
    path = _write_tar(tmp_path / "a.tar.gz", dict(reversed(contents.items())))
    archive = _read_cifar10(path)
    assert archive.class_names == {"label": NAMES}
    assert list(archive.splits) == ["train", "test"]
    for split, span in (("train", slice(15)), ("test", slice(15, None))):
        np.testing.assert_array_equal(archive.splits[split].images, images[span], strict=True)
        np.testing.assert_array_equal(
            archive.splits[split].labels["label"], labels[span], strict=True
        )
    assert [p.name for p in tmp_path.iterdir()] == ["a.tar.gz"]


def test_cifar100(tmp_path):
    contents, images, coarse, fine = _cifar100_contents()
    path = _write_tar(tmp_path / "a.tar.gz", contents)
    archive = official_archives.read_cifar100({"cifar-100-binary.tar.gz": path})
    assert archive.class_names == {"coarse_label": COARSE_NAMES, "label": FINE_NAMES}
    for split, span in (("train", slice(4)), ("test", slice(4, None))):
        data = archive.splits[split]
        np.testing.assert_array_equal(data.images, images[span], strict=True)
        np.testing.assert_array_equal(data.labels["coarse_label"], coarse[span], strict=True)
        np.testing.assert_array_equal(data.labels["label"], fine[span], strict=True)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data_batch_3.bin", None, "lacks cifar-10-batches-bin/data_batch_3.bin"),
        ("data_batch_3.bin", b"", "data_batch_3.bin has 0 bytes"),
        ("test_batch.bin", bytes(3072), "test_batch.bin has 3072 bytes"),
        ("test_batch.bin", b"\x0a" + bytes(3072), "label 10"),
        ("batches.meta.txt", b"a\nb\n", "2 class names"),
        ("batches.meta.txt", b"a\n" * 10, "1 class names"),
    ],
)
def test_cifar10_with_a_wrong_member(tmp_path, name, content, message):
    contents, _, _ = _cifar10_contents()
    contents[f"cifar-10-batches-bin/{name}"] = content
    contents = {name: content for name, content in contents.items() if content is not None}
    path = _write_tar(tmp_path / "a.tar.gz", contents)
    with pytest.raises(InputError) as error:
        _read_cifar10(path)
    _assert_one_line(error, path, message)


def test_cifar10_as_a_truncated_or_corrupt_tar(tmp_path):
    contents, _, _ = _cifar10_contents()
    path = _write_tar(tmp_path / "a.tar.gz", contents)
    content = path.read_bytes()
    # The last kilobyte may hold only the padding of the tar format.
    broken = [content[:length] for length in range(0, len(content) - 1024, 997)]
    broken += [content[:5000] + bytes(2000) + content[7000:], b"no archive", bytes(2000)]
    for bad in broken:
        path.write_bytes(bad)
        with pytest.raises(InputError) as error:
            _read_cifar10(path)
        _assert_one_line(error, path)


def test_a_link_in_place_of_a_member_is_not_followed(tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(3073))
    contents, _, _ = _cifar10_contents()
    del contents["cifar-10-batches-bin/test_batch.bin"]
    path = _write_tar(tmp_path / "a.tar.gz", contents)
    with tarfile.open(tmp_path / "b.tar.gz", "w:gz") as linked:
        with tarfile.open(path) as tar:
            for member in tar:
                linked.addfile(member, tar.extractfile(member))
        link = tarfile.TarInfo("cifar-10-batches-bin/test_batch.bin")
        link.type = tarfile.SYMTYPE
        link.linkname = str(secret)
        linked.addfile(link)
    with pytest.raises(InputError, match="lacks cifar-10-batches-bin/test_batch"):
        _read_cifar10(tmp_path / "b.tar.gz")
