"""Messages of the library on the command line: fields become options, and other words stay as they are."""

import pytest
import typer

from sdrt.cli import app, run_command
from sdrt.cli.pictures import PICTURES
from sdrt.cli.run import REQUEST_FIELDS
from sdrt.cli.wording import field_options, in_options
from sdrt.request import nearest_field

SAID = [
    ("num_inference_steps is 1001", "--steps is 1001"),
    ("leave num_images_per_prompt out", "leave --num-images out"),
    ("mask_image is given, but there is no image", "--mask is given, but there is no image"),
    ("give image, or leave strength out", "give --image, or leave --strength out"),
    ("depth_map has 3 values", "--depth has 3 values"),
    ("controlnet_conditioning_scale lists 3", "--control-scale lists 3"),
    ("those of composed_prompts, add up to -1", "those of --and, add up to -1"),
    ("larger ones with windowed=True, up to", "larger ones with --windowed, up to"),
    ("leave height and width out", "leave --size out"),
    ("give a guidance_scale above 1", "give a --guidance-scale above 1"),
    ("outpaint's left is -1", "--outpaint's left is -1"),
]
KEPT = [
    "the image cannot be read any more",
    "/pictures/mask_image.png is not a file",
    "image.png is not a file",
    "no such option: --image-guidance-scal",
    'requests then bring a "depth_map"',
    "give a seed",
    "prompt is NoneType, not text",
    "fill the gaps in: 0 is far away",
    "image (1).png is not a file",
    "/p/'height and width'.png is not a file",
    "the prompt is too long: 'give image, num_inference_steps of height and width' was left out",
]


@pytest.mark.parametrize(("said", "shown"), SAID)
def test_a_field_is_called_by_its_option(said, shown):
    assert in_options(said) == shown


@pytest.mark.parametrize("said", KEPT)
def test_what_is_no_field_is_kept(said):
    assert in_options(said) == said


def test_arguments_of_the_command_are_kept():
    given = ["run", "--image", "my mask_image (1).png", "--out", "height and width.png"]
    assert in_options("my mask_image (1).png is not a file", given) == "my mask_image (1).png is not a file"
    assert in_options("mask_image: height and width.png is there", given) == "--mask: height and width.png is there"


def test_every_field_but_the_prompt_has_an_option():
    assert {"prompt", *field_options()} == {*REQUEST_FIELDS, *PICTURES}


def test_every_name_of_an_option_leads_python_to_its_field():
    parameters = typer.main.get_command(app).commands["run"].params
    names = {
        name.removeprefix("--").replace("-", "_"): parameter.name
        for parameter in parameters
        if parameter.name in field_options()
        for name in parameter.opts
        if name.startswith("--")
    }
    assert {name: nearest_field(name) for name in names} == names


def test_errors_and_hints_name_options(tiny_bundle, tmp_path, capsys):
    out = str(tmp_path / "a.png")
    assert run_command(["run", str(tiny_bundle), "x", "-n", "3", "--seed", "1,2", "--out", out]) == 2
    error, hint = capsys.readouterr().err.splitlines()
    assert error == "error: --num-images is 3, but there are 2 seeds"
    assert hint == "hint: give 3 seeds, or one from which they are counted up, or leave --num-images out"
