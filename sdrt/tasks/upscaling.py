"""Super-resolution: a network that sees a small image at every step draws it four times as large.

The layout of Stable Diffusion's x4 upscaler: latents of the small image's size, the small image with some noise as more
channels, and the level of that noise as a class (Ho et al. 2022, arXiv:2106.15282, conditioning augmentation). An image
that the bundle makes nothing as small of is padded, and what was drawn of the padding is cut off again.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import numpy as np
from PIL import Image

from sdrt.bundle import JsonValue, ModelRecord, NoiseAugmentation, ShapeProfile
from sdrt.checks import check_whole
from sdrt.conditions import Start
from sdrt.errors import RequestError
from sdrt.image import LARGEST_PIXELS
from sdrt.progress import Work, already
from sdrt.request import Request
from sdrt.runners.base import FloatArray
from sdrt.schedule import NoiseSchedule
from sdrt.sizes import next_size, shrunk_size
from sdrt.tasks import pictures
from sdrt.tasks.base import PlainTask, Preparation, TaskName

DEFAULT_NOISE_LEVEL = 20


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Upscaling(PlainTask):
    """See `Task`.

    image: the small image, RGB; factor: how many times as large the result is on each side. noise_weights: (a, b) with
    which a · image + b · noise is what the network sees. image_sha256: of the image as it was given.
    """

    name: ClassVar[TaskName] = "upscaling"
    windowed: ClassVar[bool] = True
    image: Image.Image
    image_sha256: str
    factor: int
    noise_level: int
    noise_weights: tuple[float, float]

    @property
    def size(self) -> tuple[int, int]:
        """That of the result."""
        return self.image.height * self.factor, self.image.width * self.factor

    def resized(self, height: int, width: int) -> Self:
        """With the small image resized for a result of this size."""
        if height % self.factor or width % self.factor:
            raise RequestError(
                f"{width}x{height} is not {self.factor} times a size", hint=f"give multiples of {self.factor}"
            )
        small = pictures.resize(self.image, height // self.factor, width // self.factor)
        return replace(self, image=small)

    def drawn_size(self, profile: ShapeProfile, height: int, width: int) -> tuple[int, int]:
        """(height, width) of what has to be drawn for a result of this size: itself, unless the bundle makes no such.

        Raises RequestError for too many pixels.
        """
        size = next_size(profile, height, width)
        if size is not None:
            return size
        raise RequestError(
            f"an image of {self._small(height, width)} pixels makes more than {LARGEST_PIXELS} in the sizes that this"
            " bundle draws",
            hint=f"give at most {LARGEST_PIXELS // self.factor**2} pixels, such as"
            f" {self._small(*shrunk_size(profile, height, width))}; sides count as the next multiples of"
            f" {profile.multiple_of // self.factor}, and those below {self._small(*profile.minimum)} as that",
        )

    def start(self, preparation: Preparation) -> Work[Start]:
        """Noise, with the small image as conditioning, made noisy with the generator's first numbers, as the reference.

        Its pixels are the latents' neighbours, one for one; it is padded where there are fewer of them.
        """
        sample = _padded(pictures.to_sample(self.image), *preparation.shape[1:])
        on_image, on_noise = (np.float32(value) for value in self.noise_weights)
        noisy = on_image * sample + on_noise * preparation.generator.randn(sample.shape)
        latents = preparation.only_noise(preparation.noise())
        return already(Start(latents=latents, conditioning=noisy[0], class_label=self.noise_level))

    def parameters(self) -> Mapping[str, JsonValue]:
        """The noise level, and by which pixels the image can be known again."""
        return {"noise_level": self.noise_level, "image_sha256": self.image_sha256}

    def _small(self, height: int, width: int) -> str:
        """WIDTHxHEIGHT of what is upscaled to this size."""
        return f"{-(-width // self.factor)}x{-(-height // self.factor)}"


def read_upscaling(request: Request, model: ModelRecord) -> Upscaling:
    """The task of a request with a small image. Raises RequestError."""
    augmentation = model.noise_augmentation
    if augmentation is None:
        raise RequestError("this bundle does not say how noisy its small images are", hint="build it again: sdrt build")
    image = pictures.check_picture("image", request.image)
    level = DEFAULT_NOISE_LEVEL if request.noise_level is None else request.noise_level
    level = check_whole("noise_level", level, 0, augmentation.max_noise_level)
    return Upscaling(
        image=image,
        image_sha256=pictures.pixels_sha256(image),
        factor=model.vae_downsample,
        noise_level=level,
        noise_weights=_noise_weights(augmentation, level),
    )


def _padded(sample: FloatArray, height: int, width: int) -> FloatArray:
    """A sample float32 [1, 3, H, W] grown to [1, 3, height, width] by its last row and column."""
    below, beside = height - sample.shape[2], width - sample.shape[3]
    return np.pad(sample, ((0, 0), (0, 0), (0, below), (0, beside)), mode="edge")


def _noise_weights(augmentation: NoiseAugmentation, level: int) -> tuple[float, float]:
    """√ᾱ of the image and √(1 - ᾱ) of noise at this timestep of the small image's own schedule."""
    alpha_bar = NoiseSchedule.from_config(augmentation.scheduler_config).alphas_cumprod[level]
    return float(np.sqrt(alpha_bar)), float(np.sqrt(1 - alpha_bar))
