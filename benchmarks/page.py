"""The report as a page that needs no other file: its figures and pictures are inside."""

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
from PIL import Image

from sdrt.benchmarks.contestants import Picture
from sdrt.benchmarks.plots import BarLine, Line, Part, line_plot, seconds_text, stacked_bars
from sdrt.benchmarks.run import Record, Row

if TYPE_CHECKING:
    from sdrt.benchmarks.report import Report

DIFFERENCE_GAIN = 16
_CONTESTANTS = ("#3b7ddd", "#9097a3", "#c98a2b", "#a4508b", "#3c9a6c")
STAGES: Mapping[str, str] = {
    "text encoder": "#d9a441",
    "steps": "#3b7ddd",
    "VAE decoder": "#3c9a6c",
    "rest": "#9097a3",
}
_STARTS: Mapping[str, str] = {"imports": "#d9a441", "rest of loading": "#9097a3", "first image": "#3b7ddd"}
_LARGE_PICTURE = 256  # pixels on a side: of larger ones a page shows one case only
_CASES_SHOWN = 4


def page(report: "Report") -> str:
    """The page, as HTML."""
    colours = {row.name: _CONTESTANTS[index % len(_CONTESTANTS)] for index, row in enumerate(report.rows)}
    return render(
        "report.html",
        report=report,
        colours=colours,
        stages=STAGES,
        starts=_STARTS,
        stage_figure=stacked_bars([stage_bar(row) for row in report.rows], label="seconds of an image, by stage"),
        start_figure=stacked_bars([_start_bar(row) for row in report.rows], label="seconds from start to first image"),
        step_figure=line_plot(
            [_step_line(record, colours[record.name]) for record in report.records], label="seconds of each step"
        ),
        gallery=_gallery(report),
        gain=DIFFERENCE_GAIN,
    )


def render(template: str, **values: object) -> str:
    """A page of this folder's templates."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters.update(duration=seconds_text, ratio=_ratio_text, mib=lambda size: f"{size / 2**20:,.0f}")
    return environment.get_template(template).render(**values)


def stage_bar(row: Row) -> BarLine:
    """Where the seconds of a median image go; `rest` is what no stage accounts for."""
    parts = [row.text_encoder.median, row.denoising.median, row.vae_decoder.median]
    parts.append(max(row.total.median - sum(parts), 0.0))
    return BarLine(
        name=row.name,
        parts=[
            Part(name=name, colour=colour, seconds=seconds)
            for (name, colour), seconds in zip(STAGES.items(), parts, strict=True)
        ],
        seconds=row.total.median,
        low=row.total.low,
        high=row.total.high,
    )


def _start_bar(row: Row) -> BarLine:
    rest = max(row.load.median - row.imports.median, 0.0)
    seconds = (row.imports.median, rest, row.first_image.median)
    several = row.start_to_image.count > 1
    return BarLine(
        name=row.name,
        parts=[
            Part(name=name, colour=colour, seconds=value)
            for (name, colour), value in zip(_STARTS.items(), seconds, strict=True)
        ],
        seconds=row.start_to_image.median,
        low=row.start_to_image.minimum if several else None,
        high=row.start_to_image.maximum if several else None,
    )


def _step_line(record: Record, colour: str) -> Line:
    rounds = np.array([drawing.step_seconds for drawing in record.rounds])
    low, middle, high = np.percentile(rounds, [25, 50, 75], axis=0)
    return Line(name=record.name, colour=colour, middle=middle.tolist(), low=low.tolist(), high=high.tolist())


def _gallery(report: "Report") -> list[dict[str, Any]]:
    """Picture by picture, what everyone drew: a row of the page for each case, the reference first."""
    by_name = {record.name: record for record in report.records}
    truth = by_name.get(report.reference)
    height, width = report.records[0].starts[0].first.picture.shape[:2]
    shown = 1 if max(height, width) > _LARGE_PICTURE else min(_CASES_SHOWN, len(report.cases))
    ordered = sorted(report.records, key=lambda record: record is not truth)
    rows = []
    for index in range(min(shown, len(report.records[0].rounds))):
        pictures = [_picture(record, record.rounds[index].picture, truth, index) for record in ordered]
        rows.append({"case": report.cases[index % len(report.cases)], "pictures": pictures})
    return rows


def _picture(record: Record, picture: Picture, truth: Record | None, index: int) -> dict[str, Any]:
    shown = {"name": record.name, "image": _data_uri(picture), "difference": None, "largest": None}
    if truth is None or record is truth:
        return shown
    strong, largest = difference(picture, truth.rounds[index].picture)
    return shown | {"difference": _data_uri(strong), "largest": largest}


def difference(picture: Picture, reference: Picture) -> tuple[Picture, int]:
    """Where two pictures differ, DIFFERENCE_GAIN times as strong, and by how many levels of 255 at most."""
    gaps = np.abs(picture.astype(int) - reference.astype(int))
    return np.clip(gaps * DIFFERENCE_GAIN, 0, 255).astype(np.uint8), int(gaps.max())


def png_bytes(pixels: Picture) -> bytes:
    """A picture as the content of a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def small_uri(pixels: Picture, side: int) -> str:
    """A picture of at most `side` pixels a side, with a little loss, in the place of its address."""
    image = Image.fromarray(pixels)
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=85)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _data_uri(pixels: Picture) -> str:
    return "data:image/png;base64," + base64.b64encode(png_bytes(pixels)).decode()


def _ratio_text(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"
