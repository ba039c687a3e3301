"""The one place where a request is checked, before anything is computed, and its defaults are filled in."""

import math
import reprlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from PIL import Image

from sdrt.bundle import Manifest, ModelRecord, ShapeProfile
from sdrt.checks import check_finite, check_flag, check_share, check_whole, shown
from sdrt.controls import Control, check_arrays, check_control_size, resolve_controls, size_of_controls
from sdrt.errors import RequestError
from sdrt.image import LARGEST_PIXELS
from sdrt.noise import GENERATORS, GeneratorName, Variation
from sdrt.plan import SCHEDULERS, SamplingPlan, build_plan, count_steps
from sdrt.plan.catalog import find_scheduler
from sdrt.plan.clamping import Thresholding, read_thresholding
from sdrt.request import Request
from sdrt.sizes import describe_sizes, fits_windows, nearest_size, next_size, shaped_size, shrunk_size
from sdrt.tasks import read_task
from sdrt.tasks.base import Task
from sdrt.tasks.editing import Editing
from sdrt.tasks.hires import SecondPass, read_second_pass
from sdrt.tasks.outpainting import Outpainting
from sdrt.tasks.upscaling import Upscaling

MAX_IMAGES = 64
MAX_STEPS = 1000
OWN_PLAN = "a plan of one's own"  # in the place of a scheduler's name
VaeName = Literal["full", "tiny"]
VAES: tuple[VaeName, ...] = ("full", "tiny")
MAX_PROMPT_CHARACTERS = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedRequest:
    """A request that was checked against a bundle, with every default filled in, and its sampling plan.

    seeds, variations: those of each image. image_guidance_scale: of editing.
    windowed: larger than the engines take at once. hires: the second pass, a request of its own that begins with what
    this one draws. controls: one for each ControlNet of the bundle, or none.
    places_per_image: how many plain images' lanes each of its images takes in a batch.
    drawn_size: (height, width) in pixels that the engines work on, whose upper left part is the result: all of it, but
    for a small image that is padded.
    """

    prompt: str
    negative_prompt: str
    height: int
    width: int
    drawn_size: tuple[int, int]
    num_inference_steps: int
    guidance_scale: float
    scheduler: str
    seeds: tuple[int, ...]
    eta: float
    generator: GeneratorName
    guidance_start: float
    guidance_end: float
    guidance_rescale: float
    timesteps: tuple[float, ...] | None
    sigmas: tuple[float, ...] | None
    plan: SamplingPlan
    task: Task
    image_guidance_scale: float | None
    windowed: bool
    variations: tuple[Variation | None, ...]
    vae: VaeName
    controls: tuple[Control, ...] = ()
    composed_prompts: tuple[tuple[str, float], ...] = ()
    places_per_image: int = 1
    hires: "ResolvedRequest | None" = None

    @property
    def passes(self) -> "tuple[ResolvedRequest, ...]":
        """It, and the second pass where there is one."""
        return (self,) if self.hires is None else (self, self.hires)

    def cropped(self, image: Image.Image) -> Image.Image:
        """Of an image that was drawn, what was asked for."""
        if self.drawn_size == (self.height, self.width):
            return image
        return image.crop((0, 0, self.width, self.height))

    @property
    def seed(self) -> int:
        """The seed of the first image."""
        return self.seeds[0]

    @property
    def num_images_per_prompt(self) -> int:
        """How many images."""
        return len(self.seeds)

    @property
    def guided(self) -> bool:
        """Whether classifier-free guidance runs; decided here and nowhere else, as the reference does."""
        return self.guidance_scale > 1

    @property
    def guided_rows(self) -> range:
        """The rows of the plan that are guided: those that begin in [guidance_start, guidance_end)."""
        if not self.guided:
            return range(0)
        rows = len(self.plan)
        # Rounded first: 0.3 of 10 rows is 3, though 0.3 · 10 may be a little more.
        first, end = (math.ceil(round(share * rows, 9)) for share in (self.guidance_start, self.guidance_end))
        return range(first, end)


def resolve_request(request: Request, manifest: Manifest) -> ResolvedRequest:
    """Check a request against a bundle and fill in its defaults. Raises RequestError; computes nothing."""
    _check_text("prompt", request.prompt)
    _check_text("negative_prompt", request.negative_prompt)
    second = read_second_pass(request)
    resolved = _resolve(request, manifest, read_task(request, manifest.model))
    return resolved if second is None else replace(resolved, hires=_resolve_hires(request, manifest, resolved, second))


def _resolve_hires(request: Request, manifest: Manifest, first: ResolvedRequest, second: SecondPass) -> ResolvedRequest:
    """The second pass: the request again, in its own size, and with its own steps where they are given."""
    if isinstance(request.scheduler, SamplingPlan):
        hint = "name a scheduler, or leave hires_scale out"
        raise RequestError("hires_scale is given beside a plan of one's own, which is for one pass", hint=hint)
    height, width = second.size_of(first.height, first.width, manifest.profile.multiple_of)
    made = f"hires_scale {second.scale:g} makes {width}x{height} of {first.width}x{first.height}"
    if (height, width) == (first.height, first.width):
        raise RequestError(f"{made}, which is no larger", hint="give a larger hires_scale, or leave it out")
    if height * width > LARGEST_PIXELS:  # else windows of the first pass's size fit
        raise RequestError(f"{made}, more than {LARGEST_PIXELS} pixels", hint="give a smaller hires_scale")
    again = replace(request, height=height, width=width, seed=first.seeds, num_images_per_prompt=None)
    if second.steps is not None:
        steps = check_whole("hires_steps", second.steps, 1, MAX_STEPS)
        again = replace(again, num_inference_steps=steps, timesteps=None, sigmas=None)
    return _resolve(again, manifest, second)


def _resolve(request: Request, manifest: Manifest, task: Task) -> ResolvedRequest:
    """One pass of a request, which does `task`. Raises RequestError."""
    controls = resolve_controls(request, manifest.model)
    height, width, drawn_size, windowed = _resolve_size(request, manifest, task, controls)
    check_arrays(controls, height, width)
    task = task.resized(height, width)
    guidance_scale = check_finite("guidance_scale", request.guidance_scale)
    composed = _resolve_composed(request, guidance_scale, task)
    eta = check_share("eta", request.eta, hint="give a number from 0 (no noise) to 1")
    guidance_start, guidance_end = (
        check_finite(name, getattr(request, name)) for name in ("guidance_start", "guidance_end")
    )
    if not 0 <= guidance_start < guidance_end <= 1:
        raise RequestError(
            f"guidance_start is {guidance_start:g} and guidance_end {guidance_end:g}",
            hint="give shares of the steps: 0 <= start < end <= 1; for no guidance at all, guidance_scale 1",
        )
    hint = "give a number from 0 (not at all) to 1"
    guidance_rescale = check_share("guidance_rescale", request.guidance_rescale, hint=hint)
    timesteps, sigmas = (_numbers(name, getattr(request, name)) for name in ("timesteps", "sigmas"))
    plan, scheduler, steps = _resolve_plan(request, manifest, task, eta, timesteps, sigmas)
    generator = _resolve_generator(request.generator)
    seeds = _resolve_seeds(request.seed, request.num_images_per_prompt)
    seeds, variations = _resolve_variations(request, seeds, generator)
    resolved = ResolvedRequest(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        height=height,
        width=width,
        drawn_size=drawn_size,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        scheduler=scheduler,
        seeds=seeds,
        variations=variations,
        eta=eta,
        generator=generator,
        guidance_start=guidance_start,
        guidance_end=guidance_end,
        guidance_rescale=guidance_rescale,
        timesteps=timesteps,
        sigmas=sigmas,
        plan=plan,
        task=task,
        image_guidance_scale=task.image_guidance_scale if isinstance(task, Editing) else None,
        windowed=windowed,
        controls=controls,
        composed_prompts=composed,
        places_per_image=_resolve_places(composed, manifest),
        vae=resolve_vae(request.vae, manifest.model),
    )
    if resolved.guided and not resolved.guided_rows:
        raise RequestError(
            f"guidance_start {guidance_start:g}, guidance_end {guidance_end:g}: none of {len(plan)} rows is guided",
            hint="widen the interval, or ask for more steps; for no guidance at all, guidance_scale 1",
        )
    return resolved


def _resolve_composed(request: Request, guidance_scale: float, task: Task) -> tuple[tuple[str, float], ...]:
    """More prompts with their weights."""
    if request.composed_prompts is None:
        return ()
    hint = 'give pairs of a prompt and its weight: [("a small blue star", 0.8)]'
    listed = _listed(request.composed_prompts) or [None]
    pairs = [pair for pair in listed if isinstance(pair, list | tuple) and len(pair) == 2]
    if len(pairs) < len(listed):
        raise RequestError(f"composed_prompts is {shown(request.composed_prompts)}", hint=hint)
    if isinstance(task, Editing):
        raise RequestError("composed_prompts means nothing in editing", hint="leave composed_prompts out")
    if not guidance_scale > 1:
        raise RequestError(
            f"composed_prompts are given, but guidance_scale {guidance_scale:g} guides nothing",
            hint="give a guidance_scale above 1",
        )
    composed = []
    for text, weight in pairs:
        _check_text("a composed prompt", text)
        composed.append((str(text), check_finite("the weight of a composed prompt", weight)))
    total = 1 + sum(weight for _, weight in composed)
    if total <= 0:
        raise RequestError(
            f"the weights of the prompts, 1 and those of composed_prompts, add up to {total:g}",
            hint="give weights whose sum with 1 is above 0",
        )
    return tuple(composed)


def _resolve_places(composed: tuple[tuple[str, float], ...], manifest: Manifest) -> int:
    """How many plain images' lanes an image takes. RequestError where that is more than the engines have."""
    per_image, most = manifest.model.lanes_per_image, manifest.profile.max_batch
    lanes = per_image + len(composed)
    places = -(-lanes // per_image)
    if places > most:
        raise RequestError(
            f"{len(composed)} composed prompts need {lanes} network evaluations a step; this bundle has room for"
            f" {most * per_image}",
            hint=f"give fewer, or build the bundle with --batch 1..{places}",
        )
    return places


def _resolve_variations(
    request: Request, seeds: tuple[int, ...], generator: GeneratorName
) -> tuple[tuple[int, ...], tuple[Variation | None, ...]]:
    """The seeds and variations of the images: with a variation, seeds that were counted up are one again."""
    share = check_share("variation_strength", request.variation_strength, hint="give a number from 0 to 1")
    if request.variation_seed is None:
        if share != 0:
            raise RequestError(f"variation_strength is {share:g} of no other seed", hint="give a variation_seed")
        return seeds, (None,) * len(seeds)
    first = check_whole("variation_seed", request.variation_seed, 0, 2**64 - len(seeds))
    if _listed(request.seed) is None:
        seeds = (seeds[0],) * len(seeds)
    others = range(first, first + len(seeds))
    return seeds, tuple(Variation(seed=other, share=share, generator=generator) for other in others)


def _resolve_size(
    request: Request, manifest: Manifest, task: Task, controls: Sequence[Control]
) -> tuple[int, int, tuple[int, int], bool]:
    """Height and width, as asked for, else what task or controls bring, else the model's; `drawn_size`; `windowed`."""
    model, profile = manifest.model, manifest.profile
    brought = size_of_controls(controls, profile) if task.size is None else task.size
    default = nearest_size(profile, model.default_height, model.default_width) if brought is None else brought
    height = default[0] if request.height is None else check_whole("height", request.height, 1, 10**6)
    width = default[1] if request.width is None else check_whole("width", request.width, 1, 10**6)
    if isinstance(task, Outpainting):
        task.check_size(profile, height, width)
    windowed = check_flag("windowed", request.windowed) or task.windowed
    if controls and request.padding_mask_crop is not None:
        hint = "leave padding_mask_crop out, or control_image"
        raise RequestError("padding_mask_crop is given beside a control_image, which is for the whole image", hint=hint)
    drawn_size = task.drawn_size(profile, height, width) if isinstance(task, Upscaling) else (height, width)
    if profile.accepts(*drawn_size):
        return height, width, drawn_size, False
    if windowed and fits_windows(profile, *drawn_size):
        check_control_size(controls, *drawn_size, profile)
        return height, width, drawn_size, True
    of_picture = (height, width) == brought and not isinstance(task, Outpainting)
    what = None if not of_picture else "picture" if task.size is not None else "control picture"
    raise _refused_size(profile, task, height, width, windowed=windowed, picture=what)


def _refused_size(
    profile: ShapeProfile, task: Task, height: int, width: int, *, windowed: bool, picture: str | None
) -> RequestError:
    """The error of a size that is not made, with what could be asked for instead. picture: whose own size it is."""
    too_large = height * width > LARGEST_PIXELS
    if windowed and too_large:
        rows, columns = shrunk_size(profile, height, width)
        less = f"ask for less, such as {columns}x{rows}"
        return RequestError(f"{width}x{height} is more than {LARGEST_PIXELS} pixels, even in windows", hint=less)
    hint = task.fitting_margins(profile, height, width) if isinstance(task, Outpainting) else None
    if hint is None:
        closest = nearest_size if picture is None else shaped_size
        near = (next_size(profile, height, width) if windowed else None) or closest(profile, height, width)
        larger = windowed or too_large or fits_windows(profile, height, width)
        more = f", larger ones with windowed=True, up to {LARGEST_PIXELS} pixels" if larger else ""
        scaled = "give height and width, to which a picture is scaled, such as"
        instead = "the nearest is" if picture is None else scaled
        hint = f"it makes {describe_sizes(profile)}{more}; {instead} {near[1]}x{near[0]}"
    reason = "" if picture is None else f", what the {picture}'s size comes to"
    if height % profile.multiple_of or width % profile.multiple_of:
        reason += f": both sides must be multiples of {profile.multiple_of}"
    return RequestError(f"this bundle does not make images of {width}x{height}{reason}", hint=hint)


def _resolve_plan(
    request: Request,
    manifest: Manifest,
    task: Task,
    eta: float,
    timesteps: tuple[float, ...] | None,
    sigmas: tuple[float, ...] | None,
) -> tuple[SamplingPlan, str, int]:
    """The plan, the scheduler's name and the number of steps."""
    model = manifest.model
    scheduler: object = request.scheduler
    steps = request.num_inference_steps
    if steps is not None:
        steps = check_whole("num_inference_steps", steps, 1, MAX_STEPS)
    if isinstance(scheduler, SamplingPlan):
        _check_own_plan(request, scheduler, read_thresholding(model.scheduler_config))
        task.check_plan(scheduler)
        plan, name, count = scheduler, OWN_PLAN, len(scheduler)
    elif scheduler is None or isinstance(scheduler, str):
        count = count_steps(
            scheduler_class=model.scheduler_class,
            scheduler=scheduler,
            num_inference_steps=steps,
            timesteps=timesteps,
            sigmas=sigmas,
        )
        plan = build_plan(
            scheduler_class=model.scheduler_class,
            scheduler_config=model.scheduler_config,
            num_inference_steps=steps,
            scheduler=scheduler,
            eta=eta,
            timesteps=timesteps,
            sigmas=sigmas,
            first=task.first_step(count),
        )
        name = model.scheduler_class if scheduler is None else find_scheduler(scheduler).name
    else:
        hint = f"give a SamplingPlan, or one of: {', '.join(SCHEDULERS)}"
        raise RequestError(f"scheduler is {type(scheduler).__name__}, not a name", hint=hint)
    if plan.slots > manifest.state_slots:
        raise RequestError(
            f"the scheduler keeps {plan.slots} states; this bundle has room for {manifest.state_slots}",
            hint="choose another scheduler, or rebuild the bundle with: sdrt build",
        )
    return plan, name, count


def _check_own_plan(request: Request, plan: SamplingPlan, thresholding: Thresholding | None) -> None:
    """A plan of one's own has its steps and its noise. thresholding: what the bundle's step graph does to an x₀."""
    beside = [
        name
        for name in ("num_inference_steps", "timesteps", "sigmas", "strength")
        if getattr(request, name) is not None
    ]
    beside += ["eta"] if request.eta != 0 else []
    if beside:
        raise RequestError(f"{beside[0]} is given beside a plan, which has its own", hint=f"leave {beside[0]} out")
    numbers = (plan.timesteps, plan.input_scales, plan.transitions, np.array(plan.initial_scale))
    if not all(np.isfinite(values).all() for values in numbers):
        raise RequestError("the plan has values that are not finite", hint="ask its scheduler for other steps")
    ratio = None if thresholding is None else thresholding.ratio
    if plan.clamp is not None and plan.clamp.ratio != ratio:
        raise RequestError(
            f"the plan thresholds at {plan.clamp.ratio}, this bundle's step graph at {ratio}",
            hint="use a scheduler that does as the checkpoint's own; sdrt inspect shows its config",
        )


def resolve_vae(name: object, model: ModelRecord) -> VaeName:
    """What decodes, "full" unless named. Raises RequestError for a decoder that the bundle does not have."""
    if name == "tiny" and model.tiny_vae is None:
        raise RequestError(
            "vae is 'tiny', and this bundle was built without a tiny VAE",
            hint="build it with: sdrt build MODEL --tiny-vae FOLDER; or let the full one decode",
        )
    for known in VAES:
        if name == known:
            return known
    if name is None:
        return "full"
    raise RequestError(f"vae is {shown(name)}", hint=f"choose one of: {', '.join(VAES)}")


def _resolve_generator(name: object) -> GeneratorName:
    for known in GENERATORS:
        if name == known:
            return known
    raise RequestError(f"generator is {reprlib.repr(name)}", hint=f"choose one of: {', '.join(GENERATORS)}")


def _resolve_seeds(seed: object, images: int | None) -> tuple[int, ...]:
    """The seed of each image."""
    count = None if images is None else check_whole("num_images_per_prompt", images, 1, MAX_IMAGES)
    if seed is None:
        seed = secrets.randbelow(2**32)
    if (listed := _listed(seed)) is not None:
        seed = listed
        check_whole("the number of seeds", len(seed), 1, MAX_IMAGES)
        if count is not None and count != len(seed):
            raise RequestError(
                f"num_images_per_prompt is {count}, but there are {len(seed)} seeds",
                hint=f"give {count} seeds, or one from which they are counted up, or leave num_images_per_prompt out",
            )
        return tuple(check_whole("seed", each, 0, 2**64 - 1) for each in seed)
    count = 1 if count is None else count
    first = check_whole("seed", seed, 0, 2**64 - count)
    return tuple(range(first, first + count))


def _numbers(name: str, values: object) -> tuple[float, ...] | None:
    if values is None:
        return None
    listed = _listed(values)
    if listed is None or not 1 <= len(listed) <= MAX_STEPS + 1:
        raise RequestError(f"{name} is {shown(values)}", hint=f"give 1 to {MAX_STEPS} numbers in descending order")
    return tuple(check_finite(name, value) for value in listed)


def _listed(values: object) -> list[object] | None:
    """The items of a list, a tuple or a one-dimensional array; None of anything else."""
    if isinstance(values, np.ndarray):
        return list(values) if values.ndim == 1 else None
    return list(values) if isinstance(values, list | tuple | range) else None


def _check_text(name: str, text: object) -> None:
    if not isinstance(text, str):
        raise RequestError(f"{name} is {type(text).__name__}, not text", hint="give a string; it may be empty")
    if len(text) > MAX_PROMPT_CHARACTERS:
        hint = f"give at most {MAX_PROMPT_CHARACTERS} characters"
        raise RequestError(f"{name} has {len(text)} characters", hint=hint)
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise RequestError(f"{name} holds characters that are no text (NUL or a lone surrogate)", hint="remove them")
