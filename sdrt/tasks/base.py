"""The seam between a request and its task: how it begins and what becomes of its image, as one protocol."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, Self

import numpy as np
from PIL import Image

from sdrt.bundle import JsonValue
from sdrt.conditions import Start
from sdrt.noise import Generator
from sdrt.plan import SamplingPlan
from sdrt.progress import Work
from sdrt.runners.base import FloatArray
from sdrt.vae import Posterior

TaskName = Literal[
    "text-to-image", "image-to-image", "inpainting", "outpainting", "upscaling", "depth-to-image", "editing"
]
Encode = Callable[[FloatArray], Work[Posterior]]
EstimateDepth = Callable[[Image.Image], FloatArray]
Vary = Callable[[FloatArray], FloatArray]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Drawn:
    """What the pass before has drawn of an image: latents float32 [1, C, h, w], and what makes pixels of them."""

    latents: FloatArray
    decode: Callable[[FloatArray], Work[Image.Image]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Preparation:
    """What a task may use to begin one image.

    generator: whose next numbers are the image's own, to be drawn in the reference's order. shape: (C, h, w) of the
    latents. encode: the bundle's VAE encoder, for samples float32 [1, 3, H, W] in [-1, 1]; it draws nothing.
    estimate_depth: the bundle's depth estimator, for RGB images: float32 [H', W'] of its own size; it draws nothing.
    vary: what becomes of the noise that the latents begin with, where a variation is asked for.
    drawn: by the pass before this one, where there is one.
    """

    plan: SamplingPlan
    generator: Generator
    shape: tuple[int, int, int]
    encode: Encode
    estimate_depth: EstimateDepth
    vary: Vary
    drawn: Drawn | None = None

    def numbers(self) -> FloatArray:
        """The generator's next numbers in the latents' shape: float32 [1, C, h, w]."""
        return self.generator.randn((1, *self.shape))

    def noise(self) -> FloatArray:
        """The noise that the latents begin with, of the next numbers: float32 [1, C, h, w]."""
        return self.vary(self.numbers())

    def latents_of(self, sample: FloatArray) -> Work[FloatArray]:
        """An image's latents, sampled with the next numbers: float32 [1, C, h, w]."""
        posterior = yield from self.encode(sample)
        return posterior.sample(self.numbers())

    def only_noise(self, noise: FloatArray) -> FloatArray:
        """Latents that hold nothing but noise, at the scale of the plan's first row: float32 [C, h, w]."""
        scaled: FloatArray = noise[0] * np.float32(self.plan.initial_scale)
        return scaled

    def with_noise(self, latents: FloatArray, noise: FloatArray) -> FloatArray:
        """An image's latents as noisy as the plan's first row has them: float32 [C, h, w]."""
        on_image, on_noise = (np.float32(value) for value in self.plan.noised[0])
        mixed: FloatArray = (on_image * latents + on_noise * noise)[0]
        return mixed


class PlainTask:
    """What most tasks do: begin with noise, leave no step out, give the decoded image as it is. See `Task`."""

    __slots__ = ()
    windowed: ClassVar[bool] = False

    def check_plan(self, plan: SamplingPlan) -> None:
        """Any plan begins with noise."""

    def first_step(self, num_inference_steps: int) -> int:
        """None is left out."""
        return 0

    def finish(self, image: Image.Image) -> Image.Image:
        """The image is the result."""
        return image

    def warnings(self) -> tuple[str, ...]:
        """Nothing is odd."""
        return ()


class Task(Protocol):
    """What a checked request does. Holds pixels and numbers, no engines."""

    @property
    def name(self) -> TaskName:
        """What is done."""
        ...

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width) in pixels that it works on; None: whatever the request says."""
        ...

    @property
    def windowed(self) -> bool:
        """Whether it may be larger than the engines take at once, without being asked."""
        ...

    def resized(self, height: int, width: int) -> Self:
        """The same, worked on in this size, in pixels."""
        ...

    def check_plan(self, plan: SamplingPlan) -> None:
        """RequestError for a plan that it cannot begin."""
        ...

    def first_step(self, num_inference_steps: int) -> int:
        """How many steps of the whole plan are left out at the beginning. RequestError where that leaves none."""
        ...

    def start(self, preparation: Preparation) -> Work[Start]:
        """One image before the plan's first row. It may rest, as what it has of `preparation` does."""
        ...

    def finish(self, image: Image.Image) -> Image.Image:
        """What becomes of a decoded image."""
        ...

    def warnings(self) -> tuple[str, ...]:
        """What in it is odd, though it can be done."""
        ...

    def parameters(self) -> Mapping[str, JsonValue]:
        """What is to be remembered of it beside the request's numbers."""
        ...
