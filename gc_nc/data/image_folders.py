"""A folder of images a class, as mini-ImageNet comes; decoded once and cached, or streamed."""

import contextlib
import difflib
import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from absl import logging
from PIL import Image
from tqdm import tqdm

from gc_nc.data.streamed_images import StreamedImages
from gc_nc.errors import InputError

_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}


def find_images(
    folder: Path, classes: Sequence[str] | None = None, images_per_class: int | None = None
) -> dict[str, list[Path]]:
    """{class: its image files, by name}; the folder that an image lies in is its class.

    So that folders of classes may also lie below train/, val/ and test/, which are merged.

    Args:
      folder: of the set.
      classes: whose images are wanted; None for all.
      images_per_class: what each must have; None for any number.

    Raises:
      InputError: no such folder, no images in it, a class that is missing or has another number.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; it should hold a folder of images a class")
    found: dict[str, list[Path]] = {}
    seen = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        # A link to a folder above would be walked for ever.
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        if place == str(folder):
            continue
        images = [
            Path(place, file)
            for file in files
            if Path(file).suffix.lower() in _SUFFIXES and not file.startswith(".")
        ]
        if images:
            found.setdefault(os.path.basename(place), []).extend(images)
    if not found:
        raise InputError(f"{folder} holds no folders of images ({', '.join(sorted(_SUFFIXES))})")
    for name in classes or ():
        if name not in found:
            near = difflib.get_close_matches(name, found, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; it has {len(found)} others"
            raise InputError(f"{folder} has no folder of images {name!r}{hint}")
    if classes is not None:
        found = {name: found[name] for name in classes}
    for name, files in found.items():
        if len(files) != (images_per_class or len(files)):
            raise InputError(
                f"class {name!r} in {folder} has {len(files)} images; {images_per_class} are needed"
            )
    return {name: sorted(found[name], key=lambda path: path.name) for name in sorted(found)}


def read_image_folder(
    folder: Path,
    image_size: int,
    classes: Sequence[str] | None = None,
    images_per_class: int | None = None,
    check_fits: Callable[[int], bool] = lambda num_bytes: True,
) -> tuple[np.ndarray | StreamedImages, np.ndarray, tuple[str, ...]]:
    """Images (N, size, size, 3) uint8, labels (N,) and class names.

    Each image becomes RGB and a square, whatever its aspect, by an antialiased bilinear filter.
    The result is kept in the folder as .gc_nc_SIZE.npz and used again while names, sizes and times
    of the files are the same. Streamed images are made anew whenever they are asked for.

    Args:
      folder: of the set.
      image_size: height and width to resize to.
      classes: as in `find_images`.
      images_per_class: as there.
      check_fits: whether so many bytes are held in memory; called before any image is decoded.

    Raises:
      InputError: as `find_images`; a file that is no image; what `check_fits` raises.
    """
    found = find_images(folder, classes, images_per_class)
    paths = [path for files in found.values() for path in files]
    labels = np.repeat(np.arange(len(found)), [len(files) for files in found.values()])
    if not check_fits(len(paths) * image_size**2 * 3):
        return StreamedImages([_FolderImages(paths, image_size)]), labels, tuple(found)
    cache = folder / f".gc_nc_{image_size}.npz"
    fingerprint = _fingerprint(folder, paths)
    images = _read_cache(cache, fingerprint, (len(paths), image_size, image_size, 3))
    if images is None:
        images = np.empty((len(paths), image_size, image_size, 3), np.uint8)
        # Threads: decoding and resizing let go of Python's lock.
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            resized = pool.map(lambda path: _resized(path, image_size), paths)
            bar = tqdm(resized, "resizing", len(paths), unit="image", disable=None)
            for i, image in enumerate(bar):
                images[i] = image
        _write_cache(cache, fingerprint, images)
    return images, labels, tuple(found)


class _FolderImages:
    """Image files, decoded and resized when they are read."""

    def __init__(self, paths: Sequence[Path], size: int):
        self._paths = paths
        self.shape = (len(paths), size, size, 3)

    def read(self, rows: np.ndarray) -> np.ndarray:
        return np.stack([_resized(self._paths[row], self.shape[1]) for row in rows])


def _resized(path: Path, size: int) -> np.ndarray:
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                # PIL would cut them off at 255.
                raise InputError(f"{path} has pixels of more than 8 bits; save it with 8")
            return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} is no image that can be read ({error}); remove it") from error


def _fingerprint(folder: Path, paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        facts = path.stat()
        entry = str(path.relative_to(folder)), facts.st_size, facts.st_mtime_ns
        digest.update(json.dumps(entry).encode())
    return digest.hexdigest()


def _read_cache(path: Path, fingerprint: str, shape: tuple[int, ...]) -> np.ndarray | None:
    try:
        # Opened here: NumPy leaves the file of a broken archive open.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            if str(stored["fingerprint"]) == fingerprint and stored["images"].shape == shape:
                return stored["images"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        # None yet, or cut off: it is made again.
        return None
    return None


def _write_cache(path: Path, fingerprint: str, images: np.ndarray) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            np.savez(file, images=images, fingerprint=fingerprint)
        os.replace(temporary, path)
    except OSError as error:
        logging.warning("%s was not written (%s): images are resized at every start", path, error)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
