"""Reads a folder with one folder of images per class; decoded once and cached, or streamed."""

import hashlib
import json
import os
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from absl import logging
from tqdm import tqdm

from gc_nc.data.class_names import canonical_name, shown_name
from gc_nc.data.folder_census import FolderCensus, Skipped, shorten, skipped_for
from gc_nc.data.folder_classes import choose_classes, name_classes
from gc_nc.data.folder_listing import (
    CACHE_PREFIX,
    IMAGE_SUFFIXES,
    Listing,
    Parts,
    Place,
    list_folder,
    show,
)
from gc_nc.data.image_files import read_square
from gc_nc.data.streamed_images import StreamedImages
from gc_nc.errors import InputError
from gc_nc.files import replacing

# The version of how files become pixels; a change makes all caches anew.
_READING = 3


def find_images(
    folder: Path, classes: Sequence[str] | None = None, images_per_class: int | None = None
) -> tuple[dict[str, list[Path]], FolderCensus]:
    """{class: its image files, by name} and a census; docs/data.md describes the rules.

    The folder that an image lies in is its class (`name_classes`). The folders of classes may also
    lie below train/, val/ and test/, which are merged.

    Args:
      folder: the folder of the set.
      classes: the classes whose images are wanted; None for all.
      images_per_class: the number of images that each class must have; None allows any number.

    Raises:
      InputError: the folder does not exist or contains no images, a class is missing or has a wrong
        number of images, a link leads nowhere, or `name_classes` raised an error.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; it should hold one folder of images per class")
    listing = list_folder(folder)
    root = shown_name(str(folder))
    if classes is None:
        _check_links(root, listing.places.values())
    found = name_classes(root, listing.places)
    chosen = found.places
    if classes is not None:
        chosen = choose_classes(root, found.places, classes, _empty_folders(listing.places))
        _check_links(root, (place for places in chosen.values() for place in places))
    paths = {
        # Files are sorted by name; files of the same name keep the order of their folders.
        name: sorted(
            (Path(place.path, file) for place in chosen[name] for file in place.images),
            key=lambda path: canonical_name(path.name),
        )
        for name in sorted(chosen)
    }
    skipped = _skipped(listing, found.strays)
    if not paths:
        raise InputError(_no_classes(root, found.strays, skipped))
    for name, files in paths.items():
        if len(files) != (images_per_class or len(files)):
            raise InputError(
                f"class {name!r} in {root} has {len(files)} images; {images_per_class} are needed"
            )
    counts = [len(files) for files in paths.values()]
    total = sum(len(place.images) for places in found.places.values() for place in places)
    if total > sum(counts):
        unwanted = f"of {len(found.places) - len(paths)} classes"
        skipped += (Skipped("images that are not asked for", total - sum(counts), (unwanted,)),)
    return paths, FolderCensus(
        root, len(paths), sum(counts), min(counts), max(counts), found.notes, skipped
    )


def _check_links(root: str, places: Iterable[Place]) -> None:
    broken = [show(place.parts, name) for place in places for name in place.broken_links]
    if broken:
        first, *others = sorted(broken)
        more = f" and {len(others)} more" if others else ""
        raise InputError(
            f"{root}/{first}{more} is a link that leads nowhere; restore its target or"
            " remove the link"
        )


def _empty_folders(places: Mapping[Parts, Place]) -> dict[str, str]:
    """{folder without images and subfolders: its name and what it contains}."""
    empty = {}
    for parts, place in places.items():
        if parts and not place.images and not place.has_folders:
            inside = list(_kinds(place.others))
            inside += [f"{len(place.broken_links)} links"] if place.broken_links else []
            name = show(parts)
            empty[name] = f"{name}: {' and '.join(inside)}" if inside else name
    return empty


def _kinds(others: Counter) -> tuple[str, ...]:
    """Texts such as ("12 .txt", "1 .json"), the most frequent ending first."""
    ordered = sorted(others.items(), key=lambda kind: (-kind[1], kind[0]))
    return tuple(f"{count} {suffix}" for suffix, count in ordered)


def _skipped(listing: Listing, strays: Sequence[Place]) -> tuple[Skipped, ...]:
    places = listing.places.values()
    others = sum((place.others for place in places), Counter())
    empty = _empty_folders(listing.places).values()
    broken = [show(place.parts, name) for place in places for name in place.broken_links]
    stray = [show(place.parts, name) for place in strays for name in place.images]
    every = (
        skipped_for("folders without an image that can be read", empty),
        skipped_for("folders that cannot be listed", listing.unlisted),
        skipped_for("images in no class's folder", stray),
        skipped_for("links to folders that are read at their own place", listing.repeated_links),
        skipped_for("links to a folder around this one", listing.links_up),
        skipped_for("links that lead nowhere", broken),
        skipped_for("neither files nor folders", listing.special),
        Skipped("files with another ending", others.total(), _kinds(others)),
        skipped_for("hidden or system files", listing.hidden),
    )
    return tuple(part for part in every if part.count)


def _no_classes(root: str, strays: Sequence[Place], left_out: Sequence[Skipped]) -> str:
    if strays:
        where = shorten(show(place.parts, min(place.images)) for place in strays)
        return (
            f"{root} contains no folders of images, only images in no class's folder"
            f" ({where}); move those of each class into a folder of its name"
        )
    details = "".join(f"; {part.text()}" for part in left_out)
    return f"{root} contains no folders of images ({', '.join(sorted(IMAGE_SUFFIXES))}){details}"


def read_image_folder(
    folder: Path,
    image_size: int,
    classes: Sequence[str] | None = None,
    images_per_class: int | None = None,
    check_fits: Callable[[int], bool] = lambda num_bytes: True,
    report: Callable[[FolderCensus], None] = lambda census: None,
) -> tuple[np.ndarray | StreamedImages, np.ndarray, tuple[str, ...]]:
    """Reads images (N, size, size, 3) uint8, labels (N,) and class names.

    Each image becomes RGB and a square (`read_square`). The result is cached in the folder as
    .gc_nc_SIZE.npz and used again while names, sizes and times of the files are the same. Streamed
    images are not cached but decoded whenever they are read.

    Args:
      folder: the folder of the set.
      image_size: the height and width to resize to.
      classes: the classes whose images are wanted; None for all.
      images_per_class: the number of images that each class must have; None allows any number.
      check_fits: says whether this number of bytes is kept in memory; called before any decoding.
      report: called with the census, before `check_fits`.

    Raises:
      InputError: `find_images`, `report` or `check_fits` raised it, or a file is not an image.
    """
    found, census = find_images(folder, classes, images_per_class)
    report(census)
    paths = [path for files in found.values() for path in files]
    labels = np.repeat(np.arange(len(found)), [len(files) for files in found.values()])
    if not check_fits(len(paths) * image_size**2 * 3):
        return StreamedImages([_FolderImages(paths, image_size)]), labels, tuple(found)
    cache = folder / f"{CACHE_PREFIX}{image_size}.npz"
    fingerprint = _fingerprint(folder, paths)
    images = _read_cache(cache, fingerprint, (len(paths), image_size, image_size, 3))
    if images is None:
        images = np.empty((len(paths), image_size, image_size, 3), np.uint8)
        # Threads help because decoding and resizing release Python's lock.
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            resized = pool.map(lambda path: read_square(path, image_size), paths)
            bar = tqdm(resized, "resizing", len(paths), unit="image", disable=None)
            for i, image in enumerate(bar):
                images[i] = image
        _write_cache(cache, fingerprint, images)
    return images, labels, tuple(found)


class _FolderImages:
    """Image files that are decoded and resized when they are read."""

    def __init__(self, paths: Sequence[Path], size: int):
        self._paths = paths
        self.shape = (len(paths), size, size, 3)

    def read(self, rows: np.ndarray) -> np.ndarray:
        return np.stack([read_square(self._paths[row], self.shape[1]) for row in rows])


def _fingerprint(folder: Path, paths: Sequence[Path]) -> str:
    digest = hashlib.sha256(b"%d" % _READING)
    for path in paths:
        facts = path.stat()
        entry = str(path.relative_to(folder)), facts.st_size, facts.st_mtime_ns
        digest.update(json.dumps(entry).encode())
    return digest.hexdigest()


def _read_cache(path: Path, fingerprint: str, shape: tuple[int, ...]) -> np.ndarray | None:
    try:
        # The file is opened here because NumPy would leave that of a broken archive open.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            if str(stored["fingerprint"]) == fingerprint and stored["images"].shape == shape:
                return stored["images"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        # The cache does not exist yet or is cut off, so it is made again.
        return None
    return None


def _write_cache(path: Path, fingerprint: str, images: np.ndarray) -> None:
    try:
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, images=images, fingerprint=fingerprint)
    except OSError as error:
        logging.warning("%s was not written (%s): images are resized at every start", path, error)
