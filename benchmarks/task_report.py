"""The tasks suite's report: every task's figures side by side, as a table, report.json, a page and the pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from PIL import Image

from sdrt.benchmarks.contestants import PYTORCH_FP32
from sdrt.benchmarks.page import DIFFERENCE_GAIN, STAGES, difference, render, small_uri, stage_bar
from sdrt.benchmarks.plots import stacked_bars
from sdrt.benchmarks.report import (
    SCHEMA_VERSION,
    Bar,
    ParityVerdict,
    aligned,
    bars_text,
    parity_text,
    row_json,
)
from sdrt.benchmarks.run import Row
from sdrt.benchmarks.task_suite import TaskResult
from sdrt.bundle import JsonValue
from sdrt.errors import OutputError
from sdrt.files import check_replaceable, staged_directory

SUITE = "tasks"
_SHOWN_SIDE = 256  # pixels, of a picture on the page; the files beside it are whole


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TasksReport:
    """Everything that the page shows. machine: the one that this run was on; each result has that of its own run."""

    title: str
    command: str
    machine: Mapping[str, Any]
    settings: Mapping[str, JsonValue]
    results: Sequence[TaskResult]

    @property
    def parity(self) -> ParityVerdict:
        """Missed where one task missed it; held where each was checked."""
        verdicts = {result.parity for result in self.results}
        if "missed" in verdicts:
            return "missed"
        return "held" if verdicts == {"held"} else "not checked"

    @property
    def bars(self) -> list[tuple[str, Bar]]:
        """Each task's bars, with the task's name."""
        return [(result.name, bar) for result in self.results for bar in result.bars]


def ours_of(result: TaskResult) -> Row:
    """sdrt's own row."""
    (row,) = (row for row in result.rows if row.ours)
    return row


def peers_of(result: TaskResult) -> list[Row]:
    """The rows of those that sdrt is compared with."""
    return [row for row in result.rows if not row.ours]


def tasks_text(results: Sequence[TaskResult]) -> str:
    """A line for each task and peer, then one for each bar."""
    head = ("", "sdrt s", "against", "image s", "x image", "95 %", "x step", "MiB", "its MiB", "parity")
    lines = [head, *(_cells(result, row) for result in results for row in peers_of(result))]
    bars = [f"{result.name}: {line}" for result in results for line in bars_text(result.bars)]
    return "\n".join([aligned(lines), *bars])


def tasks_json(report: TasksReport) -> dict[str, Any]:
    """The report as data, pictures left out."""
    return {
        "schema_version": SCHEMA_VERSION,
        "suite": SUITE,
        "title": report.title,
        "command": report.command,
        "parity": report.parity,
        "machine": dict(report.machine),
        "settings": dict(report.settings),
        "tasks": [_result_json(result) for result in report.results],
    }


def tasks_page(report: TasksReport) -> str:
    """The page, as HTML that needs no other file. Its pictures are small ones."""
    stages = {("encoders and rest" if name == "rest" else name): colour for name, colour in STAGES.items()}
    return render(
        "tasks.html",
        report=report,
        settings={name.replace("_", " "): _setting(value) for name, value in report.settings.items()},
        sections=[_section(result) for result in report.results],
        counted=_counted([bar for _, bar in report.bars]),
        reference=PYTORCH_FP32,
        stages=stages,
        gain=DIFFERENCE_GAIN,
        parity_text=parity_text,
    )


def check_place(out: Path, *, overwrite: bool) -> None:
    """OutputError unless a report may go there: where nothing is, or where an earlier one of this suite is.

    overwrite: or one of another suite.
    """
    earlier = out / "report.json"
    if not overwrite and earlier.is_file() and _suite_of(earlier) != SUITE:
        raise OutputError(f"{out} holds the report of another suite", hint="name another output, or allow --force")
    check_replaceable(out, mark="report.json", overwrite=overwrite or earlier.is_file())


def write_tasks(report: TasksReport, out: Path) -> None:
    """Write report.json, report.html and the pictures into `out`, in the place of an earlier report."""
    with staged_directory(out, overwrite=True) as staged:
        text = msgspec.json.format(msgspec.json.encode(tasks_json(report)), indent=2)
        (staged / "report.json").write_bytes(text + b"\n")
        (staged / "report.html").write_text(tasks_page(report), encoding="utf-8")
        for result in report.results:
            for name, png in (*_given_named(result), *result.drawn.items()):
                (staged / f"{result.name}-{name.lower().replace(' ', '-')}.png").write_bytes(png)


def _suite_of(path: Path) -> object:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any]).get("suite")
    except msgspec.DecodeError:
        return None


def _setting(value: JsonValue) -> JsonValue:
    return ", ".join(map(str, value)) if isinstance(value, list) else value


def _cells(result: TaskResult, row: Row) -> tuple[str, ...]:
    ours = ours_of(result)
    ratio, steps = row.total_ratio, row.step_ratio
    return (
        result.name,
        f"{ours.total.median:.2f}",
        row.name,
        f"{row.total.median:.2f}",
        "-" if ratio is None else f"{ratio.value:.2f}",
        "-" if ratio is None else f"[{ratio.low:.2f}, {ratio.high:.2f}]",
        "-" if steps is None else f"{steps.value:.2f}",
        f"{ours.peak_bytes / 2**20:.0f}",
        f"{row.peak_bytes / 2**20:.0f}",
        "-" if ours.parity is None else parity_text(ours.parity),
    )


def _result_json(result: TaskResult) -> dict[str, Any]:
    return {
        "task": result.name,
        "case": result.case,
        "bundle": result.bundle,
        "parity": result.parity,
        "bars": [asdict(bar) | {"met": bar.met} for bar in result.bars],
        "rows": [row_json(row) for row in result.rows],
        "extra": result.extra,
        "machine": result.machine,
        "raw": result.raw,
    }


def _counted(bars: Sequence[Bar]) -> list[tuple[str, int, int]]:
    """Each bar's name, in how many tasks it was met, and of how many."""
    names = dict.fromkeys(bar.name for bar in bars)
    met = {name: [bar.met for bar in bars if bar.name == name] for name in names}
    return [(name, sum(values), len(values)) for name, values in met.items()]


def _section(result: TaskResult) -> dict[str, Any]:
    """What the page says of one task, with the pictures in the order in which they are looked at."""
    truth = result.drawn.get(PYTORCH_FP32)
    ordered = sorted(result.drawn.items(), key=lambda item: item[0] != PYTORCH_FP32)
    given = [
        {"name": f"given: {name}", "image": small_uri(_shown(png), _SHOWN_SIDE)} for name, png in result.given.items()
    ]
    return {
        "result": result,
        "ours": ours_of(result),
        "figure": stacked_bars(
            [stage_bar(row) for row in result.rows], label=f"seconds of an image of {result.name}, by stage"
        ),
        "pictures": [*given, *(_picture(name, png, None if name == PYTORCH_FP32 else truth) for name, png in ordered)],
    }


def _picture(name: str, png: bytes, truth: bytes | None) -> dict[str, Any]:
    shown = {"name": name, "image": small_uri(_pixels(png), _SHOWN_SIDE)}
    if truth is None:
        return shown
    strong, largest = difference(_pixels(png), _pixels(truth))
    return shown | {"difference": small_uri(strong, _SHOWN_SIDE), "largest": largest}


def _pixels(png: bytes) -> npt.NDArray[Any]:
    return np.asarray(Image.open(BytesIO(png)))


def _shown(png: bytes) -> npt.NDArray[np.uint8]:
    """With 8 bits, which every browser shows the same way."""
    pixels = _pixels(png)
    return (pixels >> 8).astype(np.uint8) if pixels.dtype.itemsize > 1 else pixels


def _given_named(result: TaskResult) -> list[tuple[str, bytes]]:
    return [(f"given-{name.replace('_', '-')}", png) for name, png in result.given.items()]
