"""Text-to-image: the start is noise."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

from PIL import Image

from sdrt.bundle import JsonValue, ModelRecord
from sdrt.conditions import Start
from sdrt.plan import SamplingPlan
from sdrt.request import Request
from sdrt.tasks.base import Preparation, TaskName


@dataclass(frozen=True, slots=True, kw_only=True)
class TextToImage:
    """See `Task`."""

    name: ClassVar[TaskName] = "text-to-image"
    size: ClassVar[None] = None
    windowed: ClassVar[bool] = False

    def resized(self, height: int, width: int) -> Self:
        """Noise is of any size."""
        return self

    def check_plan(self, plan: SamplingPlan) -> None:
        """Any plan begins with noise."""

    def first_step(self, num_inference_steps: int) -> int:
        """None is left out."""
        return 0

    def start(self, preparation: Preparation) -> Start:
        """Noise at the scale of the plan's first row."""
        return Start(latents=preparation.only_noise(preparation.noise()))

    def finish(self, image: Image.Image) -> Image.Image:
        """The image is the result."""
        return image

    def warnings(self) -> tuple[str, ...]:
        """Nothing is odd."""
        return ()

    def parameters(self) -> Mapping[str, JsonValue]:
        """Nothing: the seeds are the request's."""
        return {}


def read_text_to_image(request: Request, model: ModelRecord) -> TextToImage:
    """The task of a request that brings text alone."""
    return TextToImage()
