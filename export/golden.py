"""The reference image: what diffusers draws in float32, for the engines to be held to."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sdrt.bundle import ModelTask
from sdrt.errors import CheckpointError, RequestError
from sdrt.export.checkpoint import Checkpoint, pipeline_scheduler_config
from sdrt.exported import GoldenRequest
from sdrt.golden import golden_fields
from sdrt.plan import build_plan

PROMPT = "a large red circle left of a small blue star on a white background"
STEPS = 4
STEPS_OF_A_LARGE_MODEL = 2
LARGE_BYTES = 400 * 2**20  # of UNet weights
_PIPELINES: Mapping[ModelTask, str] = {
    "text-to-image": "StableDiffusionPipeline",
    "inpainting": "StableDiffusionInpaintPipeline",
    "upscaling": "StableDiffusionUpscalePipeline",
    "depth-to-image": "StableDiffusionDepth2ImgPipeline",
    "editing": "StableDiffusionInstructPix2PixPipeline",
}
_STEERED: Mapping[ModelTask, str] = {
    "text-to-image": "StableDiffusionControlNetPipeline",
    "inpainting": "StableDiffusionControlNetInpaintPipeline",
}
_TAKING_SIZES: tuple[ModelTask, ...] = ("text-to-image", "inpainting")  # the others are of their picture's size
_UNCHECKED: Mapping[str, object] = {"safety_checker": None, "feature_extractor": None}
_PLAIN: Mapping[str, object] = {**_UNCHECKED, "image_encoder": None, "requires_safety_checker": False}
# The components that golden images do without.
_WITHOUT: Mapping[ModelTask, Mapping[str, object]] = {
    "text-to-image": _PLAIN,
    "inpainting": _PLAIN,
    "upscaling": {**_UNCHECKED, "watermarker": None},
    "depth-to-image": {"depth_estimator": None, "feature_extractor": None},
    "editing": _PLAIN,
}


def golden_request(checkpoint: Checkpoint, size: tuple[int, int] | None) -> GoldenRequest:
    """The request that the reference answers; size is (height, width), by default the model's own.

    CheckpointError: the checkpoint's scheduler is none that sdrt plans, or has fields that it cannot honour.
    """
    height, width = checkpoint.default_size if size is None else size
    unet_bytes = sum(path.stat().st_size for path in checkpoint.weights["unet"])
    counts = (STEPS_OF_A_LARGE_MODEL, STEPS) if unet_bytes > LARGE_BYTES else (STEPS,)
    return GoldenRequest(
        prompt=PROMPT,
        seed=0,
        num_inference_steps=_first_possible(counts, checkpoint),
        guidance_scale=7.5,
        height=height,
        width=width,
    )


def _first_possible(counts: Sequence[int], checkpoint: Checkpoint) -> int:
    """The first number of steps that the checkpoint's own scheduler takes: some need four."""
    config = pipeline_scheduler_config(checkpoint)
    for count in counts:
        try:
            build_plan(scheduler_class=checkpoint.scheduler_class, scheduler_config=config, num_inference_steps=count)
        except RequestError as error:
            refused = error
        else:
            return count
    raise CheckpointError(
        f"{checkpoint.path / 'scheduler'} cannot be planned: {refused.message}", hint=refused.hint
    ) from refused


def reference_name() -> str:
    """The reference and its versions, for the seal."""
    return f"PyTorch {version('torch')}, diffusers {version('diffusers')}, float32"


def draw_reference(checkpoint: Checkpoint, request: GoldenRequest) -> npt.NDArray[np.uint8]:
    """The image of the diffusers pipeline that the checkpoint was made for, uint8 [H, W, 3]."""
    import diffusers
    import torch

    from sdrt.export.components import load_component, load_controlnets, load_depth_pair, load_text_encoder

    estimates_depth = checkpoint.depth_estimation is not None
    others = dict(_WITHOUT[checkpoint.task])
    if estimates_depth:
        others["depth_estimator"], others["feature_extractor"] = load_depth_pair(checkpoint)
    kind = _PIPELINES[checkpoint.task]
    if checkpoint.controlnets:
        kind, others["controlnet"] = _STEERED[checkpoint.task], load_controlnets(checkpoint)
    pipeline = getattr(diffusers, kind).from_pretrained(
        checkpoint.path,
        unet=load_component(checkpoint, "unet"),
        vae=load_component(checkpoint, "vae"),
        text_encoder=load_text_encoder(checkpoint),
        local_files_only=True,
        **others,
    )
    pipeline.set_progress_bar_config(disable=True)
    arguments = {name: value for name, value in asdict(request).items() if name != "seed"}
    if checkpoint.task not in _TAKING_SIZES:
        del arguments["height"], arguments["width"]
    brought: dict[str, Any] = dict(
        golden_fields(
            checkpoint.task,
            request.height,
            request.width,
            checkpoint.vae_downsample,
            estimates_depth=estimates_depth,
            controls=len(checkpoint.controlnets),
        )
    )
    if "control_image" in brought and checkpoint.task == "text-to-image":
        brought["image"] = brought.pop("control_image")
    if "depth_map" in brought:
        brought["depth_map"] = torch.from_numpy(brought["depth_map"])[None]
    generator = torch.Generator("cpu").manual_seed(request.seed)
    return np.asarray(pipeline(generator=generator, **arguments, **brought).images[0])


def save_reference(image: npt.NDArray[np.uint8], path: Path) -> None:
    """Write golden/image.npz."""
    np.savez_compressed(path, image=image)
