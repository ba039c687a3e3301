"""The judge of tasks agrees with the truth, and refuses what is broken."""

import numpy as np
import pytest

from sdrt.models.shapes.judge_tasks import (
    changed_outside,
    enlarge,
    judge_task,
    overlap,
    psnr,
    silhouette_of,
)
from sdrt.models.shapes.scenes import BACKGROUNDS, is_held_out, parse_caption
from sdrt.models.shapes.task_cases import STRENGTHS, TASKS, task_cases

COUNT = 12
TASKS_WITH_TRUTH = [task for task in TASKS if task != "image-to-image"]


def truths(cases):
    return [case.truth for case in cases]


def blank(case):
    size = (128, 128) if case.mask is None else case.mask.shape
    return np.full((*size, 3), BACKGROUNDS[parse_caption(case.caption).background], np.uint8)


@pytest.mark.parametrize("task", TASKS)
def test_cases_are_held_out_and_the_same_for_a_seed(task):
    cases, again = task_cases(task, 8), task_cases(task, 8)
    assert len(cases) == 8
    assert all(is_held_out(case.caption) for case in cases)
    for one, other in zip(cases, again, strict=True):
        for name in ("caption", "source", "mask", "outpaint", "small", "depth", "edges", "truth", "silhouette"):
            assert np.array_equal(getattr(one, name), getattr(other, name))


@pytest.mark.parametrize("task", TASKS_WITH_TRUTH)
def test_the_truth_passes(task):
    cases = task_cases(task, COUNT)
    score = judge_task(task, cases, truths(cases))
    assert score.passed, score.figures


@pytest.mark.parametrize("task", TASKS)
def test_blank_pictures_do_not_pass(task):
    cases = task_cases(task, COUNT)
    assert not judge_task(task, cases, [blank(case) for case in cases]).passed


@pytest.mark.parametrize("task", TASKS_WITH_TRUTH)
def test_the_truths_of_other_cases_do_not_pass(task):
    cases = [case for case in task_cases(task, 2 * COUNT) if case.truth.shape != (160, 128, 3)]
    wrong = truths(cases)[4:] + truths(cases)[:4]
    assert not judge_task(task, cases, wrong).passed


def test_the_hidden_object_itself_is_not_what_was_asked_for():
    cases = task_cases("inpaint", COUNT)
    assert judge_task("inpaint", cases, [case.source for case in cases]).figures["captions"] == 0.0


def test_one_pixel_outside_the_hole_is_noticed():
    case = task_cases("inpaint", 1)[0]
    picture = case.source.copy()
    row, column = np.argwhere(~case.mask)[7]
    picture[row, column, 1] ^= 1
    assert changed_outside(case, case.source) == 0
    assert changed_outside(case, picture) == 1
    assert not judge_task("inpaint", [case], [picture]).passed


def test_a_source_that_was_moved_on_its_canvas_is_noticed():
    case = next(case for case in task_cases("outpaint", COUNT) if case.outpaint == {"left": 32})
    assert changed_outside(case, case.truth) == 0
    assert changed_outside(case, np.roll(case.truth, 1, axis=1)) > 0


def test_outpainting_whole_and_in_windows_are_told_apart():
    cases = task_cases("outpaint", COUNT)
    pictures = [case.truth ^ 8 if case.in_windows else case.truth for case in cases]
    figures = judge_task("outpaint", cases, pictures).figures
    assert [figures[name] for name in ("right", "right whole", "right in windows")] == [0.5, 1.0, 0.0]
    assert "right in windows" not in judge_task("outpaint", cases[:1], pictures[:1]).figures


def test_a_seam_is_noticed():
    cases = task_cases("outpaint", COUNT)
    tinted = [np.where(case.mask[..., None], case.truth ^ 8, case.truth) for case in cases]
    figures = judge_task("outpaint", cases, tinted).figures
    assert figures["continued"] == 1.0
    assert figures["seamless"] == 0.0


def test_bicubic_gains_nothing_over_bicubic():
    cases = task_cases("upscale", COUNT)
    assert judge_task("upscale", cases, [enlarge(case.small) for case in cases]).figures["gain"] == 0.0


def test_other_colours_in_the_right_places_are_noticed():
    cases = task_cases("depth", COUNT)
    figures = judge_task("depth", cases, [case.source for case in cases]).figures
    assert figures["iou"] > 0.9
    assert figures["colours"] == 0.0


def test_image_to_image_has_to_leave_the_source_little_by_little():
    cases = task_cases("image-to-image", COUNT)
    away = [np.clip(case.source.astype(int) + round(50 * case.strength), 0, 255).astype(np.uint8) for case in cases]
    assert judge_task("image-to-image", cases, away).figures["monotonic"] == 1.0
    back = [away[index + 1 - 2 * (index % 2)] for index in range(len(away))]
    assert judge_task("image-to-image", cases, back).figures["monotonic"] == 0.0
    assert len(cases) % len(STRENGTHS) == 0


def test_overlap_is_intersection_over_union():
    one, other = np.zeros((2, 4), bool), np.zeros((2, 4), bool)
    one[:, :2], other[:, 1:] = True, True
    assert overlap(one, other) == 0.25
    assert overlap(one, one) == overlap(one & False, one & False) == 1.0


def test_psnr_is_in_decibels_of_the_peak():
    black = np.zeros((8, 8, 3), np.uint8)
    assert psnr(black, black) == 60.0
    assert psnr(black + np.uint8(255), black) == pytest.approx(0.0)
    assert psnr(black + np.uint8(51), black) == pytest.approx(20 * np.log10(5))


def test_a_silhouette_is_where_something_is_drawn():
    cases = task_cases("edges", COUNT)
    assert min(overlap(silhouette_of(case.truth), case.silhouette) for case in cases) > 0.9


def test_a_case_of_another_task_and_an_unknown_task_are_errors():
    cases = task_cases("upscale", 1)
    with pytest.raises(ValueError, match="another task"):
        judge_task("edges", cases, truths(cases))
    with pytest.raises(ValueError, match="not a task"):
        task_cases("sing", 1)
