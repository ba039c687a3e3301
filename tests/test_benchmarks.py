"""The benchmark: contestants take turns in processes of their own, and what a run is refused for."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from sdrt.benchmarks.baselines.convert_openvino_genai import restate_checkpoint
from sdrt.benchmarks.baselines.protocol import peak_bytes
from sdrt.benchmarks.builds import ensure_peers, run_timed
from sdrt.benchmarks.cases import Case
from sdrt.benchmarks.contestants import Contestant, ContestantSpec, compiled
from sdrt.benchmarks.machine import describe_machine, source_digest
from sdrt.benchmarks.run import compare, rotated
from sdrt.benchmarks.subjects import bundle_subject, judged, peer_names, resized
from sdrt.benchmarks.suites import shapes
from sdrt.errors import BackendError, BuildError, CheckpointError, OutputError, RequestError
from sdrt.models.shapes.scenes import draw_scene, parse_caption
from sdrt.worker import run_child

CASE = Case(prompt="red", height=64, width=64, num_inference_steps=2, guidance_scale=2.0, seed=0, scheduler="ddim")

PLAYER = """
import sys, time
from sdrt.benchmarks.baselines.protocol import serve
import numpy as np
name, log = sys.argv[1:]

def note(what):
    with open(log, "a") as file:
        print(name, what, file=file)

def draw(case):
    print("a library that prints")
    note(case["seed"])
    timings = {"text_encoder_seconds": 0.0, "step_seconds": [0.01, 0.02], "vae_decoder_seconds": 0.0}
    return np.full((2, 2, 3), case["seed"], np.uint8), timings

serve(lambda: note("starts"), lambda: draw, lambda: {"version": "1"})
"""


def players(log: Path, *names: str) -> list[ContestantSpec]:
    """Contestants that draw their case's seed at once, and note in `log` who did what."""
    return [ContestantSpec(name=name, command=(sys.executable, "-c", PLAYER, name, str(log))) for name in names]


def cases(count: int) -> list[Case]:
    return [replace(CASE, seed=10 + index) for index in range(count)]


def quiet(stage: str, done: int, total: int) -> None:
    assert done < total


def test_turns_rotate():
    assert [rotated("abc", turn) for turn in range(4)] == [list("abc"), list("bca"), list("cab"), list("abc")]


def test_contestants_take_turns_on_the_same_cases_in_rotating_order(tmp_path):
    log = tmp_path / "log"
    records = compare(players(log, "a", "b"), cases(2), rounds=3, warmup=1, cold_starts=1, say=quiet)
    starts, draws = ["a starts", "a 10", "b starts", "b 10"], ["a 10", "b 10", "b 10", "a 10", "a 11", "b 11"]
    assert log.read_text().splitlines() == [*starts, *draws, "b 10", "a 10"]
    for record in records:
        assert [drawing.picture[0, 0, 0] for drawing in record.rounds] == [10, 11, 10]


def test_each_cold_start_is_a_new_process_and_only_the_last_stays(tmp_path):
    log = tmp_path / "log"
    (record,) = compare(players(log, "a"), cases(1), rounds=1, warmup=0, cold_starts=3, say=quiet)
    assert log.read_text().splitlines().count("a starts") == 3
    assert len(record.starts) == 3
    assert all(start.load_seconds >= start.import_seconds + start.open_seconds > 0 for start in record.starts)


def test_one_at_a_time_starts_and_warms_up_anew_in_each_round(tmp_path):
    log = tmp_path / "log"
    alive = []

    def watch(stage: str, done: int, total: int) -> None:
        alive.append(len(psutil.Process().children()))

    records = compare(players(log, "a", "b"), cases(2), rounds=2, warmup=1, resident="1", say=watch)
    one = ["starts", "10", "10", "10"], ["starts", "10", "11", "11"]
    expected = [*(f"a {what}" for what in one[0]), *(f"b {what}" for what in one[0])]
    expected += [*(f"b {what}" for what in one[1]), *(f"a {what}" for what in one[1])]
    assert log.read_text().splitlines() == expected
    assert [len(record.starts) for record in records] == [2, 2]
    assert max(alive) - min(alive) == 1


def test_contestants_end_with_the_comparison_even_when_it_fails(tmp_path):
    doomed = ContestantSpec(name="doomed", command=(sys.executable, "-c", "raise SystemExit('out of luck')"))
    before = len(psutil.Process().children())
    with pytest.raises(BackendError, match="doomed ended with code 1: out of luck"):
        compare([*players(tmp_path / "log", "a"), doomed], cases(1), rounds=1, warmup=0, say=quiet)
    assert len(psutil.Process().children()) == before


def test_a_contestant_that_dies_while_drawing_is_an_error_that_says_why(tmp_path):
    script = PLAYER.replace("note(case", "raise ValueError('no ink') #")
    spec = ContestantSpec(name="dry", command=(sys.executable, "-c", script, "dry", str(tmp_path / "log")))
    with Contestant(spec) as contestant, pytest.raises(BackendError, match="no ink"):
        contestant.draw(CASE.arguments())


def test_a_contestant_that_talks_nonsense_is_an_error():
    spec = ContestantSpec(name="parrot", command=(sys.executable, "-c", "print('hello'); input()"))
    with pytest.raises(BackendError, match="answered 'hello'"):
        Contestant(spec)


def test_a_contestant_whose_program_is_absent_is_an_error(tmp_path):
    spec = ContestantSpec(name="ghost", command=(str(tmp_path / "python"),))
    with pytest.raises(BackendError, match="ghost cannot be started"):
        Contestant(spec)


def test_a_process_s_peak_does_not_count_what_its_parent_had():
    ballast = np.ones(300 * 2**20, np.uint8)
    command = "from sdrt.benchmarks.baselines.protocol import peak_bytes; print(peak_bytes())"
    child = int(subprocess.run([sys.executable, "-c", command], capture_output=True, check=True).stdout)
    assert peak_bytes() > ballast.nbytes > child


def test_the_runtime_draws_the_same_case_the_same_way_twice(tiny_bundle):
    (only,) = compare([compiled(tiny_bundle, threads=1)], [CASE], rounds=2, warmup=0, say=quiet)
    assert only.version.startswith("sdrt ")
    assert len(only.rounds[0].step_seconds) == 2
    assert only.rounds[1].text_encoder_seconds > 0
    np.testing.assert_array_equal(only.rounds[0].picture, only.rounds[1].picture)


def test_the_whole_comparison_with_pytorch_holds_parity(tiny_bundle, tiny_checkpoint, tmp_path):
    out = tmp_path / "report"
    flags = ["--rounds", "1", "--warmup", "0", "--cold-starts", "1", "--steps", "2", "--threads", "1"]
    peers = ["--baseline", str(tiny_checkpoint), "--contestants", "sdrt,pytorch-fp32"]
    result = run_child("sdrt.benchmarks", [str(tiny_bundle), "--out", str(out), *flags, *peers])
    data = json.loads((out / "report.json").read_text())
    assert (result["valid"], result["parity"]) == (True, "held")
    assert [row["name"] for row in data["rows"]] == ["sdrt", "PyTorch eager fp32"]
    assert data["rows"][0]["parity"]["largest_difference"] <= 1
    assert data["settings"]["threads"] == 1
    assert all(len(raw["rounds"][0]["step_seconds"]) == 2 for raw in data["raw"].values())
    assert (out / "report.html").stat().st_size > 5_000


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rounds", "0"], "--rounds is 0"),
        (["--steps", "-1"], "--steps is -1"),
        (["--contestants", "abacus"], "abacus"),
        (["--contestants", "pytorch-fp32"], "without the checkpoint"),
        (["--size", "big"], "'big'"),
    ],
)
def test_a_bad_argument_is_refused_before_any_work(tiny_bundle, tmp_path, flags, message):
    out = tmp_path / "report"
    with pytest.raises(RequestError, match=message):
        run_child("sdrt.benchmarks", [str(tiny_bundle), "--out", str(out), *flags])
    assert not out.exists()


def test_a_baseline_that_is_no_checkpoint_is_refused(tiny_bundle, tmp_path):
    with pytest.raises(CheckpointError, match="model_index"):
        run_child("sdrt.benchmarks", [str(tiny_bundle), "--baseline", str(tmp_path), "--out", str(tmp_path / "report")])


def test_no_bundle_and_an_existing_report_are_refused(tiny_bundle, tmp_path):
    with pytest.raises(RequestError, match="no bundle"):
        run_child("sdrt.benchmarks", ["--out", str(tmp_path / "report")])
    with pytest.raises(OutputError, match="exists"):
        run_child("sdrt.benchmarks", [str(tiny_bundle), "--out", str(tmp_path)])


def test_peers_are_named_once_and_sdrt_always_runs():
    assert peer_names(None) is None
    assert peer_names("sdrt, pytorch-bf16,pytorch-fp32,pytorch-bf16") == ["pytorch-bf16", "pytorch-fp32"]
    assert peer_names("sdrt") == []


def test_a_size_is_width_by_height(tiny_bundle):
    subject = bundle_subject(tiny_bundle, None, "plain", prompt="red", peers=None)
    (case,) = resized(subject, steps=3, size="128x64").cases
    assert (case.width, case.height, case.num_inference_steps) == (128, 64, 3)


def test_pictures_are_judged_against_their_own_captions(tiny_bundle):
    subject = judged(bundle_subject(tiny_bundle, None, "shapes", prompt="", peers=None), "shapes")
    rng = np.random.default_rng(0)
    drawn = [draw_scene(parse_caption(case.prompt), rng) for case in subject.cases]
    right, wrong = subject.wanted_share(drawn), subject.wanted_share([*drawn[1:], drawn[0]])
    assert right > 0.95
    assert wrong < 0.75


def test_pictures_of_another_size_are_not_judged(tiny_bundle):
    subject = bundle_subject(tiny_bundle, None, "shapes", prompt="", peers=None)
    assert judged(resized(subject, steps=None, size="64x64"), "shapes").wanted_share is None
    assert judged(subject, "plain").wanted_share is None


def test_the_suite_s_captions_differ_so_that_no_two_rounds_draw_the_same():
    assert len({case.prompt for case in shapes.cases()}) == len(shapes.cases()) == 8


def test_a_command_is_timed_with_the_peak_of_its_largest_process():
    child = "import numpy, time; x = numpy.ones(200 * 2**20, numpy.uint8); time.sleep(0.5)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    built = run_timed([sys.executable, "-c", parent])
    assert 200 * 2**20 < built.peak_bytes < 400 * 2**20
    assert built.seconds > 0.5


def test_a_command_that_fails_says_what_it_printed():
    with pytest.raises(BuildError, match="no paper"):
        run_timed([sys.executable, "-c", "raise SystemExit('no paper')"])


def test_an_interrupted_command_is_stopped(tmp_path):
    mark = tmp_path / "pid"
    child = f"import os, pathlib, time; pathlib.Path({str(mark)!r}).write_text(str(os.getpid())); time.sleep(60)"
    parent = f"import sys; from sdrt.benchmarks.builds import run_timed; run_timed([sys.executable, '-c', {child!r}])"
    running = subprocess.Popen([sys.executable, "-c", parent], stderr=subprocess.DEVNULL)
    wait_until(lambda: mark.exists() and mark.read_text())
    running.send_signal(signal.SIGINT)
    assert running.wait(20) != 0
    wait_until(lambda: not psutil.pid_exists(int(mark.read_text())))


def wait_until(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_half_made_environment_for_peers_is_made_again(tmp_path, monkeypatch):
    pins = tmp_path / "peers.txt"
    pins.write_text("./absent-package\n")
    monkeypatch.setattr("sdrt.benchmarks.builds.PEER_PINS", pins)
    python = tmp_path / "venv" / "bin" / "python"
    with pytest.raises(BuildError, match="absent-package"):
        ensure_peers(python)
    assert not python.exists()


def test_a_checkpoint_is_restated_for_older_readers_without_touching_it(tiny_checkpoint, tmp_path):
    from safetensors.numpy import load_file

    before = {path: path.stat().st_mtime_ns for path in tiny_checkpoint.rglob("*")}
    view = tmp_path / "view"
    restate_checkpoint(tiny_checkpoint, view)
    theirs = load_file(tiny_checkpoint / "text_encoder" / "model.safetensors")
    restated = load_file(view / "text_encoder" / "model.safetensors")
    assert set(restated) == {f"text_model.{name}" for name in theirs}
    for name, weights in theirs.items():
        np.testing.assert_array_equal(restated[f"text_model.{name}"], weights)
    assert (view / "unet" / "diffusion_pytorch_model.safetensors").is_symlink()
    assert {path: path.stat().st_mtime_ns for path in tiny_checkpoint.rglob("*")} == before


def test_a_restated_tokenizer_has_the_same_vocabulary_and_merges(tiny_checkpoint, tmp_path):
    view = tmp_path / "view"
    restate_checkpoint(tiny_checkpoint, view)
    model = json.loads((tiny_checkpoint / "tokenizer" / "tokenizer.json").read_text())["model"]
    vocabulary = json.loads((view / "tokenizer" / "vocab.json").read_text())
    merges = (view / "tokenizer" / "merges.txt").read_text().splitlines()
    assert vocabulary.items() >= model["vocab"].items()
    assert "<|endoftext|>" in vocabulary
    assert len(merges) == len(model["merges"]) + 1


def test_the_machine_is_described_well_enough_to_judge_figures():
    machine = describe_machine()
    assert machine["cores"] >= 1
    assert machine["memory_gib"] > 0
    assert "torch" in machine["packages"]
    assert json.loads(json.dumps(machine)) == machine
    assert machine["source"] == source_digest() != source_digest(("sdrt.export",))


def test_a_case_leaves_out_what_it_does_not_say():
    assert "scheduler" not in replace(CASE, scheduler=None).arguments()
