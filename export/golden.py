"""The reference image: what diffusers draws in float32, for the engines to be held to."""

from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sdrt.export.checkpoint import Checkpoint
from sdrt.exported import GoldenRequest

PROMPT = "a large red circle left of a small blue star on a white background"
STEPS = 4
STEPS_OF_A_LARGE_MODEL = 2
LARGE_BYTES = 400 * 2**20  # of UNet weights


def golden_request(checkpoint: Checkpoint, size: tuple[int, int] | None) -> GoldenRequest:
    """The request that the reference answers; size is (height, width), by default the model's own."""
    height, width = checkpoint.default_size if size is None else size
    unet_bytes = sum(path.stat().st_size for path in checkpoint.weights["unet"])
    return GoldenRequest(
        prompt=PROMPT,
        seed=0,
        num_inference_steps=STEPS_OF_A_LARGE_MODEL if unet_bytes > LARGE_BYTES else STEPS,
        guidance_scale=7.5,
        height=height,
        width=width,
    )


def reference_name() -> str:
    """The reference and its versions, for the seal."""
    return f"PyTorch {version('torch')}, diffusers {version('diffusers')}, float32"


def draw_reference(checkpoint: Checkpoint, request: GoldenRequest) -> npt.NDArray[np.uint8]:
    """The diffusers pipeline's image, uint8 [H, W, 3]."""
    import torch
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTextModel

    from sdrt.export.components import load_component

    text_encoder = CLIPTextModel.from_pretrained(
        checkpoint.path / "text_encoder",
        dtype=torch.float32,
        variant=checkpoint.variant["text_encoder"],
        use_safetensors=True,
    )
    pipeline = StableDiffusionPipeline.from_pretrained(
        checkpoint.path,
        unet=load_component(checkpoint, "unet"),
        vae=load_component(checkpoint, "vae"),
        text_encoder=text_encoder.eval(),
        safety_checker=None,
        feature_extractor=None,
        image_encoder=None,
        requires_safety_checker=False,
        local_files_only=True,
    )
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(generator=torch.Generator("cpu").manual_seed(request.seed), **_options(request)).images[0]
    return np.asarray(image)


def save_reference(image: npt.NDArray[np.uint8], path: Path) -> None:
    """Write golden/image.npz."""
    np.savez_compressed(path, image=image)


def _options(request: GoldenRequest) -> dict[str, object]:
    return {name: value for name, value in asdict(request).items() if name != "seed"}
