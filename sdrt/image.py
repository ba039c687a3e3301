"""Pixels: between samples and images, reading images that strangers send, writing PNG with its parameters."""

import io
import json
import math
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from PIL import Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin
from PIL.ImageFile import ImageFile

from sdrt.bundle import JsonValue
from sdrt.errors import OutputError, ParityError, RequestError
from sdrt.files import refuse_existing, write_atomically

Pixels = npt.NDArray[np.uint8]

LARGEST_PIXELS = 4096 * 4096
LARGEST_FILE_BYTES = 256 * 2**20
METADATA_KEY = "sdrt"
ACCEPTED = "save it as PNG, JPEG or WebP"
EXIF_ORIENTATION = 0x0112

PNG_START = b"\x89PNG\r\n\x1a\n"
HEADER_BYTES = 1024
# What else people send, so that the refusal can name it: (offset, first bytes, name).
OTHER_FORMATS = (
    (0, b"GIF8", "GIF"),
    (0, b"SIMPLE  =", "FITS"),
    (0, b"%!PS", "EPS"),
    (0, b"\xc5\xd0\xd3\xc6", "EPS"),
    (0, b"%PDF", "PDF"),
    (0, b"BM", "BMP"),
    (0, b"II*\0", "TIFF"),
    (0, b"MM\0*", "TIFF"),
    (0, b"8BPS", "Photoshop"),
    (0, b"\0\0\1\0", "ICO"),
    (0, b"\xff\x0a", "JPEG XL"),
    (4, b"JXL ", "JPEG XL"),
    (4, b"jP  ", "JPEG 2000"),
    (4, b"ftypavif", "AVIF"),
    (4, b"ftyp", "HEIC or video"),
)
# Whatever Pillow raises while it parses a damaged or hostile file.
DAMAGE = (OSError, SyntaxError, ValueError, EOFError, LookupError, ArithmeticError, TypeError, struct.error, zlib.error)

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def to_pixels(sample: npt.NDArray[np.float32]) -> Pixels:
    """Samples of the VAE as pixels, rounded as the diffusers pipelines round.

    sample: float32 [B, 3, H, W] in about [-1, 1]. Returns uint8 [B, H, W, 3].
    Raises ParityError before anything is clipped if a value is not finite.
    """
    finite = np.isfinite(sample)
    if not finite.all():
        raise ParityError(
            f"{np.count_nonzero(~finite)} of {sample.size} values of the image are NaN or infinite",
            hint="build the bundle again with: --precision fp32",
        )
    unit = np.clip(sample * np.float32(0.5) + np.float32(0.5), 0.0, 1.0)
    return np.ascontiguousarray((unit.transpose(0, 2, 3, 1) * np.float32(255)).round().astype(np.uint8))


def from_pixels(pixels: Pixels) -> npt.NDArray[np.float32]:
    """Pixels as samples of the VAE: uint8 [B, H, W, 3] to float32 [B, 3, H, W] in [-1, 1]."""
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3:
        raise RequestError(
            f"pixels of dtype {pixels.dtype} and shape {pixels.shape} are no RGB images",
            hint="pass uint8 [batch, height, width, 3]",
        )
    unit = pixels.astype(np.float32) / np.float32(255)
    return np.ascontiguousarray((np.float32(2) * unit - np.float32(1)).transpose(0, 3, 1, 2))


def to_images(sample: npt.NDArray[np.float32]) -> list[Image.Image]:
    """Samples of the VAE, float32 [B, 3, H, W], as RGB images. Raises ParityError as `to_pixels` does."""
    return [Image.fromarray(pixels) for pixels in to_pixels(sample)]


def open_image(path: Path) -> Image.Image:
    """Read a PNG, JPEG or WebP of at most LARGEST_PIXELS pixels as an upright RGB image on white.

    Its size is judged from the header, before anything is decoded. Palettes, grey, CMYK and 16-bit samples are
    converted, EXIF orientation is applied, transparent areas show white. Colour profiles are not applied.
    Raises RequestError for any other format, animations, damage, and what is too large.
    """
    return _open(path, _to_rgb)


def open_mask(path: Path) -> Image.Image:
    """Read a PNG, JPEG or WebP as `open_image` does, as an upright grey mask; transparent areas are black."""
    return _open(path, _to_grey)


def _open(path: Path, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    head = _read_head(path)
    kind = _format_of(head, path)
    if kind is WebPImagePlugin.WebPImageFile:
        # Pillow sets up a canvas as soon as it opens a WebP: look before.
        _check_size(_webp_size(head, path), path)
    try:
        with path.open("rb") as file, kind(file) as image:
            _check_size(image.size, path)
            if getattr(image, "n_frames", 1) > 1:
                raise RequestError(f"{path} is an animation", hint="save one of its frames as PNG, JPEG or WebP")
            image.load()
            return _upright(convert(image), image.getexif().get(EXIF_ORIENTATION, 1))
    except DAMAGE as error:
        raise RequestError(
            f"{path} is damaged or cut off: {error}", hint="save the image again, or fetch it again"
        ) from error


def as_rgb(image: Image.Image) -> Image.Image:
    """Any image as `open_image` gives it: upright RGB on white. RequestError where it is too large or an animation."""
    return _converted(image, _to_rgb)


def as_mask(image: Image.Image) -> Image.Image:
    """Any image as an upright grey mask, what is transparent being black. RequestError as `as_rgb` does."""
    return _converted(image, _to_grey)


def as_depth(image: Image.Image) -> npt.NDArray[np.float32]:
    """A grey image's samples as they are, 8 or 16 bits, upright: float32 [H, W]; of a coloured one, its brightness,
    with a warning.

    RequestError as `as_rgb` does.
    """
    return np.asarray(_converted(image, _to_samples), np.float32)


def open_depth(path: Path) -> npt.NDArray[np.float32]:
    """Read a depth map: a .npy file of numbers, or a grey PNG of 8 or 16 bits; float32 as they are.

    A coloured one is read as `as_depth` does. Raises RequestError for another format, damage, and what is too large.
    """
    if path.suffix.lower() == ".npy":
        return open_values(path, "depth map", dimensions=2)
    return np.asarray(_open(path, _to_samples), np.float32)


def open_values(path: Path, what: str, *, dimensions: int) -> npt.NDArray[np.float32]:
    """Read a .npy file of numbers, [H, W] or [H, W, 3] by `dimensions`, as float32. Raises RequestError as the others.

    what: of which they are the values, for the message.
    """
    hint = "write it with numpy.save"
    values = load_npy(path, what, hint=hint)
    if not isinstance(values, np.ndarray):
        raise RequestError(f"{path} holds several arrays", hint="write one with numpy.save")
    if values.ndim != dimensions or math.prod(values.shape[:2]) > LARGEST_PIXELS:
        shape = "[height, width]" if dimensions == 2 else "[height, width, 3]"
        raise RequestError(
            f"{path} holds an array of shape {list(values.shape)}",
            hint=f"give numbers {shape}, of at most {LARGEST_PIXELS} pixels",
        )
    try:
        return np.array(values, np.float32)
    except (TypeError, ValueError) as error:  # no numbers
        raise RequestError(f"{path} holds no {what}: {error}", hint=hint) from error


def load_npy(path: Path, what: str, *, hint: str) -> object:
    """What a .npy file holds: an array, or several where it is an archive. RequestError for damage, naming `what`.

    Mapped, so that a header that promises more than the file holds is refused instead of allocated.
    """
    try:
        loaded: object = np.load(path, mmap_mode="r", allow_pickle=False)
    except (*DAMAGE, zipfile.BadZipFile) as error:
        # What is no .npy file numpy takes for a pickle, and would have its caller allow that.
        pickled = isinstance(error, ValueError) and "pickle" in str(error)
        reason = "it is no .npy file of numbers" if pickled else error
        raise RequestError(f"{path} holds no {what}: {reason}", hint=hint) from error
    return loaded


def _converted(image: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    _check_size(image.size, "the image")
    is_photo = image.format == "MPO"  # a phone's JPEG: the photo, then a depth or gain map, or another view
    if getattr(image, "n_frames", 1) > 1 and not is_photo:
        raise RequestError("the image is an animation", hint="give one of its frames")
    try:
        if is_photo:
            image.seek(0)
            _check_size(image.size, "the image")
        image.load()
    except (*DAMAGE, AssertionError, AttributeError) as error:  # Pillow asserts that its file is still open
        hint = "call its load() before its file is closed"
        raise RequestError(f"the image cannot be read any more: {error}", hint=hint) from error
    try:
        return _upright(convert(image), image.getexif().get(EXIF_ORIENTATION, 1))
    except DAMAGE as error:
        raise RequestError(f"the image cannot be converted: {error}", hint="give an RGB image") from error


def save_png(image: Image.Image, path: Path, parameters: Mapping[str, JsonValue], *, overwrite: bool = False) -> None:
    """Write an image as PNG, with everything that made it as JSON under the text key "sdrt".

    Raises RequestError for a name that does not end in .png, OutputError when the file exists (unless
    `overwrite`), cannot be written, or the parameters are not JSON.
    """
    if path.suffix.lower() != ".png":
        raise RequestError(f"{path} does not end in .png", hint="images are written as PNG: name the output so")
    refuse_existing(path, overwrite=overwrite)
    try:
        text = json.dumps(dict(parameters), allow_nan=False)
    except (ValueError, TypeError) as error:
        raise OutputError(
            f"the parameters of {path} cannot be written: {error}", hint="pass numbers, texts, lists and mappings only"
        ) from error
    metadata = PngImagePlugin.PngInfo()
    metadata.add_text(METADATA_KEY, text)
    data = io.BytesIO()
    image.save(data, format="PNG", pnginfo=metadata)
    write_atomically(path, data.getvalue(), overwrite=overwrite)


def read_parameters(path: Path) -> dict[str, JsonValue]:
    """What `save_png` wrote beside the image. Raises RequestError if it is not a PNG that sdrt made."""
    if not _read_head(path).startswith(PNG_START):
        raise RequestError(f"{path} is not a PNG", hint="pass an image that sdrt wrote")
    try:
        with path.open("rb") as file, PngImagePlugin.PngImageFile(file) as image:
            text = image.info.get(METADATA_KEY)
    except DAMAGE as error:
        raise RequestError(f"{path} is damaged: {error}", hint="pass an image that sdrt wrote") from error
    if text is None:
        raise RequestError(
            f"{path} holds no parameters of sdrt",
            hint="another program made or re-saved it: pass sdrt's own file; to begin with a picture, use --image",
        )
    try:
        parameters: dict[str, JsonValue] = msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.MsgspecError, RecursionError, TypeError, UnicodeError) as error:
        raise RequestError(
            f"the parameters in {path} are damaged: {error}", hint="pass an image that sdrt wrote"
        ) from error
    return parameters


def grid(images: Sequence[Image.Image], *, columns: int | None = None, gap: int = 4) -> Image.Image:
    """Images of one size in one picture, row by row, about as many columns as rows, `gap` white pixels between."""
    sizes = {image.size for image in images}
    if len(sizes) != 1:
        raise RequestError(f"{len(images)} images of {len(sizes)} sizes make no grid", hint="pass images of one size")
    across = math.ceil(math.sqrt(len(images))) if columns is None else columns
    if across < 1 or gap < 0:
        raise RequestError(f"a grid of {across} columns, {gap} pixels apart, is none", hint="use 1 column or more")
    ((width, height),) = sizes
    across = min(across, len(images))
    down = math.ceil(len(images) / across)
    sheet = Image.new("RGB", (across * (width + gap) - gap, down * (height + gap) - gap), "white")
    for index, image in enumerate(images):
        row, column = divmod(index, across)
        sheet.paste(image, (column * (width + gap), row * (height + gap)))
    return sheet


def _read_head(path: Path) -> bytes:
    if not path.is_file():
        raise RequestError(f"{path} is not a file", hint="name an image file that exists")
    try:
        if path.stat().st_size > LARGEST_FILE_BYTES:
            raise RequestError(f"{path} has {path.stat().st_size:,} bytes", hint="images of up to 256 MiB are read")
        with path.open("rb") as file:
            return file.read(HEADER_BYTES)
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}", hint="check that you may read it") from error


def _format_of(head: bytes, path: Path) -> type[ImageFile]:
    """The reader for these first bytes; the file's name does not count."""
    if head.startswith(PNG_START):
        return PngImagePlugin.PngImageFile
    if head.startswith(b"\xff\xd8\xff"):
        return JpegImagePlugin.JpegImageFile
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return WebPImagePlugin.WebPImageFile
    for offset, start, name in OTHER_FORMATS:
        if head[offset:].startswith(start):
            raise RequestError(f"{path} is a {name} file", hint=ACCEPTED)
    if b"<svg" in head.lower() or head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<?xml"):
        raise RequestError(f"{path} is an SVG or another XML file", hint=ACCEPTED)
    raise RequestError(f"{path} is {'empty' if not head else 'not an image that sdrt reads'}", hint=ACCEPTED)


def _webp_size(head: bytes, path: Path) -> tuple[int, int]:
    """Width and height from the first chunk, of each of the three kinds (RFC 9649, section 2)."""
    kind = head[12:16]
    if len(head) < 30 or kind not in (b"VP8X", b"VP8L", b"VP8 "):
        raise RequestError(f"{path} is damaged or cut off", hint="save the image again, or fetch it again")
    if kind == b"VP8X":
        return int.from_bytes(head[24:27], "little") + 1, int.from_bytes(head[27:30], "little") + 1
    if kind == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    return int.from_bytes(head[26:28], "little") & 0x3FFF, int.from_bytes(head[28:30], "little") & 0x3FFF


def _check_size(size: tuple[int, int], path: Path | str) -> None:
    width, height = size
    if width * height > LARGEST_PIXELS:
        raise RequestError(
            f"{path} has {width}x{height} pixels, {width * height / 1e6:.1f} million",
            hint=f"make it smaller: at most {LARGEST_PIXELS / 1e6:.1f} million pixels (4096x4096) are read",
        )


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any mode that PNG, JPEG and WebP decode to, as RGB without metadata; transparency shows white."""
    return _on_backdrop(image, "white").convert("RGB")


def _to_grey(image: Image.Image) -> Image.Image:
    """Any mode as grey without metadata; transparency shows black."""
    return _on_backdrop(image, "black").convert("L")


def _to_samples(image: Image.Image) -> Image.Image:
    """Deep greys as they are, anything else as `_to_grey`, which warns of colours."""
    if image.mode.startswith(("I", "F")):
        return image
    shown = _on_backdrop(image, "black")
    if shown.mode not in ("1", "L"):
        pixels = np.asarray(shown.convert("RGB"))
        if (pixels != pixels[..., :1]).any():
            text = "the depth map has colours, not depth in greys: how bright they are counts as near"
            warnings.warn(text, stacklevel=2)
    return shown.convert("L")


def _on_backdrop(image: Image.Image, colour: str) -> Image.Image:
    """The image without metadata; where it is transparent, on a backdrop."""
    if image.mode.startswith("I"):
        image = _from_sixteen_bits(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        coloured = image.convert("RGBA")
        opaque = Image.alpha_composite(Image.new("RGBA", image.size, colour), coloured).convert("RGB")
    else:
        opaque = image.convert("L" if image.mode in ("1", "L") else "RGB")
    opaque.info = {}
    return opaque


def _from_sixteen_bits(image: Image.Image) -> Image.Image:
    """16-bit grey as LA: Pillow's own conversion would cut off everything above 255."""
    samples = np.asarray(image).astype(np.uint32)
    grey = ((samples + 128) // 257).astype(np.uint8)
    key = image.info.get("transparency")
    alpha = np.full_like(grey, 255) if key is None else np.where(samples == key, 0, 255).astype(np.uint8)
    return Image.merge("LA", (Image.fromarray(grey), Image.fromarray(alpha)))


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    turn = TURNS.get(orientation)
    return image if turn is None else image.transpose(turn)
