"""The command line's ControlNets: what steers is given in files, remembered, asked for again, and listed."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from sdrt.cli import run_command
from sdrt.cli.pictures import check_same_picture, open_pictures
from sdrt.controls import shown_sha256
from sdrt.errors import ExportError, RequestError
from sdrt.image import read_parameters
from sdrt.tasks.pictures import pixels_sha256


def sdrt(*arguments) -> int:
    return run_command([str(argument) for argument in arguments])


def drawn(capsys, *arguments):
    """The JSON object that a successful command prints."""
    assert sdrt(*arguments, "--json") == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def refused(capsys, *arguments) -> str:
    """The error and the hint of a command that is refused."""
    assert sdrt(*arguments) in (1, 2)
    return capsys.readouterr().err


@pytest.fixture
def controls(tmp_path):
    """Two pictures as files."""
    paths = [tmp_path / f"control-{index}.png" for index in range(2)]
    for index, path in enumerate(paths):
        Image.fromarray(np.random.default_rng(index).integers(0, 256, (64, 64, 3), np.uint8)).save(path)
    return paths


@pytest.fixture
def run(steered_bundle, tmp_path):
    """A function that gives the arguments of a run, and where it writes."""

    def arguments(*options, out="a.png"):
        return ("run", steered_bundle, "x", "--steps", 2, "--seed", 1, *options, "--out", tmp_path / out)

    return arguments


def test_what_steered_an_image_is_remembered_and_asked_for_again(controls, run, steered_bundle, tmp_path, capsys):
    given = ("--control-image", controls[0], "--control-image", controls[1])
    shares = ("--control-scale", 0.5, "--control-scale", 1.25, "--control-start", 0.5, "--control-end", 1)
    drawn(capsys, *run(*given, *shares))
    first = tmp_path / "a.png"
    parameters = read_parameters(first)
    hashes = [pixels_sha256(Image.open(path)) for path in controls]
    assert parameters["control_image_sha256"] == hashes
    assert parameters["controlnet_conditioning_scale"] == [0.5, 1.25]
    assert parameters["control_guidance_start"] == [0.5, 0.5]
    again = ("run", steered_bundle, "--from-image", first, "--out", tmp_path / "b.png")
    assert "name it with --control-image for each ControlNet" in refused(capsys, *again)
    assert sdrt(*again, *given) == 0
    assert (tmp_path / "b.png").read_bytes() == first.read_bytes()
    capsys.readouterr()
    assert sdrt(*again, "--force", *given[2:], *given[:2]) == 0
    assert "--control-image is not the picture of the time before" in capsys.readouterr().err


def test_a_controlnet_can_be_left_out_and_diffusers_names_are_aliases(controls, run, steered_bundle, tmp_path, capsys):
    shares = ("--controlnet-conditioning-scale", 2, "--control-guidance-start", 0, "--control-guidance-end", 1)
    drawn(capsys, *run("--control-image", "none", "--control-image", controls[1], *shares))
    parameters = read_parameters(tmp_path / "a.png")
    assert parameters["control_image_sha256"] == [None, pixels_sha256(Image.open(controls[1]))]
    assert parameters["controlnet_conditioning_scale"] == [2, 2]
    again = ("run", steered_bundle, "--from-image", tmp_path / "a.png", "--out", tmp_path / "b.png")
    assert sdrt(*again, "--control-image", "none", "--control-image", controls[1]) == 0
    assert "not the picture" not in capsys.readouterr().err
    assert (tmp_path / "b.png").read_bytes() == (tmp_path / "a.png").read_bytes()
    drawn(capsys, *run(out="plain.png"))
    assert "control_image_sha256" not in read_parameters(tmp_path / "plain.png")
    assert (tmp_path / "plain.png").read_bytes() != (tmp_path / "a.png").read_bytes()


REFUSED = {
    "one picture for two": (("--control-image", "0"), "--control-image lists 1, but this bundle has 2: rgb, bgr"),
    "three scales": (
        ("--control-image", "0", "--control-image", "1", *3 * ("--control-scale", 1)),
        "--control-scale lists 3, but this bundle has 2",
    ),
    "a picture that is not there": (("--control-image", "/nowhere.png", "--control-image", "0"), "/nowhere.png"),
    "none at all": (("--control-image", "none", "--control-image", "none"), "--control-image names no image"),
    "a scale alone": (("--control-scale", 0.5), "there is no --control-image"),
    "an end before the start": (
        ("--control-image", "0", "--control-image", "1", "--control-start", 0.7, "--control-end", 0.2),
        "--control-start is 0.7 and --control-end 0.2",
    ),
    "a scale that is no number": (("--control-scale", "much"), "--control-scale"),
}


@pytest.mark.parametrize(("options", "named"), REFUSED.values(), ids=REFUSED)
def test_a_bad_control_is_refused_before_any_work(options, named, controls, run, tmp_path, capsys):
    given = [controls[int(option)] if option in ("0", "1") else option for option in options]
    message = refused(capsys, *run(*given))
    assert named in message
    assert not (tmp_path / "a.png").exists()


def test_a_bundle_without_controlnets_says_how_to_build_one_with(controls, tiny_bundle, tmp_path, capsys):
    message = refused(capsys, "run", tiny_bundle, "x", "--control-image", controls[0], "--out", tmp_path / "a.png")
    assert "this bundle has no ControlNet" in message
    assert "sdrt build MODEL --controlnet FOLDER" in message


def test_an_array_is_read_from_a_file_and_known_again(tmp_path, capsys):
    values = np.random.default_rng(0).standard_normal((8, 8, 3)).astype(np.float32)
    np.save(tmp_path / "values.npy", values)
    fields = open_pictures({"control_image": [str(tmp_path / "values.npy"), "none"]})
    np.testing.assert_array_equal(fields["control_image"][0], values)
    check_same_picture({"control_image_sha256": [shown_sha256(values), None]}, fields)
    assert capsys.readouterr().err == ""
    np.save(tmp_path / "values.npy", values[0])
    with pytest.raises(RequestError, match=r"holds an array of shape \[8, 3\]"):
        open_pictures({"control_image": [str(tmp_path / "values.npy")]})


@pytest.mark.parametrize("hashes", ["x", 3, [[]], {"a": 1}], ids=str)
def test_what_an_image_remembers_of_controls_may_be_anything(hashes, controls, capsys):
    check_same_picture({"control_image_sha256": hashes}, open_pictures({"control_image": [*map(str, controls)]}))
    assert "not the picture of the time before" in capsys.readouterr().err


def test_inspect_lists_the_controlnets_of_a_bundle(steered_bundle, capsys):
    assert sdrt("inspect", steered_bundle) == 0
    assert re.search(r"^ *ControlNets +rgb, bgr$", capsys.readouterr().out, re.MULTILINE)


def test_build_exports_with_each_controlnet_in_order(tiny_checkpoint, tiny_controlnets, tmp_path, capsys, monkeypatch):
    started = []

    def stop(module, arguments, progress):
        started.append((module, arguments))
        raise ExportError("stopped here", hint="none")

    monkeypatch.setattr("sdrt.cli.build.run_stage", stop)
    first, second = tiny_controlnets
    given = ("--controlnet", second, "--controlnet", first)
    assert "stopped here" in refused(capsys, "build", tiny_checkpoint, *given, "--out", tmp_path / "a.sdrt")
    ((module, arguments),) = started
    assert module == "sdrt.export"
    at = arguments.index("--controlnet")
    assert arguments[at : at + 4] == ["--controlnet", str(second), "--controlnet", str(first)]


def test_a_controlnet_that_cannot_be_is_refused_before_the_stages(
    tiny_checkpoint, tiny_export, tiny_controlnets, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("sdrt.cli.build.run_stage", lambda *_: pytest.fail("a stage was started"))
    out = ("--out", tmp_path / "a.sdrt")
    message = refused(capsys, "build", tiny_export, "--controlnet", tiny_controlnets[0], *out)
    assert "is an ONNX folder, whose UNet is traced as it is" in message
    assert "python -m sdrt.export MODEL OUT --controlnet FOLDER" in message
    message = refused(capsys, "build", tiny_checkpoint, "--controlnet", tmp_path / "nowhere", *out)
    assert "there is no such folder" in message
    message = refused(capsys, "build", tiny_checkpoint, "--controlnet", tmp_path, *out)
    assert "it has no config.json" in message
    assert list(tmp_path.iterdir()) == []
