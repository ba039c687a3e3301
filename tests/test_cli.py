"""The command line at work on a tiny bundle: what it writes, prints and reproduces."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdrt.cli import run_command
from sdrt.image import read_parameters

SDRT = str(Path(sys.executable).with_name("sdrt"))


def sdrt(*arguments) -> int:
    return run_command([str(argument) for argument in arguments])


def drawn(capsys, *arguments):
    """The JSON object that a successful command prints, and nothing else on stdout."""
    assert sdrt(*arguments, "--json") == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def picture(tiny_bundle, tmp_path, capsys):
    out = tmp_path / "picture.png"
    drawn(capsys, "run", tiny_bundle, "a large red circle", "--steps", 2, "--seed", 0, "--out", out)
    return out


def test_run_writes_the_image_with_everything_that_made_it(picture):
    parameters = read_parameters(picture)
    assert parameters["prompt"] == "a large red circle"
    assert parameters["seed"] == 0
    assert parameters["num_inference_steps"] == 2
    assert Image.open(picture).size == (parameters["width"], parameters["height"])


def test_an_image_is_reproduced_from_itself(picture, tiny_bundle, tmp_path):
    again = tmp_path / "again.png"
    assert sdrt("run", tiny_bundle, "--from-image", picture, "--out", again) == 0
    assert again.read_bytes() == picture.read_bytes()


def test_options_win_over_the_image_that_is_drawn_again(picture, tiny_bundle, tmp_path):
    again = tmp_path / "again.png"
    assert sdrt("run", tiny_bundle, "other", "--from-image", picture, "--seed", 5, "--out", again) == 0
    parameters = read_parameters(again)
    assert (parameters["prompt"], parameters["seed"], parameters["num_inference_steps"]) == ("other", 5, 2)


def test_several_images_are_numbered_and_each_is_reproduced_alone(tiny_bundle, tmp_path, capsys):
    options = ("--steps", 1, "--seed", 3, "--num-images", 3, "--grid", "--out", tmp_path / "many.png")
    result = drawn(capsys, "run", tiny_bundle, "x", *options)
    names = [Path(image["path"]).name for image in result["images"]]
    assert names == ["many-1.png", "many-2.png", "many-3.png"]
    assert Path(result["grid"]).name == "many-grid.png"
    assert [image["parameters"]["seed"] for image in result["images"]] == [3, 4, 5]
    again = tmp_path / "again.png"
    assert sdrt("run", tiny_bundle, "--from-image", tmp_path / "many-2.png", "--out", again) == 0
    np.testing.assert_array_equal(np.asarray(Image.open(again)), np.asarray(Image.open(tmp_path / "many-2.png")))


def test_the_grid_reproduces_all_of_its_images(tiny_bundle, tmp_path):
    assert sdrt("run", tiny_bundle, "x", "--steps", 1, "-n", 2, "--grid", "--out", tmp_path / "a.png") == 0
    assert sdrt("run", tiny_bundle, "--from-image", tmp_path / "a-grid.png", "--out", tmp_path / "b.png") == 0
    for number in (1, 2):
        assert (tmp_path / f"a-{number}.png").read_bytes() == (tmp_path / f"b-{number}.png").read_bytes()


def test_a_seed_for_each_image_and_the_grid_remembers_them(tiny_bundle, tmp_path, capsys):
    options = ("--steps", 1, "--seed", "9,4", "--grid", "--out", tmp_path / "a.png")
    assert drawn(capsys, "run", tiny_bundle, "x", *options)["seeds"] == [9, 4]
    assert drawn(capsys, "run", tiny_bundle, "--from-image", tmp_path / "a-grid.png", "--out", tmp_path / "b.png")
    for number in (1, 2):
        assert (tmp_path / f"a-{number}.png").read_bytes() == (tmp_path / f"b-{number}.png").read_bytes()


@pytest.mark.parametrize(
    ("options", "remembered"),
    [
        (("--scheduler", "ddpm", "--timesteps", "900,500,20"), {"timesteps": [900, 500, 20], "num_inference_steps": 3}),
        (("--scheduler", "euler", "--sigmas", "14,3,0"), {"sigmas": [14, 3, 0], "num_inference_steps": 2}),
        (("--scheduler", "tcd", "--steps", 3, "--eta", 0.3), {"eta": 0.3}),
        (("--steps", 2, "--guidance-rescale", 0.7), {"guidance_rescale": 0.7}),
    ],
)
def test_what_a_scheduler_was_asked_is_remembered(options, remembered, tiny_bundle, tmp_path, capsys):
    first, again = tmp_path / "first.png", tmp_path / "again.png"
    drawn(capsys, "run", tiny_bundle, "x", "--seed", 1, *options, "--out", first)
    assert remembered.items() <= read_parameters(first).items()
    assert sdrt("run", tiny_bundle, "--from-image", first, "--out", again) == 0
    assert again.read_bytes() == first.read_bytes()


def test_new_steps_take_the_place_of_remembered_timesteps(tiny_bundle, tmp_path, capsys):
    first, again = tmp_path / "first.png", tmp_path / "again.png"
    drawn(capsys, "run", tiny_bundle, "x", "--scheduler", "ddpm", "--timesteps", "900,20", "--out", first)
    drawn(capsys, "run", tiny_bundle, "--from-image", first, "--steps", 3, "--out", again)
    parameters = read_parameters(again)
    assert (parameters["num_inference_steps"], parameters["timesteps"]) == (3, None)


def test_another_scheduler_does_not_remember_what_only_the_first_could_do(tiny_bundle, tmp_path, capsys):
    first, again = tmp_path / "first.png", tmp_path / "again.png"
    drawn(capsys, "run", tiny_bundle, "x", "--scheduler", "ddim", "--steps", 2, "--eta", 0.5, "--out", first)
    drawn(capsys, "run", tiny_bundle, "--from-image", first, "--scheduler", "euler", "--out", again)
    assert (read_parameters(again)["eta"], read_parameters(again)["num_inference_steps"]) == (0, 2)


def test_options_without_effect_are_told(tiny_bundle, tmp_path, capsys):
    options = ("--steps", 1, "--guidance-scale", 1, "--guidance-rescale", 0.5, "--out", tmp_path / "a.png")
    assert "guidance_rescale did nothing" in drawn(capsys, "run", tiny_bundle, "x", *options)["warnings"][0]


def test_an_image_is_what_is_begun_with(picture, tiny_bundle, tmp_path, capsys):
    first, again = tmp_path / "first.png", tmp_path / "again.png"
    options = ("--image", picture, "--strength", 0.5, "--steps", 4, "--seed", 2)
    drawn(capsys, "run", tiny_bundle, "x", *options, "--out", first)
    parameters = read_parameters(first)
    assert (parameters["strength"], len(parameters["image_sha256"])) == (0.5, 64)
    assert sdrt("run", tiny_bundle, "--from-image", first, "--image", picture, "--out", again) == 0
    assert again.read_bytes() == first.read_bytes()
    assert sdrt("run", tiny_bundle, "--from-image", first, "--out", tmp_path / "other.png") == 2
    assert "--image" in capsys.readouterr().err


def test_another_image_to_begin_with_is_told(picture, tiny_bundle, tmp_path, capsys):
    first = tmp_path / "first.png"
    drawn(capsys, "run", tiny_bundle, "x", "--image", picture, "--steps", 2, "--out", first)
    assert sdrt("run", tiny_bundle, "--from-image", first, "--image", first, "--out", tmp_path / "b.png") == 0
    assert "not the picture of the time before" in capsys.readouterr().err


def test_pictures_of_the_time_before_are_asked_for_all_at_once(tiny_bundle, tmp_path, capsys):
    from sdrt.image import save_png

    first = tmp_path / "first.png"
    hashes = {"image_sha256": "a", "mask_image_sha256": "b"}
    save_png(Image.new("RGB", (64, 64)), first, {"prompt": "x", **hashes})
    assert sdrt("run", tiny_bundle, "--from-image", first, "--out", tmp_path / "again.png") == 2
    error = capsys.readouterr().err
    assert "the image was made with 2 pictures that it does not hold" in error
    assert "name them with --image and --mask\n" in error


def test_every_field_of_a_request_is_remembered_but_its_pictures():
    from sdrt.cli.pictures import PICTURES
    from sdrt.cli.run import REQUEST_FIELDS
    from sdrt.request import Request

    assert {*REQUEST_FIELDS, *PICTURES} == set(Request.__dataclass_fields__)


def test_another_margin_makes_another_canvas(picture, tiny_bundle, tmp_path, capsys):
    first, again = tmp_path / "first.png", tmp_path / "again.png"
    drawn(capsys, "run", tiny_bundle, "x", "--image", picture, "--outpaint", "right=16", "--steps", 2, "--out", first)
    options = ("--from-image", first, "--image", picture, "--outpaint", "right=32", "--out", again)
    drawn(capsys, "run", tiny_bundle, *options)
    width, height = Image.open(picture).size
    assert Image.open(first).size == (width + 16, height)
    assert Image.open(again).size == (width + 32, height)


def test_another_picture_makes_another_canvas(picture, tiny_bundle, tmp_path, capsys):
    first, again, wide = (tmp_path / name for name in ("first.png", "again.png", "wide.png"))
    drawn(capsys, "run", tiny_bundle, "x", "--image", picture, "--outpaint", "right=16", "--steps", 2, "--out", first)
    Image.new("RGB", (80, 64), "red").save(wide)
    drawn(capsys, "run", tiny_bundle, "--from-image", first, "--image", wide, "--out", again)
    assert Image.open(again).size == (96, 64)


def test_a_size_beside_margins_is_refused_with_margins_that_make_it(picture, tiny_bundle, tmp_path, capsys):
    options = ("--image", picture, "--outpaint", "right=12", "--size", "80x64", "--out", tmp_path / "a.png")
    assert sdrt("run", tiny_bundle, "x", *options) == 2
    error = capsys.readouterr().err
    assert "--outpaint makes 76x64, not the 80x64 of --size" in error
    assert "right=16 makes 80x64" in error


def test_a_variation_is_remembered(tiny_bundle, tmp_path, capsys):
    first, again = tmp_path / "a.png", tmp_path / "b.png"
    options = ("--variation-seed", 4, "--variation-strength", 0.2, "--seed", 1, "-n", 2)
    drawn(capsys, "run", tiny_bundle, "x", "--steps", 1, *options, "--out", first)
    assert sdrt("run", tiny_bundle, "--from-image", tmp_path / "a-2.png", "--out", again) == 0
    np.testing.assert_array_equal(np.asarray(Image.open(again)), np.asarray(Image.open(tmp_path / "a-2.png")))


def test_schedulers_lists_names_classes_and_spacings(capsys):
    listed = {each["name"]: each for each in drawn(capsys, "schedulers")["schedulers"]}
    assert listed["dpmpp_3m_sde"]["class"] == "DPMSolverMultistepScheduler"
    assert listed["dpmpp_3m_sde"]["sets"] == {
        "algorithm_type": "sde-dpmsolver++",
        "solver_order": 3,
        "solver_type": "midpoint",
    }
    assert listed["euler"]["spacings"] == ["karras", "exponential", "beta"]
    assert listed["euler"]["takes"] == ["timesteps", "sigmas"]
    assert listed["tcd"]["takes"] == ["eta", "timesteps"]
    assert listed["euler"]["predictions"] == ["epsilon", "v_prediction", "sample"]
    assert listed["euler_a"]["predictions"] == ["epsilon", "v_prediction"]
    assert listed["flow_euler"]["predictions"] == []


def test_diffusers_names_are_aliases(tiny_bundle, tmp_path, capsys):
    ours = ("--steps", 2, "--guidance-scale", 0, "--size", "96x64")
    theirs = ("--num-inference-steps", 2, "--cfg-scale", 0, "--width", 96, "--height", 64)
    results = [
        drawn(capsys, "run", tiny_bundle, "x", "--seed", 1, *options, "--out", tmp_path / f"{index}.png")
        for index, options in enumerate((ours, theirs))
    ]
    first, second = (result["images"][0]["parameters"] for result in results)
    assert first == second
    assert (first["width"], first["height"], first["guidance_scale"]) == (96, 64, 0)


def test_an_empty_prompt_is_legal(tiny_bundle, tmp_path):
    assert sdrt("run", tiny_bundle, "", "--steps", 1, "--out", tmp_path / "empty.png") == 0


def test_a_prompt_that_is_cut_short_warns_of_what_was_dropped(tiny_bundle, tmp_path, capsys):
    result = drawn(capsys, "run", tiny_bundle, "red " * 90 + "zebra", "--steps", 1, "--out", tmp_path / "long.png")
    assert "zebra" in result["warnings"][0]


def test_a_prompt_may_look_like_an_option(tiny_bundle, tmp_path, capsys):
    assert sdrt("run", "--steps", 1, "--out", tmp_path / "a.png", "--", tiny_bundle, "--json") == 0
    assert not capsys.readouterr().out.startswith("{")
    assert read_parameters(tmp_path / "a.png")["prompt"] == "--json"


def test_encode_and_decode_are_inverse_borders(picture, tiny_bundle, tmp_path, capsys):
    latents, decoded = tmp_path / "latents.npy", tmp_path / "decoded.png"
    assert drawn(capsys, "encode", tiny_bundle, picture, "--out", latents)["shape"] == [1, 4, 8, 8]
    assert np.load(latents).dtype == np.float32
    assert drawn(capsys, "decode", tiny_bundle, latents, "--out", decoded)["images"] == [str(decoded)]
    assert Image.open(decoded).size == Image.open(picture).size


def test_encode_and_decode_take_sizes_that_the_bundle_does_not_draw(tiny_bundle, tmp_path, capsys):
    for width, height in ((200, 72), (40, 1000)):
        Image.new("RGB", (width, height), "red").save(tmp_path / "wide.png")
        latents, decoded = tmp_path / "latents.npy", tmp_path / "decoded.png"
        shape = drawn(capsys, "encode", tiny_bundle, tmp_path / "wide.png", "--out", latents, "--force")["shape"]
        assert shape == [1, 4, height // 8, width // 8]
        drawn(capsys, "decode", tiny_bundle, latents, "--out", decoded, "--force")
        assert Image.open(decoded).size == (width, height)


def test_an_image_off_the_vaes_grid_is_not_encoded(tiny_bundle, tmp_path, capsys):
    Image.new("RGB", (70, 64)).save(tmp_path / "odd.png")
    assert sdrt("encode", tiny_bundle, tmp_path / "odd.png", "--out", tmp_path / "a.npy") == 2
    error = capsys.readouterr().err
    assert "the image has 70x64 pixels; the VAE takes multiples of 8" in error
    assert "64x64" in error
    assert not (tmp_path / "a.npy").exists()


@pytest.mark.parametrize("channels", [3, 16])
def test_latents_of_another_model_are_refused_before_the_engines_are_loaded(
    tiny_bundle, tmp_path, capsys, monkeypatch, channels
):
    monkeypatch.setattr("sdrt.runners.open_runner", lambda *_, **__: pytest.fail("the engines were loaded"))
    np.save(tmp_path / "other.npy", np.zeros((1, channels, 8, 8), np.float32))
    assert sdrt("decode", tiny_bundle, tmp_path / "other.npy", "--out", tmp_path / "a.png") == 2
    error = capsys.readouterr().err
    assert f"latents are float32 [1, {channels}, 8, 8]" in error
    assert "give float32 [batch, 4, h, w]" in error


def test_encode_with_a_seed_is_a_sample_and_without_the_mean(picture, tiny_bundle, tmp_path):
    for name, options in {"mean": (), "a": ("--seed", 0), "b": ("--seed", 0)}.items():
        assert sdrt("encode", tiny_bundle, picture, *options, "--out", tmp_path / f"{name}.npy") == 0
    mean, first, second = (np.load(tmp_path / f"{name}.npy") for name in ("mean", "a", "b"))
    np.testing.assert_array_equal(first, second)
    assert np.abs(mean - first).max() > 0


def test_inspect_tells_a_bundle_from_a_model(tiny_bundle, tiny_checkpoint, tiny_export, capsys):
    bundle = drawn(capsys, "inspect", tiny_bundle)
    assert (bundle["kind"], bundle["manifest"]["precision"]) == ("bundle", "fp32")
    model = drawn(capsys, "inspect", tiny_checkpoint)
    assert (model["kind"], model["size_multiple"], model["scheduler"]) == ("diffusers", 8, "PNDMScheduler")
    assert drawn(capsys, "inspect", tiny_export)["kind"] == "onnx"


def test_verify_draws_the_golden_image_again(tiny_bundle, capsys):
    result = drawn(capsys, "verify", tiny_bundle)
    assert result["valid"]
    assert result["parity"]["measured"] <= result["parity"]["bound"]


def test_doctor_names_the_backends_and_the_machine(capsys):
    result = drawn(capsys, "doctor")
    assert result["backends"]["openvino"]["works"]
    assert result["machine"]["cores"] >= 1


def test_demo_writes_its_own_files_only(tiny_bundle, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sdrt.cli.demo.STEPS", 1)
    out = tmp_path / "demo"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    result = drawn(capsys, "demo", "--bundle", tiny_bundle, "--out", out)
    pictures = {f"picture-{number}.png" for number in range(1, 9)}
    assert {path.name for path in out.iterdir()} == pictures | {"sheet.png", "mine.txt"}
    assert len({picture["caption"] for picture in result["pictures"]}) == 8
    sheet, first = Image.open(out / "sheet.png"), Image.open(out / "picture-1.png")
    assert sheet.width > 4 * first.width
    assert sheet.height < 3 * first.height
    assert sdrt("demo", "--bundle", tiny_bundle, "--out", out) == 1
    assert sdrt("demo", "--bundle", tiny_bundle, "--out", out, "--force") == 0


def test_build_from_a_checkpoint_and_from_onnx(tiny_checkpoint, tiny_export, tmp_path, capsys):
    for model in (tiny_checkpoint, tiny_export):
        out = tmp_path / f"{model.name}.sdrt"
        options = ("--precision", "fp32", "--sizes", "64x64", "--batch", "1..2", "--threads", 1)
        result = drawn(capsys, "build", model, "--out", out, *options)
        assert result["precision"] == "fp32"
        assert all(record["measured"] <= record["bound"] for record in result["parity"].values())
        assert drawn(capsys, "verify", out)["valid"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.sdrt", "onnx.sdrt"]


def test_a_reader_that_leaves_early_is_no_error(tiny_bundle):
    pipe = subprocess.Popen([SDRT, "inspect", str(tiny_bundle)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    pipe.stdout.close()
    assert pipe.stderr.read() == b""
    pipe.stderr.close()
    pipe.wait()


def test_completion_offers_commands_and_schedulers():
    if shutil.which("bash") is None:
        pytest.skip("there is no bash")
    environment = {"PATH": "/usr/bin:/bin", "_SDRT_COMPLETE": "complete_bash"}
    offered = {}
    for words, index in (("sdrt in", 1), ("sdrt run --scheduler dp", 3)):
        variables = environment | {"COMP_WORDS": words, "COMP_CWORD": str(index)}
        offered[words] = subprocess.run([SDRT], env=variables, capture_output=True, text=True).stdout.split()
    assert offered["sdrt in"] == ["inspect"]
    assert {"dpm2", "dpmpp_2m", "dpmpp_2m_karras"} <= set(offered["sdrt run --scheduler dp"])
