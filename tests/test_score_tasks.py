"""The score of the tasks: what is asked for each case, and pictures in the cases' order."""

import json

import numpy as np
import pytest
from PIL import Image

import sdrt
from sdrt.benchmarks import score_tasks
from sdrt.benchmarks.score_tasks import (
    MODELS,
    Settings,
    contact_sheet,
    draw,
    draw_task,
    parse_arguments,
    request_of,
    settings_of,
)
from sdrt.engines.profile import parse_profile
from sdrt.models.shapes.task_cases import TASKS, task_cases

GIVEN = {
    "inpaint": {"image", "mask_image", "preserve", "strength"},
    "outpaint": {"image", "outpaint"},
    "upscale": {"image", "noise_level"},
    "depth": {"image", "depth_map", "strength"},
    "image-to-image": {"image", "strength"},
    "edges": {"control_image"},
}


@pytest.fixture
def settings(tmp_path):
    return Settings(
        work=tmp_path,
        precision="fp32",
        num_inference_steps=5,
        guidance_scale=4.0,
        noise_level=20,
        max_batch=4,
        threads=None,
    )


@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_a_model_and_is_asked_for_with_what_its_case_brings(task, settings):
    assert task in MODELS
    request = request_of(task_cases(task, 4)[0], settings)
    names = set.union(*GIVEN.values())
    assert {name for name in names if getattr(request, name) is not None} == GIVEN[task]


def test_pictures_come_in_the_cases_order_as_if_each_had_been_drawn_alone(shapes_bundle, settings):
    cases = task_cases("image-to-image", 8)
    assert len({case.strength for case in cases}) > 1  # they end after different numbers of steps
    drawn = list(draw(shapes_bundle, cases, settings))
    with sdrt.open(shapes_bundle) as pipeline:
        alone = [pipeline.generate(request_of(case, settings)).images[0] for case in cases]
    for picture, image in zip(drawn, alone, strict=True):
        assert np.array_equal(picture, np.asarray(image))


def test_half_of_the_outpainted_canvases_are_larger_than_their_engines_take():
    cases = task_cases("outpaint", 16)
    for case in cases:
        sizes = MODELS["outpaint"].model_of(case).sizes
        profile = parse_profile(sizes, "1", default=(128, 128), multiple_of=8, text_length=77)
        assert profile.accepts(*case.mask.shape) is not case.in_windows
    assert [case.in_windows for case in cases] == [False, True] * 8
    assert len({(*case.outpaint, case.in_windows) for case in cases}) == 8  # every side in both ways


def test_each_case_is_drawn_by_its_model_and_pictures_come_in_the_cases_order(settings, monkeypatch):
    cases = task_cases("outpaint", 5)
    monkeypatch.setattr(score_tasks, "build", lambda model, settings: model.name)
    monkeypatch.setattr(score_tasks, "draw", lambda bundle, cases, settings: [(bundle, case.seed) for case in cases])
    pictures, _ = draw_task("outpaint", cases, settings)
    whole, in_windows = "inpaint", "inpaint-small"
    assert pictures == [(whole, 0), (in_windows, 1), (whole, 2), (in_windows, 3), (whole, 4)]


@pytest.mark.parametrize("task", TASKS)
def test_a_task_has_its_own_guidance_unless_the_command_line_has_one_for_all(task):
    options = parse_arguments([])
    assert settings_of(task, options).guidance_scale == MODELS[task].guidance_scale
    assert settings_of(task, options).noise_level == MODELS[task].noise_level
    options = parse_arguments(["--guidance-scale", "1", "--noise-level", "0"])
    assert settings_of(task, options).guidance_scale == 1
    assert settings_of(task, options).noise_level == (0 if task == "upscale" else None)


def test_the_results_say_how_each_task_was_asked(monkeypatch, capsys):
    def draw_truth(task, cases, settings):
        return [case.truth for case in cases], 1.0

    monkeypatch.setattr(score_tasks, "draw_task", draw_truth)
    assert score_tasks.main(["--only", "upscale", "--cases", "3", "--guidance-scale", "1.5", "--noise-level", "0"]) == 0
    asked = json.loads(capsys.readouterr().out)["upscale"]
    assert (asked["guidance_scale"], asked["noise_level"]) == (1.5, 0)


def test_a_sheet_shows_what_was_given_above_what_was_drawn():
    cases = task_cases("upscale", 2)
    sheet = contact_sheet(cases, [case.truth for case in cases])
    assert sheet.crop((160, 160, 288, 288)).tobytes() == Image.fromarray(cases[1].truth).tobytes()
    assert sheet.crop((160, 0, 192, 32)).tobytes() == Image.fromarray(cases[1].small).tobytes()
