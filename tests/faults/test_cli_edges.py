"""Rarer ways to fail on the command line and in its stages: odd children, odd terminals, hang-ups, late refusals."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdrt import errors, worker
from sdrt.cli import run_command
from sdrt.errors import BuildError, Cancelled, SdrtError
from sdrt.worker import run_child

SDRT = str(Path(sys.executable).with_name("sdrt"))
KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, SdrtError)]


@pytest.fixture
def child(tmp_path, monkeypatch):
    """A function that makes a stage of the given body; its module name is returned."""
    path = [str(tmp_path), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path).rstrip(os.pathsep))

    def make(body, *, prelude=""):
        source = [
            "import os, signal, sys, time",
            "from sdrt.errors import *",
            "from sdrt.worker import serve",
            prelude,
            "def main(progress):",
            textwrap.indent(textwrap.dedent(body).strip(), "    "),
            "if __name__ == '__main__':",
            "    sys.exit(serve(main))",
        ]
        (tmp_path / "odd_stage.py").write_text("\n".join(source))
        return "odd_stage"

    return make


def ended(pid):
    """Whether a process is gone; it may need a moment."""
    for _ in range(200):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


# children


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_each_error_of_the_tree_crosses_the_pipe(child, kind):
    with pytest.raises(SdrtError) as caught:
        run_child(child(f"raise {kind.__name__}('what happened: ½', hint='what to do')"), [])
    assert type(caught.value) is kind
    assert (caught.value.message, caught.value.hint) == ("what happened: ½", "what to do")


@pytest.mark.parametrize("name", ["StrangeError", "__builtins__", "__doc__"])
def test_an_error_of_an_unknown_kind_is_still_an_error(child, name):
    with pytest.raises(SdrtError, match="odd"):
        run_child(child(f"raise type({name!r}, (SdrtError,), {{}})('odd', hint='none')"), [])


def test_what_is_printed_before_the_child_serves_does_not_disturb(child):
    assert run_child(child("return 1", prelude="print('hello', flush=True); print('[7]', flush=True)"), []) == 1


@pytest.mark.parametrize("code", [0, 1, 3])
def test_a_child_that_ends_without_a_result_has_failed_whatever_its_exit_code(child, code):
    with pytest.raises(BuildError, match=f"ended with code {code}"):
        run_child(child(f"os._exit({code})"), [])


def test_a_child_that_does_not_stop_is_killed(child, monkeypatch):
    monkeypatch.setattr(worker, "_GRACE_SECONDS", 0.3)
    body = "signal.signal(signal.SIGTERM, signal.SIG_IGN); progress('pid', os.getpid(), 0); time.sleep(60)"
    pids = []

    def interrupt(stage, done, total):
        pids.append(done)
        raise KeyboardInterrupt

    with pytest.raises(Cancelled):
        run_child(child(body), [], interrupt)
    assert ended(pids[0])


def test_a_failing_progress_bar_stops_the_child(child):
    pids = []

    def fail(stage, done, total):
        pids.append(done)
        raise OSError("the terminal has gone")

    with pytest.raises(OSError, match="gone"):
        run_child(child("progress('pid', os.getpid(), 0); time.sleep(60)"), [], fail)
    assert ended(pids[0])


# refusals that must not wait for the export


@pytest.mark.parametrize(
    ("sizes", "error"),
    [
        ("64x64,76x64", "multiples of 8"),
        ("64..100", "multiples of 8"),
        ("64x64..100x128", "multiples of 8"),
        ("128..64", "ends below its start"),
        ("64x128..128x64", "ends below its start"),
    ],
)
def test_no_stage_starts_for_sizes_that_it_would_refuse(tiny_checkpoint, tmp_path, capsys, monkeypatch, sizes, error):
    monkeypatch.setattr("sdrt.cli.build.run_stage", lambda *_: pytest.fail("a stage was started"))
    code = run_command(["build", str(tiny_checkpoint), "--out", str(tmp_path / "x"), "--sizes", sizes])
    assert code == 2
    assert error in capsys.readouterr().err


# input


@pytest.mark.parametrize("start", [b"PK\x03\x04", b"PK\x05\x06", b"\x80\x04\x95", b"\x93NUMPY"])
def test_a_file_that_only_begins_like_an_array_is_refused(tiny_bundle, tmp_path, capsys, start):
    path = tmp_path / "l.npy"
    path.write_bytes(start + b"\0" * 60)
    assert run_command(["decode", str(tiny_bundle), str(path), "--out", str(tmp_path / "o.png")]) == 2
    assert "l.npy holds no" in capsys.readouterr().err


def test_a_picture_instead_of_latents_is_called_no_npy_file(tiny_bundle, tmp_path, capsys):
    path = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(path)
    assert run_command(["decode", str(tiny_bundle), str(path), "--out", str(tmp_path / "o.png")]) == 2
    error = capsys.readouterr().err
    assert "a.png holds no latents: it is no .npy file" in error
    assert "pickle" not in error


def test_an_archive_of_arrays_is_no_latents(tiny_bundle, tmp_path, capsys):
    path = tmp_path / "l.npz"
    np.savez(path, latents=np.zeros((1, 4, 8, 8), np.float32))
    assert run_command(["decode", str(tiny_bundle), str(path), "--out", str(tmp_path / "o.png")]) == 2
    assert "l.npz" in capsys.readouterr().err


def test_the_diffusers_name_of_the_number_of_images_is_an_alias(tiny_bundle, tmp_path, capsys):
    out = str(tmp_path / "a.png")
    few = ["--steps", "1", "--size", "64x64", "--num-images-per-prompt", "2"]
    assert run_command(["run", str(tiny_bundle), "a red circle", *few, "--out", out]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-1.png", "a-2.png"]


def test_an_onnx_folder_tells_its_pixel_grid(tiny_export, capsys):
    assert run_command(["inspect", str(tiny_export), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["size_multiple"] == 8


# the doctor


def test_the_doctor_fails_where_no_backend_is_installed(capsys, monkeypatch):
    monkeypatch.setattr("sdrt.cli.doctor.find_spec", lambda name: None)
    assert run_command(["doctor", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["healthy"] is False
    assert "pip install" in found["backends"]["openvino"]["text"]


def test_a_backend_that_does_not_load_is_told_with_its_reason(capsys, monkeypatch):
    def broken(name):
        raise ImportError("libtbb.so.12: cannot open shared object file")

    monkeypatch.setattr("sdrt.cli.doctor.import_module", broken)
    assert run_command(["doctor", "--json"]) == 1
    assert "libtbb" in json.loads(capsys.readouterr().out)["backends"]["openvino"]["text"]


# what stdout and stderr are


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", [["doctor"], ["doctor", "--json"], ["--version"], ["--help"]])
def test_a_full_disk_behind_stdout_is_told(arguments):
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([SDRT, *arguments], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == ["error", "hint"]


@pytest.mark.parametrize("arguments", [["doctor", "--json"], ["verify", "nowhere", "--json"], ["verify", "nowhere"]])
def test_a_reader_that_has_gone_gets_no_traceback(arguments):
    ours, theirs = os.pipe()
    os.close(ours)
    done = subprocess.run([SDRT, *arguments], stdout=theirs, stderr=subprocess.PIPE, text=True)
    os.close(theirs)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


def test_a_terminal_that_knows_only_ascii_still_gets_the_table(tiny_bundle):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([SDRT, "inspect", str(tiny_bundle)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "vae_decoder" in done.stdout


# hanging up


def test_a_terminal_that_closes_during_a_build_leaves_nothing(tiny_checkpoint, tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    environment = {**os.environ, "SDRT_CACHE": str(tmp_path / "cache")}
    command = [SDRT, "build", str(tiny_checkpoint), "--out", str(work / "a.sdrt")]
    # A test run that was itself started with nohup hands that on, and the build would go on, as it should then.
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )
    while process.poll() is None and not any(work.iterdir()):
        time.sleep(0.05)
    time.sleep(1)
    process.send_signal(signal.SIGHUP)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130, error
    assert error.splitlines()[-2] == "error: cancelled"
    assert list(work.iterdir()) == []


def test_a_build_under_nohup_goes_on_when_the_terminal_closes(tiny_export, tmp_path):
    command = ["nohup", SDRT, "build", str(tiny_export), "--out", str(tmp_path / "a.sdrt")]
    process = subprocess.Popen([*command, "--precision", "fp32"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(10):
        time.sleep(0.1)
        process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=120) == 0
