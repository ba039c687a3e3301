"""The score of the tasks: what is asked for each case, and pictures in the cases' order."""

import numpy as np
import pytest
from PIL import Image

import sdrt
from sdrt.benchmarks.score_tasks import MODELS, Settings, contact_sheet, draw, request_of
from sdrt.models.shapes.task_cases import TASKS, task_cases

GIVEN = {
    "inpaint": {"image", "mask_image", "preserve", "strength"},
    "outpaint": {"image", "mask_image", "preserve", "strength"},
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


def test_a_sheet_shows_what_was_given_above_what_was_drawn():
    cases = task_cases("upscale", 2)
    sheet = contact_sheet(cases, [case.truth for case in cases])
    assert sheet.crop((160, 160, 288, 288)).tobytes() == Image.fromarray(cases[1].truth).tobytes()
    assert sheet.crop((160, 0, 192, 32)).tobytes() == Image.fromarray(cases[1].small).tobytes()
