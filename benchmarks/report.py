"""The report of a comparison as data: verdicts, a table for the terminal, report.json, and the folder it is kept in."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from PIL import Image

from sdrt.benchmarks.cases import Case
from sdrt.benchmarks.contestants import Drawing
from sdrt.benchmarks.measure import Parity
from sdrt.benchmarks.page import page
from sdrt.benchmarks.run import Record, Row, Start
from sdrt.bundle import JsonValue
from sdrt.files import staged_directory

SCHEMA_VERSION = 2
FP32_LEVELS = 1  # of 255, on every pixel
BF16_PSNR_DB = 35.0

ParityVerdict = Literal["held", "missed", "not checked"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """Something the comparison had to reach. `measured` is None where the peer it names did not run.

    low, high: the interval of what was measured, where it has one.
    """

    name: str
    measured: float | None
    low: float | None
    high: float | None
    bound: float

    @property
    def met(self) -> bool:
        """Whether it was measured, and is at least the bound."""
        return self.measured is not None and self.measured >= self.bound


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Report:
    """Everything that the page shows."""

    title: str
    command: str
    machine: Mapping[str, Any]
    bundle: Mapping[str, Any]
    settings: Mapping[str, JsonValue]
    cases: Sequence[Case]
    rows: Sequence[Row]
    records: Sequence[Record]
    reference: str
    bars: Sequence[Bar]
    extra: Mapping[str, JsonValue]
    parity: ParityVerdict

    @property
    def valid(self) -> bool | None:
        """Whether the pictures are what the bundle promises; None where nobody drew a reference."""
        return None if self.parity == "not checked" else self.parity == "held"


def parity_verdict(rows: Sequence[Row], precision: str) -> ParityVerdict:
    """Whether this runtime's pictures are as close to the reference as its precision promises."""
    (ours,) = (row for row in rows if row.ours)
    if ours.parity is None:
        return "not checked"
    if precision == "fp32":
        return "held" if ours.parity.largest_difference <= FP32_LEVELS else "missed"
    return "held" if ours.parity.psnr_db >= BF16_PSNR_DB else "missed"


def bars_of(bars: Mapping[str, tuple[str, str, float]], rows: Sequence[Row]) -> list[Bar]:
    """The bars with what was measured, each the peer's over ours. A kind is "step", "total", "start" or "memory".

    Memory is that of the process at its peak; one run has one, so it has no interval.
    """
    by_name = {row.name: row for row in rows}
    (ours,) = (row for row in rows if row.ours)
    made = []
    for name, (kind, peer, bound) in bars.items():
        row = by_name.get(peer)
        ratio, measured = None, None
        if row is not None and kind == "memory":
            measured = row.peak_bytes / ours.peak_bytes
        elif row is not None:
            ratio = {"step": row.step_ratio, "total": row.total_ratio, "start": row.start_ratio}[kind]
            measured = None if ratio is None else ratio.value
        low, high = (None, None) if ratio is None else (ratio.low, ratio.high)
        made.append(Bar(name=name, measured=measured, low=low, high=high, bound=bound))
    return made


def bars_text(bars: Sequence[Bar]) -> list[str]:
    """A line for each bar."""
    return [
        f"{'met   ' if bar.met else 'MISSED'} {bar.name}: {_measured_text(bar)}, at least {bar.bound:.2f}"
        for bar in bars
    ]


def _measured_text(bar: Bar) -> str:
    if bar.measured is None:
        return "not measured"
    interval = "" if bar.low is None else f" [{bar.low:.2f}, {bar.high:.2f}]"
    return f"{bar.measured:.2f}{interval}"


def table_text(rows: Sequence[Row]) -> str:
    """The table as plain text."""
    head = ("", "load s", "1st image s", "step ms", "p90", "p99", "VAE ms", "image s", "p90", "p99")
    return aligned([(*head, "x step", "x image", "x start", "peak MiB", "parity"), *(_cells(row) for row in rows)])


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Rows of cells as plain text: the first column to the left, the others to the right."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = []
    for first, *rest in lines:
        padded = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        text.append("  ".join([first.ljust(widths[0]), *padded]).rstrip())
    return "\n".join(text)


def report_json(report: Report) -> dict[str, Any]:
    """The report as data, pictures left out."""
    return {
        "schema_version": SCHEMA_VERSION,
        "title": report.title,
        "command": report.command,
        "parity": report.parity,
        "valid": report.valid,
        "reference": report.reference,
        "machine": dict(report.machine),
        "bundle": dict(report.bundle),
        "settings": dict(report.settings),
        "cases": [case.arguments() for case in report.cases],
        "rows": [row_json(row) for row in report.rows],
        "raw": {record.name: raw_timings(record) for record in report.records},
        "bars": [asdict(bar) | {"met": bar.met} for bar in report.bars],
        "extra": dict(report.extra),
    }


def write_report(report: Report, out: Path, *, overwrite: bool = False) -> None:
    """Write report.json, report.html and each contestant's first picture into the new folder `out`."""
    with staged_directory(out, overwrite=overwrite) as staged:
        text = msgspec.json.format(msgspec.json.encode(report_json(report)), indent=2)
        (staged / "report.json").write_bytes(text + b"\n")
        (staged / "report.html").write_text(page(report), encoding="utf-8")
        for record in report.records:
            name = record.name.lower().replace(" ", "-")
            Image.fromarray(record.starts[0].first.picture).save(staged / f"{name}.png")


def _cells(row: Row) -> tuple[str, ...]:
    ratios = [
        "1" if ratio is None else f"{ratio.value:.2f}" for ratio in (row.step_ratio, row.total_ratio, row.start_ratio)
    ]
    match = "-" if row.parity is None else parity_text(row.parity)
    return (
        row.name,
        f"{row.load.median:.2f}",
        f"{row.first_image.median:.2f}",
        f"{row.step.median * 1000:.1f}",
        f"{row.step.p90 * 1000:.1f}",
        f"{row.step.p99 * 1000:.1f}",
        f"{row.vae_decoder.median * 1000:.1f}",
        f"{row.total.median:.3f}",
        f"{row.total.p90:.3f}",
        f"{row.total.p99:.3f}",
        *ratios,
        f"{row.peak_bytes / 2**20:.0f}",
        match,
    )


def parity_text(parity: Parity) -> str:
    """The worst of the pictures in few words."""
    if parity.largest_difference == 0:
        return "equal"
    return f"{parity.largest_difference}/255 {parity.psnr_db:.1f} dB"


def raw_timings(record: Record) -> dict[str, JsonValue]:
    """Every timing of a contestant as it was taken."""
    return {
        "starts": [_start(start) for start in record.starts],
        "rounds": [_timings(drawing) for drawing in record.rounds],
    }


def _start(start: Start) -> dict[str, JsonValue]:
    return {
        "load_seconds": start.load_seconds,
        "import_seconds": start.import_seconds,
        "open_seconds": start.open_seconds,
        "first": _timings(start.first),
    }


def _timings(drawing: Drawing) -> dict[str, JsonValue]:
    return {
        "total_seconds": drawing.total_seconds,
        "text_encoder_seconds": drawing.text_encoder_seconds,
        "step_seconds": list(drawing.step_seconds),
        "vae_decoder_seconds": drawing.vae_decoder_seconds,
        "peak_bytes": drawing.peak_bytes,
        "gpu_bytes": drawing.gpu_bytes,
        "gap_seconds": drawing.gap_seconds,
    }


def row_json(row: Row) -> JsonValue:
    """A row as strict JSON."""
    return _finite(msgspec.to_builtins(asdict(row)))


def _finite(value: JsonValue) -> JsonValue:
    """JSON has no infinity (the PSNR of equal pictures): null stands for it."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    return None if isinstance(value, float) and not np.isfinite(value) else value
