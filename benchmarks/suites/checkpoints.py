"""Checkpoints with the layouts of Stable Diffusion's models and random weights, as diffusers folders."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path

from sdrt.bundle import JsonValue
from sdrt.files import staged_directory

Config = Mapping[str, object]

_BETAS: Config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PNDM: Config = {
    "_class_name": "PNDMScheduler",
    **_BETAS,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}
CONTROLNET = "controlnet"
_FILTERED: Config = {"requires_safety_checker": False}
# Beside the components that every checkpoint has: what a pipeline's index says of what is absent, and its own fields.
_INDEX: Mapping[str, tuple[tuple[str, ...], Config]] = {
    "StableDiffusionPipeline": (("feature_extractor", "image_encoder", "safety_checker"), _FILTERED),
    "StableDiffusionInpaintPipeline": (("feature_extractor", "image_encoder", "safety_checker"), _FILTERED),
    "StableDiffusionInstructPix2PixPipeline": (("feature_extractor", "image_encoder", "safety_checker"), _FILTERED),
    "StableDiffusionDepth2ImgPipeline": (("depth_estimator", "feature_extractor"), {}),
    "StableDiffusionUpscalePipeline": (
        ("feature_extractor", "safety_checker", "watermarker"),
        {"max_noise_level": 350},
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A checkpoint but for its weights: the pipeline's class, and the config of each part.

    low_res_scheduler: of upscalers, the schedule of the noise on the small image. controlled: with a ControlNet of the
    UNet's layout beside it, in the folder CONTROLNET.
    """

    pipeline_class: str
    text_encoder: Config
    vae: Config
    unet: Config
    scheduler: Config = field(default_factory=lambda: PNDM)
    low_res_scheduler: Config | None = None
    controlled: bool = False

    @property
    def digest(self) -> str:
        """What tells this layout from another in a file's name."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]


def make_checkpoint(folder: Path, layout: Layout, *, seed: int = 0) -> None:
    """Write a diffusers folder with seeded random float32 weights, unless it is there already."""
    if folder.is_dir():
        return
    with staged_directory(folder) as staged:
        _write_tokenizer(staged / "tokenizer")
        _write_models(staged, layout, seed)
        _write_scheduler(staged / "scheduler", layout.scheduler)
        if layout.low_res_scheduler is not None:
            _write_scheduler(staged / "low_res_scheduler", layout.low_res_scheduler)
        (staged / "model_index.json").write_text(json.dumps(_index(layout), indent=2))


def _index(layout: Layout) -> dict[str, object]:
    import diffusers

    absent, fields = _INDEX[layout.pipeline_class]
    schedulers = {"scheduler": layout.scheduler, "low_res_scheduler": layout.low_res_scheduler}
    nothing: JsonValue = [None, None]
    return {
        "_class_name": layout.pipeline_class,
        "_diffusers_version": diffusers.__version__,
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        **{name: ["diffusers", config["_class_name"]] for name, config in schedulers.items() if config is not None},
        **dict.fromkeys(absent, nothing),
        **fields,
    }


@cache
def _captions() -> tuple[str, ...]:
    from sdrt.models.shapes.scenes import held_out_captions

    return tuple(held_out_captions(500))


def _write_tokenizer(folder: Path) -> None:
    from sdrt.models.shapes.train import build_tokenizer

    tokenizer = build_tokenizer(_captions(), folder)
    # Older readers (OpenVINO's and transformers 4's) know only the two-file form.
    saved = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(tokenizer.get_vocab()))
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in saved["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")


def _write_models(staged: Path, layout: Layout, seed: int) -> None:
    """One model in memory at a time. The UNet is last, so that layouts which differ in it alone share the others."""
    import torch
    from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    CLIPTextModel(CLIPTextConfig(**layout.text_encoder)).save_pretrained(staged / "text_encoder")
    AutoencoderKL(**layout.vae).save_pretrained(staged / "vae")
    unet = UNet2DConditionModel(**layout.unet)
    unet.save_pretrained(staged / "unet", max_shard_size="10GB")
    if layout.controlled:
        controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(16, 32, 96, 256))
        del unet
        for name, parameter in controlnet.named_parameters():
            if not bool(parameter.any()):  # what begins at zero would steer nothing
                torch.nn.init.normal_(parameter, std=0.02 if name.endswith("weight") else 0.0)
        controlnet.save_pretrained(staged / CONTROLNET, max_shard_size="10GB")


def _write_scheduler(folder: Path, config: Config) -> None:
    import diffusers

    fields = {name: value for name, value in config.items() if name != "_class_name"}
    getattr(diffusers, str(config["_class_name"]))(**fields).save_pretrained(folder)
