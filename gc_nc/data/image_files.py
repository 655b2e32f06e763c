"""Reads the pixels of image files of any format, mode, depth and orientation."""

from pathlib import Path

import numpy as np
from PIL import Image

from gc_nc.data.class_names import shown_name
from gc_nc.errors import InputError

_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Pillow's names of the notes that may give the orientation; in a TIFF it is a tag.
_NOTES = frozenset(["exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"])
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_0 = 258, 262, 0
_ALPHA_MODES = ("LA", "La", "PA", "RGBA", "RGBa")


def read_square(path: Path, size: int) -> np.ndarray:
    """Reads an image file as (size, size, 3) uint8.

    If the file contains several images, the first is read. It is turned as its EXIF orientation
    says, transparent parts are laid on white, and of 16 bits per channel the upper 8 are kept. It
    becomes RGB and a square, whatever its aspect ratio, by an antialiased bilinear filter.

    Raises:
      InputError: the file is not an image that can be read, or its pixels have 32 bits.
    """
    try:
        with Image.open(path) as image:
            tiles = image.tile
            # Pillow turns TIFFs as it loads them, so the orientation must be read afterwards.
            image.load()
            key = image.info.get("transparency")
            if isinstance(key, tuple) and "RGB;16" in str(tiles):
                # The transparent colour still has 16 bits.
                image.info["transparency"] = tuple(level >> 8 for level in key)
            image = _opaque(_upright(_eight_bits(image)))
            # The three channels of a grey image are equal, so only one is resized.
            if image.mode not in ("L", "RGB"):
                image = image.convert("RGB")
            image = image.resize((size, size), Image.Resampling.BILINEAR)
            return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    except InputError as error:
        raise InputError(f"{shown_name(str(path))} {error}") from error
    # Pillow raises errors of many kinds for files that it cannot read.
    except Exception as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"{shown_name(str(path))} is not an image that can be read ({why}); remove it"
        ) from error


def _eight_bits(image: Image.Image) -> Image.Image:
    """Keeps the upper 8 of 16 bits of a grey, as Pillow itself does for colours."""
    if not image.mode.startswith(("I", "F")):
        return image
    levels = np.asarray(image)
    if image.format == "PPM" and image.mode == "I":
        # In this format, Pillow spreads greys over 0..65535 and rounds colours.
        levels = (levels + 128) // 257
    elif image.mode.startswith("I;16") or image.format == "PNG":
        tags = image.tag_v2 if image.format == "TIFF" else {}
        bits = tags.get(_BITS_PER_SAMPLE, (16,))[0]
        # Pillow inverts such greys of 8 bits, but not those of 16.
        levels = 2**bits - 1 - levels if tags.get(_PHOTOMETRIC) == _WHITE_IS_0 else levels
        levels = levels >> (bits - 8)
    else:
        raise InputError(
            f"has 32-bit or signed pixels (mode {image.mode}), whose range is not known;"
            " save it with 8 or 16 bits per channel"
        )
    grey = Image.fromarray(levels.astype(np.uint8))
    grey.info = {
        name: value >> 8 if name == "transparency" else value for name, value in image.info.items()
    }
    return grey


def _upright(image: Image.Image) -> Image.Image:
    if _NOTES.isdisjoint(image.info) and image.format != "TIFF":
        return image
    try:
        turn = _TURNS.get(image.getexif().get(_ORIENTATION))
    # Garbled notes of the camera are not a reason to refuse the pixels.
    except Exception:
        return image
    return image if turn is None else image.transpose(turn)


def _opaque(image: Image.Image) -> Image.Image:
    if image.mode not in _ALPHA_MODES and "transparency" not in image.info:
        return image
    if image.mode == "La":
        image = image.convert("LA")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")
