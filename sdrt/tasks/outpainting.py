"""Outpainting: an image on a larger canvas, whose new part is drawn. It is inpainting of that part."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import numpy as np
from PIL import Image, ImageColor

from sdrt.bundle import JsonValue, ModelRecord, ShapeProfile
from sdrt.checks import check_whole, shown
from sdrt.conditions import Start
from sdrt.errors import RequestError
from sdrt.image import LARGEST_PIXELS
from sdrt.plan import SamplingPlan
from sdrt.progress import Work
from sdrt.request import Request
from sdrt.sizes import next_size
from sdrt.tasks import pictures
from sdrt.tasks.base import Preparation, TaskName
from sdrt.tasks.inpainting import Inpainting, inpainting_of

SIDES = ("left", "top", "right", "bottom")
LARGEST_MARGIN = 4096
EDGE, NOISE = "edge", "noise"
_NOISE_SEED = 0  # of the fill alone, so that it is the same whatever the request's seed
_HINT = 'name sides and pixels: {"left": 128, "bottom": 64}'


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outpainting:
    """See `Task`. inside: the inpainting of the canvas. margins: pixels (left, top, right, bottom).

    image_sha256: of the image as it was given.
    """

    name: ClassVar[TaskName] = "outpainting"
    windowed: ClassVar[bool] = True
    inside: Inpainting
    image_sha256: str
    margins: tuple[int, int, int, int]
    fill: str

    @property
    def size(self) -> tuple[int, int] | None:
        """That of the canvas."""
        return self.inside.size

    def resized(self, height: int, width: int) -> Self:
        """With the canvas in this size."""
        return replace(self, inside=self.inside.resized(height, width))

    def check_size(self, profile: ShapeProfile, height: int, width: int) -> None:
        """RequestError for a (height, width) that is not the canvas's: the image would be stretched into it."""
        if (height, width) == self.size:
            return
        canvas = self.inside.image
        fitting = self.fitting_margins(profile, height, width)
        if fitting is None:
            fitting = self.fitting_margins(profile, canvas.height, canvas.width)
        raise RequestError(
            f"outpaint makes {canvas.width}x{canvas.height}, not the {width}x{height} of height and width",
            hint="leave height and width out" + ("" if fitting is None else f"; {fitting}"),
        )

    def fitting_margins(self, profile: ShapeProfile, height: int, width: int) -> str | None:
        """Margins whose canvas has this size, or the next larger one that can be made, in words; None: there are none.

        The larger one of two that are opposite is changed.
        """
        size = next_size(profile, height, width)
        if size is None:
            return None
        left, top, right, bottom = self.margins
        taller, wider = size[0] - self.inside.image.height, size[1] - self.inside.image.width
        left, right = (left + wider, right) if left > right else (left, right + wider)
        top, bottom = (top + taller, bottom) if top > bottom else (top, bottom + taller)
        margins = dict(zip(SIDES, (left, top, right, bottom), strict=True))
        if not all(0 <= margin <= LARGEST_MARGIN for margin in margins.values()) or not any(margins.values()):
            return None
        named = ",".join(f"{side}={margin}" for side, margin in margins.items() if margin > 0)
        return f"{named} makes {size[1]}x{size[0]}"

    def check_plan(self, plan: SamplingPlan) -> None:
        """See `Inpainting`."""
        self.inside.check_plan(plan)

    def first_step(self, num_inference_steps: int) -> int:
        """See `Inpainting`."""
        return self.inside.first_step(num_inference_steps)

    def start(self, preparation: Preparation) -> Work[Start]:
        """See `Inpainting`."""
        return self.inside.start(preparation)

    def finish(self, image: Image.Image) -> Image.Image:
        """See `Inpainting`."""
        return self.inside.finish(image)

    def warnings(self) -> tuple[str, ...]:
        """An image so narrow that it fills no latent, of which the new part knows nothing."""
        if np.asarray(self.inside.worked_on()).min() < pictures.OPAQUE:
            return ()
        side = self.inside.vae_downsample
        return (f"the image fills no {side}x{side} pixels of the model's grid: what is drawn does not go on from it",)

    def parameters(self) -> Mapping[str, JsonValue]:
        """The margins and what filled them, and what of the inpainting's own was asked for."""
        margins: dict[str, JsonValue] = dict(zip(SIDES, self.margins, strict=True))
        inpainting = dict(self.inside.parameters())
        own = {name: inpainting[name] for name in ("strength", "mask_mode", "mask_blur", "preserve")}
        return {**own, "image_sha256": self.image_sha256, "outpaint": margins, "fill": self.fill}


def read_outpainting(request: Request, model: ModelRecord) -> Outpainting:
    """The task of a request with an image and margins. Raises RequestError."""
    image = pictures.check_picture("image", request.image)
    margins = _check_margins(request.outpaint)
    _check_canvas(image, margins)
    fill = EDGE if request.fill is None else request.fill
    inside = inpainting_of(request, model, _canvas(image, margins, fill), _mask(image, margins), preserve=True)
    inside = replace(inside, whole_latents=True)  # else some of the margin would be left as it was filled
    return Outpainting(inside=inside, image_sha256=pictures.pixels_sha256(image), margins=margins, fill=fill)


def parse_margins(text: str) -> dict[str, int]:
    """Margins as on a command line, such as left=128,right=64. Raises RequestError."""
    margins = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*([a-z]+)\s*=\s*([0-9]{1,9})\s*", part)
        if match is None or match[1] in margins:
            raise RequestError(f"outpaint is {shown(text)}", hint="name each side once: left=128,bottom=64")
        margins[match[1]] = int(match[2])
    return margins


def _check_margins(margins: object) -> tuple[int, int, int, int]:
    if not isinstance(margins, Mapping):
        raise RequestError(f"outpaint is {shown(margins)}", hint=_HINT)
    unknown = [shown(side) for side in margins if side not in SIDES]
    if unknown:
        raise RequestError(f"outpaint names {', '.join(unknown)}", hint=f"the sides are {', '.join(SIDES)}")
    left, top, right, bottom = (
        check_whole(f"outpaint's {side}", margins.get(side, 0), 0, LARGEST_MARGIN) for side in SIDES
    )
    if left + top + right + bottom == 0:
        raise RequestError("outpaint grows no side", hint=_HINT)
    return left, top, right, bottom


def _check_canvas(image: Image.Image, margins: tuple[int, int, int, int]) -> None:
    left, top, right, bottom = margins
    width, height = image.width + left + right, image.height + top + bottom
    if width * height > LARGEST_PIXELS:
        raise RequestError(
            f"outpaint makes {image.width}x{image.height} pixels {width}x{height}, more than {LARGEST_PIXELS}",
            hint="grow it by less",
        )


def _canvas(image: Image.Image, margins: tuple[int, int, int, int], fill: str) -> Image.Image:
    left, top, right, bottom = margins
    pixels = np.asarray(image)
    around = ((top, bottom), (left, right), (0, 0))
    if fill == EDGE:
        return Image.fromarray(np.pad(pixels, around, mode="edge"))
    canvas = np.pad(pixels, around)
    new = np.pad(np.zeros(pixels.shape[:2], bool), around[:2], constant_values=True)
    if fill == NOISE:
        canvas[new] = np.random.default_rng(_NOISE_SEED).integers(0, 256, (int(new.sum()), 3), np.uint8)
        return Image.fromarray(canvas)
    hint = f"give {EDGE}, {NOISE} or a colour: white, #204080"
    if not isinstance(fill, str):
        raise RequestError(f"fill is {shown(fill)}", hint=hint)
    try:
        canvas[new] = ImageColor.getrgb(fill)[:3]
    except (ValueError, AttributeError, OverflowError) as error:
        raise RequestError(f"fill is {shown(fill)}", hint=hint) from error
    return Image.fromarray(canvas)


def _mask(image: Image.Image, margins: tuple[int, int, int, int]) -> Image.Image:
    left, top, right, bottom = margins
    kept = np.zeros((image.height, image.width), np.uint8)
    return Image.fromarray(np.pad(kept, ((top, bottom), (left, right)), constant_values=pictures.OPAQUE))
