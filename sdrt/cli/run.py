"""`sdrt run`: draw images and write them as PNG, each with everything that makes it again."""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from sdrt.cli.options import (
    AsJson,
    BundleFolder,
    Force,
    OnProvider,
    Threads,
    beside,
    check_outputs,
    chosen_size,
    numbered,
)
from sdrt.cli.pictures import check_same_picture, open_pictures
from sdrt.cli.task_options import (
    Composed,
    ControlEnd,
    ControlImages,
    ControlScale,
    ControlStart,
    DepthFile,
    Fill,
    FromPicture,
    HiresScale,
    HiresSteps,
    HiresStrength,
    HiresUpscaler,
    ImageGuidanceScale,
    MaskBlur,
    MaskFile,
    MaskMode,
    NoiseLevel,
    Outpaint,
    PaddingMaskCrop,
    Preserve,
    Strength,
    Vae,
    Windowed,
)
from sdrt.cli.terminal import emit, facts, print_warning, progress_bar, seconds_text
from sdrt.errors import RequestError

if TYPE_CHECKING:
    from PIL.Image import Image
    from rich.text import Text

    from sdrt.bundle import Bundle, JsonValue
    from sdrt.pipeline import Result
    from sdrt.progress import Progress
    from sdrt.request import Request

REQUEST_FIELDS = (
    "prompt",
    "negative_prompt",
    "composed_prompts",
    "height",
    "width",
    "num_inference_steps",
    "guidance_scale",
    "scheduler",
    "seed",
    "num_images_per_prompt",
    "eta",
    "generator",
    "guidance_start",
    "guidance_end",
    "guidance_rescale",
    "timesteps",
    "sigmas",
    "strength",
    "mask_mode",
    "mask_blur",
    "padding_mask_crop",
    "preserve",
    "outpaint",
    "fill",
    "hires_scale",
    "hires_upscaler",
    "hires_strength",
    "hires_steps",
    "windowed",
    "vae",
    "noise_level",
    "image_guidance_scale",
    "controlnet_conditioning_scale",
    "control_guidance_start",
    "control_guidance_end",
    "variation_seed",
    "variation_strength",
)

# What an option says anew of a remembered image: the others of its kind no longer hold.
_STEPS = ("num_inference_steps", "timesteps", "sigmas")
_SIZE = ("height", "width")
_INSTEAD = {name: tuple(other for other in _STEPS if other != name) for name in _STEPS} | {
    "scheduler": ("eta", "timesteps", "sigmas"),
    "mask_mode": ("mask_blur",),
}

MOST_OF_A_PROMPT = 60  # characters that are shown
_WEIGHTED = re.compile(r"(.*):\s*([+-]?(?:\d+\.?\d*|\.\d+))", re.DOTALL)

Number = TypeVar("Number", int, float)


def complete_scheduler(incomplete: str) -> list[str]:
    """The schedulers' names, for the shell."""
    from sdrt.plan import SCHEDULERS

    return [name for name in SCHEDULERS if name.startswith(incomplete)]


def run(
    bundle: BundleFolder,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="PNG", help="The image; several become NAME-1.png …")],
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="What to draw; may be empty.", show_default=False)
    ] = None,
    negative_prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What to keep away from.", show_default=False)
    ] = None,
    num_inference_steps: Annotated[
        int | None,
        typer.Option(
            "--steps", "--num-inference-steps", metavar="N", help="Denoising steps. Default: 50.", show_default=False
        ),
    ] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option(
            "--guidance-scale",
            "--cfg-scale",
            metavar="S",
            help="How closely to follow the prompt; 1 is without guidance. Default: 7.5.",
            show_default=False,
        ),
    ] = None,
    guidance_start: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="Guide from this share of the steps on. Default: 0.", show_default=False),
    ] = None,
    guidance_end: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="And up to this one: 0.6 saves time. Default: 1.", show_default=False),
    ] = None,
    composed_prompts: Composed = None,
    image: FromPicture = None,
    strength: Strength = None,
    mask_image: MaskFile = None,
    mask_mode: MaskMode = None,
    mask_blur: MaskBlur = None,
    padding_mask_crop: PaddingMaskCrop = None,
    preserve: Preserve = None,
    outpaint: Outpaint = None,
    fill: Fill = None,
    hires_scale: HiresScale = None,
    hires_upscaler: HiresUpscaler = None,
    hires_strength: HiresStrength = None,
    hires_steps: HiresSteps = None,
    windowed: Windowed = None,
    vae: Vae = None,
    depth_map: DepthFile = None,
    noise_level: NoiseLevel = None,
    image_guidance_scale: ImageGuidanceScale = None,
    control_image: ControlImages = None,
    controlnet_conditioning_scale: ControlScale = None,
    control_guidance_start: ControlStart = None,
    control_guidance_end: ControlEnd = None,
    guidance_rescale: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Against washed-out contrast of high scales, most for v-prediction models: 0.7. Default: 0.",
            show_default=False,
        ),
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="A name, such as euler_karras, or a class: see sdrt schedulers. Default: the model's own.",
            autocompletion=complete_scheduler,
            show_default=False,
        ),
    ] = None,
    eta: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="How much noise ddim and tcd add in each step, 0 to 1. Default: 0.",
            show_default=False,
        ),
    ] = None,
    timesteps: Annotated[
        str | None,
        typer.Option(
            metavar="T,T,…", help="Timesteps of your own, descending, instead of --steps.", show_default=False
        ),
    ] = None,
    sigmas: Annotated[
        str | None,
        typer.Option(
            metavar="S,S,…",
            help="Sigmas of your own, descending, the one after the last step included.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[
        str | None,
        typer.Option(
            metavar="N[,N…]",
            help="Image i of several is made with N + i; or a seed for each. Default: chosen and told.",
            show_default=False,
        ),
    ] = None,
    variation_seed: Annotated[
        int | None,
        typer.Option(metavar="N", help="Go towards the noise of this seed; several images: N + i.", show_default=False),
    ] = None,
    variation_strength: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="And how far, 0 to 1. Default: 0.", show_default=False),
    ] = None,
    generator: Annotated[
        str | None,
        typer.Option(
            metavar="DEVICE",
            help="Whose numbers a seed stands for: cpu or cuda, as torch.Generator. Default: cpu.",
            show_default=False,
        ),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            metavar="WxH",
            help="In pixels; an --image is scaled to it. Default: the picture's, or else the model's own.",
            show_default=False,
        ),
    ] = None,
    width: Annotated[int | None, typer.Option(metavar="W", help="Instead of --size.", show_default=False)] = None,
    height: Annotated[int | None, typer.Option(metavar="H", help="Instead of --size.", show_default=False)] = None,
    num_images_per_prompt: Annotated[
        int | None,
        typer.Option(
            "--num-images",
            "--num-images-per-prompt",
            "-n",
            metavar="N",
            help="Images to draw. Default: 1.",
            show_default=False,
        ),
    ] = None,
    grid: Annotated[bool, typer.Option("--grid", help="Also write all images in one, as NAME-grid.png.")] = False,
    from_image: Annotated[
        Path | None,
        typer.Option(
            metavar="PNG",
            help="Draw an image of sdrt again, from what it says of itself; options win.",
            show_default=False,
        ),
    ] = None,
    threads: Threads = None,
    provider: OnProvider = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Draw PROMPT with a bundle."""
    tall, wide = chosen_size(size, width, height)
    given = {
        "prompt": prompt,
        "negative_prompt": negative_prompt,
        "height": tall,
        "width": wide,
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "guidance_start": guidance_start,
        "guidance_end": guidance_end,
        "guidance_rescale": guidance_rescale,
        "scheduler": scheduler,
        "eta": eta,
        "composed_prompts": None if composed_prompts is None else [_weighted(each) for each in composed_prompts],
        "timesteps": _numbers("--timesteps", timesteps, float),
        "sigmas": _numbers("--sigmas", sigmas, float),
        "seed": _seed(seed),
        "variation_seed": variation_seed,
        "variation_strength": variation_strength,
        "image": image,
        "strength": strength,
        "mask_image": mask_image,
        "mask_mode": mask_mode,
        "mask_blur": mask_blur,
        "padding_mask_crop": padding_mask_crop,
        "preserve": preserve,
        "outpaint": None if outpaint is None else _margins(outpaint),
        "fill": fill,
        "hires_scale": hires_scale,
        "hires_upscaler": hires_upscaler,
        "hires_strength": hires_strength,
        "hires_steps": hires_steps,
        "windowed": windowed,
        "vae": vae,
        "depth_map": depth_map,
        "noise_level": noise_level,
        "image_guidance_scale": image_guidance_scale,
        "control_image": control_image or None,
        "controlnet_conditioning_scale": _for_controlnets(controlnet_conditioning_scale),
        "control_guidance_start": _for_controlnets(control_guidance_start),
        "control_guidance_end": _for_controlnets(control_guidance_end),
        "generator": generator,
        "num_images_per_prompt": num_images_per_prompt,
    }
    options = {name: value for name, value in given.items() if value is not None}
    remembered = {} if from_image is None else _remembered(from_image)
    request, count, sealed = _request(bundle, remembered, options)
    paths = numbered(out, count)
    sheet = beside(out, "grid") if grid else None
    check_outputs([*paths, *([] if sheet is None else [sheet])], ".png", force=force)
    with progress_bar() as progress:
        result = draw(sealed, request, threads=threads, provider=provider, progress=progress)
    for warning in result.warnings:
        print_warning(warning)
    _save(result, paths, sheet, force=force)
    emit(_record(result, paths, sheet), _summary(result, paths, sheet), as_json=as_json)


def draw(
    bundle: "Bundle",
    request: "Request",
    *,
    threads: int | None,
    provider: str | None = None,
    progress: "Progress",
) -> "Result":
    """Open the engines and draw one request, reporting each step."""
    from sdrt.pipeline import Pipeline
    from sdrt.runners import open_runner

    progress("loading the engines", 0, 1)
    with Pipeline(bundle, open_runner(bundle, threads=threads, provider=provider)) as pipeline:
        for event in pipeline.stream(request, latents=False):
            progress("drawing", event.row, event.rows)
            if event.result is not None:
                return event.result
    raise RuntimeError("the last step carried no result")


def _numbers(option: str, text: str | None, kind: Callable[[str], Number]) -> list[Number] | None:
    """Numbers with commas between them. Raises RequestError."""
    if text is None:
        return None
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as error:
        hint = "give numbers with commas between them"
        raise RequestError(f"{option} is {text!r}", hint=hint) from error


def _for_controlnets(values: list[float] | None) -> float | list[float] | None:
    """One number is for every ControlNet, several are for one each."""
    if not values:
        return None
    return values[0] if len(values) == 1 else values


def _margins(text: str) -> dict[str, int]:
    from sdrt.tasks.outpainting import parse_margins

    return parse_margins(text)


def _weighted(text: str) -> tuple[str, float]:
    """ "a star:0.5" as a prompt and its weight."""
    match = _WEIGHTED.fullmatch(text)
    return (text, 1.0) if match is None else (match[1], float(match[2]))


def _seed(text: str | None) -> int | list[int] | None:
    seeds = _numbers("--seed", text, int)
    return seeds[0] if seeds is not None and len(seeds) == 1 else seeds


def _request(folder: Path, remembered: dict[str, Any], options: dict[str, Any]) -> "tuple[Request, int, Bundle]":
    """The request and its number of images, checked against the bundle before its engines are loaded.

    Raises RequestError, BundleError.
    """
    from sdrt.bundle import Bundle
    from sdrt.request import Request
    from sdrt.resolution import OWN_PLAN, resolve_request

    bundle = Bundle.open(folder)
    model = bundle.manifest.model
    if remembered and remembered.get("model_identity") != model.identity:
        print_warning(
            f"the image was made with another model ({remembered.get('model')!r}), so it will not be the same"
        )
    fields = {name: remembered[name] for name in REQUEST_FIELDS if name in remembered} | options
    decoded_by = remembered.get("tiny_vae_identity")
    if fields.get("vae") == "tiny" and model.tiny_vae is not None and decoded_by not in (None, model.tiny_vae.identity):
        print_warning("the image was decoded by another tiny VAE than this bundle's, so it will not be the same")
    for given, overridden in _INSTEAD.items():
        if given in options:
            fields = {name: value for name, value in fields.items() if name not in overridden or name in options}
    if "outpaint" in fields:  # the canvas has its own size, and another one when the picture is another
        fields = {name: value for name, value in fields.items() if name not in _SIZE or name in options}
    if "num_images_per_prompt" in options and "seed" not in options and isinstance(fields.get("seed"), list):
        fields["seed"] = fields["seed"][0]
    if fields.get("scheduler") == OWN_PLAN:
        raise RequestError(
            "the image was made with a plan of its caller's own, which it does not hold", hint="name a --scheduler"
        )
    if "prompt" not in fields:
        raise RequestError("there is no prompt", hint='give a PROMPT (it may be ""), or an image of sdrt: --from-image')
    if fields.get("scheduler") == model.scheduler_class:
        fields["scheduler"] = None
    if not isinstance(fields.get("scheduler"), str | None):
        raise RequestError(f"the scheduler is {fields['scheduler']!r}, not a name", hint="give one with --scheduler")
    fields |= open_pictures(fields)
    check_same_picture(remembered, fields)
    request = Request(**fields)
    resolved = resolve_request(request, bundle.manifest)
    return replace(request, seed=resolved.seeds, num_images_per_prompt=None), len(resolved.seeds), bundle


def _remembered(image: Path) -> dict[str, Any]:
    from sdrt.image import read_parameters

    parameters = read_parameters(image)
    if "prompt" not in parameters:
        raise RequestError(f"{image} was not drawn from a prompt", hint="pass an image that `sdrt run` wrote")
    return parameters


def _save(result: "Result", paths: Sequence[Path], sheet: Path | None, *, force: bool) -> None:
    from sdrt.image import grid

    with written_together() as write:
        for index, path in enumerate(paths):
            write(result.images[index], path, result.parameters(index), force)
        if sheet is not None:
            shared = result.parameters(0) | {"seed": [*result.seeds]}
            write(grid(result.images), sheet, shared, force)


@contextlib.contextmanager
def written_together() -> "Iterator[Any]":
    """Yields a function that writes an image; when the block fails, new files that it wrote are removed."""
    from sdrt.image import save_png

    fresh: list[Path] = []

    def write(image: "Image", path: Path, parameters: "Mapping[str, JsonValue]", force: bool) -> None:
        existed = path.exists()
        save_png(image, path, parameters, overwrite=force)
        if not existed:
            fresh.append(path)

    try:
        yield write
    except BaseException:
        for path in fresh:
            path.unlink(missing_ok=True)
        raise


def _record(result: "Result", paths: Sequence[Path], sheet: Path | None) -> "dict[str, JsonValue]":
    timings = result.timings
    return {
        "images": [{"path": str(path), "parameters": result.parameters(index)} for index, path in enumerate(paths)],
        "grid": None if sheet is None else str(sheet),
        "seeds": [*result.seeds],
        "seconds": {
            "text_encoder": timings.text_encoder_seconds,
            "vae_encoder": timings.vae_encoder_seconds,
            "steps": list(timings.step_seconds),
            "vae_decoder": timings.vae_decoder_seconds,
            "gaps_between_steps": timings.gap_seconds,
            "saved_by_guidance_interval": result.saved_seconds,
            "total": timings.total_seconds,
        },
        "warnings": list(result.warnings),
    }


def _summary(result: "Result", paths: Sequence[Path], sheet: Path | None) -> "list[Text]":
    request, timings = result.request, result.timings
    count, stepping = len(timings.step_seconds), sum(timings.step_seconds)
    consecutive = len(paths) > 2 and request.seeds == tuple(range(request.seeds[0], request.seeds[0] + len(paths)))
    seeds = f"{request.seeds[0]} to {request.seeds[-1]}" if consecutive else ", ".join(map(str, request.seeds))
    names = str(paths[0]) if len(paths) == 1 else f"{paths[0]} to {paths[-1].name}"
    rows = [
        ("image" if len(paths) == 1 else "images", names),
        *([] if sheet is None else [("grid", str(sheet))]),
        ("seed" if len(paths) == 1 else "seeds", seeds),
        *[
            ("composed with", f"{shorten(text, MOST_OF_A_PROMPT)!r} times {weight:g}")
            for text, weight in request.composed_prompts
        ],
        ("size", ", then ".join(f"{each.width}x{each.height}" for each in request.passes)),
        ("text encoder", seconds_text(timings.text_encoder_seconds)),
        (
            "denoising",
            f"{seconds_text(stepping)} ({count} of {seconds_text(stepping / count)}, {request.scheduler})",
        ),
        *_saved_text(result),
        ("VAE decoder", seconds_text(timings.vae_decoder_seconds)),
        ("total", seconds_text(timings.total_seconds)),
    ]
    return facts(rows)


def _saved_text(result: "Result") -> list[tuple[str, str]]:
    if result.saved_seconds is None:
        return []
    rows, guided = len(result.timings.step_seconds), sum(len(each.guided_rows) for each in result.request.passes)
    return [
        ("guidance", f"in {guided} of {rows} steps, which saved about {seconds_text(max(result.saved_seconds, 0.0))}")
    ]
