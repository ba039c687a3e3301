"""`sdrt demo`: eight captions drawn by the embedded model, each as a picture and all on one sheet."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sdrt.cli.build import build_bundle
from sdrt.cli.options import EMBEDDED, AsJson, Force, Threads
from sdrt.cli.run import written_together
from sdrt.cli.terminal import emit, facts, progress_bar, seconds_text, table, title
from sdrt.progress import Progress

if TYPE_CHECKING:
    from rich.text import Text

    from sdrt.bundle import Bundle, JsonValue
    from sdrt.pipeline import Result

CAPTIONS = (
    "a large red circle left of a small blue star on a white background",
    "a small green triangle above a large yellow cross on a black background",
    "a large purple ring on a gray background",
    "a large orange square right of a small cyan circle on a navy background",
    "a small pink star below a large green circle on a white background",
    "a large blue triangle on a brown background",
    "a small yellow ring left of a large red square on a black background",
    "a large cyan star above a small orange cross on a gray background",
)
STEPS = 30
GUIDANCE_SCALE = 4.0
SCHEDULER = "ddim"
FIRST_SEED = 1
COLUMNS = 4
SHEET = "sheet.png"
BUILT = "shapes.sdrt"


def demo(
    bundle: Annotated[
        Path | None,
        typer.Option(
            metavar="BUNDLE", help="A bundle of the embedded model. Default: one is built in DIR.", show_default=False
        ),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Where the pictures go.")] = Path("demo"),
    threads: Threads = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Draw eight captions with the embedded model."""
    from sdrt.bundle import Bundle
    from sdrt.files import check_writable, output_errors, refuse_existing

    pictures = [out / f"picture-{number}.png" for number in range(1, len(CAPTIONS) + 1)]
    built = out / BUILT
    for path in (*pictures, out / SHEET, *([built] if bundle is None else [])):
        refuse_existing(path, overwrite=force)
    opened = None if bundle is None else Bundle.open(bundle)
    with output_errors(out):
        made_here = not out.exists()
        out.mkdir(exist_ok=True)
    try:
        check_writable(pictures[0])
        with progress_bar(phases=True) as progress:
            if opened is None:
                opened, _ = build_bundle(
                    EMBEDDED, built, [], sizes=None, threads=threads, force=force, progress=progress
                )
            began = time.perf_counter()
            results = _draw(opened, threads, progress)
            seconds = time.perf_counter() - began
        _save(results, pictures, out / SHEET, force=force)
    except BaseException:
        if made_here and not any(out.iterdir()):
            out.rmdir()
        raise
    rows = [
        (path.name, str(result.seeds[0]), result.request.prompt) for path, result in zip(pictures, results, strict=True)
    ]
    lines: list[Text | str] = [
        title(f"{len(results)} captions drawn in {seconds_text(seconds)}"),
        *table(("picture", "seed", "caption"), rows, left=(0, 2)),
        "",
        *facts([("all of them", str(out / SHEET)), ("bundle", str(opened.path))]),
    ]
    record: dict[str, JsonValue] = {
        "pictures": [
            {"path": str(path), "caption": result.request.prompt, "seed": result.seeds[0]}
            for path, result in zip(pictures, results, strict=True)
        ],
        "sheet": str(out / SHEET),
        "bundle": str(opened.path),
        "seconds": round(seconds, 3),
    }
    emit(record, lines, as_json=as_json)


def _draw(bundle: "Bundle", threads: int | None, progress: Progress) -> "list[Result]":
    from sdrt.pipeline import Pipeline
    from sdrt.runners import open_runner

    progress("loading the engines", 0, 1)
    results = []
    with Pipeline(bundle, open_runner(bundle, threads=threads)) as pipeline:
        for index, caption in enumerate(CAPTIONS):
            events = pipeline.stream(
                caption,
                seed=FIRST_SEED + index,
                num_inference_steps=STEPS,
                guidance_scale=GUIDANCE_SCALE,
                scheduler=SCHEDULER,
                latents=False,
            )
            for event in events:
                progress("drawing", index * event.rows + event.row, len(CAPTIONS) * event.rows)
                if event.result is not None:
                    results.append(event.result)
    return results


def _save(results: "list[Result]", pictures: list[Path], sheet: Path, *, force: bool) -> None:
    from sdrt.image import grid

    with written_together() as write:
        for result, path in zip(results, pictures, strict=True):
            write(result.images[0], path, result.parameters(0), force)
        images = [result.images[0] for result in results]
        write(grid(images, columns=COLUMNS), sheet, {"captions": list(CAPTIONS)}, force)
