"""What was read from a folder of images, what was left out, and why."""

from collections.abc import Iterable
from typing import Any, NamedTuple

_SHOWN, _NOTED = 4, 100


class Skipped(NamedTuple):
    """What was left out for one reason.

    Attributes:
      reason: what was left out and why, such as "folders without an image".
      count: the number of things that were left out.
      examples: at most 100 of their paths in the folder, or how many there were of each kind.
    """

    reason: str
    count: int
    examples: tuple[str, ...]

    def text(self) -> str:
        """A text such as "images in no class's folder (2: x.png, y.png)"."""
        missing = self.count - _NOTED if len(self.examples) == _NOTED else 0
        return f"{self.reason} ({self.count}: {shorten(self.examples, missing=missing)})"


class FolderCensus(NamedTuple):
    """What was read from a folder of images and what was not.

    Attributes:
      folder: the folder that was read.
      classes: the number of classes.
      images: the number of images in all classes together.
      smallest: the number of images in the smallest class.
      largest: the number of images in the largest class.
      notes: sentences on how the folders were interpreted.
      skipped: what was left out, by reason.
    """

    folder: str
    classes: int
    images: int
    smallest: int
    largest: int
    notes: tuple[str, ...]
    skipped: tuple[Skipped, ...]

    def line(self) -> str:
        """The census as one line of text."""
        each = f"{self.smallest}"
        if self.smallest != self.largest:
            each = f"{self.smallest} to {self.largest}"
        images = f"{self.images} image{'s' * (self.images != 1)}"
        classes = f"{self.classes} class{'es' * (self.classes != 1)}"
        text = f"{self.folder}: {images} of {classes}, {each} a class"
        if self.skipped:
            text += f"; left out: {', '.join(part.text() for part in self.skipped)}"
        return "; ".join([text, *self.notes])

    def facts(self) -> dict[str, Any]:
        """The census as it is stored in metadata.json."""
        skipped = {
            reason: {"count": count, "examples": list(examples)}
            for reason, count, examples in self.skipped
        }
        return {
            "classes": self.classes,
            "images": self.images,
            "smallest_class": self.smallest,
            "largest_class": self.largest,
            "notes": list(self.notes),
            "skipped": skipped,
        }


def skipped_for(reason: str, names: Iterable[str]) -> Skipped:
    """Makes a `Skipped` from the names of all that was left out for a reason."""
    names = sorted(names)
    return Skipped(reason, len(names), tuple(names[:_NOTED]))


def shorten(names: Iterable[str], shown: int = _SHOWN, missing: int = 0) -> str:
    """The first names and the number of further ones, of which `missing` are not in `names`."""
    names = list(names)
    more = len(names) + missing - shown
    text = ", ".join(names[:shown])
    return f"{text} and {more} more" if more > 0 else text
