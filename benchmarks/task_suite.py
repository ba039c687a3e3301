"""The tasks suite's run: a checkpoint at a time is made, built, measured in each of its tasks, and removed again.

What a task's comparison gave is kept under the work folder, so that a run which was stopped goes on after it.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec

from sdrt.benchmarks import contestants
from sdrt.benchmarks.builds import build_bundle
from sdrt.benchmarks.cases import Case
from sdrt.benchmarks.contestants import PYTORCH_FP32, SDRT
from sdrt.benchmarks.page import png_bytes
from sdrt.benchmarks.report import Bar, ParityVerdict, bars_of, parity_verdict, raw_timings
from sdrt.benchmarks.run import Record, Resident, Row, compare, summarise
from sdrt.benchmarks.subjects import pytorch_peer
from sdrt.benchmarks.suites.checkpoints import CONTROLNET, make_checkpoint
from sdrt.benchmarks.suites.tasks import BARS, SIDES, Scale, SuiteTask, case_of, layout_of, subjects_of
from sdrt.bundle import Bundle, JsonValue
from sdrt.files import write_atomically
from sdrt.progress import Progress

Machine = Mapping[str, Any]
_COMPUTES = ("cpu", "cores", "python", "sdrt", "source", "packages")  # of the machine: what figures depend on


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How every task is measured. peers: beside sdrt, by their names on the command line."""

    scale: Scale
    precision: str
    threads: int
    steps: int
    rounds: int
    warmup: int
    cold_starts: int
    resident: Resident
    peers: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """A checkpoint and its bundle, in the folder that goes with them, and what making them took."""

    folder: Path
    checkpoint: Path
    bundle: Path
    extra: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TaskResult:
    """What one task's comparison gave.

    made_with: all that a later run has to share to keep it. given, drawn: PNG files, what the task was given by the
    request's field, and each contestant's first picture by its name.
    """

    name: str
    made_with: dict[str, Any]
    machine: dict[str, Any]
    case: dict[str, Any]
    bundle: dict[str, str]
    rows: list[Row]
    raw: dict[str, Any]
    bars: list[Bar]
    parity: ParityVerdict
    extra: dict[str, float]
    given: dict[str, bytes]
    drawn: dict[str, bytes]


Make = Callable[[str, Settings, Path, Progress], Made]
Measure = Callable[[SuiteTask, Case, Made, Settings, Progress], list[Record]]


def make(subject: str, settings: Settings, folder: Path, progress: Progress) -> Made:
    """The subject's checkpoint, unless an earlier run left it there, and its bundle, with the command line, timed."""
    checkpoint, bundle, cache = folder / "checkpoint", folder / "bundle.sdrt", folder / "cache"
    progress(f"{subject}: checkpoint", 0, 2)
    make_checkpoint(checkpoint, layout_of(subject, settings.scale))
    side = SIDES[settings.scale]
    flags = ["--sizes", f"{side}x{side}", "--batch", "1", "--precision", settings.precision]
    flags += ["--controlnet", str(checkpoint / CONTROLNET)] if layout_of(subject, settings.scale).controlled else []
    progress(f"{subject}: sdrt build", 1, 2)
    shutil.rmtree(cache, ignore_errors=True)  # so that the build is timed whole
    built = build_bundle(checkpoint, bundle, *flags, "--threads", str(settings.threads), "--force", cache=cache)
    shutil.rmtree(cache, ignore_errors=True)
    weights = sum(path.stat().st_size for path in checkpoint.rglob("*.safetensors"))
    extra = {
        "build seconds": round(built.seconds, 1),
        "build peak memory MiB": round(built.peak_bytes / 2**20),
        "checkpoint MiB": round(weights / 2**20, 1),
    }
    return Made(folder=folder, checkpoint=checkpoint, bundle=bundle, extra=extra)


def measure(task: SuiteTask, case: Case, made: Made, settings: Settings, say: Progress) -> list[Record]:
    """The contestants in turns, each in a process of its own."""
    threads = settings.threads
    peers = [pytorch_peer(name, made.checkpoint, threads=threads, task=task.pipeline) for name in settings.peers]
    return compare(
        [contestants.compiled(made.bundle, threads=threads), *peers],
        [case],
        rounds=settings.rounds,
        warmup=settings.warmup,
        cold_starts=settings.cold_starts,
        resident=settings.resident,
        say=say,
    )


def results_of(
    tasks: Sequence[SuiteTask],
    settings: Settings,
    work: Path,
    *,
    machine: Machine,
    again: bool,
    progress: Progress,
    make: Make = make,
    measure: Measure = measure,
) -> Iterator[TaskResult]:
    """The tasks' results in the suite's order, each as soon as it is there: kept ones unless `again`, or new ones.

    A subject is on the disk only while its tasks are measured. It stays there when that fails, for the next run.
    """
    folder = work / settings.scale
    results = folder / "results"
    results.mkdir(parents=True, exist_ok=True)
    for subject, its in subjects_of(tasks).items():
        wanted = {task.name: _made_with(task, settings, machine) for task in its}
        kept = {} if again else _kept(results, wanted)
        if len(kept) == len(its):
            yield from (kept[task.name] for task in its)
            continue
        with _placed(subject, settings, folder) as place:
            made = make(subject, settings, place, progress)
            for task in its:
                result = kept.get(task.name)
                if result is None:
                    say = _under(task.name, progress)
                    case = case_of(task, settings.scale, made.folder / "pictures", steps=settings.steps)
                    records = measure(task, case, made, settings, say)
                    result = _result(task, case, made, records, wanted[task.name], machine)
                    write_atomically(_file(results, task.name), msgspec.msgpack.encode(result), overwrite=True)
                yield result


@contextmanager
def _placed(subject: str, settings: Settings, work: Path) -> Iterator[Path]:
    """A folder for a subject, removed when the block ends well. A leftover of another layout is not taken for it."""
    folder = work / f"{subject}-{layout_of(subject, settings.scale).digest}"
    folder.mkdir(exist_ok=True)
    yield folder
    shutil.rmtree(folder)


def _result(
    task: SuiteTask, case: Case, made: Made, records: Sequence[Record], made_with: dict[str, Any], machine: Machine
) -> TaskResult:
    rows = summarise(records, ours=SDRT, reference=PYTORCH_FP32)
    manifest = Bundle.open(made.bundle).manifest
    return TaskResult(
        name=task.name,
        made_with=made_with,
        machine=dict(machine),
        case=case.arguments() | {name: path.name for name, path in case.pictures.items()},
        bundle={
            "model": task.subject,
            "identity": manifest.model.identity,
            "backend": f"{manifest.backend.name} {manifest.backend.version}",
            "precision": manifest.precision,
        },
        rows=rows,
        raw={record.name: raw_timings(record) for record in records},
        bars=bars_of(BARS, rows),
        parity=parity_verdict(rows, manifest.precision),
        extra=made.extra,
        given={name: path.read_bytes() for name, path in case.pictures.items()},
        drawn={record.name: png_bytes(record.starts[0].first.picture) for record in records},
    )


def _made_with(task: SuiteTask, settings: Settings, machine: Machine) -> dict[str, JsonValue]:
    """What a kept result must have been made with to be this run's."""
    return {
        "task": _as_json(asdict(task)),
        "settings": settings_json(settings),
        "layout": layout_of(task.subject, settings.scale).digest,
        "machine": _as_json({name: machine[name] for name in _COMPUTES}),
    }


def settings_json(settings: Settings) -> dict[str, JsonValue]:
    """The settings as JSON has them."""
    return _as_json(asdict(settings))


def _as_json(facts: dict[str, Any]) -> dict[str, JsonValue]:
    """With lists for tuples, as they come back from a file."""
    stated: dict[str, JsonValue] = json.loads(json.dumps(facts))
    return stated


def _kept(folder: Path, wanted: Mapping[str, Mapping[str, JsonValue]]) -> dict[str, TaskResult]:
    """The finished results of runs that were made with the same. What cannot be read counts as absent."""
    kept = {}
    for name, made_with in wanted.items():
        try:
            result = msgspec.msgpack.decode(_file(folder, name).read_bytes(), type=TaskResult)
        except (OSError, msgspec.DecodeError):
            continue
        if result.made_with == made_with:
            kept[name] = result
    return kept


def _file(results: Path, name: str) -> Path:
    return results / f"{name}.msgpack"


def _under(name: str, progress: Progress) -> Progress:
    def say(stage: str, done: int, total: int) -> None:
        progress(f"{name}: {stage}", done, total)

    return say
