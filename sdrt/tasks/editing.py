"""Editing by instruction (InstructPix2Pix, Brooks et al. 2023, arXiv:2211.09800): a network sees the image to edit.

Guidance has two scales (eq. 3): away from no image, and away from no instruction; so a guided row has three lanes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from PIL import Image

from sdrt.bundle import JsonValue, ModelRecord
from sdrt.checks import check_finite
from sdrt.conditions import Start
from sdrt.errors import RequestError
from sdrt.progress import Work
from sdrt.request import Request
from sdrt.tasks import pictures
from sdrt.tasks.base import PlainTask, Preparation, TaskName

DEFAULT_IMAGE_GUIDANCE_SCALE = 1.5


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Editing(PlainTask):
    """See `Task`. image: RGB, of the request's size. image_sha256: of the image as it was given."""

    name: ClassVar[TaskName] = "editing"
    image: Image.Image
    image_sha256: str
    image_guidance_scale: float

    @property
    def size(self) -> tuple[int, int]:
        """That of the image."""
        return self.image.height, self.image.width

    def resized(self, height: int, width: int) -> Self:
        """With the image resized as the reference resizes it, unless it has this size."""
        return replace(self, image=pictures.resize(self.image, height, width))

    def start(self, preparation: Preparation) -> Work[Start]:
        """Noise, with the image's likeliest latents as conditioning, which are not scaled: so it was trained."""
        posterior = yield from preparation.encode(pictures.to_sample(self.image))
        return Start(latents=preparation.only_noise(preparation.noise()), conditioning=posterior.mean[0])

    def parameters(self) -> Mapping[str, JsonValue]:
        """The scale, and by which pixels the image can be known again."""
        return {"image_guidance_scale": self.image_guidance_scale, "image_sha256": self.image_sha256}


def read_editing(request: Request, model: ModelRecord) -> Editing:
    """The task of a request with an image to edit. Raises RequestError."""
    image = pictures.check_picture("image", request.image)
    scale = DEFAULT_IMAGE_GUIDANCE_SCALE
    if request.image_guidance_scale is not None:
        scale = check_finite("image_guidance_scale", request.image_guidance_scale)
    if scale < 1:
        raise RequestError(f"image_guidance_scale is {scale:g}", hint="give 1 (far from the image) or more")
    return Editing(image=image, image_sha256=pictures.pixels_sha256(image), image_guidance_scale=scale)
