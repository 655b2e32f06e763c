"""Lists everything below a folder once: images, other files and links."""

import dataclasses
import os
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from gc_nc.data.class_names import shown_name
from gc_nc.errors import InputError

#: Files with these endings, in upper or lower case, are read as images.
IMAGE_SUFFIXES = frozenset(
    [
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".png",
        ".apng",
        ".bmp",
        ".dib",
        ".webp",
        ".gif",
        ".tif",
        ".tiff",
        ".ppm",
        ".pgm",
        ".pbm",
        ".pnm",
    ]
)

# What systems and file servers put beside a user's files under names without a leading dot.
_SYSTEM = frozenset(
    [
        "thumbs.db",
        "desktop.ini",
        "__macosx",
        "$recycle.bin",
        "#recycle",
        "system volume information",
        "@eadir",
        "lost+found",
    ]
)

#: The files that gc_nc itself writes into the folder have names that begin like this.
CACHE_PREFIX = ".gc_nc_"

Parts = tuple[str, ...]


@dataclasses.dataclass
class Place:
    """A folder and the files in it, without those in its subfolders.

    Attributes:
      parts: its path below the root, () for the root.
      path: the path to it, through the links that were followed.
      images: the names of its image files.
      others: {ending: number} of its other files.
      broken_links: the names of its links whose target does not exist.
      has_folders: whether it contains folders or links to folders.
    """

    parts: Parts
    path: str
    images: list[str] = dataclasses.field(default_factory=list)
    others: Counter = dataclasses.field(default_factory=Counter)
    broken_links: list[str] = dataclasses.field(default_factory=list)
    has_folders: bool = False


@dataclasses.dataclass
class Listing:
    """The content of a folder and of all folders below it.

    Attributes:
      places: the folders, by `Place.parts`, without hidden folders and those of the system.
      repeated_links: "link -> place" for each link to a folder that is listed at another place.
      links_up: "link -> target" for each link to a folder that contains the root.
      unlisted: the folders that cannot be listed, with the reason.
      hidden: the files and folders that are hidden or belong to the system.
      special: what is neither a file nor a folder, such as a pipe.
    """

    places: dict[Parts, Place] = dataclasses.field(default_factory=dict)
    repeated_links: list[str] = dataclasses.field(default_factory=list)
    links_up: list[str] = dataclasses.field(default_factory=list)
    unlisted: list[str] = dataclasses.field(default_factory=list)
    hidden: list[str] = dataclasses.field(default_factory=list)
    special: list[str] = dataclasses.field(default_factory=list)


def list_folder(root: Path) -> Listing:
    """Lists a folder, all folders below it, and the folders that links in them lead to.

    No folder is listed twice, so links may form circles: a folder below the root is listed at its
    own place, and a folder elsewhere at the first link to it, by name.

    Raises:
      InputError: the root cannot be listed.
    """
    return _Walk(root).listing


def show(parts: Parts, *names: str) -> str:
    """A path below the root, for messages."""
    return "/".join(map(shown_name, (*parts, *names))) or "."


class _Walk:
    def __init__(self, root: Path):
        self.listing = Listing()
        self._root = os.path.realpath(root)
        # {real path: where it is listed}
        self._seen: dict[str, Parts] = {}
        # Links to folders that are still to be followed: path and parts.
        self._links: list[tuple[str, Parts]] = []
        try:
            os.scandir(root).close()
        except OSError as error:
            raise InputError(f"{root} cannot be listed ({error.strerror})") from error
        self._list(str(root), (), self._root)
        while self._links:
            links, self._links = sorted(self._links, key=lambda link: link[1]), []
            for path, parts in links:
                self._follow(path, parts)

    def _follow(self, path: str, parts: Parts) -> None:
        target = os.path.realpath(path)
        if self._root.startswith(target.rstrip(os.sep) + os.sep):
            self.listing.links_up.append(f"{show(parts)} -> {shown_name(target)}")
        else:
            self._list(path, parts, target)

    def _list(self, path: str, parts: Parts, real: str) -> None:
        """Lists a folder and the folders below it, without following links."""
        todo = [(path, parts, real)]
        while todo:
            path, parts, real = todo.pop()
            if real in self._seen:
                self.listing.repeated_links.append(f"{show(parts)} -> {show(self._seen[real])}")
                continue
            self._seen[real] = parts
            place = Place(parts, path)
            try:
                for name in self._files_noted(place):
                    below = os.path.join(path, name), (*parts, name), os.path.join(real, name)
                    todo.append(below)
            except OSError as error:
                self.listing.unlisted.append(f"{show(parts)}: {error.strerror}")
                continue
            self.listing.places[parts] = place

    def _files_noted(self, place: Place) -> Iterator[str]:
        """Notes the files of a folder and the links in it; yields the names of its folders."""
        with os.scandir(place.path) as entries:
            for entry in entries:
                name = entry.name
                if name.startswith(".") or name.casefold() in _SYSTEM:
                    if not name.startswith(CACHE_PREFIX):
                        self.listing.hidden.append(show(place.parts, name))
                elif entry.is_symlink():
                    self._note_link(place, entry)
                elif entry.is_dir(follow_symlinks=False):
                    place.has_folders = True
                    yield name
                elif entry.is_file(follow_symlinks=False):
                    _note_file(place, name)
                else:
                    self.listing.special.append(show(place.parts, name))

    def _note_link(self, place: Place, entry: os.DirEntry) -> None:
        try:
            mode = os.stat(entry.path).st_mode
        except OSError:
            place.broken_links.append(entry.name)
            return
        if stat.S_ISDIR(mode):
            place.has_folders = True
            self._links.append((entry.path, (*place.parts, entry.name)))
        elif stat.S_ISREG(mode):
            _note_file(place, entry.name)
        else:
            # Reading a pipe would wait for ever.
            self.listing.special.append(show(place.parts, entry.name))


def _note_file(place: Place, name: str) -> None:
    suffix = os.path.splitext(name)[1].lower()
    if suffix in IMAGE_SUFFIXES:
        place.images.append(name)
    else:
        place.others[shown_name(suffix) or "no ending"] += 1
