"""Cases D1 to D8 and their kinds: folders as strangers have them, nothing lost without a word."""

import os
import unicodedata

import numpy as np
import pytest
from PIL import Image

from gc_nc.data.class_splits import ClassSplit, divide_by_class
from gc_nc.data.datasets import make_dataset
from gc_nc.data.image_folders import find_images, read_image_folder
from gc_nc.data.sources import load_dataset
from gc_nc.errors import InputError

DECOMPOSED = unicodedata.normalize("NFD", "café")


def write(root, *names):
    """Grey images of 4x4 pixels; other endings get a line of text."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() in (".txt", ".heic", ".db", "", ".json"):
            path.write_text("no image")
        else:
            Image.new("L", (4, 4), 100).save(path)


def classes(root, **options):
    """{class: number of images} and the census."""
    found, census = find_images(root, **options)
    counts = {name: len(files) for name, files in found.items()}
    assert census.classes == len(counts)
    assert census.images == sum(counts.values())
    return counts, census


def left_out(census):
    return {part.reason: (part.count, part.examples) for part in census.skipped}


def assert_one_line(error, *contained):
    message = str(error.value)
    assert "\n" not in message
    for text in contained:
        assert text in message


def test_d1_classes_of_one_name_below_other_folders_stay_apart(tmp_path):
    for alphabet in ("Greek", "Latin", "Tagalog"):
        for number in (1, 2):
            write(tmp_path, *(f"{alphabet}/character0{number}/{i}.png" for i in range(3)))
    counts, census = classes(tmp_path)
    assert len(counts) == 6
    assert counts["Tagalog/character02"] == 3
    assert any("Greek/character01" in note for note in census.notes)
    _, labels, _ = read_image_folder(tmp_path, 4)
    assert np.bincount(labels).tolist() == [3] * 6
    # By its last name where that says which, and never one of several.
    write(tmp_path, "Latin/character03/0.png")
    assert classes(tmp_path, classes=("character03",))[0] == {"character03": 1}
    with pytest.raises(InputError) as error:
        find_images(tmp_path, ("character01",))
    assert_one_line(error, "3 classes 'character01'", "Greek/character01")


def test_d1_classes_of_one_name_below_splits_are_one(tmp_path):
    for split in ("Train", "val", "test"):
        write(tmp_path / split, "Greek/a/0.png", "Latin/a/0.png", "Latin/b/0.png")
    counts, census = classes(tmp_path)
    assert counts == {"Greek/a": 3, "Latin/a": 3, "Latin/b": 3}
    assert "classes of one name in Train, test, val are one class" in census.notes
    # Within each class.
    write(tmp_path / "other", "a/train/0.png", "a/test/1.png", "b/train/0.png")
    assert classes(tmp_path / "other")[0] == {"a": 2, "b": 1}


def test_a_class_may_be_called_as_a_split_is(tmp_path):
    """CIFAR-100 has a class "train"."""
    for place in ("flat", "splits/train", "splits/test"):
        write(tmp_path / place, *(f"{name}/0.png" for name in ("bus", "train", "whale")))
    write(tmp_path / "inner", *(f"{name}/images/0.png" for name in ("bus", "train", "whale")))
    for place, count in (("flat", 1), ("splits", 2), ("inner", 1)):
        expected = {"bus": count, "train": count, "whale": count}
        assert classes(tmp_path / place)[0] == expected


def test_d2_what_is_left_out_is_named_and_counted(tmp_path, capsys):
    for name in "abc":
        write(tmp_path, f"{name}/0.png", f"{name}/1.png")
    write(tmp_path, "e/0.tif", "e/1.TIFF", *(f"f/{i}.ppm" for i in range(5)), "f/5.png", "f/6.PNG")
    write(tmp_path, "stray.png", "other stray.jpg", "g/0.heic", "g/notes.txt", "readme")
    write(tmp_path, ".DS_Store.txt", "a/._0.png", "b/Thumbs.db", "__MACOSX/a/0.png")
    (tmp_path / "d").mkdir()
    (tmp_path / "A_link").symlink_to("a")
    counts, census = classes(tmp_path)
    assert counts == {"a": 2, "b": 2, "c": 2, "e": 2, "f": 7}
    assert left_out(census) == {
        "folders without an image that can be read": (2, ("d", "g: 1 .heic and 1 .txt")),
        "images in no class's folder": (2, ("other stray.jpg", "stray.png")),
        "links to folders that are read at their own place": (1, ("A_link -> a",)),
        "files with another ending": (3, ("1 .heic", "1 .txt", "1 no ending")),
        "hidden or system files": (4, (".DS_Store.txt", "__MACOSX", "a/._0.png", "b/Thumbs.db")),
    }
    # Once a reading, in one line; a second reading finds the same, not its own cache.
    lines = []
    for _ in range(2):
        dataset = load_dataset("image_folder", None, str(tmp_path), image_size=4)
        lines.append(capsys.readouterr().err)
        assert dataset.census == census
    assert lines == [f"{census.line()}\n"] * 2
    assert census.line().startswith(f"{tmp_path}: 15 images of 5 classes, 2 to 7 a class; left out")
    for name in ("d", "g: 1 .heic and 1 .txt", "A_link -> a", "stray.png"):
        assert name in census.line()
    split = ClassSplit("random", counts=(3, 2))
    assert divide_by_class(dataset, split).source.census == census


def test_a_class_without_images_is_named_where_it_is_asked_for(tmp_path):
    write(tmp_path, "a/0.png", "b/0.png", "c/0.png", "empty/0.heic")
    with pytest.raises(InputError) as error:
        find_images(tmp_path, ("a", "empty"))
    assert_one_line(error, "'empty'", "contains no image that can be read")
    counts, census = classes(tmp_path, classes=("b", "a"))
    assert counts == {"a": 1, "b": 1}
    assert left_out(census)["images that are not asked for"] == (1, ("of 1 classes",))


def test_a_folder_of_one_class_says_which(tmp_path):
    write(tmp_path, "a/0.png", "b/0.heic", "c.png")
    with pytest.raises(InputError) as error:
        load_dataset("image_folder", None, str(tmp_path), image_size=4)
    assert_one_line(error, "1 image of 1 class", "b: 1 .heic", "c.png", "at least 2 classes")


def test_unlabelled_test_images_are_no_class(tmp_path):
    write(tmp_path, "train/cat/0.png", "train/dog/0.png", "test/0.png", "test/1.png")
    counts, census = classes(tmp_path)
    assert counts == {"cat": 1, "dog": 1}
    assert left_out(census)["images in no class's folder"] == (2, ("test/0.png", "test/1.png"))
    # Whatever lies beside the splits.
    write(tmp_path, "extra/0.png", "val/images/0.png")
    counts, census = classes(tmp_path)
    assert counts == {"cat": 1, "dog": 1, "extra": 1}
    assert left_out(census)["images in no class's folder"][0] == 3
    (tmp_path / "flat").mkdir()
    write(tmp_path / "flat", "0.png", "train/1.png")
    with pytest.raises(InputError) as error:
        find_images(tmp_path / "flat")
    assert_one_line(error, "no class's folder", "0.png", "train/1.png")


def test_images_beside_the_folders_of_a_class_are_one_line(tmp_path):
    write(tmp_path, "a/0.png", "a/more/1.png", "b/0.png", "c/0.png")
    with pytest.raises(InputError) as error:
        find_images(tmp_path)
    assert_one_line(error, "both a and a/more", "move the images")


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    write(tmp_path, "a/0.png", "b/0.png", "locked/0.png")
    scan = os.scandir

    def refuse(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    counts, census = classes(tmp_path)
    assert counts == {"a": 1, "b": 1}
    locked = (1, ("locked: Permission denied",))
    assert left_out(census)["folders that cannot be listed"] == locked


def test_links_are_classes_of_their_own_or_named(tmp_path):
    root = tmp_path / "set"
    write(tmp_path, "store/x/0.png", "store/x/1.png", "store/y/0.png", "set/b/0.png")
    write(root, ".store/hidden/0.png")
    links = {
        # Elsewhere: classes, under the names of the links, however often they come by.
        "linked": "../store/x",
        "linked again": "../store/x",
        "y": "../store/y",
        "kept": ".store/hidden",
        # Here: named. The first by name must not take the place of the folder.
        "a_link": "b",
        "around": "..",
        "b/circle": ".",
        "b/up": "..",
    }
    for name, target in links.items():
        (root / name).symlink_to(target)
    (tmp_path / "store/x/back").symlink_to(root)
    (root / "b/1.png").symlink_to("../../store/x/0.png")
    counts, census = classes(root)
    assert counts == {"b": 2, "kept": 1, "linked": 2, "y": 1}
    out = left_out(census)
    assert out["links to folders that are read at their own place"] == (
        5,
        ("a_link -> b", "b/circle -> b", "b/up -> .", "linked again -> linked", "linked/back -> ."),
    )
    assert out["links to a folder around this one"] == (1, (f"around -> {tmp_path}",))
    # Through a link, the root is the same set.
    (tmp_path / "link to set").symlink_to(root)
    assert classes(tmp_path / "link to set")[0] == counts


@pytest.mark.parametrize("link", ["b/x.png", "c", "b/loop.png"])
def test_d3_a_link_that_leads_nowhere_is_one_line(tmp_path, link):
    write(tmp_path, "a/0.png", "b/0.png")
    (tmp_path / link).symlink_to("loop.png" if "loop" in link else "/nowhere/x.png")
    for streaming in (True, False):
        with pytest.raises(InputError) as error:
            load_dataset("image_folder", None, str(tmp_path), image_size=4, streaming=streaming)
        assert_one_line(error, str(tmp_path / link), "a link that leads nowhere")
    # It does not matter to other classes.
    write(tmp_path, "z/0.png")
    counts, census = classes(tmp_path, classes=("a", "z"))
    assert counts == {"a": 1, "z": 1}
    assert left_out(census)["links that lead nowhere"] == (1, (link,))


def test_a_pipe_is_not_waited_for(tmp_path):
    write(tmp_path, "a/0.png", "b/0.png")
    os.mkfifo(tmp_path / "b" / "1.png")
    counts, census = classes(tmp_path)
    assert counts == {"a": 1, "b": 1}
    assert left_out(census)["neither files nor folders"] == (1, ("b/1.png",))


@pytest.mark.parametrize(("stored", "asked"), [(DECOMPOSED, "café"), ("café", DECOMPOSED)])
def test_d4_names_are_compared_composed(tmp_path, stored, asked):
    for name in (stored, "b", "c", "d"):
        write(tmp_path, *(f"{name}/{i}.png" for i in range(3)))
    counts, _ = classes(tmp_path, classes=(asked, "b"))
    assert counts == {"b": 3, "café": 3}
    dataset = load_dataset("image_folder", None, str(tmp_path), image_size=4)
    assert dataset.class_names == ("b", "c", "café", "d")
    for split in (
        ClassSplit("names", (asked, "b"), (), ("c", "d")),
        ClassSplit("names", ("c", "d"), (), (asked, "b")),
        ClassSplit("names", (asked, "b")),
    ):
        divided = divide_by_class(dataset, split)
        parts = divided.source.class_names + divided.target.class_names
        assert sorted(parts) == ["b", "c", "café", "d"]
    # Of a set from elsewhere, whose names are as they were written there.
    arrays = np.zeros((8, 2, 2), np.uint8), np.arange(8) % 4
    other = make_dataset("other", arrays, arrays, 4, (stored, "b", "c", "d"))
    assert divide_by_class(other, split).source.class_names == ("café", "b")


def test_d4_two_names_that_look_the_same_are_one_line_unless_in_two_splits(tmp_path):
    write(tmp_path, "train/café/0.png", f"test/{DECOMPOSED}/0.png", "train/b/0.png")
    assert classes(tmp_path)[0] == {"b": 1, "café": 2}
    write(tmp_path, f"train/{DECOMPOSED}/0.png")
    with pytest.raises(InputError) as error:
        find_images(tmp_path)
    assert_one_line(error, "two folders 'train/café'", "two classes would become one")


def test_names_that_differ_in_case_are_said_to_differ(tmp_path):
    write(tmp_path, "train/Cat/0.png", "val/cat/0.png", "train/dog/0.png")
    counts, census = classes(tmp_path)
    assert counts == {"Cat": 1, "cat": 1, "dog": 1}
    assert any("'Cat' and 'cat'" in note for note in census.notes)


def test_names_of_any_bytes_stay_on_one_line(tmp_path):
    write(tmp_path, "a\nb/0.png", "c/0.png", "d/x\ny.txt")
    os.makedirs(os.fsencode(tmp_path) + b"/\xff")
    with open(os.fsencode(tmp_path) + b"/\xff/0.png", "wb") as file:
        file.write(b"no image")
    counts, census = classes(tmp_path)
    assert counts == {"\\xff": 1, "a\\nb": 1, "c": 1}
    assert "\n" not in census.line()
    census.line().encode()
    with pytest.raises(InputError) as error:
        read_image_folder(tmp_path, 4)
    assert_one_line(error, r"\xff/0.png is not an image")


@pytest.mark.parametrize("shape", [(6, 1), (6,)])
def test_d7_npz_labels_of_one_column(tmp_path, shape):
    images = np.zeros((6, 4, 4), np.uint8)
    labels = np.arange(6) % 3
    column = labels.reshape(shape)
    split = (np.arange(6) > 2).astype(int).reshape(shape)
    np.savez(tmp_path / "a.npz", x_train=images, y_train=column, x_test=images, y_test=column)
    np.savez(tmp_path / "b.npz", images=images, labels=column, split=split)
    for name, expected in (("a", labels), ("b", labels[:3])):
        dataset = load_dataset("npz", None, str(tmp_path / f"{name}.npz"))
        np.testing.assert_array_equal(dataset.train.labels, expected.astype(np.int32), strict=True)


def test_d7_labels_of_other_shapes_name_the_remedy(tmp_path):
    images = np.zeros((6, 4, 4), np.uint8)
    for labels, remedy in (
        (np.eye(6, dtype=int), "argmax"),
        (np.arange(6)[None], "(6,) or (6, 1)"),
        (np.arange(6.0), "astype(int)"),
    ):
        arrays = {"x_train": images, "y_train": labels, "x_test": images, "y_test": labels}
        np.savez(tmp_path / "x.npz", **arrays)
        with pytest.raises(InputError) as error:
            load_dataset("npz", None, str(tmp_path / "x.npz"))
        assert_one_line(error, remedy)


def test_d8_folders_within_the_class_folders(tmp_path):
    """Tiny ImageNet: train/n01/images, and val/images for all classes."""
    for name in ("n01", "n02", "n03"):
        write(tmp_path, *(f"train/{name}/images/{name}_{i}.jpeg" for i in range(3)))
        write(tmp_path, f"train/{name}/{name}_boxes.txt")
    write(tmp_path, "val/images/val_0.jpeg", "val/val_annotations.txt", "test/images/test_0.jpeg")
    counts, census = classes(tmp_path)
    assert counts == {"n01": 3, "n02": 3, "n03": 3}
    assert any("'images'" in note or " images " in note for note in census.notes)
    strays = (2, ("test/images/test_0.jpeg", "val/images/val_0.jpeg"))
    assert left_out(census)["images in no class's folder"] == strays
    dataset = load_dataset("image_folder", None, str(tmp_path), image_size=4)
    assert dataset.class_names == ("n01", "n02", "n03")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        # Any name, where all class folders have it.
        (["n1/crops/0.png", "n2/crops/0.png"], {"n1": 1, "n2": 1}),
        # A name that says so, of some.
        (["n1/images/0.png", "n2/0.png"], {"n1": 1, "n2": 1}),
        (["n1/images/0.png", "n1/1.png", "n2/0.png"], {"n1": 2, "n2": 1}),
        # A class, beside others.
        (["images/0.png", "text/0.png"], {"images": 1, "text": 1}),
        # Neither: both are kept apart.
        (
            ["n1/images/0.png", "n1/masks/0.png", "n2/images/0.png", "n2/masks/0.png"],
            {"n1/images": 1, "n1/masks": 1, "n2/images": 1, "n2/masks": 1},
        ),
        # Around all classes.
        (["images/a/0.png", "images/b/0.png"], {"a": 1, "b": 1}),
        (["train/images/a/0.png", "val/images/a/1.png", "val/images/b/0.png"], {"a": 2, "b": 1}),
        (["ds/ds/train/a/0.png", "ds/ds/test/a/1.png", "ds/ds/test/b/0.png"], {"a": 2, "b": 1}),
        (["animals/cat/0.png", "vehicles/car/0.png"], {"car": 1, "cat": 1}),
    ],
)
def test_nested_layouts(tmp_path, files, expected):
    write(tmp_path, *files)
    assert classes(tmp_path)[0] == expected
