"""The tasks suite: each task on a checkpoint of its own layout, random weights, at real size or small for trials."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

from sdrt.benchmarks.cases import Case
from sdrt.benchmarks.contestants import PYTORCH_FP32
from sdrt.benchmarks.suites import sd15
from sdrt.benchmarks.suites.checkpoints import Config, Layout
from sdrt.errors import RequestError
from sdrt.tasks.base import TaskName

Scale = Literal["full", "small"]
SCALES: tuple[Scale, ...] = ("full", "small")
SIDES: Mapping[Scale, int] = {"full": sd15.SIDE, "small": 64}  # pixels of every result
STEPS = 4
UPSCALING_FACTOR = 4
_GRAIN = 8.0  # levels of 255, of the given images: their noise's standard deviation

BARS: Mapping[str, tuple[str, str, float]] = {  # name → (kind of ratio, peer, at least), the same for each task
    "image, times PyTorch eager fp32": ("total", PYTORCH_FP32, 1.5),
    "peak memory of PyTorch eager fp32, times sdrt's": ("memory", PYTORCH_FP32, 1.0),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SuiteTask:
    """name: in this suite; task: what is done, in sdrt's words; subject: the checkpoint it is done with.

    brings: the pictures that it is given; options: fields of its request; controlled: by a ControlNet, which has a
    pipeline of its own in diffusers.
    """

    name: str
    task: TaskName
    subject: str
    brings: tuple[str, ...] = ()
    options: Mapping[str, float] = field(default_factory=dict)
    controlled: bool = False

    @property
    def pipeline(self) -> str:
        """What the reference's pipeline for it is called among the contestants."""
        return "controlnet" if self.controlled else self.task


TASKS: tuple[SuiteTask, ...] = (
    SuiteTask(name="text-to-image", task="text-to-image", subject="sd1"),
    SuiteTask(
        name="image-to-image", task="image-to-image", subject="sd1", brings=("image",), options={"strength": 0.75}
    ),
    SuiteTask(name="inpainting", task="inpainting", subject="sd1", brings=("image", "mask_image")),
    SuiteTask(
        name="inpainting-9-channels", task="inpainting", subject="sd1-inpainting", brings=("image", "mask_image")
    ),
    SuiteTask(
        name="depth-to-image",
        task="depth-to-image",
        subject="sd2-depth",
        brings=("image", "depth_map"),
        options={"strength": 0.75},
    ),
    SuiteTask(
        name="upscaling", task="upscaling", subject="x4-upscaler", brings=("image",), options={"noise_level": 20}
    ),
    SuiteTask(
        name="editing",
        task="editing",
        subject="sd1-editing",
        brings=("image",),
        options={"image_guidance_scale": 1.5},
    ),
    SuiteTask(
        name="controlnet",
        task="text-to-image",
        subject="sd1-controlnet",
        brings=("control_image",),
        options={"controlnet_conditioning_scale": 0.8},
        controlled=True,
    ),
)


def tasks_named(text: str | None) -> tuple[SuiteTask, ...]:
    """The tasks of a comma-separated list, in the suite's order; all without one. Raises RequestError."""
    if text is None:
        return TASKS
    names = {name.strip() for name in text.split(",") if name.strip()}
    known = [task.name for task in TASKS]
    unknown = sorted(names - set(known))
    if unknown or not names:
        what = f"unknown tasks {', '.join(unknown)}" if unknown else "--tasks names none"
        raise RequestError(what, hint=f"choose from {', '.join(known)}")
    return tuple(task for task in TASKS if task.name in names)


def case_of(task: SuiteTask, scale: Scale, folder: Path, *, steps: int | None = None) -> Case:
    """What both sides draw. Its pictures are written into `folder`."""
    side = SIDES[scale]
    given = side // UPSCALING_FACTOR if task.task == "upscaling" else side
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: folder / f"{name}-{given}.png" for name in task.brings}
    for name, path in files.items():
        Image.fromarray(_PICTURES[name](given)).save(path)
    return Case(
        prompt=sd15.PROMPT,
        height=side,
        width=side,
        num_inference_steps=STEPS if steps is None else steps,
        guidance_scale=7.5,
        seed=0,
        scheduler="ddim",
        pictures=files,
        options=task.options,
    )


def _image(side: int) -> npt.NDArray[np.uint8]:
    """A captioned scene with grain, as photos have it: uint8 [side, side, 3].

    Without it the reference itself is two levels of 255 off: diffusers hands PIL images to the VAE channels last, where
    PyTorch's group norm loses on flat grounds what it keeps of contiguous values (latents 6e-3 off in place of 2e-5).
    """
    grain = np.random.default_rng(0).normal(0, _GRAIN, (side, side, 3))
    return np.clip(np.round(_drawing(side) + grain), 0, 255).astype(np.uint8)


def _drawing(side: int) -> npt.NDArray[np.uint8]:
    """A captioned scene: uint8 [side, side, 3]."""
    from sdrt.models.shapes.scenes import draw_scene, parse_caption

    scene = draw_scene(parse_caption(sd15.PROMPT), np.random.default_rng(0))
    return np.asarray(Image.fromarray(scene).resize((side, side), Image.Resampling.LANCZOS))


def _edges(side: int) -> npt.NDArray[np.uint8]:
    """The outlines of that scene, without grain: uint8 [side, side, 3], white on black."""
    outlines = Image.fromarray(_drawing(side)).convert("L").filter(ImageFilter.FIND_EDGES)
    return np.repeat(np.where(np.asarray(outlines) > 20, np.uint8(255), np.uint8(0))[..., None], 3, axis=-1)


def _mask(side: int) -> npt.NDArray[np.uint8]:
    """An ellipse off the middle: uint8 [side, side], 255 where it is drawn anew."""
    drawn = Image.new("L", (side, side))
    ImageDraw.Draw(drawn).ellipse((side // 8, side // 4, side * 5 // 8, side * 7 // 8), fill=255)
    return np.asarray(drawn)


def _depth(side: int) -> npt.NDArray[np.uint16]:
    """A ball over a floor that comes nearer downwards: uint16 [side, side], larger is nearer."""
    y, x = np.mgrid[0:side, 0:side] / side
    ball = np.sqrt(np.clip(0.09 - (x - 0.4) ** 2 - (y - 0.5) ** 2, 0, None)) / 0.3
    near: npt.NDArray[np.uint16] = (65_535 * (0.5 * y + 0.5 * ball)).astype(np.uint16)
    return near


_PICTURES: Mapping[str, Callable[[int], npt.NDArray[np.uint8] | npt.NDArray[np.uint16]]] = {
    "image": _image,
    "mask_image": _mask,
    "depth_map": _depth,
    "control_image": _edges,
}


def layout_of(subject: str, scale: Scale) -> Layout:
    """The checkpoint of a subject in TASKS."""
    return _LAYOUTS[subject](scale)


def _sd1(
    scale: Scale,
    pipeline_class: str = "StableDiffusionPipeline",
    conditioning_channels: int = 0,
    *,
    controlled: bool = False,
) -> Layout:
    """Stable Diffusion 1.5, and what was fine-tuned from it with more channels at the UNet's input."""
    base = sd15.LAYOUT if scale == "full" else _SMALL
    return Layout(
        pipeline_class=pipeline_class,
        text_encoder=base.text_encoder,
        vae=base.vae,
        unet={**base.unet, "in_channels": 4 + conditioning_channels},
        controlled=controlled,
    )


def _sd2_depth(scale: Scale) -> Layout:
    """stable-diffusion-2-depth: OpenCLIP's text encoder, linear projections, heads of one size."""
    base = sd15.LAYOUT if scale == "full" else _SMALL
    text_encoder = _open_clip(scale)
    return Layout(
        pipeline_class="StableDiffusionDepth2ImgPipeline",
        text_encoder=text_encoder,
        vae=base.vae,
        unet={
            **base.unet,
            "in_channels": 5,
            "cross_attention_dim": text_encoder["hidden_size"],
            "attention_head_dim": (5, 10, 20, 20) if scale == "full" else (1, 2),
            "use_linear_projection": True,
        },
    )


def _x4_upscaler(scale: Scale) -> Layout:
    """stable-diffusion-x4-upscaler: latents of the small image's size, a VAE of factor 4, noise levels as classes."""
    base, text_encoder = (sd15.LAYOUT if scale == "full" else _SMALL), _open_clip(scale)
    levels = 4 if scale == "full" else 2
    betas = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "scaled_linear"}
    return Layout(
        pipeline_class="StableDiffusionUpscalePipeline",
        text_encoder=text_encoder,
        vae={
            **base.vae,
            "down_block_types": ("DownEncoderBlock2D",) * 3,
            "up_block_types": ("UpDecoderBlock2D",) * 3,
            "block_out_channels": (128, 256, 512) if scale == "full" else (8, 8, 16),
            "sample_size": SIDES[scale] // 2,
            "scaling_factor": 0.08333,
        },
        unet={
            **base.unet,
            "sample_size": SIDES[scale] // UPSCALING_FACTOR,
            "in_channels": 7,
            "block_out_channels": (256, 512, 512, 1024) if scale == "full" else (16, 32),
            "cross_attention_dim": text_encoder["hidden_size"],
            "num_class_embeds": 1000,
            "only_cross_attention": (True, True, True, False) if scale == "full" else (True, False),
            "use_linear_projection": True,
            "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * (levels - 1),
            "up_block_types": ("CrossAttnUpBlock2D",) * (levels - 1) + ("UpBlock2D",),
        },
        scheduler={
            "_class_name": "DDIMScheduler",
            **betas,
            "clip_sample": False,
            "set_alpha_to_one": False,
            "steps_offset": 1,
            "prediction_type": "v_prediction",
        },
        low_res_scheduler={"_class_name": "DDPMScheduler", **betas},
    )


def _open_clip(scale: Scale) -> Config:
    """The text encoder of Stable Diffusion 2: the last but one layer of OpenCLIP's ViT-H is its last."""
    if scale == "small":
        return {**_SMALL.text_encoder, "hidden_size": 48, "hidden_act": "gelu"}
    return {
        "vocab_size": 49_408,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 23,
        "num_attention_heads": 16,
        "max_position_embeddings": 77,
        "projection_dim": 512,
        "hidden_act": "gelu",
    }


_SMALL = Layout(
    pipeline_class="StableDiffusionPipeline",
    text_encoder={
        "vocab_size": 1024,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 77,
        "projection_dim": 32,
        "bos_token_id": 0,
        "eos_token_id": 1,
    },
    vae={
        **sd15.LAYOUT.vae,
        "block_out_channels": (8, 8, 16, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "sample_size": SIDES["small"],
    },
    unet={
        **sd15.LAYOUT.unet,
        "sample_size": SIDES["small"] // 8,
        "block_out_channels": (16, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "cross_attention_dim": 32,
        "attention_head_dim": 2,
    },
)
_LAYOUTS: Mapping[str, Callable[[Scale], Layout]] = {
    "sd1": _sd1,
    "sd1-inpainting": lambda scale: _sd1(scale, "StableDiffusionInpaintPipeline", 5),
    "sd1-editing": lambda scale: _sd1(scale, "StableDiffusionInstructPix2PixPipeline", 4),
    "sd1-controlnet": lambda scale: _sd1(scale, controlled=True),
    "sd2-depth": _sd2_depth,
    "x4-upscaler": _x4_upscaler,
}


def subjects_of(tasks: Sequence[SuiteTask]) -> dict[str, list[SuiteTask]]:
    """The tasks by the checkpoint that they are done with, both in the suite's order."""
    by_subject: dict[str, list[SuiteTask]] = {}
    for task in tasks:
        by_subject.setdefault(task.subject, []).append(task)
    return by_subject
