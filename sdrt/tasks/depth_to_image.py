"""Depth-to-image: a network that sees how near each place is draws what is there (Rombach et al. 2022, layout of 2.0).

The depth is one more channel, brought to the latents' size and to [-1, 1] image by image. It is given, or estimated
from the image where the checkpoint brought an estimator.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import numpy as np
from PIL import Image

from sdrt.bundle import DepthEstimation, JsonValue, ModelRecord
from sdrt.checks import shown
from sdrt.conditions import Start
from sdrt.depth import check_estimable
from sdrt.errors import RequestError
from sdrt.plan import SamplingPlan
from sdrt.progress import Work
from sdrt.request import Request
from sdrt.runners.base import FloatArray
from sdrt.tasks import pictures
from sdrt.tasks.base import PlainTask, Preparation, TaskName
from sdrt.tasks.image_to_image import check_noised, check_strength, first_step_of
from sdrt.tasks.resampling import bicubic

DEFAULT_STRENGTH = 0.8
_FLAT = "the depth is the same everywhere: all of it counts as far"
_NEAR_OVERFLOW = np.float32(1e30)
_SHAPE_TOLERANCE = 0.02  # between the shapes of image and depth: estimators round sizes


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DepthToImage(PlainTask):
    """See `Task`. depth: float32 [H, W], larger is nearer; None: as `estimation` makes it of the image.

    image: RGB, or None to begin with noise. strength: the share of the steps that run; 1 without an image.
    image_sha256, depth_sha256: as given.
    """

    name: ClassVar[TaskName] = "depth-to-image"
    depth: FloatArray | None
    depth_sha256: str | None
    estimation: DepthEstimation | None
    image: Image.Image | None
    image_sha256: str | None
    strength: float

    @property
    def size(self) -> tuple[int, int] | None:
        """That of the image; without one, whatever the request says."""
        return None if self.image is None else (self.image.height, self.image.width)

    def resized(self, height: int, width: int) -> Self:
        """With the image in this size. The depth is brought to that of the latents later, from what it was."""
        if self.depth is not None:
            _check_shape(self.depth, height, width)
        elif self.estimation is not None:
            check_estimable(self.estimation, height, width)
        return self if self.image is None else replace(self, image=pictures.resize(self.image, height, width))

    def check_plan(self, plan: SamplingPlan) -> None:
        """RequestError for a plan without `noised`, where an image has to enter it."""
        if self.image is not None:
            check_noised(plan)

    def first_step(self, num_inference_steps: int) -> int:
        """The steps before those that `strength` lets run."""
        return first_step_of(self.strength, num_inference_steps)

    def start(self, preparation: Preparation) -> Work[Start]:
        """The image's latents with noise, or noise alone; both drawn as in the reference."""
        depth = bicubic(self._depth(preparation), *preparation.shape[1:])
        if self.image is None:
            latents = preparation.only_noise(preparation.noise())
        else:
            known = yield from preparation.latents_of(pictures.to_sample(self.image))
            latents = preparation.with_noise(known, preparation.noise())
        return Start(
            latents=latents,
            conditioning=normalised(depth)[None],
            warnings=(_FLAT,) if depth.min() == depth.max() else (),
        )

    def parameters(self) -> Mapping[str, JsonValue]:
        """The strength, and by which values depth and image can be known again."""
        image = {} if self.image is None else {"strength": self.strength, "image_sha256": self.image_sha256}
        depth: dict[str, JsonValue] = {} if self.depth is None else {"depth_map_sha256": self.depth_sha256}
        return {**depth, **image}

    def _depth(self, preparation: Preparation) -> FloatArray:
        if self.depth is not None:
            return self.depth
        if self.image is None:
            raise RuntimeError("a depth-to-image task has neither a depth map nor an image")
        return preparation.estimate_depth(self.image)


def read_depth_to_image(request: Request, model: ModelRecord) -> DepthToImage:
    """The task of a request with a depth map, or with an image whose depth is estimated. Raises RequestError."""
    depth = None if request.depth_map is None else pictures.check_depth("depth_map", request.depth_map)
    image = None if request.image is None else pictures.check_picture("image", request.image)
    if image is None and request.strength is not None:
        raise RequestError(
            f"strength is {shown(request.strength)}, but there is no image", hint="give an image, or leave strength out"
        )
    return DepthToImage(
        depth=depth,
        depth_sha256=None if depth is None else pictures.values_sha256(depth),
        estimation=model.depth_estimation if depth is None else None,
        image=image,
        image_sha256=None if image is None else pictures.pixels_sha256(image),
        strength=1.0 if image is None else check_strength(request.strength, DEFAULT_STRENGTH),
    )


def normalised(depth: FloatArray) -> FloatArray:
    """Values from -1, the farthest, to 1, the nearest: float32, shaped like `depth`. Equal ones are all -1."""
    low, high = depth.min(), depth.max()
    if low == high:
        return np.full_like(depth, -1)
    if max(-low, high) > _NEAR_OVERFLOW:  # a map that marks gaps with the largest number there is
        return normalised(depth / _NEAR_OVERFLOW)
    unit: FloatArray = np.float32(2) * (depth - low) / (high - low) - np.float32(1)
    return unit


def _check_shape(depth: FloatArray, height: int, width: int) -> None:
    tall, wide = depth.shape
    if abs(np.log((wide / tall) / (width / height))) > _SHAPE_TOLERANCE:
        raise RequestError(
            f"the depth map has {wide}x{tall} values for an image of {width}x{height}",
            hint="give both in one shape: the depth map may be larger or smaller, not wider or narrower",
        )
