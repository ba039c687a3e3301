"""The benchmark as a child process, and the SD1.5 suite: python -m sdrt.benchmarks [BUNDLE] --out DIR."""

import argparse
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sdrt import worker
from sdrt.benchmarks import contestants
from sdrt.benchmarks.builds import build_bundle, run_timed
from sdrt.benchmarks.contestants import ContestantSpec
from sdrt.benchmarks.machine import describe_machine
from sdrt.benchmarks.report import Bar, Report, table_text, write_report
from sdrt.benchmarks.run import Case, Row, compare, summarise
from sdrt.benchmarks.suites import sd15, shapes
from sdrt.bundle import Bundle, JsonValue
from sdrt.errors import RequestError
from sdrt.files import refuse_existing
from sdrt.progress import Progress

REFERENCE = "PyTorch eager fp32"
FP32_LEVELS, BF16_PSNR_DB = 1, 35.0
DEFAULT_CONTESTANTS = "pytorch-fp32,pytorch-bf16"
ALL_CONTESTANTS = ("pytorch-fp32", "pytorch-bf16", "pytorch-compile", "openvino-genai")


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is compared: the bundle, the checkpoint it came from, the cases, the bars and what else to report."""

    title: str
    bundle: Path
    baseline: Path | None
    cases: Sequence[Case]
    bars: Mapping[str, tuple[str, float]]
    extra: Mapping[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the arguments and speak the child protocol."""
    options = _parser().parse_args(arguments)

    def bench(progress: Progress) -> JsonValue:
        refuse_existing(options.out, overwrite=options.force)
        subject = _prepare_sd15(options, progress) if options.suite == "sd15" else _subject(options)
        return _compare(subject, options, progress)

    return worker.serve(bench)


def _compare(subject: Subject, options: argparse.Namespace, progress: Progress) -> JsonValue:
    bundle = Bundle.open(subject.bundle)
    specs = [contestants.compiled(subject.bundle, threads=options.threads), *_peers(subject, options)]
    records = compare(specs, subject.cases, rounds=options.rounds, warmup=options.warmup, say=progress)
    rows = summarise(records, ours="sdrt", reference=REFERENCE)
    report = Report(
        title=subject.title,
        command="sdrt bench " + " ".join(sys.argv[1:]),
        machine=describe_machine(),
        bundle=_describe(bundle),
        cases=subject.cases,
        rows=rows,
        records=records,
        bars=_bars(subject, rows),
        extra=subject.extra,
        valid=_valid(rows, bundle.manifest.precision),
    )
    write_report(report, options.out, overwrite=options.force)
    total = len(specs) * (1 + options.warmup + options.rounds)
    progress("report", total, total)
    return {
        "table": table_text(rows),
        "valid": report.valid,
        "bars": [
            {"name": bar.name, "measured": bar.measured, "bound": bar.bound, "met": bar.met} for bar in report.bars
        ],
        "report": str(options.out / "report.html"),
        "extra": dict(subject.extra),
    }


def _subject(options: argparse.Namespace) -> Subject:
    if options.bundle is None:
        raise RequestError("no bundle was named", hint="sdrt bench BUNDLE --baseline MODEL --out DIR")
    model = Bundle.open(options.bundle).manifest.model
    chosen = (
        shapes.cases()
        if options.suite == "shapes"
        else [_plain_case(options, model.default_height, model.default_width)]
    )
    return Subject(
        title=f"{model.name}: sdrt and its peers",
        bundle=options.bundle,
        baseline=options.baseline,
        cases=[_adjusted(case, options) for case in chosen],
        bars={},
        extra={},
    )


def _prepare_sd15(options: argparse.Namespace, progress: Progress) -> Subject:
    """Make the checkpoint, build it (timed), build it again from the cache (timed), convert it for the peer."""
    work = options.work
    work.mkdir(parents=True, exist_ok=True)
    checkpoint, bundle = work / "checkpoint", work / "sd15.sdrt"
    progress("SD1.5 checkpoint", 0, 4)
    sd15.make_checkpoint(checkpoint)
    flags = ("--sizes", f"{sd15.SIDE}x{sd15.SIDE}", "--batch", "1", "--precision", options.precision, "--force")
    progress("sdrt build", 1, 4)
    built = build_bundle(checkpoint, bundle, *flags)
    progress("sdrt build, from the cache", 2, 4)
    again = build_bundle(checkpoint, bundle, *flags)
    progress("conversion for OpenVINO GenAI", 3, 4)
    _convert_for_genai(checkpoint, options)
    weights = sum(path.stat().st_size for path in checkpoint.rglob("*.safetensors"))
    bars = {
        "per step, times PyTorch eager fp32": (REFERENCE, 2.0),
        "per step, times PyTorch eager bf16": ("PyTorch eager bf16", 1.25),
        "end to end, times OpenVINO GenAI": ("OpenVINO GenAI", 1.0),
        "start to first image, times OpenVINO GenAI": ("OpenVINO GenAI", 1.0),
    }
    return Subject(
        title="SD1.5 architecture, random weights: sdrt and its peers",
        bundle=bundle,
        baseline=checkpoint,
        cases=[_adjusted(case, options) for case in sd15.cases()],
        bars=bars,
        extra={
            "build seconds": round(built.seconds, 1),
            "rebuild from cache seconds": round(again.seconds, 2),
            "build peak bytes": built.peak_bytes,
            "checkpoint bytes": weights,
            "build peak / checkpoint": round(built.peak_bytes / weights, 2),
        },
    )


def _convert_for_genai(checkpoint: Path, options: argparse.Namespace) -> None:
    target = options.work / "genai"
    if "openvino-genai" not in _names(options) or target.is_dir():
        return
    tool = options.genai_python.with_name("optimum-cli")
    partial = options.work / "genai.partial"
    shutil.rmtree(partial, ignore_errors=True)
    command = [str(tool), "export", "openvino", "--model", str(checkpoint), "--task", "text-to-image"]
    run_timed([*command, "--weight-format", "fp32", str(partial)])
    partial.rename(target)


def _peers(subject: Subject, options: argparse.Namespace) -> list[ContestantSpec]:
    if subject.baseline is None:
        return []
    model, threads = subject.baseline, options.threads
    makers = {
        "pytorch-fp32": lambda: contestants.pytorch(model, "fp32", threads=threads),
        "pytorch-bf16": lambda: contestants.pytorch(model, "bf16", threads=threads),
        "pytorch-compile": lambda: contestants.pytorch(model, "fp32", threads=threads, compile_unet=True),
        "openvino-genai": lambda: contestants.openvino_genai(
            options.work / "genai", options.genai_python, threads=threads
        ),
    }
    return [makers[name]() for name in _names(options)]


def _names(options: argparse.Namespace) -> list[str]:
    names = [name.strip() for name in options.contestants.split(",") if name.strip()]
    unknown = sorted(set(names) - set(ALL_CONTESTANTS))
    if unknown:
        raise RequestError(
            f"unknown contestants {', '.join(unknown)}", hint=f"choose from {', '.join(ALL_CONTESTANTS)}"
        )
    return names


def _bars(subject: Subject, rows: Sequence[Row]) -> list[Bar]:
    by_name = {row.name: row for row in rows}
    bars = []
    for name, (peer, bound) in subject.bars.items():
        row = by_name.get(peer)
        if row is None or row.step_ratio is None or row.total_ratio is None or row.start_to_image_ratio is None:
            continue
        kinds = {"per": row.step_ratio.median, "end": row.total_ratio.median, "start": row.start_to_image_ratio}
        bars.append(Bar(name=name, measured=kinds[name.split(" ")[0]], bound=bound))
    return bars


def _valid(rows: Sequence[Row], precision: str) -> bool:
    """Whether this runtime's pictures are as close to the reference as its precision promises."""
    for row in rows:
        if row.total_ratio is None and row.parity is not None:
            if precision == "fp32":
                return row.parity.largest_difference <= FP32_LEVELS
            return row.parity.psnr_db >= BF16_PSNR_DB
    return True


def _describe(bundle: Bundle) -> dict[str, Any]:
    manifest = bundle.manifest
    return {
        "model": f"{manifest.model.name} ({manifest.model.identity[:12]})",
        "backend": f"{manifest.backend.name} {manifest.backend.version}",
        "precision": manifest.precision,
    }


def _plain_case(options: argparse.Namespace, height: int, width: int) -> Case:
    return Case(
        prompt=options.prompt,
        height=height,
        width=width,
        num_inference_steps=30,
        guidance_scale=7.5,
        seed=0,
        scheduler="ddim",
    )


def _adjusted(case: Case, options: argparse.Namespace) -> Case:
    if options.steps is not None:
        case = replace(case, num_inference_steps=options.steps)
    if options.size is not None:
        width, _, height = options.size.partition("x")
        if not (width.isdigit() and height.isdigit()):
            raise RequestError(f"--size {options.size!r} is not a size", hint="write WIDTHxHEIGHT, such as 512x512")
        case = replace(case, height=int(height), width=int(width))
    return case


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sdrt.benchmarks", description=__doc__)
    parser.add_argument("bundle", type=Path, nargs="?")
    parser.add_argument("--baseline", type=Path, help="the checkpoint, for the PyTorch contestants")
    parser.add_argument("--suite", choices=("plain", "shapes", "sd15"), default="plain")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--size")
    parser.add_argument("--prompt", default="a large red circle left of a small blue star on a white background")
    parser.add_argument("--contestants", default=DEFAULT_CONTESTANTS)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--work", type=Path, default=Path("build/sd15"))
    parser.add_argument("--genai-python", type=Path, default=Path(".venv-peers/bin/python"))
    parser.add_argument("--force", action="store_true")
    return parser


if __name__ == "__main__":
    sys.exit(main())
