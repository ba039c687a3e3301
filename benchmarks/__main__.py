"""The benchmark as a child process: python -m sdrt.benchmarks [BUNDLE] --out DIR."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from sdrt import worker
from sdrt.benchmarks import subjects
from sdrt.benchmarks.contestants import PYTORCH_FP32, SDRT
from sdrt.benchmarks.machine import describe_machine
from sdrt.benchmarks.report import Report, bars_of, bars_text, parity_verdict, table_text, write_report
from sdrt.benchmarks.run import compare, summarise
from sdrt.benchmarks.subjects import Subject
from sdrt.benchmarks.suites.tasks import SCALES, STEPS, tasks_named
from sdrt.benchmarks.task_report import TasksReport, check_place, tasks_text, write_tasks
from sdrt.benchmarks.task_suite import Settings, results_of, settings_json
from sdrt.bundle import Bundle, JsonValue
from sdrt.errors import RequestError
from sdrt.files import check_replaceable, check_writable
from sdrt.progress import Progress
from sdrt.runners.cpu import available_cores

COLD_STARTS = {"plain": 3, "shapes": 3, "sd15": 3, "tasks": 1}
ROUNDS = {"plain": 8, "shapes": 8, "sd15": 5, "tasks": 5}
WORK = {"tasks": Path("build/tasks")}
PROMPT = "a large red circle left of a small blue star on a white background"


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the arguments and speak the child protocol."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(words)

    def bench(progress: Progress) -> JsonValue:
        _check(options)
        machine = describe_machine()  # before the work, so that the load average is not our own
        if options.suite == "tasks":
            return _run_tasks(options, progress, machine, words)
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
    builds_its_own = options.suite in ("sd15", "tasks")
    if options.bundle is None and not builds_its_own:
        raise RequestError("no bundle was named", hint="sdrt bench BUNDLE --baseline MODEL --out DIR")
    if builds_its_own and (options.bundle is not None or options.baseline is not None):
        raise RequestError(f"--suite {options.suite} builds its own bundle", hint="leave BUNDLE and --baseline out")
    if options.suite == "tasks":
        _check_tasks(options)
    else:
        if options.tasks is not None or options.scale is not None:
            raise RequestError("--tasks and --scale are of the suite tasks", hint="add --suite tasks")
        subjects.peer_names(options.contestants)
        check_replaceable(options.out, mark="report.json", overwrite=options.force)
    check_writable(options.out)


def _check_tasks(options: argparse.Namespace) -> None:
    tasks_named(options.tasks)
    subjects.peer_names(options.contestants, subjects.TASK_PEERS)
    if options.size is not None or options.provider is not None:
        raise RequestError(
            "the suite tasks has a size and a backend of its own", hint="leave --size and --provider out"
        )
    check_place(options.out, overwrite=options.force)


def _run_tasks(
    options: argparse.Namespace, progress: Progress, machine: dict[str, JsonValue], words: Sequence[str]
) -> JsonValue:
    peers = subjects.peer_names(options.contestants, subjects.TASK_PEERS)
    settings = Settings(
        scale="full" if options.scale is None else options.scale,
        precision=options.precision,
        threads=available_cores() if options.threads is None else options.threads,
        steps=STEPS if options.steps is None else options.steps,
        rounds=_rounds(options),
        warmup=options.warmup,
        cold_starts=_cold_starts(options),
        resident=options.resident,
        peers=("pytorch-fp32",) if peers is None else tuple(peers),
    )
    report = TasksReport(
        title="Each task of Stable Diffusion against its diffusers pipeline, random weights",
        command="python -m sdrt.benchmarks " + shlex.join(words),
        machine=machine,
        settings=settings_json(settings),
        results=[],
    )
    tasks, work = tasks_named(options.tasks), _work(options)
    for result in results_of(tasks, settings, work, machine=machine, again=options.force, progress=progress):
        report = replace(report, results=[*report.results, result])
        write_tasks(report, options.out)  # after each, so that a run which is stopped has shown what it found
    return {
        "table": tasks_text(report.results),
        "valid": report.parity != "missed",
        "parity": report.parity,
        "bars": [asdict(bar) | {"task": name, "met": bar.met} for name, bar in report.bars],
        "report": str(options.out / "report.html"),
    }


def _rounds(options: argparse.Namespace) -> int:
    return ROUNDS[options.suite] if options.rounds is None else int(options.rounds)


def _cold_starts(options: argparse.Namespace) -> int:
    return COLD_STARTS[options.suite] if options.cold_starts is None else int(options.cold_starts)


def _work(options: argparse.Namespace) -> Path:
    return WORK.get(options.suite, Path("build/sd15")) if options.work is None else options.work


def _subject(options: argparse.Namespace, progress: Progress) -> Subject:
    peers = subjects.peer_names(options.contestants)
    if options.suite == "sd15":
        made = subjects.sd15_subject(_work(options), options.precision, options.threads, progress, peers=peers)
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
    rounds = _rounds(options)
    progress("getting the contestants ready", 0, 1)
    specs = subjects.contestants_of(
        subject, threads=threads, provider=options.provider, genai_python=options.genai_python, work=_work(options)
    )
    records = compare(
        specs,
        subject.cases,
        rounds=rounds,
        warmup=options.warmup,
        say=progress,
        cold_starts=_cold_starts(options),
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
    parser.add_argument("bundle", type=Path, nargs="?", help="not with --suite sd15 or tasks, which build their own")
    parser.add_argument("--baseline", type=Path, help="the checkpoint, for the peers")
    parser.add_argument("--suite", choices=subjects.SUITES, default="plain")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, help="measured images of each contestant")
    parser.add_argument("--warmup", type=int, default=1, help="images before those, not measured")
    parser.add_argument("--cold-starts", type=int, help="of each contestant's process")
    parser.add_argument("--resident", choices=("all", "1"), default="all", help="contestants in memory at a time")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--size", metavar="WxH")
    parser.add_argument("--prompt", default=PROMPT, help="of the suite plain")
    parser.add_argument("--contestants", metavar="A,B", help=f"of sdrt, {', '.join(subjects.PEERS)}")
    parser.add_argument("--threads", type=int, help="for every contestant; default: every core")
    parser.add_argument("--provider", help="of sdrt, for an onnxruntime bundle; default: cpu")
    parser.add_argument("--precision", default="auto", help="of the bundles that --suite sd15 and tasks build")
    parser.add_argument("--tasks", metavar="A,B", help="of --suite tasks; default: each")
    parser.add_argument("--scale", choices=SCALES, help="of --suite tasks; default: full")
    parser.add_argument("--work", type=Path, help="where checkpoints, conversions and finished tasks go")
    parser.add_argument("--genai-python", type=Path, default=Path(".venv-peers/bin/python"))
    parser.add_argument("--force", action="store_true")
    return parser


if __name__ == "__main__":
    sys.exit(main())
