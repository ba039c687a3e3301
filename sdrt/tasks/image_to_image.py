"""Image-to-image (SDEdit, Meng et al. 2022, arXiv:2108.01073): the start is an image with noise, some steps down."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import numpy as np
from PIL import Image

from sdrt.bundle import JsonValue
from sdrt.errors import RequestError
from sdrt.noise import Generator
from sdrt.plan import SamplingPlan
from sdrt.runners.base import FloatArray
from sdrt.tasks.base import Encode, Shape, TaskName, Vary

DEFAULT_STRENGTH = 0.8


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ImageToImage:
    """See `Start`. image: RGB, of the request's size. strength: the share of the steps that run, above 0, up to 1."""

    task: ClassVar[TaskName] = "image-to-image"
    image: Image.Image
    strength: float

    @property
    def size(self) -> tuple[int, int]:
        """That of the image."""
        return self.image.height, self.image.width

    def resized(self, height: int, width: int) -> Self:
        """With the image resized as the reference resizes it, unless it has this size."""
        if self.size == (height, width):
            return self
        return replace(self, image=self.image.resize((width, height), Image.Resampling.LANCZOS))

    def check_plan(self, plan: SamplingPlan) -> None:
        """RequestError for a plan without `noised`."""
        if not np.isfinite(plan.noised).all():
            raise RequestError("the plan does not say how an image enters it", hint="give its scheduler an add_noise")

    def first_step(self, num_inference_steps: int) -> int:
        """The reference rounds the number of steps that run down, float error and all: 0.58 of 50 are 28."""
        left = min(int(num_inference_steps * self.strength), num_inference_steps)
        if left == 0:
            raise RequestError(
                f"strength {self.strength:g} of {num_inference_steps} steps is none",
                hint=f"give a strength of at least {1 / num_inference_steps:.3g}, or ask for more steps",
            )
        return num_inference_steps - left

    def latents(self, plan: SamplingPlan, generator: Generator, shape: Shape, encode: Encode, vary: Vary) -> FloatArray:
        """The image's latents, sampled with the generator's first numbers, with noise of the next ones.

        Both draws are the reference's, in its order.
        """
        known = encode(self.image).sample(generator.randn((1, *shape)))
        noise = vary(generator.randn((1, *shape)))
        on_image, on_noise = (np.float32(value) for value in plan.noised)
        mixed: FloatArray = (on_image * known + on_noise * noise)[0]
        return mixed

    def parameters(self) -> Mapping[str, JsonValue]:
        """The strength, and by which pixels the image can be known again."""
        return {"strength": self.strength, "image_sha256": pixels_sha256(self.image)}


def pixels_sha256(image: Image.Image) -> str:
    """The hash of an RGB image's size and pixels."""
    return hashlib.sha256(f"{image.width}x{image.height}:".encode() + image.tobytes()).hexdigest()
