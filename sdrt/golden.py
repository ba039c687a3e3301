"""Golden requests, and what they bring beside their text: the same pictures on every machine for each kind of model."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from sdrt.bundle import GoldenRecord, ModelRecord, ModelTask
from sdrt.exported import GoldenRequest
from sdrt.request import Request

NOISE_LEVEL = 20
IMAGE_GUIDANCE_SCALE = 1.5
STRENGTH = 0.8
CONTROL_SCALE = 0.75


def request_of(golden: GoldenRequest | GoldenRecord, model: ModelRecord) -> Request:
    """The request that a golden image answers, for the runtime."""
    brought: Mapping[str, Any] = golden_fields(
        model.task,
        golden.height,
        golden.width,
        model.vae_downsample,
        estimates_depth=model.depth_estimation is not None,
        controls=len(model.controlnets),
    )
    return Request(
        prompt=golden.prompt,
        seed=golden.seed,
        num_inference_steps=golden.num_inference_steps,
        guidance_scale=golden.guidance_scale,
        height=golden.height,
        width=golden.width,
        **brought,
    )


def golden_fields(
    task: ModelTask, height: int, width: int, vae_downsample: int, *, estimates_depth: bool = False, controls: int = 0
) -> Mapping[str, object]:
    """Fields of `sdrt.request.Request` for an image of this size, in pixels; none for text-to-image.

    estimates_depth: the checkpoint has a depth estimator, so that the image's depth is not given. controls: how many
    ControlNets there are.

    They are those of the diffusers pipelines too, but for `depth_map`, which is float32 [H, W] here.
    """
    if controls:
        pictures = [_picture(height + 8 * index, width) for index in range(controls)]
        steered = {"control_image": pictures, "controlnet_conditioning_scale": [CONTROL_SCALE] * controls}
        return {**golden_fields(task, height, width, vae_downsample), **steered}
    if task == "upscaling":
        small = _picture(height // vae_downsample, width // vae_downsample)
        return {"image": small, "noise_level": NOISE_LEVEL}
    image = _picture(height, width)
    if task == "inpainting":
        return {"image": image, "mask_image": Image.fromarray(np.where(_disc(height, width), 255, 0).astype(np.uint8))}
    if task == "depth-to-image":
        if estimates_depth:
            return {"image": image, "strength": STRENGTH}
        depth = np.linspace(0, 1, width, dtype=np.float32) + 2 * _disc(height, width).astype(np.float32)
        return {"image": image, "depth_map": depth, "strength": STRENGTH}
    if task == "editing":
        return {"image": image, "image_guidance_scale": IMAGE_GUIDANCE_SCALE}
    return {}


def _picture(height: int, width: int) -> Image.Image:
    """Two ramps and a disc."""
    down, across = np.mgrid[0:height, 0:width]
    ramps = [255 * down // height, 255 * across // width, np.where(_disc(height, width), 220, 40)]
    return Image.fromarray(np.stack(ramps, axis=-1).astype(np.uint8))


def _disc(height: int, width: int) -> npt.NDArray[np.bool_]:
    """In the middle, half as wide as the shorter side."""
    down, across = np.mgrid[0:height, 0:width]
    inside: npt.NDArray[np.bool_] = np.hypot(down - height / 2, across - width / 2) < min(height, width) / 4
    return inside
