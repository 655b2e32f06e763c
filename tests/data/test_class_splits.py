"""Sets divided by class: no class in two parts, every image with its own label."""

import numpy as np
import pytest

from gc_nc.data.class_splits import ClassSplit, divide_by_class, hold_out
from gc_nc.data.datasets import make_dataset
from gc_nc.data.official_archives import Archive, Split
from gc_nc.data.published_splits import PUBLISHED_SPLITS
from gc_nc.data.tfds_writer import write_dataset
from gc_nc.errors import InputError
from gc_nc.runs.configuration import check_config, default_config
from gc_nc.runs.run_data import load_run_data

NAMES = ("cat", "dog", "fox", "hen", "owl", "pig", "rat")


def labelled(labels):
    """Images filled with their label, the place among those of a class in the first pixel."""
    labels = np.asarray(labels)
    images = np.repeat(labels.astype(np.uint8), 16).reshape(-1, 4, 4)
    for label in np.unique(labels):
        images[labels == label, 0, 0] = np.arange(np.sum(labels == label))
    return images, labels


def dataset(per_class=10, num_train=40):
    images, labels = labelled(np.random.default_rng(0).permutation(np.arange(7 * per_class) % 7))
    train, test = slice(0, num_train), slice(num_train, None)
    return make_dataset(
        "animals", (images[train], labels[train]), (images[test], labels[test]), 7, NAMES
    )


def original_names(images):
    return {NAMES[label] for label in images[:, 1, 1, 0]}


def assert_labelled(images, labels, class_names):
    for label, name in enumerate(class_names):
        assert original_names(images[labels == label]) == {name}


@pytest.mark.parametrize(
    "split",
    [
        ClassSplit("names", source=("owl", "cat", "dog"), val=("fox", "hen")),
        ClassSplit("names", source=("owl", "cat", "dog"), target=("pig", "rat")),
        ClassSplit("random", counts=(3, 2, 2)),
        ClassSplit("random", counts=(3, 2), images_per_class=10),
    ],
)
def test_f4_every_image_keeps_its_label_and_parts_are_disjoint(split):
    divided = divide_by_class(dataset(), split)
    source = divided.source
    assert source.num_classes == len(source.class_names) == 3
    for part in (source.train, source.test):
        assert_labelled(part.images, part.labels, source.class_names)
    # All images of the source classes, each on one side.
    assert len(source.train.labels) == 24
    assert np.bincount(source.test.labels).tolist() == [2, 2, 2]
    pixels = np.concatenate([source.train.images, source.test.images])[:, [0, 1], [0, 1], 0]
    assert len(np.unique(pixels, axis=0)) == 30
    seen = set(source.class_names)
    for part in filter(None, (divided.val, divided.target)):
        assert_labelled(part.images, part.labels, part.class_names)
        assert np.bincount(part.labels).tolist() == [10] * len(part.class_names)
        assert not seen & set(part.class_names)
        seen |= set(part.class_names)
    if split.kind == "names":
        assert source.class_names == ("owl", "cat", "dog")
        assert divided.target.class_names == ("pig", "rat")


def test_random_classes_depend_on_the_seed_alone():
    splits = [ClassSplit("random", counts=(3, 2), seed=seed) for seed in (0, 0, 1)]
    names = [divide_by_class(dataset(), split).source.class_names for split in splits]
    assert names[0] == names[1] != names[2]


def test_a_file_of_disjoint_classes_is_its_own_split():
    images, labels = labelled(np.arange(70) % 7)
    train = labels < 4
    whole = make_dataset(
        "animals", (images[train], labels[train]), (images[~train], labels[~train]), 7, NAMES
    )
    divided = divide_by_class(whole, ClassSplit("from_file"))
    assert divided.source.class_names == NAMES[:4]
    assert divided.val is None
    assert divided.target.class_names == NAMES[4:]
    assert_labelled(divided.target.images, divided.target.labels, NAMES[4:])
    with pytest.raises(InputError, match="is in source and in target"):
        divide_by_class(dataset(), ClassSplit("from_file"))


@pytest.mark.parametrize(("share", "held"), [(0.2, 2), (0.01, 1), (0.99, 9)])
def test_held_out_images_of_each_class(share, held):
    labels = np.repeat([0, 1, 2], 10)
    train, test = hold_out(labels, "abc", share, seed=0)
    assert np.bincount(labels[test]).tolist() == [held] * 3
    np.testing.assert_array_equal(np.sort(np.concatenate([train, test])), np.arange(30))
    others = hold_out(labels, "abc", share, seed=1)[1]
    assert not np.array_equal(test, others)


def test_published_splits_are_disjoint():
    for split, num_characters in (("cifar_fs", None), ("mini_imagenet", 9)):
        parts = PUBLISHED_SPLITS[split]
        assert {part: len(names) for part, names in parts.items()} == {
            "source": 64,
            "val": 16,
            "target": 20,
        }
        names = [name for part in parts.values() for name in part]
        assert len(set(names)) == 100
        assert num_characters is None or {len(name) for name in names} == {num_characters}


def cifar100_config(data_dir, class_names, per_class=4):
    """A TFDS directory of CIFAR-100's classes in the order of `class_names`, and a config."""
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.arange(100 * per_class) % 100).astype(np.uint8)
    images = np.broadcast_to(labels[:, None, None, None], (len(labels), 32, 32, 3)).copy()
    splits = {
        split: Split(images[rows], {"label": labels[rows], "coarse_label": labels[rows] // 5})
        for split, rows in (("train", slice(0, 300)), ("test", slice(300, None)))
    }
    coarse = [f"coarse {i}" for i in range(20)]
    archive = Archive(splits, {"label": list(class_names), "coarse_label": coarse})
    write_dataset("cifar100", archive, data_dir)
    config = default_config()
    config.data.source, config.data.name = "tfds", "cifar100"
    config.data.data_dir = str(data_dir)
    config.data.classes.split = "cifar_fs"
    config.data.classes.images_per_class = per_class
    check_config(config)
    return config


def test_f4_cifar_fs_from_a_tfds_directory_by_name(tmp_path):
    # In an order of their own: whoever maps by number gets it wrong.
    parts = PUBLISHED_SPLITS["cifar_fs"]
    names = np.random.default_rng(1).permutation([n for part in parts.values() for n in part])
    config = cifar100_config(tmp_path, names)
    data = load_run_data(config)
    assert set(data.source.class_names) == set(parts["source"])
    assert np.bincount(data.source.train.labels).tolist() == [3] * 64
    assert np.bincount(data.source.test.labels).tolist() == [1] * 64
    for part in ("val", "target"):
        images, labels, class_names = getattr(data, part)
        assert set(class_names) == set(parts[part])
        assert np.bincount(labels).tolist() == [4] * len(class_names)
        for label, name in enumerate(class_names):
            assert {names[i] for i in images[labels == label, 5, 5, 1]} == {name}
    config.data.classes.images_per_class = 600
    with pytest.raises(InputError, match="has 4 images; 600 are needed"):
        load_run_data(config)


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (ClassSplit("names", source=("cat", "dgo")), "no class 'dgo'; did you mean 'dog'"),
        (ClassSplit("names", source=("cat", "xyz")), "no class 'xyz'; it has cat, dog"),
        (ClassSplit("names", source=("cat", "dog"), target=("dog", "fox")), "'dog'.*is in source"),
        (ClassSplit("names", source=("cat", "cat")), "'cat'.*is in source and in source"),
        (ClassSplit("names", source=("cat", "dog"), val=("fox",)), "2 val classes, but .* has 1"),
        (ClassSplit("names", source=NAMES[:6]), "2 target classes, but .* has 1"),
        (ClassSplit("names", source=NAMES), "2 target classes, but .* has 0"),
        (ClassSplit("cifar_fs"), "animals has no class 'apple'"),
        (ClassSplit("random", counts=(6, 2)), "are 8 classes in all, but animals has 7"),
        (ClassSplit("random", counts=(3, 2), images_per_class=9), "has 10 images; 9 are needed"),
    ],
)
def test_bad_splits_are_one_line(split, message):
    with pytest.raises(InputError, match=message) as error:
        divide_by_class(dataset(), split)
    assert "\n" not in str(error.value)


def test_names_that_do_not_number_the_classes_are_refused():
    images, labels = labelled(np.arange(14) % 7)
    with pytest.raises(InputError, match="num_classes=9, but the source names 7 classes"):
        make_dataset("animals", (images, labels), (images, labels), 9, NAMES)


def test_a_class_of_one_image_cannot_be_held_out():
    with pytest.raises(InputError, match="class 'b' has 1 image"):
        hold_out(np.array([0, 0, 1]), "ab", 0.5, 0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"split": "cifarfs"}, "classes.split='cifarfs' must be one of"),
        ({"source": ("cat", "dog")}, r"source=\('cat', 'dog'\) must be \(\) with"),
        ({"split": "names"}, "names of at least 2 classes"),
        ({"split": "names", "source": ("cat", 3)}, "must be names of classes"),
        ({"counts": (6, 4)}, "counts are for 'random'"),
        ({"split": "random"}, r"as in \(6, 4\)"),
        ({"split": "random", "counts": (6, 1)}, r"as in \(6, 4\)"),
        ({"split": "random", "counts": (6, 2.5)}, r"as in \(6, 4\)"),
        ({"images_per_class": 1}, "at least 2"),
        ({"seed": -1}, "at least 0"),
    ],
)
def test_bad_config_values_are_one_line(values, message):
    config = default_config()
    config.data.classes.update(values)
    with pytest.raises(InputError, match=message) as error:
        check_config(config)
    assert "\n" not in str(error.value)
