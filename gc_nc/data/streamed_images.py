"""Images that stay where they are stored until they are asked for."""

import os
from collections.abc import Callable, Generator, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
from tqdm import tqdm

from gc_nc.errors import require_extra

# More threads than this gain nothing, and each keeps a batch in memory.
_MAX_THREADS = 16
_BLOCK = 1000

T = TypeVar("T")


@runtime_checkable
class ImageSource(Protocol):
    """A place from which images are read.

    Attributes:
      shape: the shape (N, H, W, c) of all its images.
    """

    shape: tuple[int, int, int, int]

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Decodes the images (n, H, W, c) uint8 of these rows; called from several threads.

        Raises:
          InputError: an image cannot be read; the message names it.
        """


class StreamedImages:
    """Images (N, H, W, c) uint8 that are read and decoded when they are indexed.

    They can be used like an array as long as whole images are chosen: `images[rows]` reads these
    rows. `take` and `concatenate` choose and join images without reading them.
    """

    dtype = np.dtype(np.uint8)
    ndim = 4

    def __init__(self, sources: Sequence[ImageSource], rows: np.ndarray | None = None):
        """Joins sources whose images have the same shape.

        Args:
          sources: the sources, joined end to end.
          rows: the rows of the images to choose, in order; by default all.
        """
        self._sources = tuple(sources)
        ends = np.cumsum([source.shape[0] for source in sources])
        self._starts = np.concatenate([[0], ends[:-1]])
        self._rows = np.arange(ends[-1]) if rows is None else rows
        self.shape = (len(self._rows), *sources[0].shape[1:])

    @property
    def size(self) -> int:
        """The number of pixel values."""
        return int(np.prod(self.shape))

    @property
    def nbytes(self) -> int:
        """The number of bytes that the images would take in memory."""
        return self.size

    def __len__(self) -> int:
        """The number N of images."""
        return len(self._rows)

    def __array__(self, dtype=None, copy=None):
        """Always raises TypeError, since NumPy would read all images one by one."""
        raise TypeError(f"{self!r} cannot be read as a whole; index them")

    def __repr__(self) -> str:
        """The name and shape, for messages."""
        return f"StreamedImages{self.shape}"

    def __getitem__(self, key: Any) -> np.ndarray:
        """Reads images; the key chooses along the first axis only."""
        if isinstance(key, tuple) or key is Ellipsis or key is None:
            raise IndexError(f"{self!r} can be indexed along the first axis only")
        rows = self._rows[key]
        images = self._read(np.atleast_1d(rows))
        return images if rows.ndim else images[0]

    def _read(self, rows: np.ndarray) -> np.ndarray:
        images = np.empty((len(rows), *self.shape[1:]), np.uint8)
        source_of = np.searchsorted(self._starts, rows, side="right") - 1
        for i in np.unique(source_of):
            chosen = source_of == i
            images[chosen] = self._sources[i].read(rows[chosen] - self._starts[i])
        return images

    def take(self, indices: np.ndarray) -> "StreamedImages":
        """The images of these indices, in their order; nothing is read."""
        return StreamedImages(self._sources, self._rows[indices])

    def concatenate(self, other: "StreamedImages") -> "StreamedImages":
        """These images followed by the others; nothing is read."""
        own = sum(source.shape[0] for source in self._sources)
        rows = np.concatenate([self._rows, own + other._rows])
        return StreamedImages(self._sources + other._sources, rows)

    def blocks(self, doing: str) -> Generator[np.ndarray, None, None]:
        """Yields all images once, in blocks that are read ahead; `doing` labels a progress bar."""

        def load(i):
            return self[i * _BLOCK : (i + 1) * _BLOCK]

        with tqdm(desc=doing, total=len(self), unit="image", disable=None) as bar:
            for block in read_ahead(load, 0, -(-len(self) // _BLOCK)):
                yield block
                bar.update(len(block))


def take_images(images: np.ndarray | StreamedImages, rows: np.ndarray):
    """The chosen images; streamed images stay streamed."""
    return images.take(rows) if isinstance(images, StreamedImages) else images[rows]


def concatenate_images(a: np.ndarray | StreamedImages, b: np.ndarray | StreamedImages):
    """Joins images end to end; both must be in memory or both streamed."""
    return a.concatenate(b) if isinstance(a, StreamedImages) else np.concatenate([a, b])


def read_ahead(load: Callable[[int], T], start: int, stop: int) -> Generator[T, None, None]:
    """Yields load(start), ..., load(stop - 1), computed ahead in threads.

    Close or delete the generator to stop early: it finishes what is being loaded and starts nothing
    more.
    """
    require_extra("data", "grain")
    # Imported here so that only streaming runs wait for it. It keeps the order, also of errors.
    import grain

    threads = min(_MAX_THREADS, os.cpu_count() or 1)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 2)
    loaded = iter(grain.MapDataset.range(start, stop).map(load).to_iter_dataset(options))
    try:
        yield from loaded
    finally:
        loaded.close()
