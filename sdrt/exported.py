"""What an exported ONNX folder says of itself: the contract between the export and the engines stage.

Layout (components as Hugging Face Optimum names them):

    model_index.json
    text_encoder/model.onnx (+ model.onnx.data)   input_ids → last_hidden_state (, pooler_output)
    unet/model.onnx                                sample, timestep, encoder_hidden_states → out_sample; the weights of
        ControlNets in it are named controlnets.<number>.<name>
    vae_decoder/model.onnx                         latent_sample → sample
    tiny_vae_decoder/model.onnx                    the same, where a tiny VAE was exported beside the checkpoint's own
    vae_encoder/model.onnx                         sample → latent_parameters
    depth_estimator/model.onnx                     pixel_values → predicted_depth; with
        feature_extractor/preprocessor_config.json, where a depth-to-image checkpoint brought both
    <component>/config.json, tokenizer/…, scheduler/scheduler_config.json
    golden/<component>.npz                         arrays "input.<name>" and "output.<name>", made by PyTorch
    golden/image.npz                               the reference image, uint8 [H, W, 3], as "image"
    export.json                                    an `ExportRecord`

A folder that another exporter made has neither golden/ nor export.json; the engines stage then takes
ONNX Runtime in float32 as the reference and says so in the seal.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from sdrt.bundle import ModelRecord, ModelTask
from sdrt.errors import CheckpointError

EXPORT_RECORD_NAME = "export.json"
EXPORT_FORMAT_VERSION = 2
MAX_NOISE_LEVEL = 350  # of an upscaler whose index does not say, as the reference has it
# How many channels a UNet takes beside the latents' tells what it was made for.
TASK_OF_CHANNELS: Mapping[int, ModelTask] = {
    0: "text-to-image",
    1: "depth-to-image",
    3: "upscaling",
    4: "editing",
    5: "inpainting",
}
_OF_A_CONTROLNET = re.compile(r"controlnets\.(\d+)\.(.+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class GoldenRequest:
    """The request whose image the reference made; what it brings beside its text is in `sdrt.golden`."""

    prompt: str
    seed: int
    num_inference_steps: int
    guidance_scale: float
    height: int
    width: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportRecord:
    """The content of export.json."""

    format_version: int
    model: ModelRecord
    reference: str  # "PyTorch 2.13.0, diffusers 0.42.1, float32"
    golden: GoldenRequest


def task_of_channels(conditioning_channels: int) -> ModelTask:
    """What a UNet with so many channels beside the latents' was made for. Raises CheckpointError where nobody knows."""
    if conditioning_channels not in TASK_OF_CHANNELS:
        known = ", ".join(f"{4 + count} ({task})" for count, task in TASK_OF_CHANNELS.items())
        raise CheckpointError(
            f"the UNet takes {conditioning_channels} channels beside the latents",
            hint=f"sdrt knows UNets of Stable Diffusion with {known} channels",
        )
    return TASK_OF_CHANNELS[conditioning_channels]


def controlnet_weight(weight: str) -> tuple[int, str] | None:
    """Which ControlNet of the UNet's a weight belongs to, and its name there; None for the UNet's own."""
    match = _OF_A_CONTROLNET.match(weight)
    return None if match is None else (int(match[1]), match[2])
