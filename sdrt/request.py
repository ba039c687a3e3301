"""What a caller asks for, and the one place where it is checked before anything is computed."""

import math
import numbers
import reprlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from sdrt.bundle import Manifest, ShapeProfile
from sdrt.errors import RequestError
from sdrt.image import as_rgb
from sdrt.noise import GENERATORS, GeneratorName, Variation
from sdrt.plan import SCHEDULERS, SamplingPlan, build_plan, count_steps
from sdrt.plan.catalog import find_scheduler
from sdrt.plan.clamping import Thresholding, read_thresholding
from sdrt.tasks import DEFAULT_STRENGTH, ImageToImage, Start, TextToImage

MAX_IMAGES = 64
MAX_STEPS = 1000
OWN_PLAN = "a plan of one's own"  # in the place of a scheduler's name
MAX_PROMPT_CHARACTERS = 100_000
LARGEST_FLOAT32 = 3.4028234663852886e38


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request, in the names of the diffusers pipelines. `None` means the model's default.

    num_inference_steps: 50 unless given, or as many as `timesteps` or `sigmas` have.
    scheduler: a name or a class (`sdrt schedulers` lists them), or a plan of one's own: `sdrt.plan.derive` makes them.
    seed: with `num_images_per_prompt` > 1, image i is made with seed + i, so each can be made again alone; or one seed
    for each image, as a list of generators.
    timesteps, sigmas: a grid of one's own, descending, as the reference's `set_timesteps` takes it.
    image: what to begin with, instead of noise (image-to-image); it is resized where height or width say so. strength:
    the share of the steps that then run, 0.8 unless given: the more, the freer.
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
    image: Image.Image | None = None
    strength: float | None = None
    variation_seed: int | None = None
    variation_strength: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedRequest:
    """A request that was checked against a bundle, with every default filled in, and its sampling plan.

    seeds, variations: those of each image. start: the task, with what it begins with.
    """

    prompt: str
    negative_prompt: str
    height: int
    width: int
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
    start: Start
    variations: tuple[Variation | None, ...]

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
    start = _resolve_start(request)
    height, width = _resolve_size(request, manifest, start)
    start = start.resized(height, width)
    guidance_scale = _finite("guidance_scale", request.guidance_scale)
    eta = _share("eta", request.eta, hint="give a number from 0 (no noise) to 1")
    guidance_start, guidance_end = (
        _finite(name, getattr(request, name)) for name in ("guidance_start", "guidance_end")
    )
    if not 0 <= guidance_start < guidance_end <= 1:
        raise RequestError(
            f"guidance_start is {guidance_start:g} and guidance_end {guidance_end:g}",
            hint="give shares of the steps: 0 <= start < end <= 1; for no guidance at all, guidance_scale 1",
        )
    hint = "give a number from 0 (not at all) to 1"
    guidance_rescale = _share("guidance_rescale", request.guidance_rescale, hint=hint)
    timesteps, sigmas = (_numbers(name, getattr(request, name)) for name in ("timesteps", "sigmas"))
    plan, scheduler, steps = _resolve_plan(request, manifest, start, eta, timesteps, sigmas)
    generator = _resolve_generator(request.generator)
    seeds = _resolve_seeds(request.seed, request.num_images_per_prompt)
    seeds, variations = _resolve_variations(request, seeds, generator)
    resolved = ResolvedRequest(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        height=height,
        width=width,
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
        start=start,
    )
    if resolved.guided and not resolved.guided_rows:
        raise RequestError(
            f"guidance_start {guidance_start:g}, guidance_end {guidance_end:g}: none of {len(plan)} rows is guided",
            hint="widen the interval, or ask for more steps; for no guidance at all, guidance_scale 1",
        )
    return resolved


def describe_sizes(profile: ShapeProfile) -> str:
    """The sizes that a profile accepts, as WIDTHxHEIGHT."""
    if profile.sizes:
        return ", ".join(f"{width}x{height}" for height, width in profile.sizes)
    low, high = (f"{width}x{height}" for height, width in (profile.minimum, profile.maximum))
    return low if low == high else f"{low} to {high} in steps of {profile.multiple_of} pixels"


def nearest_size(profile: ShapeProfile, height: int, width: int) -> tuple[int, int]:
    """The accepted (height, width) that is closest to the one given."""
    if profile.sizes:
        return min(profile.sizes, key=lambda size: abs(size[0] - height) + abs(size[1] - width))
    grid = profile.multiple_of
    rows, columns = (
        min(max(round(side / grid) * grid, low), high)
        for side, low, high in zip((height, width), profile.minimum, profile.maximum, strict=True)
    )
    return rows, columns


def _resolve_start(request: Request) -> Start:
    """The task that the request means by what it brings."""
    if request.image is None:
        if request.strength is not None:
            raise RequestError(
                f"strength is {_shown(request.strength)}, but there is no image", hint="give an image, or leave it out"
            )
        return TextToImage()
    if not isinstance(request.image, Image.Image):
        raise RequestError(f"image is {type(request.image).__name__}", hint="give a PIL image: sdrt.image.open_image")
    strength = DEFAULT_STRENGTH if request.strength is None else _finite("strength", request.strength)
    if not 0 < strength <= 1:
        raise RequestError(f"strength is {strength:g}", hint="give more than 0 (the image as it is), up to 1 (free)")
    return ImageToImage(image=as_rgb(request.image), strength=strength)


def _resolve_variations(
    request: Request, seeds: tuple[int, ...], generator: GeneratorName
) -> tuple[tuple[int, ...], tuple[Variation | None, ...]]:
    """The seeds and variations of the images: with a variation, seeds that were counted up are one again."""
    share = _share("variation_strength", request.variation_strength, hint="give a number from 0 to 1")
    if request.variation_seed is None:
        if share != 0:
            raise RequestError(f"variation_strength is {share:g} of no other seed", hint="give a variation_seed")
        return seeds, (None,) * len(seeds)
    first = _whole("variation_seed", request.variation_seed, 0, 2**64 - len(seeds))
    if _listed(request.seed) is None:
        seeds = (seeds[0],) * len(seeds)
    others = range(first, first + len(seeds))
    return seeds, tuple(Variation(seed=other, share=share, generator=generator) for other in others)


def _resolve_size(request: Request, manifest: Manifest, start: Start) -> tuple[int, int]:
    """(height, width): as asked for, else what the task begins with, else the model's own."""
    model, profile = manifest.model, manifest.profile
    default = nearest_size(profile, model.default_height, model.default_width) if start.size is None else start.size
    height = default[0] if request.height is None else _whole("height", request.height, 1, 10**6)
    width = default[1] if request.width is None else _whole("width", request.width, 1, 10**6)
    if not profile.accepts(height, width):
        near = nearest_size(profile, height, width)
        reason = ""
        if height % profile.multiple_of or width % profile.multiple_of:
            reason = f": both sides must be multiples of {profile.multiple_of}"
        raise RequestError(
            f"this bundle does not make images of {width}x{height}{reason}",
            hint=f"it makes {describe_sizes(profile)}; the nearest is {near[1]}x{near[0]}",
        )
    return height, width


def _resolve_plan(
    request: Request,
    manifest: Manifest,
    start: Start,
    eta: float,
    timesteps: tuple[float, ...] | None,
    sigmas: tuple[float, ...] | None,
) -> tuple[SamplingPlan, str, int]:
    """The plan, the scheduler's name and the number of steps."""
    model = manifest.model
    scheduler: object = request.scheduler
    steps = request.num_inference_steps
    if steps is not None:
        steps = _whole("num_inference_steps", steps, 1, MAX_STEPS)
    if isinstance(scheduler, SamplingPlan):
        _check_own_plan(request, scheduler, read_thresholding(model.scheduler_config))
        start.check_plan(scheduler)
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
            first=start.first_step(count),
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
    asked = {"num_inference_steps": None, "timesteps": None, "sigmas": None, "eta": 0, "strength": None}
    beside = [name for name, absent in asked.items() if getattr(request, name) != absent]
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


def _resolve_generator(name: object) -> GeneratorName:
    for known in GENERATORS:
        if name == known:
            return known
    raise RequestError(f"generator is {reprlib.repr(name)}", hint=f"choose one of: {', '.join(GENERATORS)}")


def _resolve_seeds(seed: object, images: int | None) -> tuple[int, ...]:
    """The seed of each image."""
    count = None if images is None else _whole("num_images_per_prompt", images, 1, MAX_IMAGES)
    if seed is None:
        seed = secrets.randbelow(2**32)
    if (listed := _listed(seed)) is not None:
        seed = listed
        _whole("the number of seeds", len(seed), 1, MAX_IMAGES)
        if count is not None and count != len(seed):
            raise RequestError(
                f"num_images_per_prompt is {count}, but there are {len(seed)} seeds",
                hint="leave num_images_per_prompt out: there is an image for each seed",
            )
        return tuple(_whole("seed", each, 0, 2**64 - 1) for each in seed)
    count = 1 if count is None else count
    first = _whole("seed", seed, 0, 2**64 - count)
    return tuple(range(first, first + count))


def _numbers(name: str, values: object) -> tuple[float, ...] | None:
    if values is None:
        return None
    listed = _listed(values)
    if listed is None or not 1 <= len(listed) <= MAX_STEPS + 1:
        raise RequestError(f"{name} is {_shown(values)}", hint=f"give 1 to {MAX_STEPS} numbers in descending order")
    return tuple(_finite(name, value) for value in listed)


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


def _whole(name: str, value: object, minimum: int, maximum: int) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise RequestError(f"{name} is {_shown(value)}, not a whole number", hint=f"give {minimum} to {maximum}")
    whole = int(value)
    if not minimum <= whole <= maximum:
        raise RequestError(f"{name} is {_shown(whole)}", hint=f"give a whole number from {minimum} to {maximum}")
    return whole


def _share(name: str, value: object, *, hint: str) -> float:
    share = _finite(name, value)
    if not 0 <= share <= 1:
        raise RequestError(f"{name} is {share:g}", hint=hint)
    return share


def _finite(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise RequestError(f"{name} is {_shown(value)}, not a number", hint="give a finite number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    # The engines compute in float32, where a larger number is infinite; NaN compares false.
    if not abs(number) <= LARGEST_FLOAT32:
        raise RequestError(f"{name} is {_shown(value)}", hint="give a finite number")
    return number


def _shown(value: object) -> str:
    # Python refuses to write out integers of thousands of digits.
    if isinstance(value, int) and value.bit_length() > 256:
        return f"a number of {value.bit_length()} bits"
    return reprlib.repr(value)
