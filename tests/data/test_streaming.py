"""Streamed sets against the same sets in memory."""

import shutil
import threading
import time
from contextlib import closing

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from gc_nc.data import streamed_images, tfds_reader
from gc_nc.data.class_splits import ClassSplit, divide_by_class
from gc_nc.data.datasets import ImageSplit
from gc_nc.data.device_batches import ExampleOrder, channel_normalization
from gc_nc.data.official_archives import Archive, Split
from gc_nc.data.sources import load_dataset
from gc_nc.data.streamed_images import StreamedImages
from gc_nc.data.streaming import stream_batches, stream_in_order
from gc_nc.data.tfds_writer import write_dataset
from gc_nc.errors import InputError
from gc_nc.runs.configuration import default_config
from gc_nc.runs.run_data import load_run_data

CLASSES = 10


def _arrays(count, shape, seed):
    images = np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)
    return images, np.arange(count) % CLASSES


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{source: its folder}, each with a set of 33 images."""
    root = tmp_path_factory.mktemp("sets")
    splits = {}
    for seed, (split, count) in enumerate((("train", 22), ("test", 11))):
        images, labels = _arrays(count, (28, 28, 1), seed)
        splits[split] = Split(images, {"label": labels})
    write_dataset("mnist", Archive(splits, {}), root / "tfds")
    for i, (image, label) in enumerate(zip(*_arrays(33, (9, 7, 3), 2), strict=True)):
        path = root / "image_folder" / f"class {label}" / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return {source: root / source for source in ("tfds", "image_folder")}


@pytest.fixture(params=["tfds", "image_folder"])
def source(request):
    return request.param


@pytest.fixture
def folder(folders, source):
    return folders[source]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(streamed_images, "_BLOCK", 7)
    monkeypatch.setattr(tfds_reader, "_READ_BLOCK", 7)


def load(source, folder, streaming, **options):
    name = "mnist" if source == "tfds" else "folder"
    options = {"image_size": 6} | options
    return load_dataset(source, name, str(folder), streaming=streaming, **options)


def reading_threads():
    return [t for t in threading.enumerate() if t.name.startswith("grain-prefetch")]


def assert_reading_ends():
    deadline = time.monotonic() + 20
    while reading_threads():
        assert time.monotonic() < deadline, reading_threads()
        time.sleep(0.01)


def assert_same(streamed, resident):
    assert isinstance(streamed.images, StreamedImages)
    assert isinstance(resident.images, np.ndarray)
    assert streamed.images.shape == resident.images.shape
    np.testing.assert_array_equal(streamed.images[:], resident.images, strict=True)
    np.testing.assert_array_equal(streamed.labels, resident.labels, strict=True)


def test_a_streamed_set_is_the_resident_one(source, folder):
    streamed, resident = (load(source, folder, streaming) for streaming in (True, False))
    for split in ("train", "test"):
        assert_same(getattr(streamed, split), getattr(resident, split))
    assert streamed.num_classes == resident.num_classes
    assert streamed.class_names == resident.class_names
    images = streamed.train.images
    assert (len(images), images.ndim) == (len(resident.train.images), 4)
    assert images.dtype == resident.train.images.dtype
    assert images.size == images.nbytes == resident.train.images.nbytes
    rows = np.array([5, 0, 5, 17], np.int32)
    for key in (rows, slice(3, 16, 4), slice(4, 4), 2, -1, np.arange(len(images)) % 3 == 0):
        np.testing.assert_array_equal(images[key], resident.train.images[key], strict=True)


def test_images_are_chosen_and_joined_as_arrays_are(source, folder):
    streamed, resident = (load(source, folder, streaming) for streaming in (True, False))
    a, b = streamed.train.images, streamed.test.images
    rows = np.array([3, 1, 8, 3])
    chosen = b.take(rows).concatenate(a.take(rows[:2])).concatenate(b)
    expected = np.concatenate(
        [resident.test.images[rows], resident.train.images[rows[:2]], resident.test.images]
    )
    np.testing.assert_array_equal(chosen[:], expected, strict=True)
    np.testing.assert_array_equal(chosen.take(rows)[::-1], expected[rows][::-1], strict=True)
    for key in ((slice(None), 0), Ellipsis, None):
        with pytest.raises(IndexError, match="first axis"):
            a[key]
    with pytest.raises(IndexError):
        a[len(a)]
    with pytest.raises(TypeError, match="cannot be read as a whole"):
        np.asarray(a)


@pytest.mark.parametrize("kind", ["names", "random"])
def test_division_by_class_is_the_same(source, folder, kind):
    streamed, resident = (load(source, folder, streaming) for streaming in (True, False))
    split = {
        "names": ClassSplit("names", streamed.class_names[5:2:-1], (), streamed.class_names[:2]),
        "random": ClassSplit("random", counts=(4, 3), seed=1),
    }[kind]
    a, b = divide_by_class(streamed, split), divide_by_class(resident, split)
    assert_same(a.source.train, b.source.train)
    assert_same(a.source.test, b.source.test)
    assert_same(a.target, b.target)
    assert a.source.class_names == b.source.class_names


def test_nothing_is_read_before_it_is_used(source, folder, monkeypatch):
    class ReadError(BaseException):
        pass

    def read(*args):
        raise ReadError

    monkeypatch.setattr(tfds_reader.TfdsImages, "read", read)
    monkeypatch.setattr(Image, "open", read)
    config = default_config()
    config.data.source, config.data.data_dir, config.data.streaming = source, str(folder), True
    config.data.name = "mnist"
    config.data.image_size = 6
    config.data.classes.split = "names"
    names = tuple(str(i) if source == "tfds" else f"class {i}" for i in range(4))
    config.data.classes.source, config.data.classes.target = names[:2], names[2:]
    data = load_run_data(config)
    assert isinstance(data.target.images, StreamedImages)
    with pytest.raises(ReadError):
        data.source.train.images[:1]


def test_normalization_is_the_same_to_the_bit(source, folder):
    streamed, resident = (load(source, folder, streaming) for streaming in (True, False))
    expected = channel_normalization(resident.train.images)
    assert channel_normalization(streamed.train.images) == expected
    assert_reading_ends()


@pytest.mark.parametrize("batch_size", [1, 5, 9])
def test_batches_are_those_of_the_order_from_any_step_on(source, folder, batch_size):
    streamed, resident = (load(source, folder, streaming).train for streaming in (True, False))
    order = ExampleOrder(0, len(resident.labels), batch_size)
    batches = list(stream_batches(streamed, order, 0, 12))
    assert len(batches) == 12
    for step, (images, labels) in enumerate(batches):
        rows = order.indices(step)
        np.testing.assert_array_equal(images, resident.images[rows], strict=True)
        np.testing.assert_array_equal(labels, resident.labels[rows], strict=True)
    # Another process goes on with an order of its own.
    again = ExampleOrder(0, len(resident.labels), batch_size)
    resumed = list(stream_batches(streamed, again, 7, 12))
    for a, b in zip(resumed, batches[7:], strict=True):
        np.testing.assert_array_equal(a.images, b.images)
        np.testing.assert_array_equal(a.labels, b.labels)
    assert list(stream_batches(streamed, order, 5, 5)) == []
    assert_reading_ends()


def test_parts_that_processes_load_make_up_the_batch(source, folder):
    split = load(source, folder, True).train
    order = ExampleOrder(1, len(split.labels), 6)
    parts = [slice(0, 2), slice(2, 4), slice(4, 6)]
    for whole, *loaded in zip(
        stream_batches(split, order, 0, 5),
        *(stream_batches(split, order, 0, 5, rows=rows) for rows in parts),
        strict=True,
    ):
        for field in ("images", "labels"):
            joined = np.concatenate([getattr(part, field) for part in loaded])
            np.testing.assert_array_equal(joined, getattr(whole, field), strict=True)
    for whole, *loaded in zip(
        stream_in_order(split, 6),
        *(stream_in_order(split, 6, rows=rows) for rows in parts),
        strict=True,
    ):
        for field in ("images", "labels", "weights"):
            joined = np.concatenate([getattr(part, field) for part in loaded])
            np.testing.assert_array_equal(joined, getattr(whole, field), strict=True)


@pytest.mark.parametrize("batch_size", [4, 11, 100])
def test_in_order_every_example_counts_once(source, folder, batch_size):
    streamed, resident = (load(source, folder, streaming).test for streaming in (True, False))
    num_examples = len(resident.labels)
    batches = list(stream_in_order(streamed, batch_size))
    assert {len(batch.labels) for batch in batches} == {batch_size}
    images, labels, weights = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    rows = np.minimum(np.arange(len(labels)), num_examples - 1)
    np.testing.assert_array_equal(images, resident.images[rows], strict=True)
    np.testing.assert_array_equal(labels, resident.labels[rows], strict=True)
    expected = (np.arange(len(labels)) < num_examples).astype(np.float32)
    np.testing.assert_array_equal(weights, expected, strict=True)


def test_padding_is_read_once(folders, monkeypatch):
    split = load("image_folder", folders["image_folder"], True).test
    read, opened = [], Image.open
    monkeypatch.setattr(Image, "open", lambda path: read.append(path) or opened(path))
    list(stream_in_order(split, 100))
    assert len(read) == len(split.labels)


class _Slow:
    """Images of their own number; notes which were read."""

    shape = (1000, 4, 4, 1)

    def __init__(self):
        self.read_rows = []

    def read(self, rows):
        time.sleep(0.01)
        self.read_rows.extend(rows)
        return np.broadcast_to(rows[:, None, None, None] % 256, (len(rows), 4, 4, 1))


@pytest.mark.parametrize("how", ["closed", "let go", "failed"])
def test_reading_ends_with_the_consumer(how):
    slow = _Slow()
    split = ImageSplit(StreamedImages([slow]), np.zeros(1000, np.int32))
    order = ExampleOrder(0, 1000, 2)

    def consume(batches):
        for step, batch in enumerate(batches):
            np.testing.assert_array_equal(batch.images[:, 0, 0, 0], order.indices(step) % 256)
            if step == 3:
                assert reading_threads()
                if how == "failed":
                    raise KeyboardInterrupt
                return

    batches = stream_batches(split, order, 0, 500)
    if how == "closed":
        with closing(batches):
            consume(batches)
    elif how == "failed":
        with pytest.raises(KeyboardInterrupt), closing(batches):
            consume(batches)
    else:
        consume(batches)
        del batches
    assert_reading_ends()
    # Read ahead, but not to the end.
    assert 8 < len(slow.read_rows) < 200


def test_an_image_file_that_is_gone_is_named_when_its_batch_is_due(tmp_path):
    for i in range(20):
        path = tmp_path / f"class {i % 2}" / f"{i:02}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((4, 4), i, np.uint8)).save(path)
    split = load("image_folder", tmp_path, True, image_size=4).train
    order = ExampleOrder(0, len(split.labels), 2)
    gone = int(split.images[order.indices(5)][0, 0, 0, 0])
    (tmp_path / f"class {gone % 2}" / f"{gone:02}.png").unlink()
    with closing(stream_batches(split, order, 0, 8)) as batches:
        for _ in range(5):
            next(batches)
        with pytest.raises(InputError, match=rf"{gone:02}\.png is not an image that can") as error:
            next(batches)
    assert type(error.value) is InputError
    assert "\n" not in str(error.value)
    assert_reading_ends()


def test_a_record_that_cannot_be_read_is_named(tmp_path):
    images, labels = _arrays(40, (28, 28, 1), 0)
    splits = {split: Split(images, {"label": labels}) for split in ("train", "test")}
    write_dataset("mnist", Archive(splits, {}), tmp_path)
    split = load("tfds", tmp_path, True).train
    (records,) = (tmp_path / "mnist" / "3.0.1").glob("*train*array_record*")
    content = bytearray(records.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 50] = bytes(50)
    records.write_bytes(content)
    name = rf"example \d+ of split 'train' in {tmp_path}.* cannot be read"
    with pytest.raises(InputError, match=name) as error:
        channel_normalization(split.images)
    assert type(error.value) is InputError
    assert "\n" not in str(error.value)
    assert_reading_ends()


def test_by_default_only_what_does_not_fit_is_streamed(source, folder):
    fits = load(source, folder, None, memory_limit_gib=1.0)
    assert isinstance(fits.train.images, np.ndarray)
    large = load(source, folder, None, memory_limit_gib=1e-9)
    assert isinstance(large.train.images, StreamedImages)
    assert isinstance(large.test.images, StreamedImages)
    with pytest.raises(InputError, match=r"fits .*leave --config.data.streaming out"):
        load(source, folder, False, memory_limit_gib=1e-9)


@pytest.mark.parametrize("source", ["digits", "idx", "npz"])
def test_other_sources_are_not_streamed(tmp_path, source):
    with pytest.raises(InputError, match=f"'{source}' cannot be streamed, only tfds and") as error:
        load_dataset(source, None, str(tmp_path), streaming=True)
    assert "\n" not in str(error.value)


def test_streaming_neither_reads_nor_writes_the_cache(tmp_path):
    for i in range(8):
        path = tmp_path / f"class {i % 2}" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((4, 4), i, np.uint8)).save(path)
    load("image_folder", tmp_path, True).train.images[:]
    assert not list(tmp_path.glob(".gc_nc*"))
    load("image_folder", tmp_path, False)
    (cache,) = tmp_path.glob(".gc_nc*")
    cache.write_bytes(b"")
    load("image_folder", tmp_path, True).train.images[:]
    assert cache.read_bytes() == b""


def test_tfds_sets_without_random_access_are_one_line(folders, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise NotImplementedError("no random access\n\tto tfrecord")

    monkeypatch.setattr(tfds.core.DatasetBuilder, "as_data_source", refuse)
    with pytest.raises(InputError, match=r"no ArrayRecord files .*to tfrecord") as error:
        load("tfds", folders["tfds"], True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("feature", "message"),
    [
        (tfds.features.Image(shape=(28, 28, 1), dtype=np.uint16), "as Image of uint16"),
        (tfds.features.Tensor(shape=(28, 28, 1), dtype=np.uint8), "as Tensor of uint8"),
    ],
)
def test_tfds_images_of_another_kind_are_one_line(folders, tmp_path, feature, message):
    shutil.copytree(folders["tfds"], tmp_path / "set")
    features = {"image": feature, "label": tfds.features.ClassLabel(num_classes=10)}
    place = tmp_path / "set" / "mnist" / "3.0.1"
    tfds.features.FeaturesDict(features).save_config(place)
    for streaming in (True, False):
        with pytest.raises(InputError, match=message):
            load("tfds", tmp_path / "set", streaming)


def test_a_record_that_is_no_example_is_named(folders, monkeypatch):
    split = load("tfds", folders["tfds"], True).train
    decode = tfds.features.Image.decode_example_np
    broken = split.images[7]

    def decode_others(self, content):
        image = decode(self, content)
        return None.shape if np.array_equal(image, broken) else image

    monkeypatch.setattr(tfds.features.Image, "decode_example_np", decode_others)
    with pytest.raises(InputError, match="example 7 of split 'train'") as error:
        split.images[::-1]
    assert "\n" not in str(error.value)
