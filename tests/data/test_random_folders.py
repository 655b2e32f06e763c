"""Random folders of images against a plain walk: the same census, or one line that is deserved."""

import os
import tempfile
import unicodedata
from collections import Counter, defaultdict
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from gc_nc.data.image_folders import find_images
from gc_nc.errors import InputError

# Thousands of files are made and removed, which some disks take long for.
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None

SPLITS = ("train", "val", "Test")
ENDINGS = (".png", ".JPG", ".ppm", ".Tif", ".gif", ".webp")

# Names in several scripts; some look the same, in two forms of Unicode.
NAMES = st.sampled_from(
    [
        *(
            "cat",
            "Cat",
            "n01",
            "a b",
            "x.y",
            "café",
            "cafe\u0301",
            "Ångström",
            "A\u030angstro\u0308m",
        ),
        *("日本", "가", "\u1100\u1161", "кот", "й", "и\u0306", "עברית", "हिन्दी", "😀", "train"),
    ]
)


@st.composite
def trees(draw):
    """Files, empty folders and {link: target}, by their paths below the root."""
    files, empty, links = [], [], {}

    def fill(place, most):
        for i in range(draw(st.integers(0, most))):
            files.append(f"{place}{i}{draw(st.sampled_from(ENDINGS))}")
        if draw(st.integers(0, 3)) == 0:
            files.append(place + draw(st.sampled_from([".hidden.png", "Thumbs.db", "notes.txt"])))
            files.append(place + draw(st.sampled_from(["LICENSE", "x.json", "._0.png", "a.heic"])))

    layout = draw(st.sampled_from(["flat", "splits", "nested", "nested splits", "inner"]))
    above = [""]
    if "splits" in layout:
        some = st.lists(st.sampled_from(SPLITS), min_size=1, max_size=3, unique=True)
        above = [f"{split}/" for split in draw(some)]
    if "nested" in layout:
        groups = draw(st.lists(NAMES, min_size=1, max_size=2, unique=True))
        above = [f"{place}{group}/" for place in above for group in groups]
    for place in above:
        for name in draw(st.lists(NAMES, min_size=1, max_size=4, unique=True)):
            fill(f"{place}{name}/{'images/' * (layout == 'inner')}", 3)
            if draw(st.integers(0, 5)) == 0:
                empty.append(f"{place}{name}/more")
        empty += draw(st.lists(st.sampled_from([f"{place}e1", f"{place}e2"]), max_size=2))
        if draw(st.integers(0, 5)) == 0:
            fill(place, 2)
    for name in draw(st.lists(st.sampled_from(["0_link", "cat/z_link", "z_link"]), max_size=2)):
        targets = ["outside/a", "outside/a", "outside/b", "", "set", "set/cat", "set/gone.png"]
        links[name] = draw(st.sampled_from(targets))
    return files, empty, links


def build(top, tree):
    """Writes a tree; its files are empty, since nothing opens them."""
    root = top / "set"
    files, empty, links = tree
    for file in ["outside/a/0.png", "outside/b/0.png", *(f"set/{file}" for file in files)]:
        (top / file).parent.mkdir(parents=True, exist_ok=True)
        (top / file).touch()
    for place in ("", *empty):
        (root / place).mkdir(parents=True, exist_ok=True)
    for name, target in links.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).symlink_to(top / target)
    return root


def composed(name):
    return unicodedata.normalize("NFC", name)


class Oracle:
    """What a plain walk sees of a folder, and the rules of docs/data.md taken literally."""

    def __init__(self, root):
        self.images = defaultdict(list)
        self.counts = Counter()
        self.broken = 0
        self.empty = set()
        listed, links = set(), [(str(root), ())]
        while links:
            path, parts = links.pop(0)
            real = os.path.realpath(path)
            if os.path.realpath(root).startswith(real + os.sep):
                self.counts["links to a folder around this one"] += 1
            elif real in listed:
                self.counts["links to folders that are read at their own place"] += 1
            else:
                for place, folders, files in os.walk(path):
                    listed.add(os.path.realpath(place))
                    below = (*parts, *Path(place).relative_to(path).parts)
                    links += self._note(place, below, folders, files)
            links.sort(key=lambda link: link[1])

    def _note(self, place, parts, folders, files):
        links = []
        for name in (*folders, *files):
            path = os.path.join(place, name)
            if name.startswith(".") or name == "Thumbs.db":
                self.counts["hidden or system files"] += 1
            elif not os.path.exists(path):
                self.broken += 1
            elif os.path.isdir(path):
                links += [(path, (*parts, name))] if os.path.islink(path) else []
            elif name.lower().endswith(tuple(map(str.lower, ENDINGS))):
                self.images[parts].append(path)
            else:
                self.counts["files with another ending"] += 1
        if parts and not folders and parts not in self.images:
            self.counts["folders without an image that can be read"] += 1
            self.empty.add("/".join(map(composed, parts)))
        return links

    def beside_splits(self, parts):
        """Whether all folders of images beside a folder are called as splits are."""
        beside = {p[: len(parts)] for p in self.images if p[: len(parts) - 1] == parts[:-1]}
        return all(
            p[-1].lower() in ("train", "val", "test") for p in beside if len(p) == len(parts)
        )

    def is_split(self, parts):
        """Whether it is called so, and no class: a split beside it, or it, has classes."""
        names, depth = ("train", "val", "test"), len(parts)
        has_classes = any(
            p[: depth - 1] == parts[:-1]
            and p[depth - 1].lower() in names
            and p[depth:] != ("images",)
            for p in self.images
            if len(p) > depth
        )
        return parts[-1].lower() in names and (has_classes or self.beside_splits(parts))

    def is_alone(self, parts):
        while self.is_split(parts):
            parts = parts[:-1]
        around = len(parts) - 1
        beside = [p for p in self.images if p[:around] == parts[:-1] and len(p) > around]
        return all(p[: around + 1] == parts for p in beside)

    def keys(self):
        """{folder of images: its class, as a path}."""
        keys = {
            parts: tuple(
                composed(part)
                for end, part in enumerate(parts, 1)
                if not self.is_split(parts[:end])
            )
            for parts in self.images
        }
        classes = {key for key in keys.values() if key}
        ends = {key[-1] for key in classes}
        same = len(ends) == 1 and len(classes) > 1 and min(map(len, classes)) > 1
        for key in classes:
            group = [parts for parts in keys if keys[parts] == key]
            if (same or key[-1] == "images") and all(map(self.is_alone, group)):
                keys |= {parts: key[:-1] for parts in group}
        return keys

    def faults(self, keys):
        """Why the folder deserves a line and no census."""
        looks = Counter(tuple(map(composed, parts)) for parts in keys)
        mixed = any(
            b[: len(a)] == a
            and keys[a] != keys[b]
            and (keys[a] or not all(self.beside_splits(a[:end]) for end in range(1, len(a) + 1)))
            for a in keys
            for b in keys
        )
        lookalike = any(
            looks[tuple(map(composed, parts))] > 1 for parts, key in keys.items() if key
        )
        return {
            "leads nowhere": bool(self.broken),
            "look the same": lookalike,
            "not clear which": mixed,
            "contains no folders of images": not any(keys.values()),
        }


OUTCOMES = Counter()


# The same examples at each run. A slow machine is no fault, and what is drawn is small.
@settings(
    max_examples=200,
    derandomize=True,
    database=None,
    deadline=timedelta(seconds=10),
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow],
)
@given(tree=trees())
def check_against_the_oracle(tree):
    with tempfile.TemporaryDirectory(dir=MEMORY) as top:
        root = build(Path(top), tree)
        oracle = Oracle(root)
        keys = oracle.keys()
        faults = oracle.faults(keys)
        if any(faults.values()):
            with pytest.raises(InputError) as error:
                find_images(root)
            line = str(error.value)
            assert "\n" not in line
            assert any(deserved and text in line for text, deserved in faults.items()), line
            OUTCOMES["line"] += 1
            return
        found, census = find_images(root)
        classes = defaultdict(set)
        for parts, files in oracle.images.items():
            classes[keys[parts]] |= set(files)
        strays = classes.pop((), ())
        assert {frozenset(map(str, files)) for files in found.values()} == set(
            map(frozenset, classes.values())
        )
        assert len(found) == census.classes == len(classes)
        assert census.images == sum(map(len, classes.values()))
        assert (census.smallest, census.largest) == (
            min(map(len, classes.values())),
            max(map(len, classes.values())),
        )
        expected = oracle.counts + Counter({"images in no class's folder": len(strays)})
        assert {part.reason: part.count for part in census.skipped} == dict(+expected)
        for part in census.skipped:
            if part.reason == "folders without an image that can be read":
                assert {name.partition(": ")[0] for name in part.examples} == oracle.empty
        assert all(name == composed(name) for name in found)
        OUTCOMES["census"] += 1
        OUTCOMES["skips"] += bool(census.skipped)
        OUTCOMES["links followed"] += any("link" in str(f) for fs in found.values() for f in fs)
        OUTCOMES["merged"] += any("are one class" in note for note in census.notes)
        OUTCOMES["by path"] += any("called by their paths" in note for note in census.notes)
        OUTCOMES["inner"] += any("around them" in note for note in census.notes)


def test_random_folders_have_the_census_of_a_plain_walk_or_one_line():
    OUTCOMES.clear()
    check_against_the_oracle()
    # Of what this is about there were examples enough.
    assert OUTCOMES["census"] + OUTCOMES["line"] == 200
    assert OUTCOMES["census"] > 100, OUTCOMES
    assert min(OUTCOMES.values()) >= 5, OUTCOMES
