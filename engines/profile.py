"""Shape profiles: what `--sizes` and `--batch` mean for one model."""

import re

from sdrt.bundle import ShapeProfile
from sdrt.errors import RequestError

_SIZE = re.compile(r"([0-9]{1,9})[xX]([0-9]{1,9})")
_HINT = (
    "write sizes as WIDTHxHEIGHT: a list (512x512,512x768), a range of both sides (256..1024), "
    "or of each (256x256..1024x768)"
)
LARGEST_SIDE = 8192
LARGEST_BATCH = 64

Size = tuple[int, int]


def parse_profile(
    sizes: str | None,
    batch: str,
    *,
    default: Size,
    multiple_of: int,
    text_length: int,
) -> ShapeProfile:
    """The profile that the options ask for.

    sizes: WIDTHxHEIGHT list or range, or None for everything from half to one and a half times `default`
    (height, width). batch: "4" or "1..4", in images. multiple_of: the model's grid in pixels.
    RequestError: not of this form, off the grid, empty or absurd.
    """
    if sizes is None:
        minimum, maximum = _around(default, multiple_of)
        listed: tuple[Size, ...] = ()
    elif ".." in sizes:
        minimum, maximum = _parse_range(sizes)
        listed = ()
    else:
        listed = _parse_list(sizes)
        minimum = (min(height for height, _ in listed), min(width for _, width in listed))
        maximum = (max(height for height, _ in listed), max(width for _, width in listed))
    for size in (*listed, minimum, maximum):
        _check(size, multiple_of)
    return ShapeProfile(
        sizes=listed,
        minimum=minimum,
        maximum=maximum,
        multiple_of=multiple_of,
        max_batch=_parse_batch(batch),
        text_length=text_length,
    )


def describe_profile(profile: ShapeProfile) -> str:
    """The profile in words, as `sizes` could be written again."""
    images = f"up to {profile.max_batch} images at a time" if profile.max_batch > 1 else "one image at a time"
    if profile.sizes:
        return ", ".join(f"{width}x{height}" for height, width in profile.sizes) + f", {images}"
    low, high = (f"{width}x{height}" for height, width in (profile.minimum, profile.maximum))
    return f"{low}..{high} in multiples of {profile.multiple_of}, {images}"


def _around(default: Size, multiple_of: int) -> tuple[Size, Size]:
    low = tuple(max(multiple_of, side // 2 // multiple_of * multiple_of) for side in default)
    high = tuple(-(-side * 3 // 2 // multiple_of) * multiple_of for side in default)
    return (low[0], low[1]), (high[0], high[1])


def _parse_list(text: str) -> tuple[Size, ...]:
    sizes = tuple(_parse_size(part.strip(), text) for part in text.split(","))
    return tuple(dict.fromkeys(sizes))


def _parse_range(text: str) -> tuple[Size, Size]:
    ends = [part.strip() for part in text.split("..")]
    if len(ends) != 2:
        raise RequestError(f"--sizes {text!r} is not one range", hint=_HINT)
    low, high = ((int(end), int(end)) if _is_count(end) else _parse_size(end, text) for end in ends)
    if low[0] > high[0] or low[1] > high[1]:
        raise RequestError(f"--sizes {text!r} ends below its start", hint=_HINT)
    return low, high


def _parse_size(part: str, text: str) -> Size:
    match = _SIZE.fullmatch(part)
    if match is None:
        raise RequestError(f"--sizes {text!r}: {part!r} is not a size", hint=_HINT)
    return int(match[2]), int(match[1])


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 9


def _check(size: Size, multiple_of: int) -> None:
    height, width = size
    if min(size) < multiple_of or height % multiple_of != 0 or width % multiple_of != 0:
        near = "x".join(str(max(1, round(side / multiple_of)) * multiple_of) for side in (width, height))
        raise RequestError(
            f"{width}x{height} is not a size of this model: both sides must be multiples of {multiple_of} pixels",
            hint=f"the nearest one is {near}",
        )
    if max(size) > LARGEST_SIDE:
        raise RequestError(f"{width}x{height} is too large", hint=f"the largest side is {LARGEST_SIDE} pixels")


def _parse_batch(text: str) -> int:
    ends = [part.strip() for part in text.split("..")]
    hint = f'write "1..4" for up to four images at a time; the largest is {LARGEST_BATCH}'
    if len(ends) > 2 or not all(_is_count(end) for end in ends):
        raise RequestError(f"--batch {text!r} is not a range of counts", hint=hint)
    if len(ends) == 2 and int(ends[0]) != 1:
        raise RequestError(f"--batch {text!r} does not start at 1, but single images are always possible", hint=hint)
    if not 1 <= int(ends[-1]) <= LARGEST_BATCH:
        raise RequestError(f"--batch {text!r} is out of range", hint=hint)
    return int(ends[-1])
