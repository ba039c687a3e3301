"""What a caller asks for, as plain data. `sdrt.resolution` checks it; nothing here does."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from sdrt.noise import GeneratorName
from sdrt.plan import SamplingPlan

Shown = Image.Image | npt.NDArray[np.floating] | None  # to a ControlNet
# What else fields of `Request` are called: on the command line, and in other programs.
SYNONYMS = {
    "and": "composed_prompts",
    "batch_size": "num_images_per_prompt",
    "cfg": "guidance_scale",
    "cfg_scale": "guidance_scale",
    "control_end": "control_guidance_end",
    "control_scale": "controlnet_conditioning_scale",
    "control_start": "control_guidance_start",
    "denoising_strength": "strength",
    "depth": "depth_map",
    "guidance": "guidance_scale",
    "init_image": "image",
    "mask": "mask_image",
    "num_images": "num_images_per_prompt",
    "num_steps": "num_inference_steps",
    "sampler": "scheduler",
    "steps": "num_inference_steps",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request, in the names of the diffusers pipelines. `None` means the model's default.

    Defaults are alike for every task: 50 steps, guidance 7.5, full control. Some pipelines of diffusers have others:
    its upscaler 75 steps and guidance 9, InstructPix2Pix 100 steps, ControlNets 0.8 in image-to-image and 0.5 in
    inpainting.

    num_inference_steps: 50 unless given, or as many as `timesteps` or `sigmas` have.
    scheduler: a name or a class (`sdrt schedulers` lists them), or a plan of one's own: `sdrt.plan.derive` makes them.
    seed: with `num_images_per_prompt` > 1, image i is made with seed + i, so each can be made again alone; or one seed
    for each image, as a list of generators.
    timesteps, sigmas: a grid of one's own, descending, as the reference's `set_timesteps` takes it.
    composed_prompts: more prompts with their weights, drawn together with `prompt`, whose weight is 1: each shows as if
    guided on its own (Liu et al. 2022, arXiv:2206.01714); a negative weight leads away, but all of them and the 1 add
    up to more than 0. Each is a network evaluation more in every step, and one or two take the room of
    another image in a batch.
    image: what to work on; with nothing else, what to begin with instead of noise (image-to-image). It is resized where
    height or width say so. strength: the share of the steps that then run, 0.8 unless given, 1 with a mask or outpaint:
    the more, the freer.
    mask_image: with `image`, what of it is drawn anew (inpainting): white; black keeps what it shows. Greys count as
    the nearer of the two with mask_mode "diffusers", or blend with "soft", after a blur of mask_blur pixels (8 unless
    given). preserve: every pixel outside the mask is exactly the image's own afterwards, unless given only when
    outpainting; without it those pixels too have been through the VAE. padding_mask_crop: only the mask and
    so many pixels around it are worked on, in the size that height and width say, and put back into the image.
    outpaint: by how many pixels `image` is to grow on which sides: {"left": 128, "bottom": 64}. The result has the size
    that this makes, and no other. fill: what is there before, "edge" (the border's pixels), "noise" or a colour.
    noise_level: of upscaling, how noisy the small `image` is made first, 20 unless given: more forgives its faults. It
    may have any size whose result has 4096² pixels at most: it is drawn in windows, or padded meanwhile, where need be.
    depth_map: of depth-to-image, how near each place is, as an image, 8 or 16 bits, or an array [H, W]: larger is
    nearer. Without an `image` it begins with noise. Where the checkpoint brought a depth estimator, an `image` alone
    will do: its depth is estimated.
    image_guidance_scale: of editing, how close to `image` the result stays, 1.5 unless given.
    control_image: what the bundle's ControlNet is shown, resized to the result, whose size it decides where nothing
    else does; in text-to-image too, where diffusers calls it `image`. An array, float [H, W, 3] in the size of the
    result, is shown as it is, as ControlNets for inpainting want it (-1 where something is to be drawn). Of several
    ControlNets a list with one for each, or None for one that is to have no say. controlnet_conditioning_scale: how
    much each counts, 1 unless given. control_guidance_start, control_guidance_end: in which part of the steps, 0 to 1.
    hires_scale: draw in two passes ("hires fix"): height and width are the first one's, a base that the model is good
    at; then the result is enlarged by this much, to the nearest size of the VAE, and drawn again as image-to-image.
    hires_upscaler: what enlarges, "latent" (bilinear), "latent-nearest", "latent-bicubic", or "lanczos" (of pixels).
    hires_strength: that of the second pass, 0.7 unless given. hires_steps: its num_inference_steps, of which that share
    runs; unless given those of the first, or its timesteps or sigmas. All else is the first's, the seed of each image
    too: the noise is what image-to-image draws of it. Above the bundle's sizes it works in windows, unasked.
    windowed: sizes above those of the bundle are worked on in overlapping windows, which are one at every step
    (MultiDiffusion, Bar-Tal et al. 2023, arXiv:2302.08113). Outpainting does so unasked.
    vae: what decodes the result, "full" unless given; "tiny" is much faster and a little coarser, in bundles that were
    built with a tiny VAE, which previews use anyway. Images that are encoded go through the full one.
    variation_seed, variation_strength: how far, 0 to 1, each image's noise goes towards that of another seed; image i
    of several is then made with the same seed and goes towards variation_seed + i.
    guidance_rescale: how far the guided output is brought to the deviation of the positive prompt's own, 0 to 1.
    generator: whose numbers the seed stands for, those of torch.Generator("cpu") or torch.Generator("cuda").
    guidance_start, guidance_end: the part of the steps that is guided, 0 to 1; outside it the negative prompt is not
    evaluated at all, which halves a step.
    """

    prompt: str
    negative_prompt: str = ""
    height: int | None = None
    width: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float = 7.5
    scheduler: str | SamplingPlan | None = None
    seed: int | Sequence[int] | None = None
    num_images_per_prompt: int | None = None
    eta: float = 0.0
    generator: GeneratorName = "cpu"
    guidance_start: float = 0.0
    guidance_end: float = 1.0
    guidance_rescale: float = 0.0
    timesteps: Sequence[float] | None = None
    sigmas: Sequence[float] | None = None
    composed_prompts: Sequence[tuple[str, float]] | None = None
    image: Image.Image | None = None
    strength: float | None = None
    mask_image: Image.Image | None = None
    mask_mode: str | None = None
    mask_blur: float | None = None
    padding_mask_crop: int | None = None
    preserve: bool | None = None
    outpaint: Mapping[str, int] | None = None
    fill: str | None = None
    noise_level: int | None = None
    depth_map: Image.Image | npt.NDArray[np.generic] | None = None
    image_guidance_scale: float | None = None
    control_image: Shown | Sequence[Shown] = None
    controlnet_conditioning_scale: float | Sequence[float] | None = None
    control_guidance_start: float | Sequence[float] | None = None
    control_guidance_end: float | Sequence[float] | None = None
    hires_scale: float | None = None
    hires_upscaler: str | None = None
    hires_strength: float | None = None
    hires_steps: int | None = None
    windowed: bool = False
    vae: str | None = None
    variation_seed: int | None = None
    variation_strength: float = 0.0


def nearest_field(name: str) -> str | None:
    """The field that is probably meant by a name that no field has; None where nothing is like it."""
    if name.endswith("_embeds"):  # of other libraries; no field of text takes them
        return None
    near = difflib.get_close_matches(name.lower(), [*Request.__dataclass_fields__, *SYNONYMS], n=1)
    return SYNONYMS.get(near[0], near[0]) if near else None
