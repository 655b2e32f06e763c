"""Which class a folder's images belong to, and what it is called."""

import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from gc_nc.data.class_names import canonical_name, shown_name
from gc_nc.data.folder_census import shorten
from gc_nc.data.folder_listing import Parts, Place, show
from gc_nc.data.split_folders import split_folders
from gc_nc.errors import InputError, suggestion

#: Folders that hold what belongs to the folder around them, where they are the only ones in it.
INNER_FOLDERS = frozenset(
    [
        "image",
        "images",
        "img",
        "imgs",
        "jpeg",
        "jpegs",
        "jpg",
        "photo",
        "photos",
        "picture",
        "pictures",
        "png",
    ]
)


class FolderClasses(NamedTuple):
    """The classes of a folder of images.

    Attributes:
      places: {name: the folders that hold its images}.
      strays: folders with images that lie in no class's folder.
      notes: sentences on what was taken for what.
    """

    places: dict[str, list[Place]]
    strays: list[Place]
    notes: tuple[str, ...]


def name_classes(root: str, places: Mapping[Parts, Place]) -> FolderClasses:
    """The classes that folders with images make.

    A class is a folder that images lie in. Folders of one path but for split folders ("train/cat",
    "test/cat") are one class. "n01/images" is the class n01 where "images" is all that is in n01,
    or where all paths end so. A class is called by its folder's name or, if two have that, all are
    called by their paths.

    Args:
      root: for messages.
      places: by path; those without images do not matter.

    Raises:
      InputError: two folders of one class whose names only look the same, or images beside folders
        of images where it cannot be told what the class is.
    """
    tree = _Tree(places)
    keys, inner = _without_inner_folders(tree)
    around = {key[:end] for key in keys.values() for end in range(1, len(key))}
    strays = [p for p, key in keys.items() if key in around and tree.is_of_split(p, key)]
    keys |= dict.fromkeys(strays, ())
    groups: dict[Parts, list[Place]] = defaultdict(list)
    for place in tree.places:
        groups[keys[place.parts]].append(place)
    strays = groups.pop((), [])
    for group in groups.values():
        _check_look(root, group)
    _check_levels(root, tree, keys)
    names, notes = _names(groups)
    if inner:
        notes.append(f"images in folders called {shorten(inner)} belong to the folder around them")
    merged = {part for group in groups.values() if len(group) > 1 for part in tree.splits(group)}
    if merged:
        notes.append(f"classes of one name in {', '.join(sorted(merged))} are one class")
        lacking = [
            f"{names[key]} in {part}"
            for key, group in sorted(groups.items())
            if (own := tree.splits(group))
            for part in sorted(merged.difference(own))
        ]
        if lacking:
            notes.append(f"split folders lack classes ({len(lacking)}: {shorten(lacking)})")
    notes += _notes_of_looks(names.values())
    return FolderClasses({names[key]: groups[key] for key in groups}, strays, tuple(notes))


def choose_classes(
    root: str, classes: Mapping[str, list[Place]], wanted: Sequence[str], empty: Collection[str]
) -> dict[str, list[Place]]:
    """The classes of some names, which may be the last part of a path that a class is called by.

    Args:
      root: for messages.
      classes: all.
      wanted: their names, in any Unicode form.
      empty: folders without images, for messages.

    Raises:
      InputError: there is none of this name, or there are two.
    """
    by_last = defaultdict(list)
    for name in classes:
        by_last[name.rpartition("/")[2]].append(name)
    chosen = {}
    for name in map(canonical_name, wanted):
        found = [name] if name in classes else by_last[name]
        if not found:
            hint = suggestion(name, classes) or f"; it has {len(classes)} others"
            if name in empty:
                hint = f"; the folder {name!r} is there, without an image that can be read"
            raise InputError(f"{root} has no folder of images {name!r}{hint}")
        if len(found) > 1:
            raise InputError(
                f"{root} has {len(found)} classes {name!r}: {shorten(found)}; name them so"
            )
        chosen[name] = classes[found[0]]
    return chosen


class _Tree:
    """The folders that hold images, here or further below."""

    def __init__(self, places: Mapping[Parts, Place]):
        self.places = [places[parts] for parts in sorted(places) if places[parts].images]
        #: {folder: those in it that hold images, here or further below}
        self.below: dict[Parts, set[Parts]] = defaultdict(set)
        for place in self.places:
            for end in range(len(place.parts)):
                self.below[place.parts[:end]].add(place.parts[: end + 1])
        self._called_split = set().union(*map(split_folders, self.below.values()))

    def is_split(self, parts: Parts) -> bool:
        """Whether a folder holds a part of the set and is not a class called so.

        CIFAR-100 has a class "train": beside other classes, and no split has classes in it.
        """
        if parts not in self._called_split:
            # As archives unpack in a folder of their own name: "seg_train/seg_train".
            return self._repeats_its_parent(parts) and self.is_split(parts[:-1])
        splits = self.below[parts[:-1]] & self._called_split
        return any(map(self._has_classes, splits)) or self.beside_splits(parts)

    def _repeats_its_parent(self, parts: Parts) -> bool:
        return parts[-2:] == parts[-1:] * 2 and self.below[parts[:-1]] == {parts}

    def is_of_split(self, parts: Parts, key: Parts) -> bool:
        """Whether a split folder, not a class, is what images lie in; `key` is their class."""
        has_inner_folder = key == self.key(parts)[:-1]
        return self.is_split(parts[:-1] if has_inner_folder else parts)

    def _has_classes(self, parts: Parts) -> bool:
        return any(
            other in self.below or other[-1].casefold() not in INNER_FOLDERS
            for other in self.below.get(parts, ())
        )

    def beside_splits(self, parts: Parts) -> bool:
        """Whether all folders of images beside it are called as splits are, too."""
        return self.below[parts[:-1]] <= self._called_split

    def key(self, parts: Parts) -> Parts:
        """A path without its splits, composed."""
        return tuple(
            shown_name(part) for end, part in enumerate(parts, 1) if not self.is_split(parts[:end])
        )

    def is_alone(self, parts: Parts) -> bool:
        """Whether what remains of a path without splits at its end is all that the folder has."""
        while self.is_split(parts):
            parts = parts[:-1]
        return self.below[parts[:-1]] == {parts}

    def splits(self, group: Sequence[Place]) -> list[str]:
        """Names of the split folders on the way to some folders."""
        return [
            shown_name(place.parts[end - 1])
            for place in group
            for end in range(1, len(place.parts) + 1)
            if self.is_split(place.parts[:end])
        ]


def _notes_of_looks(names: Iterable[str]) -> list[str]:
    """Of classes that somebody may take for one."""
    alike = defaultdict(list)
    for name in sorted(names):
        alike[_look(name)].append(name)
    notes = []
    for same in (same for same in alike.values() if len(same) > 1):
        case = len({name.lower() for name in same}) == 1
        how = "differ in case only" if case else "look alike"
        notes.append(f"{' and '.join(map(repr, same))} {how} and are different classes")
    return notes


def _look(name: str) -> str:
    """A name without what is hardly seen: case, ligatures, spaces and signs that do not show."""
    shown = (c for c in unicodedata.normalize("NFKC", name) if unicodedata.category(c) != "Cf")
    return " ".join("".join(shown).casefold().split())


def _without_inner_folders(tree: _Tree) -> tuple[dict[Parts, Parts], list[str]]:
    """{folder: its class, as a path}, and the names that were left out at the end of a path."""
    keys = {place.parts: tree.key(place.parts) for place in tree.places}
    by_key = defaultdict(list)
    for parts, key in keys.items():
        by_key[key].append(parts)
    classes = [key for key in by_key if key]
    # As in n01/crops, n02/crops.
    same_ends = len({key[-1] for key in classes}) == 1 and all(len(key) > 1 for key in classes)
    shared = {key[-1] for key in classes} if same_ends and len(classes) > 1 else set()
    inner = set()
    for key, group in by_key.items():
        if (
            key
            and (key[-1].casefold() in INNER_FOLDERS or key[-1] in shared)
            and all(tree.is_alone(parts) for parts in group)
        ):
            inner.add(key[-1])
            keys |= {parts: key[:-1] for parts in group}
    return keys, sorted(inner)


def _check_look(root: str, group: Sequence[Place]) -> None:
    """That the folders of a class differ by more than the Unicode form of their names."""
    seen = {}
    for place in group:
        other = seen.setdefault(show(place.parts), place)
        if other is not place:
            raise InputError(
                f"{root} has two folders {show(place.parts)!r}, whose names look the same and are"
                " written in two forms of Unicode: two classes would become one; rename one or"
                " merge them"
            )


def _check_levels(root: str, tree: _Tree, keys: Mapping[Parts, Parts]) -> None:
    """That no class lies within another's folder."""
    for place in tree.places:
        if not tree.below.get(place.parts):
            continue
        parts, key = place.parts, keys[place.parts]
        # Beside folders of classes: strays, which are left out.
        if not key and all(tree.beside_splits(parts[:end]) for end in range(1, len(parts) + 1)):
            continue
        for other in tree.places:
            if other.parts[: len(parts)] == parts and keys[other.parts] != key:
                raise InputError(
                    f"{root}: both {show(parts)} and {show(other.parts)} in it hold images (as"
                    f" {shown_name(min(place.images))} and {shown_name(min(other.images))}), so it"
                    " is not clear which of them is a class; move the images of one of them"
                )


def _names(groups: Mapping[Parts, list[Place]]) -> tuple[dict[Parts, str], list[str]]:
    """{class as a path: what it is called} and what there is to say of it."""
    by_last = defaultdict(list)
    for key in sorted(groups):
        by_last[key[-1]].append("/".join(key))
    same = next((paths for paths in by_last.values() if len(paths) > 1), None)
    if same is None:
        return {key: key[-1] for key in groups}, []
    common = 0
    while len({key[: common + 1] for key in groups}) == 1:
        common += 1
    note = f"classes are called by their paths, since folders share a name ({shorten(same, 2)})"
    return {key: "/".join(key[common:]) for key in groups}, [note]
