"""The SD1.5 suite: the architecture of Stable Diffusion 1.5 with random weights, for speed and parity at real size."""

from collections.abc import Mapping
from pathlib import Path

from sdrt.benchmarks.cases import Case
from sdrt.benchmarks.contestants import OPENVINO_GENAI, PYTORCH_BF16, PYTORCH_FP32
from sdrt.benchmarks.suites import checkpoints
from sdrt.benchmarks.suites.checkpoints import Layout

SIDE = 512
STEPS = 4
PROMPT = "a large red circle left of a small blue star on a white background"

BARS: Mapping[str, tuple[str, str, float]] = {  # name → (kind of ratio, peer, at least)
    "step, times PyTorch eager fp32": ("step", PYTORCH_FP32, 2.0),
    "step, times PyTorch eager bf16": ("step", PYTORCH_BF16, 1.25),
    "image, times OpenVINO GenAI": ("total", OPENVINO_GENAI, 1.0),
    "start to first image, times OpenVINO GenAI": ("start", OPENVINO_GENAI, 1.0),
}
LAYOUT = Layout(
    pipeline_class="StableDiffusionPipeline",
    text_encoder={
        "vocab_size": 49_408,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 77,
        "projection_dim": 768,
    },
    vae={
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "sample_size": SIDE,
    },
    unet={
        "sample_size": SIDE // 8,
        "block_out_channels": (320, 640, 1280, 1280),
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    },
)


def cases() -> list[Case]:
    """One prompt; what it shows does not matter with random weights."""
    return [
        Case(
            prompt=PROMPT,
            height=SIDE,
            width=SIDE,
            num_inference_steps=STEPS,
            guidance_scale=7.5,
            seed=0,
            scheduler="ddim",
        )
    ]


def make_checkpoint(folder: Path, *, seed: int = 0) -> None:
    """Write a diffusers folder with SD1.5's configs and seeded random float32 weights, unless it is there already."""
    checkpoints.make_checkpoint(folder, LAYOUT, seed=seed)
