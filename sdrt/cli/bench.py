"""`sdrt bench`: this runtime and its peers in turns, through the benchmarks stage."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import typer

from sdrt.cli.options import AsJson, Force, OnProvider, Threads, check_built, model_folder, parse_size
from sdrt.cli.stages import BENCHMARKS, EXPORT, check_installed, run_stage
from sdrt.cli.terminal import emit, facts, print_warning, progress_bar
from sdrt.errors import RequestError


def bench(
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="The folder of the report, to be made.")],
    bundle: Annotated[
        Path | None,
        typer.Argument(
            metavar="BUNDLE",
            help="Not with --suite sd15 or tasks, which build their own.",
            callback=check_built,
            show_default=False,
        ),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="The checkpoint, for the PyTorch contestants.", show_default=False),
    ] = None,
    suite: Annotated[
        Literal["plain", "shapes", "sd15", "tasks"],
        typer.Option(help="What is drawn: tasks is each task against its diffusers pipeline, at SD1.5's size."),
    ] = "plain",
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="A,B",
            help="Of --suite tasks: text-to-image, image-to-image, inpainting, inpainting-9-channels, depth-to-image, "
            "upscaling, editing, controlnet. Default: each.",
            show_default=False,
        ),
    ] = None,
    scale: Annotated[
        Literal["full", "small"] | None,
        typer.Option(help="Of --suite tasks: small is a trial of minutes. Default: full.", show_default=False),
    ] = None,
    work: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Where the suites that build their own keep checkpoints, bundles and finished tasks. "
            "Default: build/sd15, build/tasks.",
            show_default=False,
        ),
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Measured images of each. Default: the suite's.", show_default=False),
    ] = None,
    warmup: Annotated[int, typer.Option(min=0, help="Images before those, not measured.")] = 1,
    cold_starts: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Fresh processes of each, timed to the first image. Default: 3; tasks: 1.",
            show_default=False,
        ),
    ] = None,
    resident: Annotated[
        Literal["all", "1"], typer.Option(help="Contestants in memory at a time: 1 where all of them do not fit.")
    ] = "all",
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps", "--num-inference-steps", min=1, metavar="N", help="Default: the suite's.", show_default=False
        ),
    ] = None,
    size: Annotated[
        str | None, typer.Option(metavar="WxH", help="In pixels. Default: the suite's.", show_default=False)
    ] = None,
    contestants: Annotated[
        str | None,
        typer.Option(
            metavar="A,B",
            help="Of pytorch-fp32, pytorch-bf16, pytorch-compile, openvino-genai. "
            "Default: the first two; sd15 adds openvino-genai, tasks has the first alone.",
            show_default=False,
        ),
    ] = None,
    threads: Threads = None,
    provider: OnProvider = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Compare a bundle with PyTorch: speed, memory and parity.

    As a table and a report.
    """
    from sdrt.bundle import Bundle
    from sdrt.files import check_replaceable, check_writable
    from sdrt.runners.providers import choose_provider

    if size is not None:
        parse_size(size)
    builds_its_own = suite in ("sd15", "tasks")
    if bundle is None and not builds_its_own:
        raise RequestError("no BUNDLE was named", hint="sdrt bench BUNDLE --baseline MODEL --out DIR")
    if builds_its_own and provider is not None:
        raise RequestError(
            f"--suite {suite} builds an openvino bundle, which has no --provider", hint="name an onnxruntime BUNDLE"
        )
    if suite != "tasks":  # whose earlier report is replaced: the stage looks at what is there
        check_replaceable(out, mark="report.json", overwrite=force)
    check_writable(out)
    if bundle is not None:
        choose_provider(provider, Bundle.open(bundle).manifest.backend)
    model = None if baseline is None else model_folder(baseline)
    if model is not None or builds_its_own:
        check_installed(EXPORT)
    options = {
        "--baseline": model,
        "--suite": suite,
        "--tasks": tasks,
        "--scale": scale,
        "--work": work,
        "--out": out,
        "--rounds": rounds,
        "--warmup": warmup,
        "--cold-starts": cold_starts,
        "--resident": resident,
        "--steps": steps,
        "--size": size,
        "--contestants": contestants,
        "--threads": threads,
        "--provider": provider,
    }
    arguments = [] if bundle is None else [str(bundle)]
    arguments += _flags(options) + (["--force"] if force else [])
    with progress_bar(phases=True) as progress:
        result = run_stage(BENCHMARKS, arguments, progress)
    emit(result, [*str(result["table"]).splitlines(), "", *facts([("report", str(result["report"]))])], as_json=as_json)
    if not result["valid"]:
        print_warning("the images are further from PyTorch's than the bundle's precision promises: see the report")
        raise typer.Exit(1)


def _flags(options: Mapping[str, object]) -> list[str]:
    return [word for name, value in options.items() if value is not None for word in (name, str(value))]
