"""Layouts that public sets come in: folders of splits under other names, and images beside them."""

import pytest

from tests.data.test_strangers_folders import classes, left_out, write

CLASSES = ("cat", "dog")
BOTH = {"cat": 2, "dog": 2}


@pytest.mark.parametrize(
    "splits",
    [
        ("train_images", "test_images"),
        ("training_set", "test_set"),
        ("Training Images", "Validation-Images"),
        ("trainset", "TestSet"),
        ("images_train", "images_val"),
        ("train1", "test1"),
        ("train2017", "val2017"),
        ("data/train", "data/holdout"),
        ("seg_train", "seg_test"),
        # As archives unpack in a folder of their own name.
        ("seg_train/seg_train", "seg_test/seg_test"),
        ("train/train", "test/test"),
        ("petnet-train", "petnet-valid"),
    ],
)
def test_split_folders_under_other_names(tmp_path, splits):
    for split in splits:
        write(tmp_path / split, *(f"{name}/{split[:4]}.png" for name in CLASSES))
    counts, census = classes(tmp_path)
    assert counts == BOTH
    names = [split.rpartition("/")[2] for split in splits]
    assert f"classes of one name in {', '.join(sorted(names))} are one class" in census.notes


@pytest.mark.parametrize(
    "names",
    [
        ("train station", "test tube"),
        ("test_tube", "tube"),
        ("seal_train", "seal_test", "seal"),
        ("training_shoe", "train", "test1"),
    ],
)
def test_classes_that_are_called_as_splits_may_be(tmp_path, names):
    names = (*names, "zebra")
    write(tmp_path / "flat", *(f"{name}/0.png" for name in names))
    assert classes(tmp_path / "flat")[0] == dict.fromkeys(names, 1)
    for split in ("train", "test"):
        write(tmp_path / "splits" / split, *(f"{name}/0.png" for name in names))
    assert classes(tmp_path / "splits")[0] == dict.fromkeys(names, 2)


def test_images_of_a_split_without_classes_are_no_class(tmp_path):
    """ImageNet's val, Tiny ImageNet's, and the unlabelled images of a competition."""
    unlabelled = ("val/0.png", "test/images/0.png", "seg_pred/seg_pred/0.png", "unlabeled/0.png")
    layouts = {
        "imagenet/ILSVRC/Data/CLS-LOC": ("n01", "n02"),
        "tiny/tiny-imagenet-200": ("n01/images", "n02/images"),
        "root": ("n01", "n02"),
    }
    for layout, names in layouts.items():
        write(tmp_path / layout, *(f"train/{name}/{i}.png" for name in names for i in range(2)))
        write(tmp_path / layout, "seg_train/n01/2.png", *unlabelled)
        counts, census = classes(tmp_path / layout.partition("/")[0])
        assert counts == {"n01": 3, "n02": 2}
        assert left_out(census)["images in no class's folder"][0] == len(unlabelled)


def test_classes_that_a_split_lacks_are_named(tmp_path):
    write(tmp_path, *(f"{split}/{name}/0.png" for split in ("train", "val") for name in CLASSES))
    assert not any("lack" in note for note in classes(tmp_path)[1].notes)
    write(tmp_path, "train/bird/0.png", "val/Dog/0.png")
    counts, census = classes(tmp_path)
    assert counts == {"Dog": 1, "bird": 1, **BOTH}
    assert "split folders lack classes (2: Dog in train, bird in val)" in census.notes
    # mini-ImageNet: each class is in one of them by design.
    write(tmp_path / "mini", "train/a/0.png", "val/b/0.png", "test/c/0.png")
    assert not any("lack" in note for note in classes(tmp_path / "mini")[1].notes)


def test_names_that_look_alike_are_pointed_out(tmp_path):
    names = ("cat", "cat ", "ca\u200bt", "ﬁsh", "fish", "Fish", "dog", "Dog")
    write(tmp_path, *(f"{name}/0.png" for name in names))
    counts, census = classes(tmp_path)
    assert counts == dict.fromkeys(names, 1)
    assert census.notes == (
        "'Dog' and 'dog' differ in case only and are different classes",
        "'Fish' and 'fish' and 'ﬁsh' look alike and are different classes",
        "'cat' and 'cat ' and 'ca\\u200bt' look alike and are different classes",
    )
