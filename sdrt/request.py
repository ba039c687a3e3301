"""What a caller asks for, and the one place where it is checked before anything is computed."""

import math
import numbers
import reprlib
import secrets
from dataclasses import dataclass

from sdrt.bundle import Manifest, ShapeProfile
from sdrt.errors import RequestError
from sdrt.noise import GENERATORS, GeneratorName
from sdrt.plan import SCHEDULERS, SamplingPlan, build_plan

MAX_IMAGES = 64
MAX_PROMPT_CHARACTERS = 100_000
LARGEST_FLOAT32 = 3.4028234663852886e38


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One text-to-image request, in the names of the diffusers pipelines. `None` means the model's default.

    With `num_images_per_prompt` > 1, image i is made with seed + i, so each can be made again alone.
    generator: whose numbers the seed stands for, those of torch.Generator("cpu") or torch.Generator("cuda").
    guidance_start, guidance_end: the part of the steps that is guided, 0 to 1; outside it the negative prompt is not
    evaluated at all, which halves a step.
    """

    prompt: str
    negative_prompt: str = ""
    height: int | None = None
    width: int | None = None
    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    scheduler: str | None = None
    seed: int | None = None
    num_images_per_prompt: int = 1
    eta: float = 0.0
    generator: GeneratorName = "cpu"
    guidance_start: float = 0.0
    guidance_end: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedRequest:
    """A request that was checked against a bundle, with every default filled in, and its sampling plan."""

    prompt: str
    negative_prompt: str
    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float
    scheduler: str
    seed: int
    num_images_per_prompt: int
    eta: float
    generator: GeneratorName
    guidance_start: float
    guidance_end: float
    plan: SamplingPlan

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seed of each image."""
        return tuple(self.seed + index for index in range(self.num_images_per_prompt))

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
    model = manifest.model
    _check_text("prompt", request.prompt)
    _check_text("negative_prompt", request.negative_prompt)
    height, width = _resolve_size(request, manifest)
    steps = _whole("num_inference_steps", request.num_inference_steps, 1, 1000)
    images = _whole("num_images_per_prompt", request.num_images_per_prompt, 1, MAX_IMAGES)
    guidance_scale = _finite("guidance_scale", request.guidance_scale)
    eta = _finite("eta", request.eta)
    if not 0 <= eta <= 1:
        raise RequestError(f"eta is {eta:g}", hint="give a number from 0 (no noise) to 1")
    guidance_start, guidance_end = (
        _finite(name, getattr(request, name)) for name in ("guidance_start", "guidance_end")
    )
    if not 0 <= guidance_start < guidance_end <= 1:
        raise RequestError(
            f"guidance_start is {guidance_start:g} and guidance_end {guidance_end:g}",
            hint="give shares of the steps: 0 <= start < end <= 1; for no guidance at all, guidance_scale 1",
        )
    return ResolvedRequest(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        height=height,
        width=width,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        scheduler=model.scheduler_class if request.scheduler is None else request.scheduler,
        seed=_resolve_seed(request.seed, images),
        num_images_per_prompt=images,
        eta=eta,
        generator=_resolve_generator(request.generator),
        guidance_start=guidance_start,
        guidance_end=guidance_end,
        plan=_resolve_plan(request.scheduler, manifest, steps, eta),
    )


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


def _resolve_size(request: Request, manifest: Manifest) -> tuple[int, int]:
    model, profile = manifest.model, manifest.profile
    default = nearest_size(profile, model.default_height, model.default_width)
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


def _resolve_plan(scheduler: object, manifest: Manifest, steps: int, eta: float) -> SamplingPlan:
    model = manifest.model
    if scheduler is not None and not isinstance(scheduler, str):
        hint = f"choose one of: {', '.join(SCHEDULERS)}"
        raise RequestError(f"scheduler is {type(scheduler).__name__}, not a name", hint=hint)
    plan = build_plan(
        scheduler_class=model.scheduler_class,
        scheduler_config=model.scheduler_config,
        num_inference_steps=steps,
        scheduler=scheduler,
        eta=eta,
    )
    if plan.slots > manifest.state_slots:
        raise RequestError(
            f"the scheduler keeps {plan.slots} states; this bundle has room for {manifest.state_slots}",
            hint="choose another scheduler, or rebuild the bundle with: sdrt build",
        )
    return plan


def _resolve_generator(name: object) -> GeneratorName:
    for known in GENERATORS:
        if name == known:
            return known
    raise RequestError(f"generator is {reprlib.repr(name)}", hint=f"choose one of: {', '.join(GENERATORS)}")


def _resolve_seed(seed: int | None, images: int) -> int:
    if seed is None:
        return secrets.randbelow(2**32)
    return _whole("seed", seed, 0, 2**64 - images)


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
