"""The score of the embedded model: drawn by the compiled runtime and by PyTorch, judged alike."""

import json
import subprocess
import sys
from pathlib import Path

CHECKPOINT = Path(__file__).parents[1] / "models" / "shapes" / "checkpoint"


def test_a_few_captions_are_drawn_right_and_as_pytorch_draws_them(shapes_bundle, tmp_path):
    out = tmp_path / "score.json"
    command = [sys.executable, "-m", "sdrt.benchmarks.score", str(shapes_bundle), "--baseline", str(CHECKPOINT)]
    flags = ["--captions", "6", "--steps", "15", "--out", str(out)]
    done = subprocess.run([*command, *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())
    assert results["largest_pixel_difference"] <= 1
    assert results["sdrt"]["attributes"] == results["pytorch"]["attributes"]
    assert results["sdrt"]["attributes"] >= 0.8  # six captions and few steps; the bar is measured on 500


def test_no_bundle_is_an_error_with_a_hint(tmp_path):
    command = [sys.executable, "-m", "sdrt.benchmarks.score", str(tmp_path / "absent")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "error: there is no bundle" in done.stderr
    assert "hint:" in done.stderr
