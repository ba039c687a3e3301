"""The report: verdicts, table, JSON and page of given records."""

import json
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import numpy as np
import pytest

from sdrt.benchmarks.cases import Case
from sdrt.benchmarks.contestants import PYTORCH_FP32, SDRT, Drawing
from sdrt.benchmarks.page import page
from sdrt.benchmarks.plots import BarLine, Line, Part, line_plot, nice_ticks, seconds_text, stacked_bars, step_labels
from sdrt.benchmarks.report import (
    Report,
    bars_of,
    bars_text,
    parity_verdict,
    report_json,
    table_text,
    write_report,
)
from sdrt.benchmarks.run import Record, Start, summarise
from sdrt.errors import OutputError

CASE = Case(prompt="red <b>", height=8, width=8, num_inference_steps=2, guidance_scale=2.0, seed=0, scheduler="ddim")
BARS = {"step, times PyTorch": ("step", PYTORCH_FP32, 2.0), "image, times nobody": ("total", "nobody", 1.0)}


def drawing(seconds: float, level: int = 0) -> Drawing:
    return Drawing(
        picture=np.full((8, 8, 3), level, np.uint8),
        total_seconds=seconds,
        text_encoder_seconds=0.1 * seconds,
        step_seconds=(0.3 * seconds, 0.3 * seconds),
        vae_decoder_seconds=0.2 * seconds,
        peak_bytes=2**20,
    )


def record(name: str, seconds: float, level: int = 0) -> Record:
    start = Start(load_seconds=2.0, import_seconds=0.5, open_seconds=1.0, first=drawing(2 * seconds, level))
    return Record(name=name, version="1", starts=[start], rounds=[drawing(seconds, level) for _ in range(3)])


def report(level: int = 0, *, reference: bool = True, title: str = "a < b", precision: str = "fp32") -> Report:
    records = [record(SDRT, 1.0, level)] + ([record(PYTORCH_FP32, 2.5)] if reference else [])
    rows = summarise(records, ours=SDRT, reference=PYTORCH_FP32)
    return Report(
        title=title,
        command="sdrt bench",
        machine={
            "cpu": "x",
            "cores": 2,
            "memory_gib": 4,
            "cpu_features": ["avx2"],
            "system": "s",
            "load_average": 0.0,
            "python": "3",
            "sdrt": "1",
            "commit": None,
            "packages": {"numpy": "2"},
        },
        bundle={"precision": precision},
        settings={"threads": 1},
        cases=[CASE],
        rows=rows,
        records=records,
        reference=PYTORCH_FP32,
        bars=bars_of(BARS, rows),
        extra={"build seconds": 12.5},
        parity=parity_verdict(rows, precision),
    )


def test_a_peer_that_takes_longer_has_ratios_above_one():
    ours, theirs = report().rows
    assert theirs.total_ratio.value == pytest.approx(2.5)
    assert theirs.step_ratio.value == pytest.approx(2.5)
    assert theirs.start_ratio.value == pytest.approx((2 + 5) / (2 + 2))
    assert (ours.total_ratio, ours.step_ratio, ours.start_ratio) == (None, None, None)


def test_an_image_s_steps_are_summed_before_they_are_summarised():
    ours, _ = report().rows
    assert ours.denoising.median == pytest.approx(0.6)
    assert ours.step.median == pytest.approx(0.3)
    assert ours.step.count == 6


def test_a_fast_wrong_picture_misses_parity():
    made = report(level=9)
    assert made.rows[0].parity.largest_difference == 9
    assert (made.parity, made.valid) == ("missed", False)
    assert made.rows[1].parity is None


@pytest.mark.parametrize(
    ("level", "precision", "verdict"),
    [(1, "fp32", "held"), (2, "fp32", "missed"), (2, "bf16", "held"), (5, "bf16", "missed")],
)
def test_parity_is_held_to_the_bound_of_the_bundle_s_precision(level, precision, verdict):
    assert report(level, precision=precision).parity == verdict  # 4 levels off are 36.1 dB, 5 are 34.2 dB


def test_without_a_reference_parity_is_not_said_to_have_held():
    made = report(reference=False)
    assert (made.parity, made.valid) == ("not checked", None)
    text = page(made)
    assert "not checked" in text
    assert "parity held" not in text
    assert report_json(made)["valid"] is None


def test_a_bar_whose_peer_did_not_run_is_not_met():
    step, nobody = report().bars
    assert step.met
    assert (nobody.measured, nobody.met) == (None, False)
    assert "MISSED image, times nobody: not measured" in bars_text([nobody])[0]


def test_memory_is_a_bar_of_the_peaks_without_an_interval():
    made = report()
    (bar,) = bars_of({"memory": ("memory", PYTORCH_FP32, 1.0)}, made.rows)
    assert (bar.measured, bar.low, bar.met) == (1.0, None, True)
    assert bars_text([bar]) == ["met    memory: 1.00, at least 1.00"]
    assert "memory" in page(replace(made, bars=[bar]))


def test_a_bar_below_its_bound_is_missed():
    made = report()
    (bar,) = bars_of({"step": ("step", PYTORCH_FP32, 2.6)}, made.rows)
    assert not bar.met
    assert bar.measured == pytest.approx(2.5)


def test_the_table_has_a_line_for_each_contestant_with_its_ratio():
    lines = table_text(report().rows).splitlines()
    assert len(lines) == 3
    assert lines[2].startswith(PYTORCH_FP32)
    assert "2.50" in lines[2]


def test_report_json_is_strict_json_even_where_pictures_are_equal():
    data = json.loads(json.dumps(report_json(report()), allow_nan=False))
    assert data["schema_version"] == 2
    assert data["rows"][0]["parity"]["psnr_db"] is None
    assert data["rows"][0]["parity"]["largest_difference"] == 0
    assert data["bars"][1]["measured"] is None
    assert len(data["raw"][SDRT]["rounds"]) == 3
    assert data["raw"][SDRT]["starts"][0]["import_seconds"] == 0.5


def test_the_page_stands_alone_and_escapes_what_it_shows():
    text = page(report(title="<script>x</script>"))
    assert "<script" not in text
    assert "red &lt;b&gt;" in text
    assert not re.search(r"https?://", text)
    assert not re.search(r"<(link|iframe)|url\(", text)
    assert all(source.startswith("data:image/png;base64,") for source in re.findall(r'src="([^"]*)"', text))
    assert len(re.findall(r"<img ", text)) == 3  # two pictures, and the difference of the one that is no reference


def test_the_page_says_when_a_bound_was_missed():
    assert "INVALID" in page(report(level=9))
    assert "INVALID" not in page(report(level=1))
    assert "missed" in page(report(level=1))


def test_the_page_s_markup_is_balanced():
    text = page(report())
    for tag in ("div", "table", "tr", "td", "figure", "svg", "dl", "p", "span"):
        assert len(re.findall(rf"<{tag}[\s>]", text)) == text.count(f"</{tag}>"), tag
    for figure in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(figure)


def test_a_report_is_written_whole_and_never_over_another(tmp_path):
    out = tmp_path / "report"
    write_report(report(), out)
    assert {path.name for path in out.iterdir()} == {"report.json", "report.html", "sdrt.png", "pytorch-eager-fp32.png"}
    with pytest.raises(OutputError, match="exists"):
        write_report(report(), out)
    write_report(report(level=9), out, overwrite=True)
    assert json.loads((out / "report.json").read_text())["valid"] is False


def test_bars_are_as_long_as_their_seconds():
    bars = [
        BarLine(name="a & b", parts=[Part(name="x", colour="#000", seconds=1.0)], seconds=1.0),
        BarLine(name="c", parts=[Part(name="x", colour="#000", seconds=2.0)], seconds=2.0, low=1.5, high=3.0),
    ]
    drawn = ElementTree.fromstring(stacked_bars(bars, label="seconds"))
    first, second = (float(rect.get("width")) for rect in drawn.iter("rect"))
    assert second == pytest.approx(2 * first, rel=1e-3)


def test_a_line_of_one_step_can_be_drawn():
    drawn = line_plot([Line(name="a", colour="#000", middle=[1.0], low=[0.9], high=[1.1])], label="steps")
    assert len(list(ElementTree.fromstring(drawn).iter("circle"))) == 1


@pytest.mark.parametrize("largest", [0.0, 1e-6, 0.013, 0.97, 1.0, 9.9, 57.0, 1234.0])
def test_ticks_are_few_and_reach_from_zero_to_about_the_largest(largest):
    ticks = nice_ticks(largest)
    assert ticks[0] == 0
    assert 2 <= len(ticks) <= 8
    assert largest == 0 or 0.6 * largest <= ticks[-1] <= 1.15 * largest


@pytest.mark.parametrize("count", [1, 2, 3, 9, 10, 11, 30, 50, 1000])
def test_first_and_last_step_are_labelled_and_not_too_many_between(count):
    labels = step_labels(count)
    assert (labels[0], labels[-1]) == (0, count - 1)
    assert len(labels) <= 13


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0"), (0.00123, "1.23 ms"), (0.25, "250 ms"), (2.2, "2.20 s"), (123.4, "123 s")]
)
def test_durations_read_well(seconds, text):
    assert seconds_text(seconds) == text
