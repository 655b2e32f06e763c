"""Case D9: data of a run that is gone on with, measured or transferred are those it began with."""

import json
import shutil
import unicodedata

import jax
import numpy as np
import pytest
from PIL import Image

from gc_nc.data import fingerprints
from gc_nc.data.class_splits import TransferDataset
from gc_nc.data.datasets import make_dataset
from gc_nc.data.fingerprints import fingerprint, sample_rows
from gc_nc.data.official_archives import Archive, Split
from gc_nc.data.sources import load_dataset
from gc_nc.data.streamed_images import StreamedImages
from gc_nc.data.tfds_writer import write_dataset
from gc_nc.devices import Placement
from gc_nc.errors import InputError
from gc_nc.runs import finished_run, loop
from gc_nc.runs.configuration import default_config
from gc_nc.runs.finished_run import open_run
from gc_nc.runs.run_data import LoadedData, load_run_data
from gc_nc.runs.run_directory import create_run_directory
from gc_nc.runs.run_setup import RunSetup


def arrays(count=200, classes=4):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, 8, 8, 1), dtype=np.uint8)
    return images, np.arange(count) % classes


def write_npz(path, images, labels):
    np.savez(path, images=images, labels=labels, split=np.arange(len(labels)) % 5 == 4)


def begin(config, workdir):
    """What a run has written before its first step."""
    placement = Placement(jax.local_devices()[:1])
    setup = RunSetup(config, workdir, LoadedData(), placement)
    create_run_directory(workdir, config, setup.data_facts())


@pytest.fixture
def begun(tmp_path, monkeypatch):
    """(config, workdir) of a run on an NPZ file; a checkpoint of it is made believe."""
    monkeypatch.setattr(finished_run, "_checkpoint_steps", lambda workdir: (1,))
    write_npz(tmp_path / "x.npz", *arrays())
    config = default_config()
    config.data.source, config.data.data_dir = "npz", str(tmp_path / "x.npz")
    config.model.width, config.batch_size = 0.05, 2
    begin(config, tmp_path / "run")
    return config, tmp_path / "run"


def facts(workdir):
    return json.loads((workdir / "metadata.json").read_text())["data"]


def assert_refused(config, workdir, *contained):
    """By train, and by what measure and transfer open runs with; nothing is written."""
    before = {path: path.read_bytes() for path in workdir.iterdir() if path.name != ".lock"}
    messages = []
    for use in (lambda: loop.train(config, workdir), lambda: open_run(workdir)):
        with pytest.raises(InputError, match="the data are not those") as error:
            use()
        messages.append(str(error.value))
    for message in messages:
        assert "\n" not in message
        for text in (str(workdir), *contained):
            assert text in message
    assert "another workdir" in messages[0]
    assert "--data_dir" in messages[1]
    after = {path: path.read_bytes() for path in workdir.iterdir() if path.name != ".lock"}
    assert after == before


def shifted(images, labels):
    return images, (labels + 1) % 4


def halved(images, labels):
    return images[:100], labels[:100]


def cut_down(images, labels):
    """To fewer than a batch."""
    return images[:10], labels[:10] % 2


def inverted(images, labels):
    return 255 - images, labels


def half_inverted(images, labels):
    images = images.copy()
    images[:100] = 255 - images[:100]
    return images, labels


def swapped(images, labels):
    """The same images and the same number of each class, two of them apart."""
    labels = labels.copy()
    labels[[5, 6]] = labels[[6, 5]]
    return images, labels


def reordered(images, labels):
    return images.reshape(-1, 4, 8, 8, 1)[::-1].reshape(images.shape), labels


def another_class(images, labels):
    labels = labels.copy()
    labels[0] = 4
    return images, labels


@pytest.mark.parametrize(
    ("change", "contained"),
    [
        (shifted, ["labels of the train and test images differ;"]),
        (halved, ["num_train is 80 now and was 160", "num_test"]),
        (cut_down, ["num_train is 8 now and was 160"]),
        (inverted, ["pixels of the train and test images differ;"]),
        (half_inverted, ["pixels of the train and test images differ;"]),
        (swapped, ["labels of the train images differ;"]),
        (reordered, ["pixels of the train and test images differ"]),
        (another_class, ["num_classes is 5 now and was 4", "class_names"]),
    ],
)
def test_d9_other_data_are_refused(begun, change, contained):
    config, workdir = begun
    write_npz(config.data.data_dir, *change(*arrays()))
    assert_refused(config, workdir, *contained)
    write_npz(config.data.data_dir, *arrays())
    assert open_run(workdir).workdir == workdir


def test_held_classes_count_too(begun):
    config, workdir = begun
    config.data.classes.split, config.data.classes.counts = "random", (2, 2)
    workdir = workdir.with_name("held")
    begin(config, workdir)
    assert set(facts(workdir)["fingerprint"]) == {"train", "test", "target"}
    images, labels = arrays()
    target = [int(name) for name in facts(workdir)["held_class_names"]["target"]]
    images[np.isin(labels, target)] = 0
    write_npz(config.data.data_dir, images, labels)
    assert_refused(config, workdir, "pixels of the target images differ")


class PastTheCheckError(Exception):
    """Raised where a run would go on."""


@pytest.fixture
def stops_after_the_check(monkeypatch):
    def stop(setup, workdir, stack):
        raise PastTheCheckError

    monkeypatch.setattr(loop, "_Run", stop)


@pytest.mark.usefixtures("stops_after_the_check")
def test_data_may_be_moved_and_not_replaced(begun):
    config, workdir = begun
    metadata = json.loads((workdir / "metadata.json").read_text())
    config.data.data_dir = str(workdir.with_name("moved.npz"))
    write_npz(config.data.data_dir, *arrays())
    with pytest.raises(PastTheCheckError):
        loop.train(config, workdir)
    # What it began with stays noted.
    assert json.loads((workdir / "config.json").read_text())["data"]["data_dir"].endswith("x.npz")
    open_run(workdir, config.data.data_dir)
    results = {"test/accuracy": 1.0}
    (workdir / "results.json").write_text(json.dumps(results))
    assert loop.train(config, workdir) == results
    write_npz(config.data.data_dir, *shifted(*arrays()))
    for _ in range(2):
        with pytest.raises(InputError, match="labels of the train and test images differ"):
            loop.train(config, workdir)
        (workdir / "results.json").unlink(missing_ok=True)
    # Without a fingerprint it cannot be known.
    metadata["data"]["fingerprint"] = None
    (workdir / "metadata.json").write_text(json.dumps(metadata))
    with pytest.raises(InputError, match=r"another config: data\.data_dir is"):
        loop.train(config, workdir)


@pytest.mark.usefixtures("stops_after_the_check")
def test_a_run_from_before_fingerprints_is_read_with_a_line(begun, capsys):
    config, workdir = begun
    metadata = json.loads((workdir / "metadata.json").read_text())
    capsys.readouterr()

    def lines():
        with pytest.raises(PastTheCheckError):
            loop.train(config, workdir)
        open_run(workdir)
        return capsys.readouterr().err.splitlines()

    assert lines() == []
    del metadata["data"]["fingerprint"], metadata["data"]["census"]
    (workdir / "metadata.json").write_text(json.dumps(metadata))
    for line in (said := lines()):
        assert str(workdir) in line
        assert "no fingerprint" in line
    assert len(said) == 2
    # What such a run noted is compared.
    write_npz(config.data.data_dir, *halved(*arrays()))
    assert_refused(config, workdir, "num_train is 80 now and was 160")


@pytest.mark.usefixtures("stops_after_the_check")
def test_names_noted_in_another_form_are_the_same(begun):
    config, workdir = begun
    names = {"source": ("café", "b"), "target": ("c", "d")}
    for name in ("café", "b", "c", "d"):
        place = workdir.parent / "images" / name
        place.mkdir(parents=True)
        for i in range(4):
            Image.new("L", (8, 8), 50 * i).save(place / f"{i}.png")
    config.data.source, config.data.data_dir = "image_folder", str(workdir.parent / "images")
    config.data.image_size, config.batch_size = 8, 2
    config.data.classes.split = "names"
    config.data.classes.source, config.data.classes.target = names["source"], names["target"]
    workdir = workdir.with_name("folder")
    begin(config, workdir)
    noted = facts(workdir)
    assert noted["census"]["classes"] == 4
    assert noted["census"]["images"] == 16
    noted["class_names"] = [unicodedata.normalize("NFD", name) for name in noted["class_names"]]
    metadata = json.loads((workdir / "metadata.json").read_text()) | {"data": noted}
    (workdir / "metadata.json").write_text(json.dumps(metadata))
    open_run(workdir)
    with pytest.raises(PastTheCheckError):
        loop.train(config, workdir)
    (workdir.parent / "images" / "c").rename(workdir.parent / "images" / "other")
    config.data.classes.target = ("other", "d")
    shutil.rmtree(workdir / "checkpoints", ignore_errors=True)
    (workdir / "config.json").write_text(json.dumps(config.to_dict()))
    assert_refused(config, workdir, "held_class_names is")


@pytest.mark.usefixtures("stops_after_the_check")
def test_metadata_of_a_start_that_was_cut_off_are_not_those_of_the_run(begun):
    config, workdir = begun
    (workdir / "config.json").unlink()
    write_npz(config.data.data_dir, *shifted(*arrays()))
    for _ in range(2):
        with pytest.raises(PastTheCheckError):
            loop.train(config, workdir)
    expected = fingerprint(load_run_data(config))
    assert facts(workdir)["fingerprint"] == expected


@pytest.mark.parametrize("source", ["tfds", "image_folder"])
def test_a_streamed_set_has_the_fingerprint_of_the_resident_one(tmp_path, source):
    images, labels = arrays(150, 3)
    images = np.pad(images, ((0, 0), (10, 10), (10, 10), (0, 0)))
    if source == "tfds":
        split = Split(images, {"label": labels})
        write_dataset("mnist", Archive({"train": split, "test": split}, {}), tmp_path)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        (tmp_path / f"{label}").mkdir(exist_ok=True)
        Image.fromarray(image[..., 0]).save(tmp_path / f"{label}" / f"{i}.png")
    found = []
    for streaming in (True, False):
        dataset = load_dataset(source, "mnist", str(tmp_path), image_size=8, streaming=streaming)
        found.append(fingerprint(TransferDataset(dataset, None, None)))
    assert found[0] == found[1]
    assert set(found[0]) == {"train", "test"}


def test_few_images_of_a_streamed_set_are_read():
    class Source:
        shape = (10**6, 4, 4, 1)
        rows: tuple = ()

        def read(self, rows):
            self.rows = (*self.rows, *rows)
            return np.zeros((len(rows), 4, 4, 1), np.uint8)

    source = Source()
    images = StreamedImages([source])
    dataset = make_dataset("x", (images, np.arange(10**6) % 2), (images, np.arange(10**6) % 2))
    fingerprint(TransferDataset(dataset, None, None))
    assert len(source.rows) == 2 * 64


@pytest.mark.parametrize("count", [1, 2, 63, 64, 65, 100, 1000, 50_000, 1_281_167])
def test_the_sample_is_spread_over_all_images(count):
    rows = sample_rows(count)
    assert len(rows) == min(count, 64)
    assert rows[0] >= 0
    assert rows[-1] < count
    gaps = np.diff(rows)
    assert (gaps > 0).all()
    if count > 64:
        assert gaps.max() <= 2 * -(-count // 64)
        # Not at one place in a regular order of classes.
        assert len(set(rows % 10)) > 5
    # Fixed for good: it is in the metadata of runs.
    if count == 1000:
        assert rows[:6].tolist() == [0, 24, 34, 59, 69, 79]


def test_the_fingerprint_is_fixed_for_good():
    """Runs are refused if it changes, so this may not."""
    labels, images = np.arange(8) % 2, np.arange(8 * 64).reshape(8, 8, 8, 1).astype(np.uint8)
    dataset = make_dataset("x", (images, labels), (images[:4], labels[:4]))
    assert fingerprint(TransferDataset(dataset, None, None)) == {
        "train": {
            "labels": "5c76f0f34b14addc05bd1dea12fe3bfd",
            "pixels": "d863b5dbef00395847c124fd3dc77aca",
        },
        "test": {
            "labels": "cf9a62350534f7a11c1d2e5130b3282e",
            "pixels": "0e65d620521441b88bbb42229b85bd5c",
        },
    }


def test_the_fingerprint_of_data_is_taken_once(begun, monkeypatch):
    _, workdir = begun
    taken, take = [], fingerprints.fingerprint
    monkeypatch.setattr(fingerprints, "fingerprint", lambda data: (taken.append(1), take(data))[1])
    datasets = {}
    for _ in range(3):
        open_run(workdir, datasets=datasets)
    assert len(taken) == len(datasets) == 1
