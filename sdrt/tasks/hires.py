"""The second pass of a request ("hires fix"): what the first one drew is enlarged, and drawn again as image-to-image.

It is what AUTOMATIC1111's web UI does under that name, and a second sampler behind an upscaled latent in ComfyUI.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

from sdrt.bundle import JsonValue
from sdrt.checks import check_finite, shown
from sdrt.conditions import Start
from sdrt.errors import RequestError
from sdrt.plan import SamplingPlan
from sdrt.progress import Work
from sdrt.request import Request
from sdrt.runners.base import FloatArray
from sdrt.tasks.base import Drawn, PlainTask, Preparation, TaskName
from sdrt.tasks.image_to_image import check_noised, check_strength, first_step_of
from sdrt.tasks.pictures import resize, to_sample
from sdrt.tasks.resampling import Mode, resample

FIELDS = ("hires_scale", "hires_upscaler", "hires_strength", "hires_steps")
DEFAULT_STRENGTH = 0.7
DEFAULT_UPSCALER = "latent"
LARGEST_SCALE = 8.0
# What resamples the latents; None: their image is enlarged instead.
UPSCALERS: Mapping[str, Mode | None] = {
    "latent": "bilinear",
    "latent-nearest": "nearest",
    "latent-bicubic": "bicubic",
    "lanczos": None,
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SecondPass(PlainTask):
    """See `Task`. scale: of each side. steps: of which `strength` is the share that runs; None: those of the first."""

    name: ClassVar[TaskName] = "image-to-image"
    size: ClassVar[None] = None
    windowed: ClassVar[bool] = True
    scale: float
    upscaler: str
    strength: float
    steps: int | None

    def resized(self, height: int, width: int) -> Self:
        """What was drawn is brought to any size."""
        return self

    def check_plan(self, plan: SamplingPlan) -> None:
        """RequestError for a plan without `noised`."""
        check_noised(plan)

    def first_step(self, num_inference_steps: int) -> int:
        """The steps before those that `strength` lets run."""
        return first_step_of(self.strength, num_inference_steps, name="hires_strength")

    def start(self, preparation: Preparation) -> Work[Start]:
        """What was drawn, larger, with the generator's next numbers as noise.

        They are drawn as the reference's image-to-image draws them: of latents none are needed to encode them.
        """
        if preparation.drawn is None:
            raise ValueError("a second pass begins with what the first has drawn")
        known = yield from self._enlarged(preparation.drawn, preparation)
        return Start(latents=preparation.with_noise(known, preparation.noise()))

    def parameters(self) -> Mapping[str, JsonValue]:
        """The fields that ask for it."""
        values = (self.scale, self.upscaler, self.strength, self.steps)
        return dict(zip(FIELDS, values, strict=True))

    def size_of(self, height: int, width: int, multiple_of: int) -> tuple[int, int]:
        """(height, width) of what is drawn in this size, `scale` times as large to the nearest multiple, in pixels."""
        tall, wide = (round(side * self.scale / multiple_of) * multiple_of for side in (height, width))
        return tall, wide

    def _enlarged(self, drawn: Drawn, preparation: Preparation) -> Work[FloatArray]:
        """The latents of what was drawn in this pass's size: float32 [1, C, h, w]."""
        mode, (_, rows, columns) = UPSCALERS[self.upscaler], preparation.shape
        if mode is not None:
            return resample(drawn.latents, rows, columns, mode)
        image = yield from drawn.decode(drawn.latents)
        side = image.height // drawn.latents.shape[2]
        return (yield from preparation.latents_of(to_sample(resize(image, rows * side, columns * side))))


def read_second_pass(request: Request) -> SecondPass | None:
    """The second pass that a request asks for; None where it asks for none. Raises RequestError."""
    if request.hires_scale is None:
        given = [name for name in FIELDS if getattr(request, name) is not None]
        if given:
            raise RequestError(
                f"{given[0]} is {shown(getattr(request, given[0]))}, but there is no hires_scale",
                hint=f"give hires_scale too, such as 2, or leave {given[0]} out",
            )
        return None
    scale = check_finite("hires_scale", request.hires_scale)
    if not 1 < scale <= LARGEST_SCALE:
        raise RequestError(f"hires_scale is {scale:g}", hint=f"give more than 1, up to {LARGEST_SCALE:g}")
    upscaler = DEFAULT_UPSCALER if request.hires_upscaler is None else request.hires_upscaler
    if not isinstance(upscaler, str) or upscaler not in UPSCALERS:
        raise RequestError(f"hires_upscaler is {shown(upscaler)}", hint=f"choose one of: {', '.join(UPSCALERS)}")
    return SecondPass(
        scale=scale,
        upscaler=upscaler,
        strength=check_strength(request.hires_strength, DEFAULT_STRENGTH, name="hires_strength"),
        steps=request.hires_steps,
    )
