"""The benchmark as a child process: python -m sdrt.benchmarks [BUNDLE] --out DIR."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from sdrt import worker
from sdrt.benchmarks import subjects
from sdrt.benchmarks.contestants import PYTORCH_FP32, SDRT
from sdrt.benchmarks.machine import describe_machine
from sdrt.benchmarks.report import Report, bars_of, bars_text, parity_verdict, table_text, write_report
from sdrt.benchmarks.run import compare, summarise
from sdrt.benchmarks.subjects import Subject
from sdrt.bundle import Bundle, JsonValue
from sdrt.errors import RequestError
from sdrt.files import check_replaceable, check_writable
from sdrt.progress import Progress
from sdrt.runners.cpu import available_cores

COLD_STARTS = 3
ROUNDS = {"plain": 8, "shapes": 8, "sd15": 5}
PROMPT = "a large red circle left of a small blue star on a white background"


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the arguments and speak the child protocol."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(words)

    def bench(progress: Progress) -> JsonValue:
        _check(options)
        machine = describe_machine()  # before the work, so that the load average is not our own
        subject = _subject(options, progress)
        return _compare(subject, options, progress, machine, words)

    return worker.serve(bench)


def _check(options: argparse.Namespace) -> None:
    """Refuse what can be refused before any work. Raises RequestError, OutputError."""
    for name, least in (("rounds", 1), ("warmup", 0), ("cold_starts", 1), ("steps", 1), ("threads", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            flag = "--" + name.replace("_", "-")
            raise RequestError(f"{flag} is {value}", hint=f"give a whole number from {least}")
    if options.bundle is None and options.suite != "sd15":
        raise RequestError("no bundle was named", hint="sdrt bench BUNDLE --baseline MODEL --out DIR")
    subjects.peer_names(options.contestants)
    check_replaceable(options.out, mark="report.json", overwrite=options.force)
    check_writable(options.out)


def _subject(options: argparse.Namespace, progress: Progress) -> Subject:
    peers = subjects.peer_names(options.contestants)
    if options.suite == "sd15":
        made = subjects.sd15_subject(options.work, options.precision, options.threads, progress, peers=peers)
    else:
        made = subjects.bundle_subject(
            options.bundle, options.baseline, options.suite, prompt=options.prompt, peers=peers
        )
    return subjects.judged(subjects.resized(made, steps=options.steps, size=options.size), options.suite)


def _compare(
    subject: Subject,
    options: argparse.Namespace,
    progress: Progress,
    machine: dict[str, JsonValue],
    words: Sequence[str],
) -> JsonValue:
    bundle = Bundle.open(subject.bundle)
    threads = available_cores() if options.threads is None else options.threads
    rounds = ROUNDS[options.suite] if options.rounds is None else options.rounds
    progress("getting the contestants ready", 0, 1)
    specs = subjects.contestants_of(
        subject, threads=threads, provider=options.provider, genai_python=options.genai_python, work=options.work
    )
    records = compare(
        specs,
        subject.cases,
        rounds=rounds,
        warmup=options.warmup,
        say=progress,
        cold_starts=options.cold_starts,
        resident=options.resident,
    )
    rows = summarise(records, ours=SDRT, reference=PYTORCH_FP32, wanted_share=subject.wanted_share)
    report = Report(
        title=subject.title,
        command="python -m sdrt.benchmarks " + shlex.join(words),
        machine=machine,
        bundle=_describe(bundle),
        settings={
            "threads": threads,
            **({} if options.provider is None else {"provider": options.provider}),
            "rounds": rounds,
            "warm-up rounds": options.warmup,
            "cold starts": len(records[0].starts),
            "in memory at a time": options.resident,
        },
        cases=subject.cases,
        rows=rows,
        records=records,
        reference=PYTORCH_FP32,
        bars=bars_of(subject.bars, rows),
        extra=subject.extra,
        parity=parity_verdict(rows, bundle.manifest.precision),
    )
    write_report(report, options.out, overwrite=options.force)
    return _result(report, options.out)


def _result(report: Report, out: Path) -> JsonValue:
    """What the parent shows: `valid` is false only when parity was checked and missed."""
    return {
        "table": "\n".join([table_text(report.rows), *bars_text(report.bars)]),
        "valid": report.valid is not False,
        "parity": report.parity,
        "bars": [
            {"name": bar.name, "measured": bar.measured, "bound": bar.bound, "met": bar.met} for bar in report.bars
        ],
        "report": str(out / "report.html"),
        "extra": dict(report.extra),
    }


def _describe(bundle: Bundle) -> dict[str, JsonValue]:
    manifest = bundle.manifest
    return {
        "model": manifest.model.name,
        "identity": manifest.model.identity,
        "backend": f"{manifest.backend.name} {manifest.backend.version}",
        "precision": manifest.precision,
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sdrt.benchmarks", description=__doc__)
    parser.add_argument("bundle", type=Path, nargs="?", help="not needed with --suite sd15, which builds its own")
    parser.add_argument("--baseline", type=Path, help="the checkpoint, for the peers")
    parser.add_argument("--suite", choices=subjects.SUITES, default="plain")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, help="measured images of each contestant")
    parser.add_argument("--warmup", type=int, default=1, help="images before those, not measured")
    parser.add_argument("--cold-starts", type=int, default=COLD_STARTS, help="of each contestant's process")
    parser.add_argument("--resident", choices=("all", "1"), default="all", help="contestants in memory at a time")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--size", metavar="WxH")
    parser.add_argument("--prompt", default=PROMPT, help="of the suite plain")
    parser.add_argument("--contestants", metavar="A,B", help=f"of sdrt, {', '.join(subjects.PEERS)}")
    parser.add_argument("--threads", type=int, help="for every contestant; default: every core")
    parser.add_argument("--provider", help="of sdrt, for an onnxruntime bundle; default: cpu")
    parser.add_argument("--precision", default="auto", help="of the bundle that --suite sd15 builds")
    parser.add_argument("--work", type=Path, default=Path("build/sd15"), help="where checkpoints and conversions go")
    parser.add_argument("--genai-python", type=Path, default=Path(".venv-peers/bin/python"))
    parser.add_argument("--force", action="store_true")
    return parser


if __name__ == "__main__":
    sys.exit(main())
