"""The benchmark end to end on a tiny model: contestants take turns, and the report tells speed and parity."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest

from sdrt.benchmarks.contestants import Contestant, ContestantSpec, Drawing, compiled
from sdrt.benchmarks.report import Bar, Report, page, report_json, table_text
from sdrt.benchmarks.run import Case, Record, compare, summarise
from sdrt.errors import BackendError, RequestError
from sdrt.worker import run_child

CASE = Case(prompt="red", height=64, width=64, num_inference_steps=2, guidance_scale=2.0, seed=0, scheduler="ddim")


def drawing(seconds: float, level: int = 0) -> Drawing:
    return Drawing(
        picture=np.full((8, 8, 3), level, np.uint8),
        total_seconds=seconds,
        text_encoder_seconds=0.0,
        step_seconds=(seconds / 2, seconds / 2),
        vae_decoder_seconds=0.0,
        peak_bytes=2**20,
    )


def record(name: str, seconds: float, level: int = 0) -> Record:
    rounds = [drawing(seconds, level) for _ in range(3)]
    return Record(name=name, version="1", load_seconds=1.0, first=drawing(seconds, level), rounds=rounds)


def rows(level: int):
    return summarise(
        [record("sdrt", 1.0, level), record("PyTorch eager fp32", 2.5)], ours="sdrt", reference="PyTorch eager fp32"
    )


def test_a_peer_that_takes_longer_has_a_ratio_above_one():
    ours, theirs = rows(level=0)
    assert theirs.total_ratio.median == pytest.approx(2.5)
    assert theirs.step_ratio.median == pytest.approx(2.5)
    assert ours.total_ratio is None


def test_a_fast_wrong_picture_shows_in_the_parity():
    ours, theirs = rows(level=9)
    assert ours.parity.largest_difference == 9
    assert theirs.parity is None


def report(level: int) -> Report:
    records = [record("sdrt", 1.0, level), record("PyTorch eager fp32", 2.5)]
    return Report(
        title="a < b",
        command="sdrt bench",
        machine={"cpu": "x", "cores": 2, "memory_gib": 4, "cpu_features": ["avx2"], "system": "s", "python": "3"}
        | {"packages": {"numpy": "2"}},
        bundle={"precision": "fp32"},
        cases=[CASE],
        rows=summarise(records, ours="sdrt", reference="PyTorch eager fp32"),
        records=records,
        bars=[Bar(name="per step", measured=1.9, bound=2.0)],
        extra={},
        valid=level <= 1,
    )


def test_the_page_stands_alone_and_escapes_what_it_shows():
    text = page(report(level=0))
    assert "a &lt; b" in text
    assert "http://" not in text.replace("http://www.w3.org", "")
    assert "https://" not in text
    assert text.count("data:image/png;base64,") == 3


def test_the_page_says_when_the_comparison_is_invalid_or_a_bar_was_missed():
    assert "INVALID" in page(report(level=9))
    assert "INVALID" not in page(report(level=1))
    assert "missed" in page(report(level=1))


def test_report_json_is_json_even_where_pictures_are_equal():
    data = json.loads(json.dumps(report_json(report(level=0)), allow_nan=False))
    assert data["rows"][0]["parity"]["psnr_db"] is None
    assert data["bars"][0]["met"] is False


def test_the_table_has_a_line_for_each_contestant():
    lines = table_text(rows(level=0)).splitlines()
    assert len(lines) == 3
    assert "2.50" in lines[2]


def test_contestants_draw_the_same_case_the_same_way_twice(tiny_bundle):
    spec = compiled(tiny_bundle, threads=1)
    (only,) = compare([spec], [CASE], rounds=2, warmup=0, say=lambda *_: None)
    assert len(only.rounds) == 2
    assert only.peak_bytes > 2**20
    assert len(only.first.step_seconds) == 2
    np.testing.assert_array_equal(only.rounds[0].picture, only.rounds[1].picture)


def test_a_contestant_that_dies_is_an_error_that_says_why():
    spec = ContestantSpec(name="doomed", command=(sys.executable, "-c", "raise SystemExit('out of luck')"))
    with pytest.raises(BackendError, match="out of luck"):
        Contestant(spec)


def test_the_whole_comparison_with_pytorch_holds_parity(tiny_bundle, tiny_checkpoint, tmp_path):
    out = tmp_path / "report"
    flags = ["--rounds", "1", "--warmup", "0", "--steps", "2", "--threads", "1", "--contestants", "pytorch-fp32"]
    result = run_child(
        "sdrt.benchmarks", [str(tiny_bundle), "--baseline", str(tiny_checkpoint), "--out", str(out), *flags]
    )
    data = json.loads((out / "report.json").read_text())
    assert result["valid"] is True
    assert data["rows"][0]["parity"]["largest_difference"] <= 1
    assert (out / "report.html").stat().st_size > 5_000


def test_an_unknown_contestant_is_refused(tiny_bundle, tiny_checkpoint, tmp_path):
    flags = ["--contestants", "abacus", "--baseline", str(tiny_checkpoint), "--out", str(tmp_path / "report")]
    with pytest.raises(RequestError, match="abacus"):
        run_child("sdrt.benchmarks", [str(tiny_bundle), *flags])


def test_a_case_leaves_out_what_it_does_not_say():
    assert "scheduler" not in replace(CASE, scheduler=None).arguments()
