"""Datasets from each source, and one line for each way they can be wrong."""

import gzip
import json
import os
import socket
import time
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow_datasets as tfds

from gc_nc.data.official_archives import Archive, Split
from gc_nc.data.sources import load_dataset
from gc_nc.data.tfds_writer import write_dataset
from gc_nc.errors import InputError


def arrays(count, shape=(28, 28), classes=10, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(count, dtype=np.uint8) % classes
    images = rng.integers(0, 256, (count, *shape), dtype=np.uint8)
    # Every image carries its own label.
    images[:, 0, 0] = labels.reshape(-1, *[1] * (len(shape) - 2))
    return images, labels


def write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    content = header + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_idx_folder(folder, train, test, suffix=".gz"):
    for prefix, (images, labels) in (("train", train), ("t10k", test)):
        write_idx(folder / f"{prefix}-images-idx3-ubyte{suffix}", images)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte{suffix}", labels)


def assert_labelled_by_their_pixels(split):
    np.testing.assert_array_equal(split.images[:, 0, 0, 0], split.labels)


def test_digits_are_embedded_stratified_and_always_the_same():
    digits = load_dataset("digits")
    assert digits.train.images.shape == (1437, 8, 8, 1)
    assert digits.test.images.shape == (360, 8, 8, 1)
    assert digits.num_classes == 10
    assert np.bincount(digits.test.labels).tolist() == [36, 36, 35, 37, 36, 37, 36, 36, 35, 36]
    # 17 levels, spread over all of uint8.
    assert np.unique(digits.train.images).tolist() == np.round(np.arange(17) * 15.9375).tolist()
    # The fixed split: its first test images.
    assert digits.test.labels[:10].tolist() == load_dataset("digits").test.labels[:10].tolist()
    both = np.concatenate([digits.train.images, digits.test.images]).reshape(1797, -1)
    assert len(np.unique(both, axis=0)) == 1797


def test_prepared_tfds_directory(tmp_path):
    splits = {}
    for split, count in (("train", 20), ("test", 11)):
        images, labels = arrays(count)
        splits[split] = Split(images[..., None], {"label": labels})
    write_dataset("mnist", Archive(splits, {}), tmp_path)
    for name in ("mnist", "mnist:3.0.1"):
        dataset = load_dataset("tfds", name, str(tmp_path))
        assert dataset.train.images.shape == (20, 28, 28, 1)
        assert dataset.num_classes == 10
        for split in (dataset.train, dataset.test):
            assert_labelled_by_their_pixels(split)
        assert np.bincount(dataset.test.labels).tolist() == [2] + [1] * 9


@pytest.mark.parametrize(
    ("features", "splits", "message"),
    [
        ({"text": None}, (), r"features \['text'\]"),
        ({"image": (28, 28, 1), "label": None}, ("train",), r"splits \['train'\]"),
        ({"image": (None, None, 3), "label": None}, ("train", "test"), "differing sizes"),
        ({"image": (8, 8, 1), "label": tfds.features.Text()}, ("train", "test"), "labels as Text"),
        (
            {"image": (8, 8, 1), "label": tfds.features.Tensor(shape=(), dtype=np.float32)},
            ("train", "test"),
            "one class number per image",
        ),
    ],
)
def test_tfds_sets_of_another_kind_are_refused(tmp_path, monkeypatch, features, splits, message):
    info = SimpleNamespace(
        features={
            name: shape if name == "label" else SimpleNamespace(shape=shape)
            for name, shape in features.items()
        },
        splits={split: SimpleNamespace(num_examples=2) for split in splits},
    )
    version = tmp_path / "own_set" / "1.2.3"
    version.mkdir(parents=True)
    (version / "dataset_info.json").write_text("{}")
    monkeypatch.setattr(tfds, "builder_from_directory", lambda _: SimpleNamespace(info=info))
    with pytest.raises(InputError, match=message):
        load_dataset("tfds", "own_set", str(tmp_path))


@pytest.mark.parametrize("name", ["../../etc", ":", "My-Set!", "cifar10/plain", "cifar10:3"])
def test_tfds_names_are_checked(tmp_path, name):
    with pytest.raises(InputError, match="is not a name or name:version"):
        load_dataset("tfds", name, str(tmp_path))


def test_broken_tfds_metadata_is_one_line(tmp_path):
    broken = tmp_path / "cifar10" / "3.0.2"
    broken.mkdir(parents=True)
    (broken / "dataset_info.json").write_text("{")
    with pytest.raises(InputError, match="not a readable TFDS set"):
        load_dataset("tfds", "cifar10", str(tmp_path))


@pytest.fixture
def no_network(monkeypatch):
    """Fails a test that looks up a name or connects, after which it would wait for a timeout."""
    tried = []
    for owner, name in ((socket, "getaddrinfo"), (socket.socket, "connect")):
        monkeypatch.setattr(owner, name, lambda *args, **_: tried.append(args[-1]) or 1 / 0)
    yield
    assert not tried


def assert_prompt_line_on(name, version, data_dir, has):
    """One line on the set, its version, the folder, what it holds and the command, in no time."""
    started = time.monotonic()
    with pytest.raises(InputError) as error:
        load_dataset("tfds", name, str(data_dir))
    # Importing tensorflow-datasets is most of it.
    assert time.monotonic() - started < 30
    assert str(error.value) == (
        f"no prepared {name}{version} in {data_dir} ({has}); prepare it with:"
        f" python -m experiments.prepare --dataset={name} --data_dir={data_dir}"
    )


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(("name", "version"), [("cifar10", ":3.0.2"), ("my_own_set", "")])
def test_r8_an_empty_folder_and_no_network(tmp_path, name, version):
    assert_prompt_line_on(name, version, tmp_path, "it contains no version")
    assert_prompt_line_on(name, version, tmp_path / "missing", "it contains no version")


@pytest.mark.usefixtures("no_network")
def test_r8_another_version_and_no_network(tmp_path):
    old = tmp_path / "cifar10" / "3.0.1"
    old.mkdir(parents=True)
    (old / "dataset_info.json").write_text("{}")
    (tmp_path / "cifar10" / "3.0.2").mkdir()  # a half-removed set has no dataset_info.json
    assert_prompt_line_on("cifar10", ":3.0.2", tmp_path, "it contains version 3.0.1")


def test_a_tfds_set_of_plain_integers(tmp_path):
    images, labels = arrays(20)
    split = Split(images[..., None], {"label": labels})
    write_dataset("mnist", Archive({"train": split, "test": split}, {}), tmp_path)
    path = tmp_path / "mnist" / "3.0.1" / "features.json"
    image = tfds.features.Image(shape=(28, 28, 1))
    plain = tfds.features.FeaturesDict({"image": image, "label": tfds.features.Scalar(np.int64)})
    path.write_text(json.dumps(plain.to_json()))
    dataset = load_dataset("tfds", "mnist", str(tmp_path))
    assert dataset.class_names == tuple("0123456789")
    assert_labelled_by_their_pixels(dataset.train)


@pytest.mark.parametrize("place", ["mnist", "mnist/3.0.1"])
def test_a_folder_within_that_of_a_tfds_set_says_which_is_needed(tmp_path, place):
    split = Split(*(lambda images, labels: (images, {"label": labels}))(*arrays(10, (28, 28, 1))))
    write_dataset("mnist", Archive({"train": split, "test": split}, {}), tmp_path)
    with pytest.raises(InputError, match="the folder around mnist is needed"):
        load_dataset("tfds", "mnist", str(tmp_path / place))


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_folder(tmp_path, suffix):
    write_idx_folder(tmp_path, arrays(12, (9, 7)), arrays(5, (9, 7)), suffix)
    dataset = load_dataset("idx", "mine", str(tmp_path))
    assert dataset.name == "mine"
    assert dataset.train.images.shape == (12, 9, 7, 1)
    assert dataset.num_classes == 10
    assert_labelled_by_their_pixels(dataset.train)
    assert_labelled_by_their_pixels(dataset.test)
    assert load_dataset("idx", None, str(tmp_path), num_classes=12).num_classes == 12


def test_npz_of_both_conventions(tmp_path):
    x, y = arrays(12, (4, 4, 3))
    np.savez(tmp_path / "a.npz", x_train=x[:8], y_train=y[:8], x_test=x[8:], y_test=y[8:])
    np.savez(tmp_path / "b.npz", images=x, labels=y, split=np.arange(12) >= 8)
    for name in ("a", "b"):
        dataset = load_dataset("npz", None, str(tmp_path / f"{name}.npz"))
        np.testing.assert_array_equal(dataset.train.images, x[:8])
        np.testing.assert_array_equal(dataset.test.labels, y[8:])


class Exploit:
    def __reduce__(self):
        return (os.mkdir, ("pwned",))


def test_npz_never_unpickles(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    payload = np.array([Exploit()], dtype=object)
    np.savez("bad.npz", x_train=payload, y_train=payload, x_test=payload, y_test=payload)
    with pytest.raises(InputError, match="plain arrays"):
        load_dataset("npz", None, "bad.npz")
    assert not os.path.exists("pwned")


def npz(x, y, x_test=None, y_test=None):
    x_test, y_test = (x if x_test is None else x_test), (y if y_test is None else y_test)
    return {"x_train": x, "y_train": y, "x_test": x_test, "y_test": y_test}


X, Y = arrays(6, (4, 4))


@pytest.mark.parametrize(
    ("contents", "options", "message"),
    [
        (npz(X[:, 0], Y), {}, r"train images have shape \(6, 4\)"),
        (npz(X[..., None].repeat(2, -1), Y), {}, r"shape \(6, 4, 4, 2\)"),
        (npz(X.astype(np.float32), Y), {}, "images are float32"),
        (npz(X, Y.astype(np.float32)), {}, "labels are float32"),
        (npz(X, Y[:5]), {}, "labels of shape"),
        (npz(X[:0], Y[:0]), {}, "train has no examples"),
        (npz(X, Y, X[:0], Y[:0]), {}, "test has no examples"),
        (npz(X, Y * 0), {}, "1 class among the train labels"),
        (npz(X, Y, X, Y * 0), {}, "1 class among the test labels"),
        (npz(X, Y + 2**32 * (Y > 3).astype(int)), {}, "is more than 1000000"),
        (npz(X, Y), {"num_classes": 2**31}, "is more than 1000000"),
        (npz(X[:, :0], Y), {}, "has no examples"),
        (npz(X, Y.astype(int) - 1), {}, "train label -1 is outside"),
        (npz(X, Y), {"num_classes": 4}, r"label 4 is outside 0\.\.3"),
        (npz(X, Y, X[:, :3], Y), {}, "differ in shape"),
        ({"x": X}, {}, "contains x; x_train, y_train"),
        ({"images": X, "labels": Y, "split": Y[:2]}, {}, "differ in length"),
        ({"images": X, "labels": Y, "split": Y % 3}, {}, "split contains 2; 0 .* and 1 .* are"),
        ({"images": X, "labels": Y, "split": Y - 1.0}, {}, "split contains -1.0; 0"),
        ({"images": X, "labels": Y, "split": Y * np.nan}, {}, "split contains nan; 0"),
        ({"images": X, "labels": Y, "split": Y.astype(str)}, {}, "split contains '0'; 0"),
        (npz(X.transpose(0, 2, 1)[:, None].repeat(3, 1), Y), {}, r"transpose\(0, 2, 3, 1\)"),
        (npz(X / 255, Y), {}, "float64; uint8 in 0..255 .*if they are fractions in 0..1, store"),
        (npz(X.astype(int), Y), {}, r"int64; uint8 in 0..255 .*astype\('uint8'\)"),
        (npz(X, Y.astype(str)), {}, r"labels are <U3; .*np.unique\(labels, return_inverse=True\)"),
        (npz(X, Y), {"memory_limit_gib": 1e-9}, "GiB in memory, but only 1e-09 GiB fits"),
    ],
)
def test_bad_npz_is_one_line(tmp_path, contents, options, message):
    np.savez(tmp_path / "x.npz", **contents)
    with pytest.raises(InputError, match=message) as error:
        load_dataset("npz", None, str(tmp_path / "x.npz"), **options)
    assert "\n" not in str(error.value)


def test_npz_members_that_are_no_arrays_are_one_line(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        for name in npz(X, Y):
            archive.writestr(f"{name}.npy", b"no array")
    with pytest.raises(InputError, match="x_train is not an array") as error:
        load_dataset("npz", None, str(tmp_path / "x.npz"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("source", "place", "message"),
    [
        ("tdfs", "", "did you mean 'tfds'"),
        ("idx", "", "needs the path of the data"),
        ("idx", "missing", "not a folder"),
        ("idx", ".", "has no train-images"),
        ("npz", "missing.npz", "does not exist"),
        ("npz", "text.npz", "not a readable .npz"),
    ],
)
def test_bad_place_is_one_line(tmp_path, source, place, message):
    (tmp_path / "text.npz").write_text("no zip")
    with pytest.raises(InputError, match=message) as error:
        load_dataset(source, None, str(tmp_path / place) if place else None)
    assert "\n" not in str(error.value)


def test_a_tfds_set_that_does_not_fit_is_refused_before_it_is_read(tmp_path):
    splits = {s: Split(X[:0], {}) for s in ("train", "test")}
    for split in splits:
        images, labels = arrays(20)
        splits[split] = Split(images[..., None], {"label": labels})
    write_dataset("mnist", Archive(splits, {}), tmp_path)
    # Unreadable from here on, were it read.
    for records in (tmp_path / "mnist" / "3.0.1").glob("*array_record*"):
        records.write_bytes(b"")
    with pytest.raises(InputError, match="GiB fits"):
        load_dataset("tfds", "mnist", str(tmp_path), memory_limit_gib=1e-9, streaming=False)
