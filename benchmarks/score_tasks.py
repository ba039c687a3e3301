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
class Settings:
    """How pictures are drawn. work: where bundles are built, and kept for the next time."""

    work: Path
    precision: str
    num_inference_steps: int
    guidance_scale: float
    noise_level: int
    max_batch: int
    threads: int | None


SHAPES = Model(name="shapes", model="shapes")
INPAINT = Model(name="inpaint", model="shapes-inpaint", sizes=f"{SIDE}..{SIDE + EXTENSION}")
MODELS: Mapping[str, Model] = {
    "inpaint": INPAINT,
    "outpaint": INPAINT,
    "upscale": Model(name="upscale", model="shapes-upscale"),
    "depth": Model(name="depth", model="shapes-depth"),
    "image-to-image": SHAPES,
    "edges": Model(name="edges", model="shapes", flags=("--controlnet", "shapes-edges")),
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


def request_of(case: TaskCase, settings: Settings) -> sdrt.Request:
    """What is asked for a case: everything that it brings decides the task. Outside a mask the source is kept."""
    given: dict[str, Any] = {}
    if case.source is not None:
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


def main() -> int:
    """Command line: prints the figures as JSON, and keeps them in --out; 1 when a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=40, help="of each task; image-to-image draws each at 4 strengths")
    parser.add_argument("--only", choices=TASKS)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--guidance-scale", type=float, default=4.0)
    parser.add_argument("--noise-level", type=int, default=20, help="of the upscaler's low-resolution picture")
    parser.add_argument("--max-batch", type=int, default=4)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--work", type=Path, default=Path("build/score-tasks"), help="bundles are built and kept here")
    parser.add_argument("--pictures", type=Path, help="a folder to keep the pictures in, one sheet a task")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    settings = Settings(
        work=options.work,
        precision=options.precision,
        num_inference_steps=options.steps,
        guidance_scale=options.guidance_scale,
        noise_level=options.noise_level,
        max_batch=options.max_batch,
        threads=options.threads,
    )
    try:
        results, passed = _run(TASKS if options.only is None else (options.only,), settings, options)
        text = json.dumps(results, indent=2)
        if options.out is not None:
            write_atomically(options.out, text.encode() + b"\n", overwrite=True)
    except SdrtError as error:
        print(f"error: {error.message}\nhint: {error.hint}", file=sys.stderr)
        return error.exit_code
    print(text)
    return 0 if passed else 1


def _run(tasks: Sequence[str], settings: Settings, options: argparse.Namespace) -> tuple[dict[str, object], bool]:
    results: dict[str, object] = {
        "machine": describe_machine(),
        "precision": settings.precision,
        "num_inference_steps": settings.num_inference_steps,
        "guidance_scale": settings.guidance_scale,
        "noise_level": settings.noise_level,
        "scheduler": "ddim",
    }
    passed = True
    for task in tasks:
        cases = task_cases(task, options.cases)
        print(f"{task}: building", file=sys.stderr, flush=True)
        bundle = build(MODELS[task], settings)
        pictures, seconds = timed(task, draw(bundle, cases, settings), len(cases))
        score = judge_task(task, cases, pictures)
        results[task] = asdict(score) | {"passed": score.passed, "seconds": round(seconds, 1)}
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
    if case.source is not None and case.mask is not None:
        return Image.fromarray(np.where(case.mask[..., None], np.uint8(128), case.source))
    given = next(item for item in (case.source, case.edges, case.small) if item is not None)
    return Image.fromarray(given)


if __name__ == "__main__":
    sys.exit(main())
