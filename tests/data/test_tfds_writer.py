"""Sets written without TensorFlow, read back through TFDS."""

import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from gc_nc.data import tfds_writer
from gc_nc.data.official_archives import READERS, Archive, Split
from gc_nc.errors import InputError

NUM_EXAMPLES = {"train": 25, "test": 7}
CLASS_NAMES = {
    "cifar10": {"label": [f"name {i}" for i in range(10)]},
    "cifar100": {
        "label": [f"fine {i}" for i in range(100)],
        "coarse_label": [f"coarse {i}" for i in range(20)],
    },
    "mnist": {},
    "fashion_mnist": {},
}

# Finds TensorFlow and refuses to import it: TFDS asks whether there is one, which is harmless.
REFUSE_TENSORFLOW = """
import importlib.machinery, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "tensorflow":
            return importlib.machinery.ModuleSpec(name, self)
    def create_module(self, spec):
        raise AssertionError(f"import of {spec.name}")
    def exec_module(self, module):
        pass
sys.meta_path.insert(0, Refuse())
"""


def _archive(name):
    rng = np.random.default_rng(0)
    shape = (32, 32, 3) if name.startswith("cifar") else (28, 28, 1)
    sizes = {"label": 100 if name == "cifar100" else 10}
    if name == "cifar100":
        sizes["coarse_label"] = 20
    return Archive(
        {
            split: Split(
                rng.integers(0, 256, (n, *shape), dtype=np.uint8),
                {label: rng.integers(0, k, n, dtype=np.uint8) for label, k in sizes.items()},
            )
            for split, n in NUM_EXAMPLES.items()
        },
        CLASS_NAMES[name],
    )


@pytest.fixture(autouse=True)
def _no_progress_bars():
    tfds.disable_progress_bar()
    yield
    tfds.enable_progress_bar()


@pytest.fixture(params=list(READERS))
def name(request):
    return request.param


def _assert_same_examples(source, split, data, *, with_ids):
    """Compares bit by bit; the source is in another order, known by its ids or its pixels."""
    examples = list(source)
    assert len(source) == len(examples) == len(data.images)
    if with_ids:
        indices = [int(example["id"].decode().removeprefix(f"{split}_")) for example in examples]
        expected_ids = [f"{split}_{index:05d}".encode() for index in indices]
        assert [example["id"] for example in examples] == expected_ids
    else:
        index_of = {image.tobytes(): index for index, image in enumerate(data.images)}
        indices = [index_of[example["image"].tobytes()] for example in examples]
    assert sorted(indices) == list(range(len(data.images)))
    for example, index in zip(examples, indices, strict=True):
        assert example.keys() == {"image"} | data.labels.keys() | ({"id"} if with_ids else set())
        np.testing.assert_array_equal(example["image"], data.images[index], strict=True)
        for label, values in data.labels.items():
            assert example[label] == values[index]


def test_reads_back_bit_by_bit(name, tmp_path):
    archive = _archive(name)
    tfds_writer.write_dataset(name, archive, tmp_path)
    path = tfds_writer.dataset_dir(name, tmp_path)
    assert path == tmp_path / name / str(tfds.builder_cls(name).VERSION)
    builder = tfds.builder_from_directory(path)
    for split, data in archive.splits.items():
        sources = [
            builder.as_data_source(split=split),
            tfds.data_source(name, data_dir=tmp_path, split=split),
        ]
        for source in sources:
            _assert_same_examples(source, split, data, with_ids=name.startswith("cifar"))
    assert tfds_writer.count_examples(name, tmp_path) == NUM_EXAMPLES


def test_metadata_are_those_of_tfds(name, tmp_path):
    tfds_writer.write_dataset(name, _archive(name), tmp_path / "written")
    written = tfds.builder_from_directory(tfds_writer.dataset_dir(name, tmp_path / "written")).info
    of_tfds = tfds.builder_cls(name)(data_dir=tmp_path / "empty").info

    for label, class_names in CLASS_NAMES[name].items():
        assert written.features[label].names == class_names
    if name == "fashion_mnist":
        assert written.features["label"].names[0] == "T-shirt/top"
    assert written.features.to_json() == of_tfds.features.to_json()
    for field in ("name", "version", "description", "citation", "homepage", "module_name"):
        assert getattr(written, field) == getattr(of_tfds, field)
    official_sizes = [file.size for file in tfds_writer.official_files(name).values()]
    assert written.download_size == sum(official_sizes)
    assert written.supervised_keys == of_tfds.supervised_keys
    assert written.file_format == tfds.core.FileFormat.ARRAY_RECORD
    assert {split: info.num_examples for split, info in written.splits.items()} == NUM_EXAMPLES
    for info in written.splits.values():
        assert info.shard_lengths == [info.num_examples]
        # Noise does not compress: at least the pixels, and little more.
        pixels = info.num_examples * np.prod(written.features["image"].shape)
        assert pixels < info.num_bytes < 1.5 * pixels


def test_official_files_are_those_of_tfds():
    assert tfds_writer.official_files("cifar10") == {
        "cifar-10-binary.tar.gz": (
            "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
            170052171,
            "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        )
    }
    names = {
        f"{prefix}-{kind}-ubyte.gz"
        for prefix in ("train", "t10k")
        for kind in ("images-idx3", "labels-idx1")
    }
    assert tfds_writer.official_files("mnist").keys() == names
    assert tfds_writer.official_files("fashion_mnist").keys() == names
    assert tfds_writer.official_files("cifar100").keys() == {"cifar-100-binary.tar.gz"}


class _Interrupted(np.ndarray):
    """Images of which all but the first few cannot be read."""

    def __iter__(self):
        yield from np.asarray(self)[:5]
        raise KeyboardInterrupt


def test_an_interrupted_run_leaves_no_set(tmp_path):
    archive = _archive("cifar10")
    test = archive.splits["test"]
    interrupted = test._replace(images=test.images.view(_Interrupted))
    broken = archive._replace(splits=archive.splits | {"test": interrupted})
    with pytest.raises(KeyboardInterrupt):
        tfds_writer.write_dataset("cifar10", broken, tmp_path)
    assert list((tmp_path / "cifar10").iterdir()) == []
    assert tfds_writer.count_examples("cifar10", tmp_path) == {}

    tfds_writer.write_dataset("cifar10", archive, tmp_path)
    assert tfds_writer.count_examples("cifar10", tmp_path) == NUM_EXAMPLES


def test_a_killed_run_is_harmless(tmp_path):
    code = """
import os, sys
sys.path.insert(0, {tests!r})
import pathlib, test_tfds_writer as t
archive = t._archive("cifar10")
class Killed(t.np.ndarray):
    def __iter__(self):
        os._exit(9)
test = archive.splits["test"]
killed = test._replace(images=test.images.view(Killed))
archive = archive._replace(splits=archive.splits | {{"test": killed}})
t.tfds_writer.write_dataset("cifar10", archive, pathlib.Path({data_dir!r}))
""".format(tests=__file__.rpartition("/")[0], data_dir=str(tmp_path))
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert result.returncode == 9, result.stderr.decode()
    (left_over,) = (tmp_path / "cifar10").iterdir()
    assert left_over.name.startswith("incomplete.")

    archive = _archive("cifar10")
    assert tfds_writer.count_examples("cifar10", tmp_path) == {}
    tfds_writer.write_dataset("cifar10", archive, tmp_path)
    source = tfds.data_source("cifar10", data_dir=tmp_path, split="train")
    _assert_same_examples(source, "train", archive.splits["train"], with_ids=True)


def test_a_disk_that_is_full(tmp_path, monkeypatch):
    def fail(self):
        raise RuntimeError("write() failed:\nNo space left on device")

    builder_cls = tfds.builder_cls("mnist")
    monkeypatch.setattr(builder_cls, "download_and_prepare", fail)
    with pytest.raises(OSError, match=r"^write\(\) failed: No space left on device$"):
        tfds_writer.write_dataset("mnist", _archive("mnist"), tmp_path)


def _shard(path):
    (shard,) = path.glob("*-train.*")
    return shard


def _remove_shard(path):
    _shard(path).unlink()


def _truncate_shard(path):
    _shard(path).write_bytes(_shard(path).read_bytes()[:100_000])


def _swap_shards(path):
    (test,) = path.glob("*-test.*")
    test.replace(_shard(path))


def _remove_info(path):
    (path / "dataset_info.json").unlink()


def _rename_format(path):
    info = path / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))


@pytest.mark.parametrize(
    ("break_set", "message"),
    [
        (_remove_shard, "missing"),
        (_truncate_shard, ""),
        (_swap_shards, "has 7 records, expected 25"),
        (_remove_info, ""),
        (_rename_format, "its format is tfrecord"),
    ],
)
def test_an_incomplete_set_is_refused(tmp_path, break_set, message):
    tfds_writer.write_dataset("mnist", _archive("mnist"), tmp_path)
    path = tfds_writer.dataset_dir("mnist", tmp_path)
    break_set(path)
    with pytest.raises(InputError) as error:
        tfds_writer.count_examples("mnist", tmp_path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    assert message in str(error.value)


def test_needs_no_tensorflow(tmp_path):
    code = REFUSE_TENSORFLOW + (
        f"""
sys.path.insert(0, {__file__.rpartition("/")[0]!r})
import pathlib, test_tfds_writer as t
data_dir = pathlib.Path({str(tmp_path)!r})
for name in t.READERS:
    archive = t._archive(name)
    t.tfds_writer.write_dataset(name, archive, data_dir)
    source = t.tfds.data_source(name, data_dir=data_dir, split="train")
    t._assert_same_examples(
        source, "train", archive.splits["train"], with_ids=name.startswith("cifar")
    )
assert "tensorflow" not in sys.modules
try:
    import tensorflow
except AssertionError:
    print("refused")
"""
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert result.returncode == 0, result.stderr.decode()
    assert result.stdout == b"refused\n"
