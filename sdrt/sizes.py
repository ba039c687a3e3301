"""Which image sizes a bundle makes and its VAE takes, in words and as the nearest to one that it does not make."""

import math

from sdrt.bundle import ShapeProfile
from sdrt.errors import RequestError
from sdrt.image import LARGEST_PIXELS


def describe_sizes(profile: ShapeProfile) -> str:
    """The sizes that a profile accepts, as WIDTHxHEIGHT."""
    if profile.sizes:
        return ", ".join(f"{width}x{height}" for height, width in profile.sizes)
    low, high = (f"{width}x{height}" for height, width in (profile.minimum, profile.maximum))
    return low if low == high else f"{low} to {high} in steps of {profile.multiple_of} pixels"


def nearest_size(profile: ShapeProfile, height: int, width: int) -> tuple[int, int]:
    """The accepted (height, width) that is closest to the one given."""
    if profile.sizes:
        return min(profile.sizes, key=lambda size: abs(size[0] - height) + abs(size[1] - width))
    grid = profile.multiple_of
    rows, columns = (
        min(max(round(side / grid) * grid, low), high)
        for side, low, high in zip((height, width), profile.minimum, profile.maximum, strict=True)
    )
    return rows, columns


def shaped_size(profile: ShapeProfile, height: int, width: int) -> tuple[int, int]:
    """The accepted (height, width) for a picture of this size to be scaled to: of those most like its shape."""
    height, width = max(height, 1), max(width, 1)
    if profile.sizes:
        shape = math.log(height / width)
        return min(profile.sizes, key=lambda size: (abs(math.log(size[0] / size[1]) - shape), abs(size[0] - height)))
    sides = tuple(zip((height, width), profile.minimum, profile.maximum, strict=True))
    factor = min(1.0, *(high / side for side, _, high in sides))
    factor = max(factor, *(low / side for side, low, _ in sides))
    return nearest_size(profile, round(height * factor), round(width * factor))


def next_size(profile: ShapeProfile, height: int, width: int) -> tuple[int, int] | None:
    """The smallest (height, width), whole or in windows, of which no side is smaller than the one given, if any."""
    rows, columns = (-(-side // profile.multiple_of) * profile.multiple_of for side in (height, width))
    sizes = [(max(rows, low), max(columns, least)) for low, least in profile.sizes or (profile.minimum,)]
    possible = [size for size in sizes if profile.accepts(*size) or fits_windows(profile, *size)]
    return min(possible, key=lambda size: size[0] * size[1], default=None)


def shrunk_size(profile: ShapeProfile, height: int, width: int) -> tuple[int, int]:
    """About the largest (height, width) of a shape that can be made, for one that has too many pixels."""
    shares = (percent / 100 for percent in range(99, 0, -1))
    sizes = (next_size(profile, int(height * share), int(width * share)) for share in shares)
    return next((size for size in sizes if size is not None), profile.maximum)


def window_size(profile: ShapeProfile, height: int, width: int) -> tuple[int, int]:
    """The largest accepted (height, width) that no image of this size is smaller than, in pixels."""
    if profile.sizes:
        inside = [size for size in profile.sizes if size[0] <= height and size[1] <= width]
        return max(inside, key=lambda size: size[0] * size[1], default=(0, 0))
    return min(height, profile.maximum[0]), min(width, profile.maximum[1])


def fits_windows(profile: ShapeProfile, height: int, width: int) -> bool:
    """Whether an image of this size can be made in overlapping windows of an accepted size."""
    on_grid = height % profile.multiple_of == 0 and width % profile.multiple_of == 0
    return on_grid and height * width <= LARGEST_PIXELS and profile.accepts(*window_size(profile, height, width))


def check_vae_size(height: int, width: int, vae_downsample: int) -> None:
    """Raises RequestError for a size in pixels that a VAE of this factor does not take, or that is too large."""
    if height % vae_downsample or width % vae_downsample:
        near = [max(side // vae_downsample, 1) * vae_downsample for side in (width, height)]
        raise RequestError(
            f"the image has {width}x{height} pixels; the VAE takes multiples of {vae_downsample}",
            hint=f"resize it, for example to {near[0]}x{near[1]}",
        )
    if height * width > LARGEST_PIXELS:
        raise RequestError(
            f"the image has {width}x{height} pixels, more than {LARGEST_PIXELS}", hint="work on a smaller one"
        )
