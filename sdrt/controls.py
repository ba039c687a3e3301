"""Controls: pictures that steer the drawing through the bundle's ControlNets (Zhang et al. 2023, arXiv:2302.05543)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from sdrt.bundle import JsonValue, ModelRecord, ShapeProfile
from sdrt.checks import check_finite
from sdrt.conditions import Steering
from sdrt.errors import RequestError
from sdrt.image import LARGEST_PIXELS
from sdrt.request import Request
from sdrt.runners.base import CONTROL_EMBEDDING, FloatArray, Runner
from sdrt.tasks import pictures

LARGEST_FACTOR = 4  # of the bundle's sizes: the largest picture that its control embedding takes, for windows
_NO_SCALE, _NO_START, _NO_END = 1.0, 0.0, 1.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Control:
    """What one ControlNet of the bundle is shown, and how much of it counts in which part of the steps.

    image: RGB, or the values themselves, float32 [H, W, 3] in the result's size. None: that ControlNet has no say.
    """

    image: Image.Image | FloatArray | None
    image_sha256: str | None
    scale: float
    start: float
    end: float

    def scales(self, rows: int) -> FloatArray:
        """Its weight in each of the plan's rows, float32 [rows]; a row counts if it lies in [start, end] as a whole."""
        if self.image is None:
            return np.zeros(rows, np.float32)
        inside = [row / rows >= self.start and (row + 1) / rows <= self.end for row in range(rows)]
        return np.where(inside, np.float32(self.scale), np.float32(0)).astype(np.float32)


def resolve_controls(request: Request, model: ModelRecord) -> tuple[Control, ...]:
    """A control for each ControlNet of the bundle; none at all for a request without pictures. Raises RequestError."""
    named = ("controlnet_conditioning_scale", "control_guidance_start", "control_guidance_end")
    values = {name: getattr(request, name) for name in named}
    if request.control_image is None:
        beside = [name for name, value in values.items() if value is not None]
        if beside:
            raise RequestError(f"{beside[0]} is given, but there is no control_image", hint=f"leave {beside[0]} out")
        return ()
    count = len(model.controlnets)
    if count == 0:
        hint = "build it with one: sdrt build MODEL --controlnet FOLDER"
        raise RequestError("control_image is given, but this bundle has no ControlNet", hint=hint)
    given = _listed("control_image", request.control_image, model, default=None)
    if all(image is None for image in given):
        raise RequestError("control_image names no image", hint="give one, or leave control_image out")
    images = [None if image is None else _check_shown(image) for image in given]
    scales, starts, ends = (
        [check_finite(name, value) for value in _listed(name, values[name], model, default=default)]
        for name, default in zip(named, (_NO_SCALE, _NO_START, _NO_END), strict=True)
    )
    for start, end in zip(starts, ends, strict=True):
        if not 0 <= start < end <= 1:
            raise RequestError(
                f"control_guidance_start is {start:g} and control_guidance_end {end:g}",
                hint="give shares of the steps: 0 <= start < end <= 1",
            )
    return tuple(
        Control(
            image=image,
            image_sha256=None if image is None else shown_sha256(image),
            scale=scale,
            start=start,
            end=end,
        )
        for image, scale, start, end in zip(images, scales, starts, ends, strict=True)
    )


def without_say(controls: Sequence[Control], rows: int) -> list[str]:
    """What to warn of: pictures whose part of the steps holds none of so many as a whole."""
    return [
        f"control_guidance_start {control.start:g} to control_guidance_end {control.end:g} holds none of {rows} steps "
        "as a whole, so that control_image did nothing"
        for control in controls
        if control.image is not None and control.scale != 0 and not control.scales(rows).any()
    ]


def size_of_controls(controls: Sequence[Control], profile: ShapeProfile) -> tuple[int, int] | None:
    """(height, width) of the first picture, rounded down to the bundle's grid; None where there is none."""
    image = next((control.image for control in controls if control.image is not None), None)
    if image is None:
        return None
    height, width = (side - side % profile.multiple_of for side in _size_of(image))
    return height, width


def check_control_size(controls: Sequence[Control], height: int, width: int, profile: ShapeProfile) -> None:
    """RequestError for an image in windows that is larger than its pictures can be embedded in."""
    most = tuple(LARGEST_FACTOR * side for side in profile.maximum)
    if controls and (height > most[0] or width > most[1]):
        raise RequestError(
            f"{width}x{height} is more than {LARGEST_FACTOR} times this bundle's size",
            hint=f"with control_image, ask for at most {most[1]}x{most[0]}",
        )


def check_arrays(controls: Sequence[Control], height: int, width: int) -> None:
    """RequestError for values that are not of the size that the result has: they are not resized."""
    for control in controls:
        if isinstance(control.image, np.ndarray) and _size_of(control.image) != (height, width):
            tall, wide = _size_of(control.image)
            raise RequestError(
                f"control_image is an array of {wide}x{tall} for an image of {width}x{height}",
                hint="give arrays in the size of the result, or a picture, which is resized",
            )


def shown_sha256(image: Image.Image | FloatArray) -> str:
    """By which what a ControlNet is shown can be known again."""
    return pictures.values_sha256(image) if isinstance(image, np.ndarray) else pictures.pixels_sha256(image)


def steer(
    controls: Sequence[Control], model: ModelRecord, runner: Runner, rows: int, height: int, width: int
) -> Steering | None:
    """What the ControlNets are given for an image of this size, in pixels; None for a bundle without.

    A request without controls, or with some of them, has weights of 0 for the others.
    """
    count, side = len(model.controlnets), model.vae_downsample
    if count == 0:
        return None
    if not controls:
        nothing = np.zeros((count, model.control_features, height // side, width // side), np.float32)
        return Steering(control=nothing, scales=np.zeros((rows, count), np.float32))
    shown_to = np.zeros((1, count, 3, height, width), np.float32)
    for index, control in enumerate(controls):
        if control.image is not None:
            shown_to[0, index] = _values(control.image, height, width).transpose(2, 0, 1)
    embedded = runner.run(CONTROL_EMBEDDING, {"controlnet_cond": shown_to})["control"][0]
    return Steering(control=embedded, scales=np.stack([control.scales(rows) for control in controls], axis=1))


def control_parameters(controls: Sequence[Control]) -> Mapping[str, JsonValue]:
    """What is to be remembered of them: `Request`'s fields, and by which values the pictures can be known again."""
    if not controls:
        return {}
    return {
        "control_image_sha256": [control.image_sha256 for control in controls],
        "controlnet_conditioning_scale": [control.scale for control in controls],
        "control_guidance_start": [control.start for control in controls],
        "control_guidance_end": [control.end for control in controls],
    }


def _check_shown(image: object) -> Image.Image | FloatArray:
    """A picture as upright RGB on white; an array of any finite values as float32 [H, W, 3]. Raises RequestError."""
    if not isinstance(image, np.ndarray):
        return pictures.check_picture("control_image", image)
    if image.ndim != 3 or image.shape[2] != 3 or image.size == 0 or image.dtype.kind != "f":
        raise RequestError(
            f"control_image is an array of {image.dtype} {list(image.shape)}",
            hint="give an image, or floating-point numbers [height, width, 3] as the network is to see them",
        )
    if image.size > 3 * LARGEST_PIXELS:
        raise RequestError(f"control_image has {image.size} values", hint=f"give at most {3 * LARGEST_PIXELS}")
    with np.errstate(over="ignore"):  # what is too large becomes infinite
        values = image.astype(np.float32)
    if not np.isfinite(values).all():
        raise RequestError("control_image holds values that are NaN or infinite", hint="give finite ones")
    return values


def _size_of(image: Image.Image | FloatArray) -> tuple[int, int]:
    """(height, width)."""
    return image.shape[:2] if isinstance(image, np.ndarray) else (image.height, image.width)


def _values(image: Image.Image | FloatArray, height: int, width: int) -> FloatArray:
    """What a ControlNet sees of it, float32 [height, width, 3]: of pictures from 0 to 1."""
    if isinstance(image, np.ndarray):
        return image
    return np.asarray(pictures.resize(image, height, width), np.float32) / np.float32(255)


def _listed(name: str, value: object, model: ModelRecord, *, default: object) -> list[object]:
    """One value for each ControlNet: all those of a list, or the same number for each, or an image for the only one."""
    count = len(model.controlnets)
    if value is None:
        return [default] * count
    if not isinstance(value, list | tuple):
        if count > 1 and name == "control_image":
            raise RequestError(
                f"{name} is one image, but this bundle has {count} ControlNets: {', '.join(model.controlnets)}",
                hint="give a list with an image for each in this order, or None for one that is to have no say",
            )
        return [value] * count
    if len(value) != count:
        raise RequestError(
            f"{name} lists {len(value)}, but this bundle has {count}: {', '.join(model.controlnets)}",
            hint="give one for each ControlNet, in this order",
        )
    return list(value)
