"""Image-to-image (SDEdit, Meng et al. 2022, arXiv:2108.01073): the start is an image with noise, some steps down."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import numpy as np
from PIL import Image

from sdrt.bundle import JsonValue, ModelRecord
from sdrt.checks import check_finite
from sdrt.conditions import Start
from sdrt.errors import RequestError
from sdrt.plan import SamplingPlan
from sdrt.progress import Work
from sdrt.request import Request
from sdrt.tasks.base import PlainTask, Preparation, TaskName
from sdrt.tasks.pictures import check_picture, pixels_sha256, resize, to_sample

DEFAULT_STRENGTH = 0.8


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ImageToImage(PlainTask):
    """See `Task`. image: RGB, of the request's size. strength: the share of the steps that run, above 0, up to 1.

    image_sha256: of the image as it was given.
    """

    name: ClassVar[TaskName] = "image-to-image"
    image: Image.Image
    image_sha256: str
    strength: float

    @property
    def size(self) -> tuple[int, int]:
        """That of the image."""
        return self.image.height, self.image.width

    def resized(self, height: int, width: int) -> Self:
        """With the image resized as the reference resizes it, unless it has this size."""
        return replace(self, image=resize(self.image, height, width))

    def check_plan(self, plan: SamplingPlan) -> None:
        """RequestError for a plan without `noised`."""
        check_noised(plan)

    def first_step(self, num_inference_steps: int) -> int:
        """The steps before those that `strength` lets run."""
        return first_step_of(self.strength, num_inference_steps)

    def start(self, preparation: Preparation) -> Work[Start]:
        """The image's latents, sampled with the generator's first numbers, with noise of the next ones.

        Both draws are the reference's, in its order.
        """
        known = yield from preparation.latents_of(to_sample(self.image))
        return Start(latents=preparation.with_noise(known, preparation.noise()))

    def parameters(self) -> Mapping[str, JsonValue]:
        """The strength, and by which pixels the image can be known again."""
        return {"strength": self.strength, "image_sha256": self.image_sha256}


def read_image_to_image(request: Request, model: ModelRecord) -> ImageToImage:
    """The task of a request with an image. Raises RequestError."""
    image = check_picture("image", request.image)
    return ImageToImage(
        image=image,
        image_sha256=pixels_sha256(image),
        strength=check_strength(request.strength, DEFAULT_STRENGTH),
    )


def check_strength(value: object, default: float, *, name: str = "strength") -> float:
    """A strength above 0, up to 1; RequestError, which names the field, otherwise."""
    strength = default if value is None else check_finite(name, value)
    if not 0 < strength <= 1:
        raise RequestError(f"{name} is {strength:g}", hint="give more than 0 (the image as it is), up to 1 (free)")
    return strength


def check_noised(plan: SamplingPlan) -> None:
    """RequestError for a plan that does not say how an image enters it."""
    if not np.isfinite(plan.noised).all():
        raise RequestError("the plan does not say how an image enters it", hint="give its scheduler an add_noise")


def first_step_of(strength: float, num_inference_steps: int, *, name: str = "strength") -> int:
    """How many steps are left out. The reference rounds what runs down, float error and all: 0.58 of 50 are 28."""
    left = min(int(num_inference_steps * strength), num_inference_steps)
    if left == 0:
        raise RequestError(
            f"{name} {strength:g} of {num_inference_steps} steps is none",
            hint=f"give a {name} of at least {1 / num_inference_steps:.3g}, or ask for more steps",
        )
    return num_inference_steps - left
