"""Text-to-image: the start is noise."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

from sdrt.bundle import JsonValue, ModelRecord
from sdrt.conditions import Start
from sdrt.progress import Work, already
from sdrt.request import Request
from sdrt.tasks.base import PlainTask, Preparation, TaskName


@dataclass(frozen=True, slots=True, kw_only=True)
class TextToImage(PlainTask):
    """See `Task`."""

    name: ClassVar[TaskName] = "text-to-image"
    size: ClassVar[None] = None

    def resized(self, height: int, width: int) -> Self:
        """Noise is of any size."""
        return self

    def start(self, preparation: Preparation) -> Work[Start]:
        """Noise at the scale of the plan's first row."""
        return already(Start(latents=preparation.only_noise(preparation.noise())))

    def parameters(self) -> Mapping[str, JsonValue]:
        """Nothing: the seeds are the request's."""
        return {}


def read_text_to_image(request: Request, model: ModelRecord) -> TextToImage:
    """The task of a request that brings text alone."""
    return TextToImage()
