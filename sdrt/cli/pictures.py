"""The pictures that `sdrt run` is given as files: opened, and known again when an image of theirs is drawn again."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdrt.cli.terminal import print_warning
from sdrt.cli.wording import field_options
from sdrt.errors import RequestError

if TYPE_CHECKING:
    from PIL.Image import Image

    from sdrt.runners.base import FloatArray

    Control = Image | FloatArray | None
    Picture = Image | FloatArray | Sequence[Control]

# Fields that are pictures: options name their files, and an image remembers their hashes alone.
PICTURES = ("image", "mask_image", "depth_map", "control_image")
NO_CONTROL = "none"  # instead of a file: a ControlNet that is to have no say


def open_pictures(fields: Mapping[str, Any]) -> "dict[str, Picture]":
    """The fields that name files of pictures, with the pictures instead. Raises RequestError."""
    from sdrt.image import open_depth, open_image, open_mask

    openers: dict[str, Callable[[Any], Picture]] = {
        "image": open_image,
        "mask_image": open_mask,
        "depth_map": open_depth,
        "control_image": _open_controls,
    }
    return {field: opener(fields[field]) for field, opener in openers.items() if field in fields}


def check_same_picture(remembered: Mapping[str, Any], fields: Mapping[str, Any]) -> None:
    """An image that was made of others needs them to be drawn again: it does not hold them. Raises RequestError."""
    wanted = {field: remembered[key] for field in PICTURES if remembered.get(key := f"{field}_sha256") is not None}
    options = field_options()
    absent = [options[field] for field in wanted if field not in fields]
    if absent:
        made, them = ("a picture", "it") if len(absent) == 1 else (f"{len(absent)} pictures", "them")
        several = " for each ControlNet" if absent[-1] == options["control_image"] else ""
        raise RequestError(
            f"the image was made with {made} that it does not hold",
            hint=f"name {them} with {' and '.join(absent)}{several}",
        )
    for field, hashed in wanted.items():
        if _sha256(fields[field]) != hashed:
            print_warning(f"{options[field]} is not the picture of the time before, so the result will differ")


def _open_controls(names: Sequence[str]) -> "Sequence[Control]":
    """A picture for each ControlNet, or an array, or None."""
    return [None if name == NO_CONTROL else _open_control(Path(name)) for name in names]


def _open_control(path: Path) -> "Control":
    from sdrt.image import open_image, open_values

    return open_values(path, "picture", dimensions=3) if path.suffix.lower() == ".npy" else open_image(path)


def _sha256(picture: "Picture") -> str | list[str | None]:
    """What an image remembers of a picture; of several a list."""
    import numpy as np
    from PIL.Image import Image

    from sdrt.controls import shown_sha256

    if isinstance(picture, np.ndarray | Image):
        return shown_sha256(picture)
    return [None if each is None else shown_sha256(each) for each in picture]
