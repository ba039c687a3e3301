"""Whatever goes wrong on the command line is one `error:` and one `hint:`, and leaves nothing behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from sdrt.cli import run_command
from sdrt.image import save_png

SDRT = str(Path(sys.executable).with_name("sdrt"))


def failed(capsys, code, *arguments):
    """The error line and the hint line of a command that must fail with this code."""
    assert run_command([str(argument) for argument in arguments]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 2, captured.err
    assert lines[0].startswith("error: ")
    assert lines[1].startswith("hint: ")
    return lines


RUN = {
    "steps of zero": (("--steps", 0), "0"),
    "negative steps": (("--steps", -3), "-3"),
    "steps that are no number": (("--steps", "three"), "--steps"),
    "NaN guidance": (("--guidance-scale", "nan"), "nan"),
    "infinite guidance": (("--cfg-scale", "inf"), "inf"),
    "a negative seed": (("--seed", -1), "-1"),
    "a seed too large": (("--seed", 2**64), str(2**64)),
    "a size off the grid": (("--size", "65x64"), "65x64"),
    "a size outside the profile": (("--size", "4096x4096"), "4096x4096"),
    "a size that is none": (("--size", "big"), "big"),
    "two sizes": (("--size", "64x64", "--width", 64), "--size"),
    "an unknown scheduler": (("--scheduler", "eulr"), "eulr"),
    "steps beyond the model's": (("--steps", 1001), "1001"),
    "timesteps that do not descend": (("--scheduler", "ddpm", "--timesteps", "20,900"), "20 before 900"),
    "timesteps that are no numbers": (("--timesteps", "900,x"), "900,x"),
    "timesteps outside the model's": (("--scheduler", "ddpm", "--timesteps", "1000,20"), "1000"),
    "timesteps for a scheduler that takes none": (("--scheduler", "lms", "--timesteps", "900,20"), "timesteps"),
    "steps beside timesteps": (("--scheduler", "ddpm", "--timesteps", "900,20", "--steps", 3), "3"),
    "timesteps beside sigmas": (("--scheduler", "euler", "--timesteps", "900,20", "--sigmas", "9,0"), "both"),
    "sigmas that do not descend": (("--scheduler", "euler", "--sigmas", "1,9,0"), "1 before 9"),
    "eta for a scheduler without": (("--scheduler", "euler", "--eta", 0.5), "eta is 0.5"),
    "eta above one": (("--scheduler", "ddim", "--eta", 1.5), "1.5"),
    "a scheduler for another kind of noise": (("--scheduler", "edm_euler"), "edm_euler"),
    "rescaling by more than all": (("--guidance-rescale", 1.5), "1.5"),
    "seeds that are no numbers": (("--seed", "1,b"), "1,b"),
    "as many seeds as images": (("--seed", "1,2", "-n", 3), "2 seeds"),
    "an image that is not there": (("--image", "/nowhere.png"), "/nowhere.png"),
    "a strength without an image": (("--strength", 0.5), "there is no image"),
    "a variation of no seed": (("--variation-strength", 0.5), "no other seed"),
    "no images": (("-n", 0), "0"),
    "too many images": (("-n", 1000), "1000"),
    "no threads": (("--threads", 0), "--threads"),
    "an unknown option": (("--stepz", 3), "--stepz"),
}


@pytest.mark.parametrize(("options", "named"), RUN.values(), ids=RUN)
def test_a_bad_argument_of_run(options, named, tiny_bundle, tmp_path, capsys):
    error, _ = failed(capsys, 2, "run", tiny_bundle, "x", *options, "--out", tmp_path / "a.png")
    assert named in error
    assert list(tmp_path.iterdir()) == []


def test_a_typo_is_answered_with_a_suggestion(tiny_bundle, capsys):
    assert "build" in failed(capsys, 2, "buidl")[1]
    assert "--steps" in failed(capsys, 2, "run", tiny_bundle, "x", "--out", "a.png", "--stepz", 3)[1]
    assert "euler" in failed(capsys, 2, "run", tiny_bundle, "x", "--out", "/tmp/none.png", "--scheduler", "eulr")[1]


@pytest.mark.parametrize(
    ("arguments", "error", "hint"),
    [
        (("--steps", "abc"), "invalid value for --steps: it must be a whole number", "see: sdrt run --help"),
        (("--threads", 0), "invalid value for --threads: it must be greater than or equal to 1", "sdrt run --help"),
        (("--sched", "ddim"), "no such option: --sched", "did you mean --scheduler or --seed or --threads?"),
        (("--out", "."), "the output . does not end in .png", "name it so: --out picture.png"),
        (("--out", ".", "-n", 2), "--out is '.', a folder", "name a file: --out picture.png"),
        (("--out", "some/a.jpg"), "the output some/a.jpg does not end in .png", "name it so: --out some/a.png"),
        (("--out", "v1.5"), "the output v1.5 does not end in .png", "name it so: --out v1.5.png"),
    ],
)
def test_a_bad_option_is_told_in_plain_words_and_how_to_write_it(arguments, error, hint, tiny_bundle, capsys):
    said = failed(capsys, 2, "run", tiny_bundle, "x", "--out", "a.png", *arguments)
    assert said[0] == f"error: {error}"
    assert hint in said[1]


@pytest.mark.parametrize("command", ["run", "decode", "verify"])
def test_an_embedded_model_in_the_place_of_a_bundle_is_to_be_built(command, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = {"run": ("x", "--out", "a.png"), "decode": ("l.npy", "--out", "a.png"), "verify": ()}[command]
    assert "sdrt build shapes --out shapes.sdrt" in failed(capsys, 1, command, "shapes", *arguments)[1]


def test_a_missing_prompt_or_output(tiny_bundle, tmp_path, capsys):
    assert "prompt" in failed(capsys, 2, "run", tiny_bundle, "--out", tmp_path / "a.png")[0]
    assert "--out" in failed(capsys, 2, "run", tiny_bundle, "x")[0]


def test_an_existing_output_is_kept(tiny_bundle, tmp_path, capsys):
    out = tmp_path / "a.png"
    out.write_text("mine")
    assert "exists already" in failed(capsys, 1, "run", tiny_bundle, "x", "--out", out)[0]
    assert out.read_text() == "mine"


def test_one_existing_output_of_several_stops_all(tiny_bundle, tmp_path, capsys):
    (tmp_path / "a-2.png").write_text("mine")
    failed(capsys, 1, "run", tiny_bundle, "x", "-n", 3, "--steps", 1, "--out", tmp_path / "a.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a-2.png"]


@pytest.mark.parametrize("out", [".", "/", ""])
@pytest.mark.parametrize("options", [(), ("-n", 2), ("--grid",)])
def test_an_output_without_a_name(out, options, tiny_bundle, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    failed(capsys, 2, "run", tiny_bundle, "x", *options, "--out", out)
    assert list(tmp_path.iterdir()) == []


def test_a_precision_that_the_backend_lacks_is_refused_before_anything_is_exported(tiny_checkpoint, tmp_path, capsys):
    error, hint = failed(capsys, 1, "build", tiny_checkpoint, "--precision", "fp16", "--out", tmp_path / "a.sdrt")
    assert error == "error: openvino cannot build fp16 on this machine"
    assert "auto" in hint
    assert list(tmp_path.iterdir()) == []


def test_bisecting_names_no_provider(tiny_bundle, tiny_checkpoint, capsys):
    error, _ = failed(capsys, 2, "verify", tiny_bundle, "--bisect", tiny_checkpoint, "--provider", "cuda")
    assert "--provider was given beside --bisect" in error


@pytest.mark.parametrize(("name", "code"), [("a.jpg", 2), ("nowhere/a.png", 1)])
def test_an_output_that_cannot_be_written(name, code, tiny_bundle, tmp_path, capsys):
    failed(capsys, code, "run", tiny_bundle, "x", "--out", tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_while_saving_removes_the_images_before_it(tiny_bundle, tmp_path, capsys, monkeypatch):
    import sdrt.image

    def full(image, path, parameters, *, overwrite=False):
        if path.name == "a-3.png":
            raise OSError(28, "No space left on device", str(path))
        save_png(image, path, parameters, overwrite=overwrite)

    monkeypatch.setattr(sdrt.image, "save_png", full)
    error, _ = failed(capsys, 1, "run", tiny_bundle, "x", "-n", 3, "--steps", 1, "--out", tmp_path / "a.png")
    assert "disk is full" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [("inspect",), ("verify",), ("run", "x", "--out", "a.png")])
def test_what_is_no_bundle(command, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name, *rest = command
    failed(capsys, 1, name, tmp_path / "nowhere", *rest)
    (tmp_path / "empty").mkdir()
    failed(capsys, 1, name, tmp_path / "empty", *rest)


def test_a_model_where_a_bundle_is_needed(tiny_checkpoint, tmp_path, capsys):
    _, hint = failed(capsys, 1, "run", tiny_checkpoint, "x", "--out", tmp_path / "a.png")
    assert "sdrt build" in hint


def test_a_flipped_byte_in_any_file_is_found_by_verify(tiny_bundle, tmp_path, capsys):
    copy = tmp_path / "copy.sdrt"
    for path in sorted(item for item in tiny_bundle.rglob("*") if item.is_file()):
        shutil.copytree(tiny_bundle, copy)
        target = copy / path.relative_to(tiny_bundle)
        data = bytearray(target.read_bytes())
        data[len(data) // 2] ^= 1
        target.write_bytes(data)
        failed(capsys, 1, "verify", copy)
        shutil.rmtree(copy)


def test_a_golden_image_that_is_not_met_is_a_parity_error(tiny_bundle, tmp_path, capsys):
    import io
    from dataclasses import replace

    from sdrt.bundle import Bundle, record_file, write_manifest

    copy = tmp_path / "copy.sdrt"
    shutil.copytree(tiny_bundle, copy)
    bundle = Bundle.open(copy)
    golden = bundle.manifest.golden
    path = bundle.file(golden.file)
    image = np.load(path)["image"]
    image[0, 0, 0] ^= 64
    buffer = io.BytesIO()
    np.savez_compressed(buffer, image=image)
    path.unlink()
    path.write_bytes(buffer.getvalue())
    (copy / "bundle.json").unlink()
    write_manifest(copy, replace(bundle.manifest, golden=replace(golden, file=record_file(copy, path))))
    assert "golden image" in failed(capsys, 1, "verify", copy)[0]


def damaged_latents(folder):
    good = folder / "good.npy"
    np.save(good, np.zeros((1, 4, 8, 8), np.float32))
    data = good.read_bytes()
    np.save(folder / "nan.npy", np.full((1, 4, 8, 8), np.nan, np.float32))
    np.save(folder / "shape.npy", np.zeros((4, 8, 8), np.float32))
    np.save(folder / "channels.npy", np.zeros((1, 3, 8, 8), np.float32))
    np.save(folder / "integers.npy", np.zeros((1, 4, 8, 8), np.int64))
    np.save(folder / "large.npy", np.zeros((1, 4, 520, 520), np.float32))  # of more pixels than are read
    np.save(folder / "objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    (folder / "cut.npy").write_bytes(data[: len(data) // 2])
    (folder / "head.npy").write_bytes(data[:20])
    (folder / "empty.npy").write_bytes(b"")
    (folder / "huge.npy").write_bytes(data.replace(b"(1, 4, 8, 8)", b"(9999999999)"))
    good.unlink()
    return sorted(folder.iterdir())


def test_damaged_latents(tiny_bundle, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for path in [*damaged_latents(tmp_path / "in"), tmp_path / "nowhere.npy"]:
        error, _ = failed(capsys, 2, "decode", tiny_bundle, path, "--out", tmp_path / "a.png")
        assert error
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_an_image_that_sdrt_did_not_draw_is_not_drawn_again(tiny_bundle, tmp_path, capsys):
    from PIL import Image

    Image.new("RGB", (64, 64)).save(tmp_path / "plain.png")
    failed(capsys, 2, "run", tiny_bundle, "--from-image", tmp_path / "plain.png", "--out", tmp_path / "a.png")
    hostile = {"prompt": ["x"], "seed": "0", "scheduler": 3, "height": None}
    for name, value in hostile.items():
        path = tmp_path / f"{name}.png"
        save_png(Image.new("RGB", (64, 64)), path, {"prompt": "x", "num_inference_steps": 1, name: value})
        if value is None:
            continue
        run = ("run", str(tiny_bundle), "--from-image", str(path), "--out", str(tmp_path / "a.png"))
        assert run_command(run) == 2
        assert "error: " in capsys.readouterr().err
    assert not (tmp_path / "a.png").exists()


BUILD = {
    "a size that is none": (("--sizes", "64y64"), 2),
    "a size off the grid": (("--sizes", "65x64"), 2),
    "two ranges": (("--sizes", "64..128..256"), 2),
    "an empty size": (("--sizes", "0x64"), 2),
    "no batch": (("--batch", "0"), 2),
    "a batch that is none": (("--batch", "many"), 2),
    "an unknown backend": (("--backend", "tensorflow"), 2),
    "an unknown precision": (("--precision", "fp8"), 2),
}


@pytest.mark.parametrize(("options", "code"), BUILD.values(), ids=BUILD)
def test_a_bad_argument_of_build_is_refused_before_any_work(options, code, tiny_checkpoint, tmp_path, capsys):
    began = time.monotonic()
    failed(capsys, code, "build", tiny_checkpoint, "--out", tmp_path / "a.sdrt", *options)
    assert list(tmp_path.iterdir()) == []
    assert time.monotonic() - began < 5


def test_a_missing_or_incomplete_checkpoint(tiny_checkpoint, tmp_path, capsys):
    out = tmp_path / "a.sdrt"
    failed(capsys, 1, "build", tmp_path / "nowhere", "--out", out)
    half = tmp_path / "half"
    shutil.copytree(tiny_checkpoint, half)
    next((half / "unet").glob("*.safetensors")).unlink()
    failed(capsys, 1, "build", half, "--out", out)
    (half / "model_index.json").unlink()
    failed(capsys, 1, "build", half, "--out", out)
    assert [path.name for path in tmp_path.iterdir()] == ["half"]


def test_an_existing_bundle_is_kept(tiny_checkpoint, tmp_path, capsys):
    (tmp_path / "a.sdrt").mkdir()
    failed(capsys, 1, "build", tiny_checkpoint, "--out", tmp_path / "a.sdrt")


def test_without_torch_the_hint_installs_it(tiny_checkpoint, tmp_path, capsys, monkeypatch):
    import sdrt.cli.stages

    monkeypatch.setattr(sdrt.cli.stages, "find_spec", lambda name: None)
    error, hint = failed(capsys, 1, "build", tiny_checkpoint, "--out", tmp_path / "a.sdrt")
    assert "torch" in error
    assert 'pip install "sdrt[export]"' in hint


def test_with_json_the_error_is_an_object_too(tmp_path, capsys):
    assert run_command(["verify", str(tmp_path), "--json"]) == 1
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert report["error"]["kind"] == "BundleError"
    assert set(report["error"]) == {"kind", "message", "hint"}
    assert captured.err.startswith("error: ")


def test_a_fault_of_ours_is_no_traceback_unless_asked_for(tmp_path, capsys, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("surprise\nin two lines")

    monkeypatch.setattr("sdrt.bundle.Bundle.open", broken)
    assert "surprise in two lines" in failed(capsys, 1, "verify", tmp_path)[0]
    monkeypatch.setenv("SDRT_DEBUG", "1")
    assert run_command(["verify", str(tmp_path)]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_names_from_files_cannot_steer_the_terminal(tmp_path, capsys):
    error, _ = failed(capsys, 1, "verify", tmp_path / "\x1b[31mred\x07")
    assert "\x1b" not in error
    assert "\x07" not in error


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_in_the_middle_of_a_run_leaves_nothing(stop, tiny_bundle, tmp_path):
    command = [SDRT, "run", str(tiny_bundle), "x", "--steps", "900", "-n", "16", "--out", str(tmp_path / "a.png")]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    time.sleep(3)
    os.kill(child.pid, stop)
    out, error = child.communicate(timeout=60)
    assert child.returncode == 130
    assert error.splitlines()[0] == "error: cancelled"
    assert len(error.splitlines()) == 2
    assert out == ""
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_in_the_middle_of_a_build_leaves_nothing(tiny_checkpoint, tmp_path):
    work, cache = tmp_path / "work", tmp_path / "cache"
    work.mkdir()
    command = [SDRT, "build", str(tiny_checkpoint), "--out", str(work / "a.sdrt")]
    environment = {**os.environ, "SDRT_CACHE": str(cache)}
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    while child.poll() is None and not any(work.glob(".a.sdrt.*")):
        time.sleep(0.05)
    time.sleep(1)
    child.send_signal(signal.SIGINT)
    error = child.communicate(timeout=60)[1]
    assert child.returncode == 130, error
    assert error.splitlines()[-2] == "error: cancelled"
    assert list(work.iterdir()) == []
