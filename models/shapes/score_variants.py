"""Do the task variants do their tasks? Draws held-out cases with diffusers and prints the judge's figures as JSON.

python -m sdrt.models.shapes.score_variants --cases 40 --out FILE.json
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    ControlNetModel,
    DiffusionPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionDepth2ImgPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionUpscalePipeline,
)
from PIL import Image

from sdrt.models.shapes.conditions import Picture
from sdrt.models.shapes.judge_tasks import judge_task
from sdrt.models.shapes.task_cases import TASKS, TaskCase, task_cases
from sdrt.models.shapes.variants import variant_checkpoint

BATCH = 8
UNCHECKED = {"safety_checker": None, "feature_extractor": None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How pictures are drawn."""

    work: Path  # where variants are put together
    base: Path
    num_inference_steps: int
    guidance_scale: float
    noise_level: int


def draw(task: str, cases: Sequence[TaskCase], settings: Settings) -> list[Picture]:
    """One picture a case, with the pipeline of the task, in float32."""
    pipeline, inputs = PIPELINES[task](settings)
    pipeline.set_progress_bar_config(disable=True)
    pictures: list[Picture] = []
    for batch in _batches(cases):
        images = pipeline(
            [case.caption for case in batch],
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
            generator=[torch.Generator("cpu").manual_seed(case.seed) for case in batch],
            **inputs(batch),
        ).images
        pictures += [_kept_outside(case, np.asarray(image)) for case, image in zip(batch, images, strict=True)]
        print(f"\r{task}: {len(pictures)} of {len(cases)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    order = [case for batch in _batches(cases) for case in batch]
    by_case = {id(case): picture for case, picture in zip(order, pictures, strict=True)}
    return [by_case[id(case)] for case in cases]


def _batches(cases: Sequence[TaskCase]) -> Iterator[list[TaskCase]]:
    """Cases that can share a call: of one canvas and one strength."""
    alike: dict[object, list[TaskCase]] = {}
    for case in cases:
        shape = None if case.source is None else case.source.shape
        alike.setdefault((shape, case.strength), []).append(case)
    for group in alike.values():
        yield from (group[first : first + BATCH] for first in range(0, len(group), BATCH))


def _kept_outside(case: TaskCase, picture: Picture) -> Picture:
    """What is outside the mask comes from the source, as a user of an inpainting model wants it."""
    if case.mask is None or case.source is None:
        return picture
    return np.where(case.mask[..., None], picture, case.source)


Inputs = Callable[[Sequence[TaskCase]], dict[str, object]]


def _inpaint(settings: Settings) -> tuple[DiffusionPipeline, Inputs]:
    folder = variant_checkpoint("inpaint", settings.work)
    pipeline = StableDiffusionInpaintPipeline.from_pretrained(folder, torch_dtype=torch.float32, **UNCHECKED)

    def inputs(batch: Sequence[TaskCase]) -> dict[str, object]:
        height, width = _sources(batch)[0].height, _sources(batch)[0].width
        masks = [Image.fromarray(case.mask.astype(np.uint8) * 255) for case in batch if case.mask is not None]
        return {"image": _sources(batch), "mask_image": masks, "height": height, "width": width}

    return pipeline, inputs


def _upscale(settings: Settings) -> tuple[DiffusionPipeline, Inputs]:
    folder = variant_checkpoint("upscale", settings.work)
    pipeline = StableDiffusionUpscalePipeline.from_pretrained(folder, torch_dtype=torch.float32)

    def inputs(batch: Sequence[TaskCase]) -> dict[str, object]:
        images = [Image.fromarray(case.small) for case in batch if case.small is not None]
        return {"image": images, "noise_level": settings.noise_level}

    return pipeline, inputs


def _depth(settings: Settings) -> tuple[DiffusionPipeline, Inputs]:
    folder = variant_checkpoint("depth", settings.work)
    pipeline = StableDiffusionDepth2ImgPipeline.from_pretrained(
        folder, torch_dtype=torch.float32, depth_estimator=None, feature_extractor=None
    )

    def inputs(batch: Sequence[TaskCase]) -> dict[str, object]:
        maps = np.stack([case.depth for case in batch if case.depth is not None])
        return {"image": _sources(batch), "depth_map": torch.from_numpy(maps), "strength": batch[0].strength}

    return pipeline, inputs


def _image_to_image(settings: Settings) -> tuple[DiffusionPipeline, Inputs]:
    pipeline = StableDiffusionImg2ImgPipeline.from_pretrained(settings.base, torch_dtype=torch.float32, **UNCHECKED)
    return pipeline, lambda batch: {"image": _sources(batch), "strength": batch[0].strength}


def _edges(settings: Settings) -> tuple[DiffusionPipeline, Inputs]:
    controlnet = ControlNetModel.from_pretrained(variant_checkpoint("edges", settings.work), torch_dtype=torch.float32)
    pipeline = StableDiffusionControlNetPipeline.from_pretrained(
        settings.base, controlnet=controlnet, torch_dtype=torch.float32, **UNCHECKED
    )
    return pipeline, lambda batch: {"image": [Image.fromarray(case.edges) for case in batch if case.edges is not None]}


def _sources(batch: Sequence[TaskCase]) -> list[Image.Image]:
    return [Image.fromarray(case.source) for case in batch if case.source is not None]


PIPELINES: dict[str, Callable[[Settings], tuple[DiffusionPipeline, Inputs]]] = {
    "inpaint": _inpaint,
    "outpaint": _inpaint,
    "upscale": _upscale,
    "depth": _depth,
    "image-to-image": _image_to_image,
    "edges": _edges,
}


def main() -> int:
    """Command line: prints the figures as JSON, and keeps them in --out; 1 when a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=40)
    parser.add_argument("--only", choices=TASKS)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--guidance-scale", type=float, default=4.0)
    parser.add_argument("--noise-level", type=int, default=20, help="of the upscaler's low-resolution picture")
    parser.add_argument("--work", type=Path, default=Path("build/shapes-variants/checkpoints"))
    parser.add_argument("--base", type=Path, default=Path("models/shapes/checkpoint"))
    parser.add_argument("--pictures", type=Path, help="a folder to keep the pictures in, one sheet a task")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    settings = Settings(
        work=options.work,
        base=options.base,
        num_inference_steps=options.steps,
        guidance_scale=options.guidance_scale,
        noise_level=options.noise_level,
    )
    results: dict[str, object] = {
        "num_inference_steps": options.steps,
        "guidance_scale": options.guidance_scale,
        "noise_level": options.noise_level,
    }
    passed = True
    for task in TASKS if options.only is None else (options.only,):
        cases, began = task_cases(task, options.cases), time.monotonic()
        pictures = draw(task, cases, settings)
        score = judge_task(task, cases, pictures)
        seconds = round(time.monotonic() - began, 1)
        results[task] = asdict(score) | {"passed": score.passed, "seconds": seconds}
        passed = passed and score.passed
        if options.pictures is not None:
            options.pictures.mkdir(parents=True, exist_ok=True)
            contact_sheet(cases, pictures).save(options.pictures / f"{task}.png")
    text = json.dumps(results, indent=2)
    if options.out is not None:
        options.out.write_text(text + "\n")
    print(text)
    return 0 if passed else 1


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
