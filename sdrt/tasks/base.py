"""The seam between a request and its task: what it starts from, as one protocol."""

from collections.abc import Callable, Mapping
from typing import Literal, Protocol, Self

from PIL import Image

from sdrt.bundle import JsonValue
from sdrt.noise import Generator
from sdrt.plan import SamplingPlan
from sdrt.runners.base import FloatArray
from sdrt.vae import Posterior

TaskName = Literal["text-to-image", "image-to-image"]
Encode = Callable[[Image.Image], Posterior]
Vary = Callable[[FloatArray], FloatArray]
Shape = tuple[int, int, int]  # (C, h, w) of the latents


class Start(Protocol):
    """What a checked request starts from. Holds pixels and numbers, no engines."""

    @property
    def task(self) -> TaskName:
        """What is done."""
        ...

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width) in pixels that it wants of the result; None: whatever the request says."""
        ...

    def resized(self, height: int, width: int) -> Self:
        """The same for a result of this size, in pixels."""
        ...

    def check_plan(self, plan: SamplingPlan) -> None:
        """RequestError for a plan that it cannot begin."""
        ...

    def first_step(self, num_inference_steps: int) -> int:
        """How many steps of the whole plan are left out at the beginning. RequestError where that leaves none."""
        ...

    def latents(self, plan: SamplingPlan, generator: Generator, shape: Shape, encode: Encode, vary: Vary) -> FloatArray:
        """The latents before the plan's first row, float32 [C, h, w], from the generator's next numbers.

        encode: the bundle's VAE encoder, for an RGB image of the request's size. It draws nothing.
        vary: what becomes of the noise that the latents begin with, where a variation is asked for.
        """
        ...

    def parameters(self) -> Mapping[str, JsonValue]:
        """What is to be remembered of it beside the request's numbers."""
        ...
