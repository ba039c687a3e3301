"""Pictures that tasks are given: checked, brought to a size, as samples of the VAE, as masks, put together again."""

import hashlib

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

from sdrt.errors import RequestError
from sdrt.image import LARGEST_PIXELS, as_depth, as_mask, as_rgb, from_pixels
from sdrt.runners.base import FloatArray

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels
OPAQUE = 255
HALF = 128  # of 255: what is drawn where a mask has no greys


def check_picture(name: str, value: object) -> Image.Image:
    """An image as upright RGB on white. Raises RequestError for what is no image, too large, or moves."""
    return as_rgb(_check_image(name, value))


def check_mask(name: str, value: object) -> Image.Image:
    """A mask as upright grey, what is transparent being black. Raises RequestError as `check_picture` does."""
    return as_mask(_check_image(name, value))


def check_depth(name: str, value: object) -> FloatArray:
    """A depth map, an image or an array, as float32 [H, W]. Raises RequestError for other shapes, NaN and infinity."""
    try:
        values = as_depth(value) if isinstance(value, Image.Image) else np.asarray(value)
    except ValueError as error:  # a list whose rows are not of one length
        raise RequestError(f"{name} is no array: {error}", hint="give numbers [height, width]") from error
    if values.ndim != 2 or values.size == 0 or values.dtype.kind not in "fiu":
        raise RequestError(
            f"{name} is {type(value).__name__} of {values.dtype} {list(values.shape)}",
            hint="give numbers [height, width], or a grey image of 8 or 16 bits",
        )
    if values.size > LARGEST_PIXELS:
        raise RequestError(f"{name} has {values.size} values", hint=f"give at most {LARGEST_PIXELS}")
    depth = values.astype(np.float32)
    if not np.isfinite(depth).all():
        raise RequestError(f"{name} holds values that are NaN or infinite", hint="fill the gaps in: 0 is far away")
    return depth


def _check_image(name: str, value: object) -> Image.Image:
    if not isinstance(value, Image.Image):
        raise RequestError(f"{name} is {type(value).__name__}", hint="give a PIL image: sdrt.image.open_image")
    return value


def resize(image: Image.Image, height: int, width: int) -> Image.Image:
    """The image in this size, as the reference resizes it; itself where it has it."""
    if image.size == (width, height):
        return image
    return image.resize((width, height), Image.Resampling.LANCZOS)


def to_sample(image: Image.Image) -> FloatArray:
    """An RGB image for the VAE: float32 [1, 3, H, W] in [-1, 1]."""
    return from_pixels(np.asarray(image)[None])


def pixels_sha256(image: Image.Image) -> str:
    """The hash of an image's size and pixels."""
    return hashlib.sha256(f"{image.width}x{image.height}:".encode() + image.tobytes()).hexdigest()


def values_sha256(values: FloatArray) -> str:
    """The hash of an array's shape and values."""
    return hashlib.sha256(f"{values.shape}:".encode() + values.tobytes()).hexdigest()


def binarised(mask: Image.Image) -> Image.Image:
    """A grey mask in black and white."""
    return Image.fromarray(np.where(np.asarray(mask) >= HALF, OPAQUE, 0).astype(np.uint8))


def blurred(mask: Image.Image, radius: float) -> Image.Image:
    """A grey mask with edges as soft as a Gaussian of this standard deviation, in pixels, makes them."""
    return mask if radius == 0 else mask.filter(ImageFilter.GaussianBlur(radius))


def nearest_in_latents(mask: Image.Image, side: int) -> FloatArray:
    """A mask's pixel at the upper left corner of each latent: float32 [1, h, w] in [0, 1]."""
    return np.asarray(mask, np.float32)[None, ::side, ::side] / np.float32(OPAQUE)


def in_whole_latents(mask: Image.Image, side: int) -> Image.Image:
    """A mask that is as bright in all of each latent's pixels as in the brightest of them."""
    pixels = np.asarray(mask)
    height, width = pixels.shape
    blocks = pixels.reshape(height // side, side, width // side, side).max((1, 3))
    return Image.fromarray(blocks.repeat(side, 0).repeat(side, 1))


def mean_in_latents(mask: Image.Image, side: int) -> FloatArray:
    """A mask's mean over the pixels of each latent: float32 [1, h, w] in [0, 1]."""
    pixels = np.asarray(mask, np.float32)
    height, width = pixels.shape
    blocks = pixels.reshape(height // side, side, width // side, side).mean((1, 3))
    mean: FloatArray = (blocks / np.float32(OPAQUE))[None].astype(np.float32)
    return mean


def composite(drawn: Image.Image, image: Image.Image, mask: Image.Image) -> Image.Image:
    """`image` with what is `drawn` where the mask is white, as much as it is where it is grey; all of one size."""
    share = np.asarray(mask, np.uint32)[:, :, None]
    new, old = np.asarray(drawn, np.uint32), np.asarray(image, np.uint32)
    mixed = (new * share + old * (OPAQUE - share) + OPAQUE // 2) // OPAQUE
    return Image.fromarray(mixed.astype(np.uint8))


def crop_box(mask: Image.Image, padding: int, height: int, width: int) -> Box:
    """The smallest box of the shape height : width around all that is not black and `padding` pixels more.

    It is moved and cut to lie inside the mask, as the reference has it. RequestError for a mask that is all black.
    """
    rows, columns = np.nonzero(np.asarray(mask))
    if rows.size == 0:
        raise RequestError("the mask is all black, so there is nothing to crop to", hint="leave padding_mask_crop out")
    left, right = _padded(columns, padding, mask.width)
    top, bottom = _padded(rows, padding, mask.height)
    shape = width / height  # rounded before it is used, as the reference does: it decides about a pixel
    if (right - left) / (bottom - top) > shape:
        top, bottom = _widened(top, bottom, (right - left) / shape, mask.height)
    else:
        left, right = _widened(left, right, (bottom - top) * shape, mask.width)
    return left, top, right, bottom


def _padded(positions: npt.NDArray[np.intp], padding: int, length: int) -> tuple[int, int]:
    return max(int(positions.min()) - padding, 0), min(int(positions.max()) + 1 + padding, length)


def _widened(start: int, end: int, wanted: float, length: int) -> tuple[int, int]:
    """[start, end) grown on both sides to `wanted`, moved to lie in [0, length) and cut to it."""
    more = int(wanted - (end - start))
    start, end = start - more // 2, end + more - more // 2
    if end >= length:
        start, end = start - (end - length), length
    if start < 0:
        start, end = 0, end - start
    return start, min(end, length)


def fitted(image: Image.Image, height: int, width: int) -> Image.Image:
    """The whole image scaled into this size, in its middle; what is left is filled with its border's pixels."""
    inner = _in_shape(image, height, width, by_width=width / height < image.width / image.height)
    scaled = np.asarray(image.resize(inner, Image.Resampling.LANCZOS))
    top, left = height // 2 - inner[1] // 2, width // 2 - inner[0] // 2
    edges = ((top, height - top - inner[1]), (left, width - left - inner[0]), (0, 0))[: scaled.ndim]
    return Image.fromarray(np.pad(scaled, edges, mode="edge"))


def covering(image: Image.Image, height: int, width: int) -> Image.Image:
    """The image scaled until it covers this size, without what is outside it."""
    outer = _in_shape(image, height, width, by_width=width / height > image.width / image.height)
    scaled = image.resize(outer, Image.Resampling.LANCZOS)
    left, top = outer[0] // 2 - width // 2, outer[1] // 2 - height // 2
    return scaled.crop((left, top, left + width, top + height))


def check_covering(image_size: tuple[int, int], height: int, width: int) -> None:
    """RequestError where an image of that (width, height) would get too large before it covers this size."""
    factor = max(height / image_size[1], width / image_size[0])
    if image_size[0] * image_size[1] * factor**2 > LARGEST_PIXELS:
        raise RequestError(
            f"padding_mask_crop cuts {width}x{height} pixels out, a strip too long for {image_size[0]}x{image_size[1]}",
            hint="give a height and width of a like shape, or mark less with the mask",
        )


def _in_shape(image: Image.Image, height: int, width: int, *, by_width: bool) -> tuple[int, int]:
    """(width, height) of the image's own shape that has one side of these."""
    if by_width:
        return width, max(1, image.height * width // image.width)
    return max(1, image.width * height // image.height), height
