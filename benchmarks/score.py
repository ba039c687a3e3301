"""Does the picture show its caption? Scores a `shapes` bundle, and PyTorch on the same seeds, with the judge.

python -m sdrt.benchmarks.score BUNDLE --baseline MODEL --captions 500 --out FILE.json
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

import sdrt
from sdrt.benchmarks.machine import describe_machine
from sdrt.errors import SdrtError
from sdrt.files import write_atomically
from sdrt.models.shapes.judge import Score, judge, score
from sdrt.models.shapes.scenes import held_out_captions

Picture = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreCase:
    """What every contestant draws: caption i with seed i."""

    captions: tuple[str, ...]
    num_inference_steps: int
    guidance_scale: float
    scheduler: str


def draw_with_sdrt(bundle: Path, case: ScoreCase, *, threads: int | None, max_batch: int) -> Iterator[Picture]:
    """The pictures of a bundle, one a caption."""
    requests = [
        sdrt.Request(
            prompt=caption,
            seed=seed,
            num_inference_steps=case.num_inference_steps,
            guidance_scale=case.guidance_scale,
            scheduler=case.scheduler,
        )
        for seed, caption in enumerate(case.captions)
    ]
    return draw_batched(bundle, requests, threads=threads, max_batch=max_batch)


def draw_batched(
    bundle: Path, requests: Sequence[sdrt.Request], *, threads: int | None, max_batch: int
) -> Iterator[Picture]:
    """One picture a request, in their order, drawn in mixed batches as a service would."""
    with (
        sdrt.open(bundle, threads=threads) as pipeline,
        sdrt.Batcher(pipeline, max_batch=max_batch, max_queue=len(requests)) as batcher,
    ):
        tickets = [batcher.submit(request) for request in requests]
        for ticket in tickets:
            yield np.asarray(ticket.result().images[0])


def draw_with_pytorch(model: Path, case: ScoreCase, *, threads: int | None, batch: int) -> Iterator[Picture]:
    """The pictures of the diffusers pipeline in float32, each with a generator of its own seed."""
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    if threads is not None:
        torch.set_num_threads(threads)
    pipeline = StableDiffusionPipeline.from_pretrained(model, torch_dtype=torch.float32, safety_checker=None)
    if case.scheduler != "ddim":
        raise ValueError(f"the PyTorch side draws with ddim, not {case.scheduler!r}")
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    for first in range(0, len(case.captions), batch):
        captions = list(case.captions[first : first + batch])
        generators = [torch.Generator("cpu").manual_seed(first + index) for index in range(len(captions))]
        images = pipeline(
            captions,
            num_inference_steps=case.num_inference_steps,
            guidance_scale=case.guidance_scale,
            generator=generators,
        ).images
        yield from (np.asarray(image) for image in images)


def score_pictures(case: ScoreCase, pictures: Sequence[Picture]) -> Score:
    """Judge every picture against its caption."""
    return score([judge(picture, caption) for picture, caption in zip(pictures, case.captions, strict=True)])


def timed(name: str, pictures: Iterator[Picture], count: int) -> tuple[list[Picture], float]:
    """The pictures, counted on standard error as they come, and the seconds that they took."""
    began, drawn = time.monotonic(), []
    for picture in pictures:
        drawn.append(picture)
        print(f"\r{name}: {len(drawn)} of {count}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return drawn, time.monotonic() - began


def main() -> int:
    """Command line: prints the table as JSON, and keeps it in --out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--baseline", type=Path, help="the checkpoint, to score the PyTorch pipeline too")
    parser.add_argument("--captions", type=int, default=500)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--guidance-scale", type=float, default=4.0)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--max-batch", type=int, default=4)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    case = ScoreCase(
        captions=tuple(held_out_captions(options.captions)),
        num_inference_steps=options.steps,
        guidance_scale=options.guidance_scale,
        scheduler="ddim",
    )
    try:
        results = _run(case, options)
        text = json.dumps(results, indent=2)
        if options.out is not None:
            write_atomically(options.out, text.encode() + b"\n", overwrite=True)
    except SdrtError as error:
        print(f"error: {error.message}\nhint: {error.hint}", file=sys.stderr)
        return error.exit_code
    print(text)
    return 0


def _run(case: ScoreCase, options: argparse.Namespace) -> dict[str, object]:
    drawn = draw_with_sdrt(options.bundle, case, threads=options.threads, max_batch=options.max_batch)
    ours, seconds = timed("sdrt", drawn, len(case.captions))
    results: dict[str, object] = {
        "machine": describe_machine(),
        "captions": len(case.captions),
        "num_inference_steps": case.num_inference_steps,
        "guidance_scale": case.guidance_scale,
        "scheduler": case.scheduler,
        "sdrt": asdict(score_pictures(case, ours)) | {"seconds": round(seconds, 1)},
    }
    if options.baseline is not None:
        drawn = draw_with_pytorch(options.baseline, case, threads=options.threads, batch=options.max_batch)
        theirs, seconds = timed("pytorch", drawn, len(case.captions))
        results["pytorch"] = asdict(score_pictures(case, theirs)) | {"seconds": round(seconds, 1)}
        gaps = [int(np.abs(a.astype(int) - b.astype(int)).max()) for a, b in zip(ours, theirs, strict=True)]
        results["largest_pixel_difference"] = max(gaps)
    return results


if __name__ == "__main__":
    sys.exit(main())
