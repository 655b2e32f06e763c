"""Folders of images a class: decoded and resized once, cached until a file changes."""

import os

import numpy as np
import pytest
from PIL import Image

from gc_nc.data.image_folders import read_image_folder
from gc_nc.data.published_splits import PUBLISHED_SPLITS
from gc_nc.data.sources import load_dataset
from gc_nc.errors import InputError
from gc_nc.runs.configuration import default_config
from gc_nc.runs.run_data import load_run_data


def write_image(path, value, size=(10, 7), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.full((size[1], size[0], 3), value, np.uint8)
    Image.fromarray(array).convert(mode).save(path)


def write_folder(root, classes, per_class=3):
    for c, name in enumerate(classes):
        for i in range(per_class):
            # PNG, since JPEG does not keep values.
            write_image(root / name / f"{i}.png", c * 2, mode="L" if i == 0 else "RGB")


def test_images_of_any_size_and_mode_become_rgb_squares(tmp_path):
    write_folder(tmp_path, ["b", "a"])
    (tmp_path / "a" / "notes.txt").write_text("not an image")
    (tmp_path / "empty").mkdir()
    images, labels, names = read_image_folder(tmp_path, 6)
    assert images.shape == (6, 6, 6, 3)
    assert names == ("a", "b")
    np.testing.assert_array_equal(labels, [0, 0, 0, 1, 1, 1])
    np.testing.assert_array_equal(images[:3], 2)
    np.testing.assert_array_equal(images[3:], 0)


def test_resizing_averages_rather_than_drops_pixels(tmp_path):
    stripes = np.zeros((40, 40, 3), np.uint8)
    stripes[:, ::2] = 200
    for name in "ab":
        (tmp_path / name).mkdir()
        Image.fromarray(stripes).save(tmp_path / name / "x.png")
    images, _, _ = read_image_folder(tmp_path, 4)
    np.testing.assert_allclose(images.astype(int), 100, atol=5)


def test_folders_of_parts_are_merged_and_others_left_alone(tmp_path):
    write_folder(tmp_path / "train", ["a", "b"])
    write_folder(tmp_path / "val", ["b", "c"])
    _, labels, names = read_image_folder(tmp_path, 4)
    assert names == ("a", "b", "c")
    assert np.bincount(labels).tolist() == [3, 6, 3]
    _, labels, names = read_image_folder(tmp_path, 4, classes=("c", "a"))
    assert names == ("a", "c")
    assert np.bincount(labels).tolist() == [3, 3]


def test_the_cache_serves_until_a_file_changes(tmp_path, monkeypatch):
    write_folder(tmp_path, ["a", "b"])
    first = read_image_folder(tmp_path, 5)
    decoded, opened = [], Image.open
    monkeypatch.setattr(Image, "open", lambda path: decoded.append(path) or opened(path))
    again = read_image_folder(tmp_path, 5)
    assert not decoded
    np.testing.assert_array_equal(first[0], again[0])
    write_image(tmp_path / "a" / "1.png", 77)
    os.utime(tmp_path / "a" / "1.png", (1, 1))
    changed = read_image_folder(tmp_path, 5)
    assert len(decoded) == 6
    np.testing.assert_array_equal(changed[0][1], 77)
    # Cut off by a crash: made again.
    cache = tmp_path / ".gc_nc_5.npz"
    cache.write_bytes(cache.read_bytes()[:100])
    np.testing.assert_array_equal(read_image_folder(tmp_path, 5)[0], changed[0])
    # Another choice of classes does not read the cache of this one.
    assert read_image_folder(tmp_path, 5, classes=("b",))[2] == ("b",)


def test_mini_imagenet_from_a_folder_that_holds_more(tmp_path):
    parts = PUBLISHED_SPLITS["mini_imagenet"]
    wanted = sorted(name for part in parts.values() for name in part)
    write_folder(tmp_path, [*wanted, "n00000001"], per_class=2)
    config = default_config()
    config.data.source, config.data.name = "image_folder", "mini_imagenet"
    config.data.data_dir, config.data.image_size = str(tmp_path), 8
    config.data.classes.split = "mini_imagenet"
    config.data.classes.images_per_class = 2
    data = load_run_data(config)
    assert data.source.class_names == parts["source"]
    assert data.source.train.images.shape == (64, 8, 8, 3)
    for part in ("val", "target"):
        images, labels, names = getattr(data, part)
        assert names == parts[part]
        for label, name in enumerate(names):
            assert set(images[labels == label].ravel()) == {2 * wanted.index(name)}


def test_without_a_class_split_a_share_of_each_class_is_the_test_split(tmp_path):
    write_folder(tmp_path, ["a", "b"], per_class=10)
    dataset = load_dataset("image_folder", None, str(tmp_path), image_size=4, holdout=0.3)
    assert np.bincount(dataset.test.labels).tolist() == [3, 3]
    assert np.bincount(dataset.train.labels).tolist() == [7, 7]


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda root: None, {}, "contains no folders of images"),
        (lambda root: write_folder(root, ["a", "b"]), {"image_size": None}, "needs a size"),
        (
            lambda root: write_folder(root, ["a", "b"]),
            {"classes": ("a", "bb")},
            "'bb'; did you mean 'b'",
        ),
        (lambda root: write_folder(root, ["a", "b"]), {"images_per_class": 4}, "has 3 images; 4"),
        (
            lambda root: write_folder(root, ["a", "b"]),
            {"memory_limit_gib": 1e-9, "streaming": False},
            "fits",
        ),
        (lambda root: write_folder(root, ["a", "b"], 1), {}, "class 'a' has 1 image"),
        (lambda root: root.rmdir(), {}, "is not a folder"),
    ],
)
def test_bad_folders_are_one_line(tmp_path, make, options, message):
    root = tmp_path / "images"
    root.mkdir()
    make(root)
    with pytest.raises(InputError, match=message) as error:
        load_dataset("image_folder", None, str(root), **({"image_size": 4} | options))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["text", "cut off", "damaged", "32 bits"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, kind):
    write_folder(tmp_path, ["a", "b"])
    path = tmp_path / "b" / "2.png"
    content = path.read_bytes()
    if kind == "32 bits":
        Image.fromarray(np.full((4, 4), 20_000, np.int32)).save(path, format="TIFF")
    else:
        # The second chunk's name in the third case.
        damaged = content[:37] + bytes(4) + content[41:]
        path.write_bytes({"text": b"not a png", "cut off": content[:45], "damaged": damaged}[kind])
    with pytest.raises(InputError, match=r"b/2\.png (is not an image|has 32-bit)") as error:
        read_image_folder(tmp_path, 4)
    assert "\n" not in str(error.value)


def test_hidden_files_and_links_back_are_passed_over(tmp_path):
    write_folder(tmp_path, ["a", "b"])
    (tmp_path / "a" / "._0.png").write_bytes(b"a note of the file system")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    _, labels, names = read_image_folder(tmp_path, 4)
    assert names == ("a", "b")
    assert np.bincount(labels).tolist() == [3, 3]
