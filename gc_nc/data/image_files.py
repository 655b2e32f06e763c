"""Pixels of an image file, whatever its format, mode, depth and orientation."""

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
# Where files say so, by Pillow's names; in TIFFs it is a tag.
_NOTES = frozenset(["exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"])
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_0 = 258, 262, 0
_ALPHA_MODES = ("LA", "La", "PA", "RGBA", "RGBa")


def read_square(path: Path, size: int) -> np.ndarray:
    """An image file as (size, size, 3) uint8.

    The first image of a file that has several. It is turned as its EXIF orientation says; where it
    is transparent it is laid on white; of 16 bits a channel the upper 8 are kept, in grey and in
    colour. It becomes RGB and a square, whatever its aspect, by an antialiased bilinear filter.

    Raises:
      InputError: no image that can be read, or pixels of 32 bits.
    """
    try:
        with Image.open(path) as image:
            tiles = image.tile
            # Before its orientation is asked for: Pillow turns TIFFs while it loads them.
            image.load()
            key = image.info.get("transparency")
            if isinstance(key, tuple) and "RGB;16" in str(tiles):
                # The transparent colour has 16 bits still.
                image.info["transparency"] = tuple(level >> 8 for level in key)
            image = _opaque(_upright(_eight_bits(image)))
            # Greys are the same in each channel, so they are resized once.
            if image.mode not in ("L", "RGB"):
                image = image.convert("RGB")
            image = image.resize((size, size), Image.Resampling.BILINEAR)
            return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    except InputError as error:
        raise InputError(f"{shown_name(str(path))} {error}") from error
    # Pillow raises errors of many kinds for what it cannot read.
    except Exception as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"{shown_name(str(path))} is no image that can be read ({why}); remove it"
        ) from error


def _eight_bits(image: Image.Image) -> Image.Image:
    """Greys of 16 bits with the upper 8, as Pillow reads colours of 16 bits itself."""
    if not image.mode.startswith(("I", "F")):
        return image
    levels = np.asarray(image)
    if image.format == "PPM" and image.mode == "I":
        # Pillow spreads greys over 0..65535 and rounds the colours of this format.
        levels = (levels + 128) // 257
    elif image.mode.startswith("I;16") or image.format == "PNG":
        tags = image.tag_v2 if image.format == "TIFF" else {}
        bits = tags.get(_BITS_PER_SAMPLE, (16,))[0]
        # Pillow turns such greys of 8 bits around and those of 16 not.
        levels = 2**bits - 1 - levels if tags.get(_PHOTOMETRIC) == _WHITE_IS_0 else levels
        levels = levels >> (bits - 8)
    else:
        raise InputError(
            f"has pixels of 32 bits or with a sign (mode {image.mode}), whose range is not known;"
            " save it with 8 or 16 bits a channel"
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
    # Notes of the camera that are garbled are no reason to refuse the pixels.
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
