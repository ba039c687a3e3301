"""The report of a comparison: a table for the terminal, report.json, and a page that needs no other file."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jinja2
import msgspec
import numpy as np
from PIL import Image

from sdrt.benchmarks.contestants import Drawing
from sdrt.benchmarks.run import Case, Record, Row
from sdrt.bundle import JsonValue
from sdrt.files import staged_directory

SCHEMA_VERSION = 1
DIFFERENCE_GAIN = 16
_COLOURS = ("#2f6fde", "#8a8f98", "#b07d2b", "#3c9a6c", "#a4508b")


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """Something the comparison had to reach."""

    name: str
    measured: float
    bound: float

    @property
    def met(self) -> bool:
        """Whether the measured value is at least the bound."""
        return self.measured >= self.bound


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Report:
    """Everything that the page shows."""

    title: str
    command: str
    machine: Mapping[str, Any]
    bundle: Mapping[str, Any]
    cases: Sequence[Case]
    rows: Sequence[Row]
    records: Sequence[Record]
    bars: Sequence[Bar]
    extra: Mapping[str, Any]
    valid: bool


def table_text(rows: Sequence[Row]) -> str:
    """The table as plain text."""
    head = (
        "",
        "load s",
        "1st image s",
        "step ms",
        "p90",
        "VAE ms",
        "image s",
        "p90",
        "x step",
        "x image",
        "peak MiB",
        "parity",
    )
    lines = [head, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    text = []
    for line in lines:
        first, *rest = line
        padded = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        text.append("  ".join([first.ljust(widths[0]), *padded]).rstrip())
    return "\n".join(text)


def report_json(report: Report) -> dict[str, Any]:
    """The report as data, pictures left out."""
    return {
        "schema_version": SCHEMA_VERSION,
        "title": report.title,
        "command": report.command,
        "valid": report.valid,
        "machine": dict(report.machine),
        "bundle": dict(report.bundle),
        "cases": [case.arguments() for case in report.cases],
        "rows": [_finite(msgspec.to_builtins(asdict(row))) for row in report.rows],
        "rounds": {
            record.name: [_timings(drawing) for drawing in (record.first, *record.rounds)] for record in report.records
        },
        "bars": [asdict(bar) | {"met": bar.met} for bar in report.bars],
        "extra": dict(report.extra),
    }


def write_report(report: Report, out: Path, *, overwrite: bool = False) -> None:
    """Write report.json, report.html and the pictures into the new folder `out`."""
    with staged_directory(out, overwrite=overwrite) as staged:
        text = msgspec.json.format(msgspec.json.encode(report_json(report)), indent=2)
        (staged / "report.json").write_bytes(text + b"\n")
        (staged / "report.html").write_text(page(report), encoding="utf-8")
        for record in report.records:
            name = record.name.lower().replace(" ", "-")
            Image.fromarray(record.first.picture).save(staged / f"{name}.png")


def page(report: Report) -> str:
    """The page, with its plots and pictures inside."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    colours = {record.name: _COLOURS[index % len(_COLOURS)] for index, record in enumerate(report.records)}
    longest = max(row.total.median for row in report.rows)
    return environment.get_template("report.html").render(
        report=report,
        colours=colours,
        stages=[_stage_bar(row, longest) for row in report.rows],
        steps=_step_plot(report.records, colours),
        pictures=[_picture(record, _reference(report)) for record in report.records],
        gain=DIFFERENCE_GAIN,
        plot_width=PLOT_WIDTH,
        plot_height=PLOT_HEIGHT,
    )


PLOT_WIDTH, PLOT_HEIGHT = 920, 240
_PLOT_LEFT = 64


def _reference(report: Report) -> Record:
    return next((record for record in report.records if "fp32" in record.name), report.records[0])


def _stage_bar(row: Row, longest: float) -> dict[str, Any]:
    """Where the seconds of an image go, as shares of the slowest contestant's image."""
    steps = sum_of_steps(row)
    parts = {"text encoder": row.text_encoder.median, "steps": steps, "VAE decoder": row.vae_decoder.median}
    other = max(row.total.median - sum(parts.values()), 0.0)
    shares = {name: 100 * seconds / longest for name, seconds in (*parts.items(), ("other", other))}
    return {"name": row.name, "seconds": row.total.median, "shares": shares}


def sum_of_steps(row: Row) -> float:
    """Seconds of all network evaluations of a median image."""
    return max(row.total.median - row.text_encoder.median - row.vae_decoder.median, 0.0)


def _step_plot(records: Sequence[Record], colours: Mapping[str, str]) -> dict[str, Any]:
    """Median seconds of each network evaluation, as polylines."""
    lines = {
        record.name: np.median(np.array([drawing.step_seconds for drawing in record.rounds]), axis=0)
        for record in records
    }
    top = max(float(line.max()) for line in lines.values()) * 1.1
    count = max(len(line) for line in lines.values())
    span = PLOT_WIDTH - _PLOT_LEFT - 12

    def points(line: np.ndarray) -> str:
        width = span / max(count - 1, 1)
        return " ".join(
            f"{_PLOT_LEFT + index * width:.1f},{PLOT_HEIGHT - 24 - value / top * (PLOT_HEIGHT - 40):.1f}"
            for index, value in enumerate(line)
        )

    ticks = [(PLOT_HEIGHT - 24 - share * (PLOT_HEIGHT - 40), f"{share * top * 1000:.0f} ms") for share in (0, 0.5, 0.9)]
    return {
        "lines": [{"name": name, "colour": colours[name], "points": points(line)} for name, line in lines.items()],
        "ticks": ticks,
        "left": _PLOT_LEFT,
        "count": count,
    }


def _picture(record: Record, reference: Record) -> dict[str, str]:
    ours, truth = record.first.picture.astype(int), reference.first.picture.astype(int)
    difference = np.clip(np.abs(ours - truth) * DIFFERENCE_GAIN, 0, 255).astype(np.uint8)
    return {
        "name": record.name,
        "image": _data_uri(record.first.picture),
        "difference": "" if record is reference else _data_uri(difference),
    }


def _data_uri(pixels: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _cells(row: Row) -> tuple[str, ...]:
    ratios = ("1.00", "1.00")
    if row.step_ratio is not None and row.total_ratio is not None:
        ratios = (f"{row.step_ratio.median:.2f}", f"{row.total_ratio.median:.2f}")
    match = "reference" if row.parity is None else f"{row.parity.largest_difference}/255 {row.parity.psnr_db:.1f} dB"
    return (
        row.name,
        f"{row.load_seconds:.2f}",
        f"{row.first_image_seconds:.2f}",
        f"{row.step.median * 1000:.1f}",
        f"{row.step.p90 * 1000:.1f}",
        f"{row.vae_decoder.median * 1000:.1f}",
        f"{row.total.median:.3f}",
        f"{row.total.p90:.3f}",
        *ratios,
        f"{row.peak_bytes / 2**20:.0f}",
        match,
    )


def _timings(drawing: Drawing) -> dict[str, JsonValue]:
    return {
        "total_seconds": drawing.total_seconds,
        "text_encoder_seconds": drawing.text_encoder_seconds,
        "step_seconds": list(drawing.step_seconds),
        "vae_decoder_seconds": drawing.vae_decoder_seconds,
    }


def _finite(value: JsonValue) -> JsonValue:
    """JSON has no infinity (the PSNR of equal pictures): null stands for it."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    return None if isinstance(value, float) and not np.isfinite(value) else value
