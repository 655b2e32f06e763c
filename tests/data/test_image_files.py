"""Cases D5 and D6: orientation, transparency, depth and what else a file's pixels depend on."""

import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from gc_nc.data.image_files import read_square
from gc_nc.data.image_folders import read_image_folder
from gc_nc.errors import InputError

COLOUR, HALF = (10, 20, 30), 128
# Half of the colour and half of white, rounded as Pillow does.
ON_WHITE = (132, 137, 142)


def first_pixel(path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return tuple(read_square(path, 2)[0, 0].tolist())


def turned(grid, orientation):
    """Row 0 and column 0 of the stored grid are these sides of the picture (EXIF 2.32, 0x0112)."""
    return {
        1: grid,
        2: grid[:, ::-1],
        3: grid[::-1, ::-1],
        4: grid[::-1],
        5: grid.T,
        6: grid[::-1].T,
        7: grid[::-1, ::-1].T,
        8: grid.T[::-1],
    }[orientation]


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_d5_orientation_is_applied(tmp_path, ending, orientation):
    grid = np.array([[0, 100], [150, 250]], np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"jpg": {"quality": 100}, "webp": {"lossless": True}}.get(ending, {})
    path = tmp_path / f"x.{ending}"
    Image.fromarray(grid.repeat(8, 0).repeat(8, 1)).convert("RGB").save(path, exif=exif, **options)
    read = read_square(path, 16)
    assert read.shape == (16, 16, 3)
    # In the middle of each quarter, where JPEG keeps values nearly.
    quarters = read[4::8, 4::8, 0].astype(int)
    np.testing.assert_allclose(quarters, turned(grid, orientation), atol=3)


def test_a_garbled_exif_is_no_reason_to_refuse(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("L", (2, 2), 9).save(tmp_path / "x.jpg", exif=exif)
    content = (tmp_path / "x.jpg").read_bytes()
    start = content.index(b"Exif\0\0") + 6
    (tmp_path / "x.jpg").write_bytes(content[:start] + b"ZZZZ" + content[start + 4 :])
    assert read_square(tmp_path / "x.jpg", 2).shape == (2, 2, 3)


def palette_image():
    image = Image.new("P", (2, 2), 0)
    image.putpalette([*COLOUR, 200, 100, 50])
    return image


def grey_alpha(grey):
    return Image.fromarray(np.full((2, 2, 2), (grey, HALF), np.uint8))


RGBA = Image.fromarray(np.full((2, 2, 4), (*COLOUR, HALF), np.uint8))


@pytest.mark.parametrize(
    ("image", "name", "options", "expected"),
    [
        (RGBA, "x.png", {}, ON_WHITE),
        (RGBA, "x.tif", {}, ON_WHITE),
        (RGBA, "x.webp", {"lossless": True}, ON_WHITE),
        (grey_alpha(10), "x.png", {}, (132,) * 3),
        (palette_image(), "x.png", {"transparency": bytes([HALF, 255])}, ON_WHITE),
        (palette_image(), "x.png", {"transparency": 0}, (255,) * 3),
        (palette_image(), "x.gif", {"transparency": 0}, (255,) * 3),
        (palette_image(), "x.gif", {}, COLOUR),
        (Image.new("L", (2, 2), 7), "x.png", {"transparency": 7}, (255,) * 3),
        (Image.new("RGB", (2, 2), COLOUR), "x.png", {"transparency": COLOUR}, (255,) * 3),
        (Image.new("1", (2, 2), 0), "x.png", {"transparency": 0}, (255,) * 3),
        (Image.new("1", (2, 2), 0), "x.png", {}, (0,) * 3),
    ],
)
def test_d5_transparent_images_are_laid_on_white(tmp_path, image, name, options, expected):
    image.save(tmp_path / name, **options)
    assert first_pixel(tmp_path / name) == expected


def png_of_16_bits(colour_type, pixel, transparent=()):
    def chunk(kind, content):
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 2, 16, colour_type, 0, 0, 0))
    key = chunk(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent)) if transparent else b""
    row = b"\0" + struct.pack(f">{2 * len(pixel)}H", *pixel, *pixel)
    body = chunk(b"IDAT", zlib.compress(row * 2))
    return b"\x89PNG\r\n\x1a\n" + header + key + body + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("colour_type", "pixel", "transparent", "expected"),
    [
        (0, [0x80FF], (), 128),
        (2, [0x80FF] * 3, (), 128),
        (4, [0x80FF, 0xFFFF], (), 128),
        (6, [0x80FF] * 3 + [0xFFFF], (), 128),
        (6, [0x80FF] * 3 + [0], (), 255),
        (0, [0x80FF], [0x80FF], 255),
        (2, [0x80FF] * 3, [0x80FF] * 3, 255),
        (0, [0x80FF], [0x10FF], 128),
        (2, [0x80FF] * 3, [0x10FF] * 3, 128),
    ],
)
def test_d6_of_16_bits_the_upper_8_count(tmp_path, colour_type, pixel, transparent, expected):
    (tmp_path / "x.png").write_bytes(png_of_16_bits(colour_type, pixel, transparent))
    assert first_pixel(tmp_path / "x.png") == (expected,) * 3


def test_d6_other_formats_of_16_bits(tmp_path):
    levels = np.full((2, 2), 0x80FF, np.uint16)
    Image.fromarray(levels).save(tmp_path / "x.tif")
    assert first_pixel(tmp_path / "x.tif") == (128,) * 3
    # The same tag says in all depths that 0 is white.
    for depth in (np.uint8, np.uint16):
        Image.fromarray(np.zeros((2, 2), depth)).save(tmp_path / "x.tif")
        content = (tmp_path / "x.tif").read_bytes()
        photometric = struct.pack("<HHIH", 262, 3, 1, 1)
        assert photometric in content
        white_is_0 = struct.pack("<HHIH", 262, 3, 1, 0)
        (tmp_path / "x.tif").write_bytes(content.replace(photometric, white_is_0))
        assert first_pixel(tmp_path / "x.tif") == (255,) * 3
    # These have a largest value of their own, to which grey and colour are scaled.
    for largest in (65535, 4095):
        scaled = (levels.astype(float) * largest / 65535).astype(">u2")
        (tmp_path / "x.pgm").write_bytes(b"P5 2 2 %d\n" % largest + scaled.tobytes())
        colours = np.repeat(scaled, 3).tobytes()
        (tmp_path / "x.ppm").write_bytes(b"P6 2 2 %d\n" % largest + colours)
        assert first_pixel(tmp_path / "x.pgm") == first_pixel(tmp_path / "x.ppm") == (128,) * 3


@pytest.mark.parametrize("mode", ["I", "F"])
def test_d6_pixels_whose_range_is_not_known_are_one_line(tmp_path, mode):
    Image.new(mode, (2, 2), 5).save(tmp_path / "x.tif")
    with pytest.raises(
        InputError, match=r"x\.tif has 32-bit or signed pixels .*save it with 8 or 16"
    ) as e:
        read_square(tmp_path / "x.tif", 2)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("ending", ["gif", "webp", "png", "tif"])
def test_of_several_images_the_first_counts(tmp_path, ending):
    first, *others = (Image.new("RGB", (2, 2), (level, 0, 0)) for level in (200, 0, 100))
    options = {"lossless": True} if ending == "webp" else {}
    path = tmp_path / f"x.{ending}"
    first.save(path, save_all=True, append_images=others, **options)
    assert first_pixel(path) == (200, 0, 0)


def test_every_ending_that_counts_as_an_image_can_be_read(tmp_path):
    images = {
        "a": ["0.jpg", "1.JPEG", "2.jpe", "3.jfif", "4.PNG", "5.apng", "6.bmp", "7.dib"],
        "b": ["0.WebP", "1.gif", "2.tif", "3.TIFF", "4.ppm", "5.PGM", "6.pbm", "7.pnm"],
    }
    kinds = {".jpe": "jpeg", ".apng": "png", ".pgm": "ppm", ".pbm": "ppm", ".pnm": "ppm"}
    for name, files in images.items():
        (tmp_path / name).mkdir()
        for file in files:
            path = tmp_path / name / file
            mode = {".pbm": "1", ".pgm": "L"}.get(path.suffix.lower(), "RGB")
            image = Image.new("RGB", (4, 4), "white").convert(mode)
            image.save(path, format=kinds.get(path.suffix.lower()))
    pixels, labels, _ = read_image_folder(tmp_path, 4)
    assert np.bincount(labels).tolist() == [8, 8]
    assert pixels.min() > 250


def test_the_cache_of_another_way_of_reading_is_not_used(tmp_path, monkeypatch):
    from gc_nc.data import image_folders

    for name in "ab":
        (tmp_path / name).mkdir()
        RGBA.save(tmp_path / name / "0.png")
    monkeypatch.setattr(image_folders, "_READING", 1)
    monkeypatch.setattr(image_folders, "read_square", lambda path, size: np.zeros((2, 2, 3)))
    assert not read_image_folder(tmp_path, 2)[0].any()
    monkeypatch.undo()
    assert tuple(read_image_folder(tmp_path, 2)[0][0, 0, 0]) == ON_WHITE
