"""A build that dies at any moment leaves no half bundle, and the next one goes on where it was."""

import json
import os
import resource
import signal
import subprocess
import sys
import time

import pytest

from sdrt.bundle import Bundle, verify_files
from sdrt.errors import Cancelled, SdrtError
from sdrt.worker import run_child

# Which progress report to die at, and how long after it.
MOMENTS = [(0, 0.0), (1, 0.0), (2, 0.02), (4, 0.05), (6, 0.0), (8, 0.03), (9, 0.0), (10, 0.01)]


def arguments(onnx_folder, out):
    return [str(onnx_folder), str(out), "--precision", "fp32", "--sizes", "64..128", "--threads", "1"]


def start(onnx_folder, out, cache, **options):
    command = [sys.executable, "-m", "sdrt.engines", *arguments(onnx_folder, out)]
    environment = {**os.environ, "SDRT_CACHE": str(cache)}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, **options
    )


def wait_for_reports(child, count):
    """Read the child's output until it has made `count` progress reports, or ended."""
    for line in child.stdout:
        count -= "progress" in json.loads(line)
        if count < 0:
            return


def engine_inodes(folder):
    return {path.stat().st_ino for path in folder.rglob("model.*")}


def assert_absent_or_whole(out):
    if out.exists():
        verify_files(Bundle.open(out))


def test_killed_at_any_moment_there_is_no_half_bundle_and_the_next_build_succeeds(tiny_export, tmp_path):
    out, cache = tmp_path / "out" / "a.sdrt", tmp_path / "cache"
    out.parent.mkdir()
    finished = set()
    for report, delay in MOMENTS:
        child = start(tiny_export, out, cache)
        wait_for_reports(child, report)
        time.sleep(delay)
        child.kill()
        child.communicate()
        assert_absent_or_whole(out)
        assert finished <= engine_inodes(cache), "a finished engine was lost or built again"
        finished = {inode for entry in cache.glob("entries/*/*") for inode in engine_inodes(entry) if is_whole(entry)}
        if out.exists():
            break
    child = start(tiny_export, out, cache)
    child.communicate()
    assert child.returncode in (0, 1)
    verify_files(Bundle.open(out))
    assert finished
    assert finished <= engine_inodes(out)


def is_whole(entry):
    return not entry.name.startswith(".") and (entry / "entry.json").is_file()


@pytest.mark.parametrize("report", [0, 2, 7])
def test_ctrl_c_ends_the_build_with_one_error_and_nothing_left(tiny_export, tmp_path, report):
    out = tmp_path / "out" / "a.sdrt"
    out.parent.mkdir()
    child = start(tiny_export, out, tmp_path / "cache")
    wait_for_reports(child, report)
    child.send_signal(signal.SIGINT)
    last = [line for line in child.communicate()[0].splitlines() if line][-1]
    assert json.loads(last)["error"]["kind"] == "Cancelled"
    assert child.returncode == 130
    assert list(out.parent.iterdir()) == []


def test_the_parents_ctrl_c_stops_the_child(tiny_export, tmp_path, monkeypatch):
    monkeypatch.setenv("SDRT_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "out" / "a.sdrt"
    out.parent.mkdir()

    def interrupt(stage, done, total):
        raise KeyboardInterrupt

    with pytest.raises(Cancelled):
        run_child("sdrt.engines", arguments(tiny_export, out), interrupt)
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize("limit", [20_000, 300_000])
def test_files_that_cannot_be_written_whole_are_an_error_and_leave_nothing(tiny_export, tmp_path, limit):
    """A limit on the size of files stands for a full disk: writes fail in the middle, also those of the backend."""
    out, cache = tmp_path / "out" / "a.sdrt", tmp_path / "cache"
    out.parent.mkdir()

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    child = start(tiny_export, out, cache, preexec_fn=limited)
    messages = [json.loads(line) for line in child.communicate()[0].splitlines()]
    assert child.returncode == 1
    assert messages[-1]["error"]["kind"] == "OutputError"
    assert messages[-1]["error"]["hint"]
    assert list(out.parent.iterdir()) == []
    child = start(tiny_export, out, cache)
    child.communicate()
    assert child.returncode == 0, "what was cut short must not be taken from the cache"
    verify_files(Bundle.open(out))


def test_two_builds_of_the_same_model_at_once_both_end_well(tiny_export, tmp_path):
    outs = [tmp_path / "a.sdrt", tmp_path / "b.sdrt"]
    children = [start(tiny_export, out, tmp_path / "cache") for out in outs]
    for child in children:
        child.communicate()
    assert [child.returncode for child in children] == [0, 0]
    for out in outs:
        verify_files(Bundle.open(out))


def test_two_builds_of_one_bundle_leave_one_whole_bundle(tiny_export, tmp_path):
    out = tmp_path / "a.sdrt"
    children = [start(tiny_export, out, tmp_path / "cache") for _ in range(2)]
    for child in children:
        child.communicate()
    assert 0 in [child.returncode for child in children]
    verify_files(Bundle.open(out))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.sdrt", "cache"]


def test_a_child_without_the_onnx_folder_reports_its_error(tmp_path):
    with pytest.raises(SdrtError, match="not a folder"):
        run_child("sdrt.engines", arguments(tmp_path / "nowhere", tmp_path / "a.sdrt"))
