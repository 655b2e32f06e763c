"""Which class the images in a folder belong to, and what the class is called."""

import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from gc_nc.data.class_names import canonical_name, shown_name
from gc_nc.data.folder_census import shorten
from gc_nc.data.folder_listing import Parts, Place, show
from gc_nc.data.split_folders import split_folders
from gc_nc.errors import InputError, suggestion

#: The images in such a folder belong to its parent, if this has no other folders of images.
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
      places: {class name: the folders that contain its images}.
      strays: folders with images that do not lie in the folder of a class.
      notes: sentences on how the folders were interpreted.
    """

    places: dict[str, list[Place]]
    strays: list[Place]
    notes: tuple[str, ...]


def name_classes(root: str, places: Mapping[Parts, Place]) -> FolderClasses:
    """Finds the classes among the folders that contain images.

    A class is a folder with images in it. Folders whose paths differ only in split folders
    ("train/cat", "test/cat") are one class. "n01/images" is the class n01 if "images" is the only
    folder in n01, or if all paths end in the same name. A class has the name of its folder; if two
    folders have the same name, all classes are called by their paths.

    Args:
      root: the folder of the set, for messages.
      places: the folders by path; those without images are ignored.

    Raises:
      InputError: two folders of one class have names that only look the same, or images lie beside
        folders of images, so that it is not clear which of them is a class.
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
    """Chooses classes by name; the last part of the path suffices for one called by its path.

    Args:
      root: the folder of the set, for messages.
      classes: all classes.
      wanted: the names of the classes to choose, in any Unicode form.
      empty: the folders without images, for messages.

    Raises:
      InputError: a name belongs to none of the classes, or to several.
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
                hint = f"; the folder {name!r} exists, but contains no image that can be read"
            raise InputError(f"{root} has no folder of images {name!r}{hint}")
        if len(found) > 1:
            raise InputError(
                f"{root} has {len(found)} classes {name!r}: {shorten(found)}; use one of these"
            )
        chosen[name] = classes[found[0]]
    return chosen


class _Tree:
    """The folders that contain images, directly or further below."""

    def __init__(self, places: Mapping[Parts, Place]):
        self.places = [places[parts] for parts in sorted(places) if places[parts].images]
        #: {folder: the folders in it that contain images, directly or further below}
        self.below: dict[Parts, set[Parts]] = defaultdict(set)
        for place in self.places:
            for end in range(len(place.parts)):
                self.below[place.parts[:end]].add(place.parts[: end + 1])
        self._called_split = set().union(*map(split_folders, self.below.values()))

    def is_split(self, parts: Parts) -> bool:
        """Whether a folder is a part of the set and not a class with the name of a split.

        CIFAR-100 has a class "train": it lies beside other classes and contains no classes.
        """
        if parts not in self._called_split:
            # Some archives unpack to a folder in a folder of the same name: "seg_train/seg_train".
            return self._repeats_its_parent(parts) and self.is_split(parts[:-1])
        splits = self.below[parts[:-1]] & self._called_split
        return any(map(self._has_classes, splits)) or self.beside_splits(parts)

    def _repeats_its_parent(self, parts: Parts) -> bool:
        return parts[-2:] == parts[-1:] * 2 and self.below[parts[:-1]] == {parts}

    def is_of_split(self, parts: Parts, key: Parts) -> bool:
        """Whether images lie in a split folder and not in one of a class; `key` is their class."""
        has_inner_folder = key == self.key(parts)[:-1]
        return self.is_split(parts[:-1] if has_inner_folder else parts)

    def _has_classes(self, parts: Parts) -> bool:
        return any(
            other in self.below or other[-1].casefold() not in INNER_FOLDERS
            for other in self.below.get(parts, ())
        )

    def beside_splits(self, parts: Parts) -> bool:
        """Whether all folders of images beside it have names of splits, too."""
        return self.below[parts[:-1]] <= self._called_split

    def key(self, parts: Parts) -> Parts:
        """A path without its split folders, in composed Unicode."""
        return tuple(
            shown_name(part) for end, part in enumerate(parts, 1) if not self.is_split(parts[:end])
        )

    def is_alone(self, parts: Parts) -> bool:
        """Whether a folder is the only one in its parent, once splits at the path's end are cut."""
        while self.is_split(parts):
            parts = parts[:-1]
        return self.below[parts[:-1]] == {parts}

    def splits(self, group: Sequence[Place]) -> list[str]:
        """The names of the split folders on the paths to some folders."""
        return [
            shown_name(place.parts[end - 1])
            for place in group
            for end in range(1, len(place.parts) + 1)
            if self.is_split(place.parts[:end])
        ]


def _notes_of_looks(names: Iterable[str]) -> list[str]:
    """Notes about different classes that a reader may take for the same one."""
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
    """A name without details that are easily missed: case, ligatures, spaces, invisible signs."""
    shown = (c for c in unicodedata.normalize("NFKC", name) if unicodedata.category(c) != "Cf")
    return " ".join("".join(shown).casefold().split())


def _without_inner_folders(tree: _Tree) -> tuple[dict[Parts, Parts], list[str]]:
    """{folder: its class, as a path}, and the names that were dropped from the ends of paths."""
    keys = {place.parts: tree.key(place.parts) for place in tree.places}
    by_key = defaultdict(list)
    for parts, key in keys.items():
        by_key[key].append(parts)
    classes = [key for key in by_key if key]
    # For example n01/crops and n02/crops.
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
    """Checks that the folders of a class differ in more than the Unicode form of their names."""
    seen = {}
    for place in group:
        other = seen.setdefault(show(place.parts), place)
        if other is not place:
            raise InputError(
                f"{root} has two folders {show(place.parts)!r}, whose names look the same but are"
                " written in two forms of Unicode, so that two classes would become one; rename one"
                " or merge them"
            )


def _check_levels(root: str, tree: _Tree, keys: Mapping[Parts, Parts]) -> None:
    """Checks that no class lies in the folder of another class."""
    for place in tree.places:
        if not tree.below.get(place.parts):
            continue
        parts, key = place.parts, keys[place.parts]
        # Images beside the folders of classes are strays, which are left out.
        if not key and all(tree.beside_splits(parts[:end]) for end in range(1, len(parts) + 1)):
            continue
        for other in tree.places:
            if other.parts[: len(parts)] == parts and keys[other.parts] != key:
                raise InputError(
                    f"{root}: both {show(parts)} and {show(other.parts)} in it contain images"
                    f" ({shown_name(min(place.images))} and {shown_name(min(other.images))}), so it"
                    " is not clear which of them is a class; move the images of one of them"
                )


def _names(groups: Mapping[Parts, list[Place]]) -> tuple[dict[Parts, str], list[str]]:
    """{class as a path: its name}, and notes about the names."""
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
