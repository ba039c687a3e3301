"""Text-to-image: the start is noise."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np

from sdrt.bundle import JsonValue
from sdrt.noise import Generator
from sdrt.plan import SamplingPlan
from sdrt.runners.base import FloatArray
from sdrt.tasks.base import Encode, Shape, TaskName, Vary


@dataclass(frozen=True, slots=True, kw_only=True)
class TextToImage:
    """See `Start`."""

    task: ClassVar[TaskName] = "text-to-image"
    size: ClassVar[None] = None

    def resized(self, height: int, width: int) -> Self:
        """Noise is of any size."""
        return self

    def check_plan(self, plan: SamplingPlan) -> None:
        """Any plan begins with noise."""

    def first_step(self, num_inference_steps: int) -> int:
        """None is left out."""
        return 0

    def latents(self, plan: SamplingPlan, generator: Generator, shape: Shape, encode: Encode, vary: Vary) -> FloatArray:
        """Noise at the scale of the plan's first row."""
        scaled: FloatArray = vary(generator.randn((1, *shape)))[0] * np.float32(plan.initial_scale)
        return scaled

    def parameters(self) -> Mapping[str, JsonValue]:
        """Nothing: the seeds are the request's."""
        return {}
