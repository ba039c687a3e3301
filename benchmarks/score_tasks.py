"""Does each task do what its name promises? Draws held-out cases with bundles of `shapes`, and asks the judge.

python -m sdrt.benchmarks.score_tasks --cases 40 --out FILE.json
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import sdrt
from sdrt.benchmarks.builds import build_bundle
from sdrt.benchmarks.machine import describe_machine
from sdrt.benchmarks.score import Picture, draw_batched, timed
from sdrt.errors import SdrtError
from sdrt.files import write_atomically
from sdrt.models.shapes.judge_tasks import judge_task
from sdrt.models.shapes.task_cases import EXTENSION, TASKS, TaskCase, task_cases

SIDE = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What is built for a task, by its name on the command line."""

    name: str  # of its bundle's folder
    model: str
    sizes: str = f"{SIDE}x{SIDE}"
    flags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What draws the cases of a task, and how. in_windows: instead of `model`, those larger than its engines take.

    noise_level: of the upscaler's low-resolution picture.
    """

    model: Model
    in_windows: Model | None = None
    guidance_scale: float
    noise_level: int | None = None

    def model_of(self, case: TaskCase) -> Model:
        """Raises ValueError for a case in windows where the task has none."""
        if not case.in_windows:
            return self.model
        if self.in_windows is None:
            raise ValueError("this task is not drawn in windows")
        return self.in_windows


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How pictures are drawn. work: where bundles are built, and kept for the next time."""

    work: Path
    precision: str
    num_inference_steps: int
    guidance_scale: float
    noise_level: int | None
    max_batch: int
    threads: int | None


INPAINT = Model(name="inpaint", model="shapes-inpaint", sizes=f"{SIDE}..{SIDE + EXTENSION}")
SMALL_INPAINT = Model(name="inpaint-small", model="shapes-inpaint")
EDGES = Model(name="edges", model="shapes", flags=("--controlnet", "shapes-edges"))
MODELS: Mapping[str, Setup] = {
    "inpaint": Setup(model=INPAINT, guidance_scale=4.0),
    "outpaint": Setup(model=INPAINT, in_windows=SMALL_INPAINT, guidance_scale=1.0),
    # Where the picture given says nearly all, guidance only exaggerates.
    "upscale": Setup(model=Model(name="upscale", model="shapes-upscale"), guidance_scale=1.0, noise_level=20),
    "depth": Setup(model=Model(name="depth", model="shapes-depth"), guidance_scale=2.0),
    "image-to-image": Setup(model=Model(name="shapes", model="shapes"), guidance_scale=4.0),
    "edges": Setup(model=EDGES, guidance_scale=2.0),
}


def build(model: Model, settings: Settings) -> Path:
    """A model's bundle; what has been built before comes from the cache in the work folder. Raises BuildError."""
    target = settings.work / f"{model.name}-{settings.precision}.sdrt"
    settings.work.mkdir(parents=True, exist_ok=True)
    flags = [
        "--precision",
        settings.precision,
        "--sizes",
        model.sizes,
        "--batch",
        f"1..{settings.max_batch}",
        "--force",
    ]
    build_bundle(Path(model.model), target, *model.flags, *flags, cache=settings.work / "cache")
    return target


def draw(bundle: Path, cases: Sequence[TaskCase], settings: Settings) -> Iterator[Picture]:
    """One picture a case, in the cases' order."""
    requests = [request_of(case, settings) for case in cases]
    return draw_batched(bundle, requests, threads=settings.threads, max_batch=settings.max_batch)


def draw_task(task: str, cases: Sequence[TaskCase], settings: Settings) -> tuple[list[Picture], float]:
    """One picture a case, in the cases' order, each by its model, and the seconds without those of building."""
    setup = MODELS[task]
    drawn: dict[int, Picture] = {}
    seconds = 0.0
    for model in dict.fromkeys(setup.model_of(case) for case in cases):
        numbers = [number for number, case in enumerate(cases) if setup.model_of(case) == model]
        print(f"{task}: building {model.name}", file=sys.stderr, flush=True)
        pictures = draw(build(model, settings), [cases[number] for number in numbers], settings)
        listed, took = timed(f"{task} with {model.name}", pictures, len(numbers))
        drawn |= dict(zip(numbers, listed, strict=True))
        seconds += took
    return [drawn[number] for number in range(len(cases))], seconds


def request_of(case: TaskCase, settings: Settings) -> sdrt.Request:
    """What is asked for a case: everything that it brings decides the task. Outside a mask the source is kept."""
    given: dict[str, Any] = {}
    if case.source is not None and case.outpaint is not None:
        given |= {"image": Image.fromarray(case.source), "outpaint": case.outpaint}
    elif case.source is not None:
        height, width = case.source.shape[:2]
        given |= {"image": Image.fromarray(case.source), "height": height, "width": width}
        if case.mask is not None:
            mask = Image.fromarray(case.mask.astype(np.uint8) * 255)
            given |= {"mask_image": mask, "strength": 1.0, "preserve": True}
        else:
            given["strength"] = case.strength
    if case.small is not None:
        given |= {"image": Image.fromarray(case.small), "noise_level": settings.noise_level}
    if case.depth is not None:
        given["depth_map"] = case.depth
    if case.edges is not None:
        given["control_image"] = Image.fromarray(case.edges)
    return sdrt.Request(
        prompt=case.caption,
        seed=case.seed,
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        scheduler="ddim",
        **given,
    )


def settings_of(task: str, options: argparse.Namespace) -> Settings:
    """The command line's, and what it leaves open from the task's own."""
    own = MODELS[task]
    noise_level = own.noise_level
    if noise_level is not None and options.noise_level is not None:
        noise_level = options.noise_level
    return Settings(
        work=options.work,
        precision=options.precision,
        num_inference_steps=options.steps,
        guidance_scale=own.guidance_scale if options.guidance_scale is None else options.guidance_scale,
        noise_level=noise_level,
        max_batch=options.max_batch,
        threads=options.threads,
    )


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=40, help="of each task; image-to-image draws each at 4 strengths")
    parser.add_argument("--only", choices=TASKS)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--guidance-scale", type=float, help="of every task, instead of each one's own")
    parser.add_argument("--noise-level", type=int, help="of the upscaler's low-resolution picture, instead of its own")
    parser.add_argument("--max-batch", type=int, default=4)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--work", type=Path, default=Path("build/score-tasks"), help="bundles are built and kept here")
    parser.add_argument("--pictures", type=Path, help="a folder to keep the pictures in, one sheet a task")
    parser.add_argument("--out", type=Path)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: prints the figures as JSON, and keeps them in --out; 1 when a bar is missed."""
    options = parse_arguments(arguments)
    try:
        results, passed = _run(TASKS if options.only is None else (options.only,), options)
        text = json.dumps(results, indent=2)
        if options.out is not None:
            write_atomically(options.out, text.encode() + b"\n", overwrite=True)
    except SdrtError as error:
        print(f"error: {error.message}\nhint: {error.hint}", file=sys.stderr)
        return error.exit_code
    print(text)
    return 0 if passed else 1


def _run(tasks: Sequence[str], options: argparse.Namespace) -> tuple[dict[str, object], bool]:
    results: dict[str, object] = {
        "machine": describe_machine(),
        "precision": options.precision,
        "num_inference_steps": options.steps,
        "scheduler": "ddim",
    }
    passed = True
    for task in tasks:
        cases, settings = task_cases(task, options.cases), settings_of(task, options)
        pictures, seconds = draw_task(task, cases, settings)
        score = judge_task(task, cases, pictures)
        asked: dict[str, float] = {"guidance_scale": settings.guidance_scale}
        asked |= {} if settings.noise_level is None else {"noise_level": settings.noise_level}
        results[task] = asked | asdict(score) | {"passed": score.passed, "seconds": round(seconds, 1)}
        passed = passed and score.passed
        if options.pictures is not None:
            options.pictures.mkdir(parents=True, exist_ok=True)
            contact_sheet(cases, pictures).save(options.pictures / f"{task}.png")
    return results, passed


def contact_sheet(cases: Sequence[TaskCase], pictures: Sequence[Picture]) -> Image.Image:
    """What was given above what was drawn, up to eight cases a row."""
    cell, columns = 160, 8
    rows = -(-len(cases) // columns)
    sheet = Image.new("RGB", (columns * cell, 2 * rows * cell), (200, 200, 200))
    for number, (case, picture) in enumerate(zip(cases, pictures, strict=True)):
        left, top = number % columns * cell, 2 * (number // columns) * cell
        sheet.paste(_given(case), (left, top))
        sheet.paste(Image.fromarray(picture), (left, top + cell))
    return sheet


def _given(case: TaskCase) -> Image.Image:
    if case.depth is not None:
        return Image.fromarray((255 * case.depth).astype(np.uint8)).convert("RGB")
    before = case.source if case.outpaint is None else case.truth
    if before is not None and case.mask is not None:
        return Image.fromarray(np.where(case.mask[..., None], np.uint8(128), before))
    given = next(item for item in (case.source, case.edges, case.small) if item is not None)
    return Image.fromarray(given)


if __name__ == "__main__":
    sys.exit(main())
