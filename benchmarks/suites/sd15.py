"""The SD1.5 suite: the architecture of Stable Diffusion 1.5 with random weights, for speed and parity at real size."""

import json
from collections.abc import Mapping
from pathlib import Path

from sdrt.benchmarks.cases import Case
from sdrt.benchmarks.contestants import OPENVINO_GENAI, PYTORCH_BF16, PYTORCH_FP32
from sdrt.files import staged_directory

SIDE = 512
STEPS = 4
PROMPT = "a large red circle left of a small blue star on a white background"
VOCABULARY = 49_408

BARS: Mapping[str, tuple[str, str, float]] = {  # name → (kind of ratio, peer, at least)
    "step, times PyTorch eager fp32": ("step", PYTORCH_FP32, 2.0),
    "step, times PyTorch eager bf16": ("step", PYTORCH_BF16, 1.25),
    "image, times OpenVINO GenAI": ("total", OPENVINO_GENAI, 1.0),
    "start to first image, times OpenVINO GenAI": ("start", OPENVINO_GENAI, 1.0),
}


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
    if folder.is_dir():
        return
    with staged_directory(folder) as staged:
        _write_tokenizer(staged / "tokenizer")
        _write_models(staged, seed)
        _write_scheduler(staged / "scheduler")
        index = {
            "_class_name": "StableDiffusionPipeline",
            "feature_extractor": [None, None],
            "image_encoder": [None, None],
            "requires_safety_checker": False,
            "safety_checker": [None, None],
            "scheduler": ["diffusers", "PNDMScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        }
        (staged / "model_index.json").write_text(json.dumps(index, indent=2))


def _write_tokenizer(folder: Path) -> None:
    from sdrt.models.shapes.scenes import held_out_captions
    from sdrt.models.shapes.train import build_tokenizer

    tokenizer = build_tokenizer(held_out_captions(500), folder)
    # Older readers (OpenVINO's and transformers 4's) know only the two-file form.
    saved = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(tokenizer.get_vocab()))
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in saved["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")


def _write_models(staged: Path, seed: int) -> None:
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=VOCABULARY,
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            max_position_embeddings=77,
            projection_dim=768,
        )
    )
    text_encoder.save_pretrained(staged / "text_encoder")
    del text_encoder
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        sample_size=SIDE,
    )
    vae.save_pretrained(staged / "vae")
    del vae
    unet = UNet2DConditionModel(
        sample_size=SIDE // 8,
        block_out_channels=(320, 640, 1280, 1280),
        cross_attention_dim=768,
        attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    )
    unet.save_pretrained(staged / "unet", max_shard_size="10GB")


def _write_scheduler(folder: Path) -> None:
    from diffusers import PNDMScheduler

    PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        set_alpha_to_one=False,
        skip_prk_steps=True,
        steps_offset=1,
    ).save_pretrained(folder)
