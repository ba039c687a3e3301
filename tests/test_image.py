"""Pixels and samples, images as strangers send them, PNG with its parameters, grids."""

import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from sdrt.errors import OutputError, ParityError, RequestError
from sdrt.image import (
    as_depth,
    as_mask,
    as_rgb,
    from_pixels,
    grid,
    open_image,
    read_parameters,
    save_png,
    to_images,
    to_pixels,
)

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def corners() -> Image.Image:
    """16x8: red above blue on the left, green above white on the right."""
    image = Image.new("RGB", (16, 8))
    for index, colour in enumerate((RED, GREEN, BLUE, WHITE)):
        image.paste(colour, (8 * (index % 2), 4 * (index // 2), 8 * (index % 2) + 8, 4 * (index // 2) + 4))
    return image


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_of(width: int, height: int, *, depth: int, colour: int, rows: bytes, extra: bytes = b"") -> bytes:
    """A PNG from its parts. Rows come unfiltered, each with its filter byte 0."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = [png_chunk(b"IHDR", header), extra, png_chunk(b"IDAT", zlib.compress(rows)), png_chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    data = io.BytesIO()
    image.save(data, format=kind, **options)
    return data.getvalue()


def written(folder: Path, data: bytes, name: str = "input.png") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def pixel(image: Image.Image, x: int = 0, y: int = 0) -> tuple[int, int, int]:
    assert image.mode == "RGB"
    return image.getpixel((x, y))


# Pixels and samples


def test_every_pixel_value_survives_the_way_to_a_sample_and_back():
    pixels = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    sample = from_pixels(pixels)
    assert sample.dtype == np.float32
    assert sample.shape == (1, 3, 16, 16)
    assert (sample.min(), sample.max()) == (-1, 1)
    np.testing.assert_array_equal(to_pixels(sample), pixels)


def test_values_outside_the_range_are_clipped():
    sample = np.array([-7.0, -1.0, 0.0, 1.0, 7.0], np.float32).reshape(1, 1, 1, 5).repeat(3, axis=1)
    assert to_pixels(sample)[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_sample_that_is_not_finite_is_no_image(value):
    sample = np.zeros((2, 3, 4, 4), np.float32)
    sample[1, 0, 0, 0] = value
    with pytest.raises(ParityError, match="1 of 96 values") as caught:
        to_pixels(sample)
    assert "fp32" in caught.value.hint


def test_samples_become_images():
    first, second = to_images(np.stack([np.full((3, 4, 6), -1, np.float32), np.full((3, 4, 6), 1, np.float32)]))
    assert first.size == (6, 4)
    assert (pixel(first), pixel(second)) == ((0, 0, 0), WHITE)


@pytest.mark.parametrize(
    ("shape", "dtype"), [((4, 4, 3), np.uint8), ((1, 4, 4, 4), np.uint8), ((1, 4, 4, 3), np.float32)]
)
def test_pixels_of_another_layout_are_refused(shape, dtype):
    with pytest.raises(RequestError, match="no RGB images"):
        from_pixels(np.zeros(shape, dtype))


# Images as strangers send them


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True}), ("JPEG", {"quality": 95})])
def test_each_accepted_format_is_read_whatever_its_name(kind, options, tmp_path):
    image = open_image(written(tmp_path, encoded(corners(), kind, **options), "image.dat"))
    difference = np.abs(np.asarray(image, int) - np.asarray(corners(), int))
    assert image.size == (16, 8)
    assert np.median(difference) <= 2


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
def test_png_modes_without_transparency(mode, tmp_path):
    image = open_image(written(tmp_path, encoded(corners().convert(mode), "PNG")))
    assert pixel(image, 15, 7) == WHITE
    np.testing.assert_array_equal(np.asarray(image), np.asarray(corners().convert(mode).convert("RGB")))


def test_transparency_shows_white(tmp_path):
    image = corners().convert("RGBA")
    image.putalpha(Image.new("L", image.size, 0))
    image.paste((255, 0, 0, 128), (0, 0, 1, 1))
    opened = open_image(written(tmp_path, encoded(image, "PNG")))
    assert pixel(opened, 5, 5) == WHITE
    assert pixel(opened) == (255, 127, 127)


def test_a_palette_with_transparent_entries_shows_white(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *BLUE])
    image.putdata([0, 1])
    opened = open_image(written(tmp_path, encoded(image, "PNG", transparency=b"\xff\x00")))
    assert [pixel(opened, 0), pixel(opened, 1)] == [RED, WHITE]


def test_a_transparent_colour_shows_white(tmp_path):
    opened = open_image(written(tmp_path, encoded(corners(), "PNG", transparency=RED)))
    assert [pixel(opened, 0, 0), pixel(opened, 0, 7)] == [WHITE, BLUE]


def test_grey_with_alpha_shows_white(tmp_path):
    opened = open_image(written(tmp_path, encoded(Image.new("LA", (1, 1), (0, 51)), "PNG")))
    assert pixel(opened) == (204, 204, 204)


def test_sixteen_bit_grey_keeps_its_brightness(tmp_path):
    values = [0, 128, 200, 0x8080, 0xFFFF]
    rows = b"\0" + struct.pack(">5H", *values)
    opened = open_image(written(tmp_path, png_of(5, 1, depth=16, colour=0, rows=rows)))
    assert [pixel(opened, x)[0] for x in range(5)] == [0, 0, 1, 128, 255]


def test_sixteen_bit_grey_with_a_transparent_value(tmp_path):
    rows = b"\0" + struct.pack(">2H", 300, 301)
    transparent = png_chunk(b"tRNS", struct.pack(">H", 300))
    opened = open_image(written(tmp_path, png_of(2, 1, depth=16, colour=0, rows=rows, extra=transparent)))
    assert [pixel(opened, 0), pixel(opened, 1)] == [WHITE, (1, 1, 1)]


@pytest.mark.parametrize(("colour", "channels"), [(2, 3), (4, 2), (6, 4)])
def test_other_sixteen_bit_layouts(colour, channels, tmp_path):
    rows = b"\0" + struct.pack(f">{channels}H", *[0xFFFF] * channels)
    assert pixel(open_image(written(tmp_path, png_of(1, 1, depth=16, colour=colour, rows=rows)))) == WHITE


def test_cmyk_jpeg(tmp_path):
    cyan = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    red, green, blue = pixel(open_image(written(tmp_path, encoded(cyan, "JPEG", quality=100))))
    assert red < 10
    assert min(green, blue) > 245


# Exif 2.32, tag 274: which side of the picture the first row and the first column of the file are.
ORIENTATIONS = {
    1: ("top", "left"),
    2: ("top", "right"),
    3: ("bottom", "right"),
    4: ("bottom", "left"),
    5: ("left", "top"),
    6: ("right", "top"),
    7: ("right", "bottom"),
    8: ("left", "bottom"),
}


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_exif_orientation_is_applied(orientation, kind, tmp_path):
    first_row, first_column = ORIENTATIONS[orientation]
    pixels = np.asarray(corners())
    pixels = pixels.transpose(1, 0, 2) if first_row in ("left", "right") else pixels
    pixels = pixels[::-1] if first_row in ("bottom", "right") else pixels
    pixels = pixels[:, ::-1] if first_column in ("bottom", "right") else pixels
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(pixels))
    options = {"lossless": True} if kind == "WEBP" else {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    opened = open_image(written(tmp_path, encoded(stored, kind, exif=exif, **options)))
    assert opened.size == (16, 8)
    assert np.abs(np.asarray(opened, int) - np.asarray(corners(), int)).max() <= 12


def test_a_picture_whose_file_was_closed_before_it_was_read_says_so(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as closed:
        pass
    with pytest.raises(RequestError, match="cannot be read any more") as raised:
        as_rgb(closed)
    assert "load()" in raised.value.hint


def test_one_pixel_is_an_image(tmp_path):
    assert open_image(written(tmp_path, encoded(Image.new("RGB", (1, 1), RED), "PNG"))).size == (1, 1)


OTHERS = {
    "GIF": encoded(corners(), "GIF"),
    "BMP": encoded(corners(), "BMP"),
    "TIFF": encoded(corners(), "TIFF"),
    "ICO": encoded(Image.new("RGB", (16, 16)), "ICO"),
    "FITS": b"SIMPLE  =                    T" + b" " * 2850,
    "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n",
    "PDF": b"%PDF-1.7\n",
    "SVG": b"\xef\xbb\xbf<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg'/>",
    "AVIF": b"\0\0\0 ftypavif\0\0\0\0",
    "Photoshop": b"8BPS\0\1" + b"\0" * 40,
    "empty": b"",
    "not an image": b"hello there, this is text",
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_formats_are_refused_by_name_though_they_call_themselves_png(name, tmp_path):
    with pytest.raises(RequestError, match=name) as caught:
        open_image(written(tmp_path, OTHERS[name]))
    assert "PNG, JPEG or WebP" in caught.value.hint


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_animations_are_refused(kind, tmp_path):
    data = encoded(corners(), kind, save_all=True, append_images=[Image.new("RGB", (16, 8))], lossless=True)
    with pytest.raises(RequestError, match="animation"):
        open_image(written(tmp_path, data))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "TIFF", "WEBP"])
def test_animations_that_are_given_opened_are_refused(kind):
    data = encoded(corners(), kind, save_all=True, append_images=[Image.new("RGB", (16, 8))])
    with pytest.raises(RequestError, match="animation"):
        as_rgb(Image.open(io.BytesIO(data)))


@pytest.mark.parametrize("seen", [0, 1], ids="the frame seen is {}".format)
def test_of_a_phone_s_jpeg_the_photo_is_read(seen, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    stored, gain_map = corners().transpose(Image.Transpose.ROTATE_180), Image.new("L", (8, 4), 128)
    options = {"exif": exif, "quality": 100, "subsampling": 0, "save_all": True, "append_images": [gain_map]}
    path = written(tmp_path, encoded(stored, "MPO", **options), "photo.jpg")
    given = Image.open(path)
    assert (given.format, given.n_frames) == ("MPO", 2)
    given.seek(seen)
    for photo in (as_rgb(given), open_image(path)):
        assert photo.size == (16, 8)
        assert np.abs(np.asarray(photo, int) - np.asarray(corners(), int)).max() <= 12
    assert as_mask(given).size == as_depth(given).shape[::-1] == (16, 8)


def jpeg_claiming(width: int, height: int) -> bytes:
    data = bytearray(encoded(corners(), "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def extended_webp_claiming(width: int, height: int) -> bytes:
    body = b"VP8X" + struct.pack("<I", 10) + b"\0" * 4 + (width - 1).to_bytes(3, "little")
    body += (height - 1).to_bytes(3, "little") + encoded(corners(), "WEBP")[12:]
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def lossless_webp_claiming(width: int, height: int) -> bytes:
    data = bytearray(encoded(corners(), "WEBP", lossless=True))
    data[21:25] = struct.pack("<I", (width - 1) | (height - 1) << 14)
    return bytes(data)


def lossy_webp_claiming(width: int, height: int) -> bytes:
    data = bytearray(encoded(corners(), "WEBP"))
    assert data[12:16] == b"VP8 "
    data[26:30] = struct.pack("<HH", width, height)
    return bytes(data)


BOMBS = {
    "png": (png_of(20_000, 20_000, depth=8, colour=2, rows=b""), "20000x20000"),
    "png far beyond": (png_of(2**31 - 1, 2**31 - 1, depth=8, colour=2, rows=b""), "2147483647x2147483647"),
    "png just above": (png_of(4096, 4097, depth=8, colour=2, rows=b""), "4096x4097"),
    "jpeg": (jpeg_claiming(64_250, 64_250), "64250x64250"),
    "webp": (extended_webp_claiming(2**24, 255), "16777216x255"),
    "lossless webp": (lossless_webp_claiming(16_384, 16_384), "16384x16384"),
    "lossy webp": (lossy_webp_claiming(16_383, 16_383), "16383x16383"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_from_their_header(name, tmp_path, monkeypatch):
    data, size = BOMBS[name]

    def decode(*_: object) -> None:
        raise AssertionError("the image was decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decode)
    monkeypatch.setattr("PIL._webp.WebPAnimDecoder", decode)
    with pytest.raises(RequestError, match=f"{size} pixels") as caught:
        open_image(written(tmp_path, data))
    assert "4096x4096" in caught.value.hint


def test_the_largest_image_is_read(tmp_path):
    assert open_image(written(tmp_path, encoded(Image.new("1", (4096, 4096)), "PNG"))).size == (4096, 4096)


def test_a_text_bomb_is_refused(tmp_path):
    text = b"comment\0\1\0\0\0" + zlib.compress(b"a" * 2**27, 9)
    data = png_of(1, 1, depth=8, colour=0, rows=b"\0\0", extra=png_chunk(b"iTXt", text))
    assert len(data) < 2**20
    with pytest.raises(RequestError, match="damaged"):
        open_image(written(tmp_path, data))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("kept", [0.02, 0.5, 0.9])
def test_files_that_are_cut_off_are_refused(kind, kept, tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    data = encoded(noise, kind)
    with pytest.raises(RequestError) as caught:
        open_image(written(tmp_path, data[: max(13, int(kept * len(data)))]))
    assert caught.value.hint


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@given(changes=st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), min_size=1, max_size=8))
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_wrong_bytes_are_a_request_error_or_another_image(kind, changes, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = bytearray(encoded(corners(), kind, exif=exif))
    for position, byte in changes:
        data[position % len(data)] = byte
    path = written(tmp_path, bytes(data))
    try:
        image = open_image(path)
    except RequestError as error:
        hint = error.hint
    else:
        hint = image.mode
    assert hint


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir()], ids=["missing", "folder"])
def test_what_is_no_file_is_refused(make, tmp_path):
    make(tmp_path / "input")
    with pytest.raises(RequestError, match="not a file"):
        open_image(tmp_path / "input")


# PNG with its parameters

PARAMETERS = {
    "prompt": "a “red” circle 😀\n\0 naïve",
    "seed": 2**64 - 1,
    "guidance_scale": 0.0,
    "negative_prompt": "",
    "sizes": [1, 2.5, None, True],
    "nested": {"a": {}},
}


def test_an_image_and_its_parameters_come_back_as_they_were(tmp_path):
    path = tmp_path / "image.png"
    save_png(corners(), path, PARAMETERS)
    assert read_parameters(path) == PARAMETERS
    np.testing.assert_array_equal(np.asarray(open_image(path)), np.asarray(corners()))


def test_any_program_finds_the_parameters_as_json(tmp_path):
    save_png(corners(), tmp_path / "image.png", PARAMETERS)
    with Image.open(tmp_path / "image.png") as image:
        assert json.loads(image.text["sdrt"]) == PARAMETERS


def test_an_existing_file_is_kept_unless_overwriting_is_asked_for(tmp_path):
    path = written(tmp_path, b"precious", "image.png")
    with pytest.raises(OutputError, match="exists"):
        save_png(corners(), path, {})
    assert path.read_bytes() == b"precious"
    save_png(corners(), path, {"seed": 0}, overwrite=True)
    assert read_parameters(path) == {"seed": 0}
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_does_not_exist_is_an_output_error(tmp_path):
    with pytest.raises(OutputError, match="nowhere"):
        save_png(corners(), tmp_path / "nowhere" / "image.png", {})


@pytest.mark.parametrize("name", ["image.jpg", "image", "image.png.webp"])
def test_another_ending_is_refused(name, tmp_path):
    with pytest.raises(RequestError, match=r"\.png"):
        save_png(corners(), tmp_path / name, {})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, Path("x")])
def test_parameters_that_are_not_json_leave_no_file(value, tmp_path):
    with pytest.raises(OutputError, match="parameters"):
        save_png(corners(), tmp_path / "image.png", {"value": value})
    assert list(tmp_path.iterdir()) == []


def png_with_text(text: str) -> bytes:
    metadata = PngImagePlugin.PngInfo()
    metadata.add_text("sdrt", text)
    return encoded(corners(), "PNG", pnginfo=metadata)


NO_PARAMETERS = {
    "a JPEG": encoded(corners(), "JPEG"),
    "a PNG of another program": encoded(corners(), "PNG"),
    "cut off JSON": png_with_text('{"seed": 1'),
    "a list": png_with_text("[1, 2]"),
    "depth": png_with_text('{"a":' + "[" * 100_000),
    "a PNG cut off in its metadata": png_with_text('{"seed": 1, "prompt": "' + "a" * 200 + '"}')[:100],
}


@pytest.mark.parametrize("name", NO_PARAMETERS)
def test_files_without_readable_parameters_are_refused(name, tmp_path):
    with pytest.raises(RequestError) as caught:
        read_parameters(written(tmp_path, NO_PARAMETERS[name]))
    assert "sdrt" in caught.value.hint


# Grids


@pytest.mark.parametrize(
    ("count", "columns", "size"),
    [
        (1, None, (16, 8)),
        (2, None, (36, 8)),
        (4, None, (36, 20)),
        (5, None, (56, 20)),
        (3, 1, (16, 32)),
        (2, 9, (36, 8)),
    ],
)
def test_grids_are_about_square(count, columns, size):
    assert grid([corners()] * count, columns=columns, gap=4).size == size


def test_a_grid_goes_row_by_row_on_white():
    images = [Image.new("RGB", (2, 2), colour) for colour in (RED, GREEN, BLUE)]
    sheet = grid(images, gap=1)
    assert [pixel(sheet, 0, 0), pixel(sheet, 3, 0), pixel(sheet, 0, 3), pixel(sheet, 3, 3)] == [RED, GREEN, BLUE, WHITE]
    assert pixel(sheet, 2, 0) == WHITE


@pytest.mark.parametrize("images", [[], [Image.new("RGB", (1, 1)), Image.new("RGB", (2, 1))]])
def test_images_that_make_no_grid_are_refused(images):
    with pytest.raises(RequestError, match="grid"):
        grid(images)
