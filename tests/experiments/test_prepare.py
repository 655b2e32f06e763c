"""`python -m experiments.prepare` on small archives, from files and from a server here."""

import functools
import gzip
import hashlib
import http.server
import io
import struct
import tarfile
import tempfile
import threading

import numpy as np
import pytest
import tensorflow_datasets as tfds
from absl import flags
from absl.testing import flagsaver

from experiments import prepare
from gc_nc.data import tfds_writer
from gc_nc.errors import InputError

TAR_NAME = "cifar-10-binary.tar.gz"


@pytest.fixture(autouse=True)
def _parsed_flags(monkeypatch):
    flags.FLAGS.mark_as_parsed()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield
    tfds.enable_progress_bar()


@pytest.fixture
def cifar10(tmp_path):
    """A folder with CIFAR-10's archive: one image a batch, image i is i everywhere."""
    folder = tmp_path / "official"
    folder.mkdir()
    with tarfile.open(folder / TAR_NAME, "w:gz") as tar:
        contents = {"batches.meta.txt": b"".join(b"name %d\n" % i for i in range(10))}
        batches = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
        for i, name in enumerate(batches):
            contents[name] = bytes([9 - i]) + bytes([i]) * 3072
        for name, content in contents.items():
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return folder


@pytest.fixture
def mnist(tmp_path):
    """A folder with MNIST's four files."""
    folder = tmp_path / "official"
    folder.mkdir()
    for prefix, n in (("train", 4), ("t10k", 2)):
        arrays = {"images-idx3": np.ones((n, 28, 28), np.uint8), "labels-idx1": np.arange(n)}
        for kind, array in arrays.items():
            header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
            content = gzip.compress(header + array.astype(np.uint8).tobytes())
            (folder / f"{prefix}-{kind}-ubyte.gz").write_bytes(content)
    return folder


def _record_official_files(monkeypatch, folder, server="http://127.0.0.1:9"):
    """Makes the files in `folder` the official ones."""
    official = {
        path.name: tfds_writer.OfficialFile(
            f"{server}/{path.name}",
            path.stat().st_size,
            hashlib.sha256(path.read_bytes()).hexdigest(),
        )
        for path in folder.iterdir()
    }
    monkeypatch.setattr(tfds_writer, "official_files", lambda name: official)


def _prepare(dataset, data_dir, archive=None):
    values = {"dataset": dataset, "data_dir": str(data_dir)}
    with flagsaver.flagsaver(**values, archive=archive and str(archive)):
        prepare.main(["prepare"])


def _error(*args):
    with pytest.raises(InputError) as error:
        _prepare(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_cifar10_from_a_file(cifar10, tmp_path, monkeypatch, capfd):
    _record_official_files(monkeypatch, cifar10)
    renamed = (cifar10 / TAR_NAME).rename(tmp_path / "copy.tgz")
    _prepare("cifar10", tmp_path / "data", renamed)

    path = tfds_writer.dataset_dir("cifar10", tmp_path / "data")
    captured = capfd.readouterr()
    assert captured.out == (
        f"prepared: {path} (train 5, test 1); use it with --config.data.source=tfds "
        f"--config.data.name=cifar10 --config.data.data_dir={tmp_path / 'data'}\n"
    )
    assert "examples/s" not in captured.err
    examples = list(tfds.data_source("cifar10", data_dir=tmp_path / "data", split="train"))
    assert sorted(example["id"] for example in examples) == [b"train_%05d" % i for i in range(5)]
    for example in examples:
        index = int(example["id"][-1:])
        assert example["label"] == 9 - index
        np.testing.assert_array_equal(example["image"], np.full((32, 32, 3), index, np.uint8))

    # A second run needs neither archive nor network.
    renamed.unlink()
    _prepare("cifar10", tmp_path / "data")
    assert capfd.readouterr().out.startswith(f"already there: {path} (train 5, test 1)")


@pytest.mark.parametrize("unpacked_name", ["train-labels-idx1-ubyte", "train-labels.idx1-ubyte"])
def test_mnist_from_a_folder_partly_unpacked(
    mnist, tmp_path, monkeypatch, caplog, capsys, unpacked_name
):
    _record_official_files(monkeypatch, mnist)
    packed = mnist / "train-labels-idx1-ubyte.gz"
    unpacked = mnist / unpacked_name
    unpacked.write_bytes(gzip.decompress(packed.read_bytes()))
    packed.unlink()
    _prepare("mnist", tmp_path / "data", mnist)
    assert "(train 4, test 2)" in capsys.readouterr().out
    (record,) = [r for r in caplog.records if "unpacked" in r.getMessage()]
    assert str(unpacked) in record.getMessage()


def test_a_wrong_checksum_of_a_given_file(mnist, tmp_path, monkeypatch):
    _record_official_files(monkeypatch, mnist)
    path = mnist / "t10k-labels-idx1-ubyte.gz"
    good = hashlib.sha256(path.read_bytes()).hexdigest()
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()), 1) + b"x")
    bad = hashlib.sha256(path.read_bytes()).hexdigest()
    message = _error("mnist", tmp_path / "data", mnist)
    for text in (str(path), good, bad, "get http://127.0.0.1:9/t10k-labels"):
        assert text in message
    assert not (tmp_path / "data" / "mnist").exists()


def test_mnist_and_fashion_mnist_from_a_server(mnist, tmp_path, monkeypatch, capsys):
    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Handler, directory=mnist)
    with http.server.HTTPServer(("127.0.0.1", 0), handler) as server:
        _record_official_files(monkeypatch, mnist, f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            # Their files have the same names and must not be taken for each other's.
            _prepare("mnist", tmp_path / "data")
            images = mnist / "t10k-images-idx3-ubyte.gz"
            header = gzip.decompress(images.read_bytes())[:16]
            images.write_bytes(gzip.compress(header + bytes(2 * 28 * 28)))
            _record_official_files(monkeypatch, mnist, f"http://127.0.0.1:{server.server_port}")
            _prepare("fashion_mnist", tmp_path / "data")
        finally:
            server.shutdown()
            thread.join()
    assert capsys.readouterr().out.count("(train 4, test 2)") == 2
    for name, pixel in (("mnist", 1), ("fashion_mnist", 0)):
        for example in tfds.data_source(name, data_dir=tmp_path / "data", split="test"):
            np.testing.assert_array_equal(example["image"], pixel)


def test_no_server_and_no_archive(cifar10, tmp_path, monkeypatch):
    _record_official_files(monkeypatch, cifar10)
    message = _error("cifar10", tmp_path / "data")
    assert f"could not download http://127.0.0.1:9/{TAR_NAME}" in message
    assert "--archive=" in message


def test_a_data_dir_that_cannot_be_written_fails_before_the_download(tmp_path):
    (tmp_path / "file").touch()
    message = _error("cifar10", tmp_path / "file" / "data")
    assert str(tmp_path / "file") in message
    assert "download" not in message


def test_a_data_dir_without_permission_fails_before_the_download(tmp_path, monkeypatch):
    def refuse(dir):
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    message = _error("cifar10", tmp_path)
    assert f"Permission denied: '{tmp_path}'" in message
    assert f"check --data_dir={tmp_path}" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--dataset=svhn", "--data_dir=DIR"],
            "--dataset=svhn: value should be one of <cifar10|cifar100|mnist|fashion_mnist>",
        ),
        (["--data_dir=DIR"], "--dataset (one of cifar10, cifar100, mnist, fashion_mnist) and --da"),
        (["--dataset=mnist"], "and --data_dir, a folder"),
        (["--dataset=mnist", "--data_dir=DIR", "y"], "unexpected argument 'y'"),
        (["--dataset=mnist", "--data_dir=DIR", "--archive=absent"], "absent does not exist"),
    ],
)
def test_command_line_errors(run_command, tmp_path, arguments, message):
    arguments = [argument.replace("DIR", str(tmp_path)) for argument in arguments]
    result = run_command("experiments.prepare", *arguments)
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line
