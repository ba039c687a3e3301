"""Classifier-free guidance as lanes and weights: the reference's formula, and no lane that is not needed."""

from dataclasses import replace

import numpy as np
import pytest

from sdrt.denoiser import step_trajectories
from sdrt.errors import RequestError
from sdrt.guidance import guidance_of
from sdrt.request import Request

COND = np.ones((12, 8), np.float32)
UNCOND = np.zeros((12, 8), np.float32)


@pytest.fixture
def resolved(fake):
    return fake().resolve(Request(prompt="red", seed=0, num_inference_steps=2))


@pytest.mark.parametrize("scale", [1.0001, 2.0, 7.5, 100.0])
def test_two_lanes_combine_to_the_references_formula(resolved, scale):
    rng = np.random.default_rng(0)
    outputs = {"cond": rng.standard_normal(64), "uncond": rng.standard_normal(64)}
    lanes = guidance_of(replace(resolved, guidance_scale=scale), COND, UNCOND).lanes(0)
    by_lane = [outputs["uncond" if lane.prompt_embeds is UNCOND else "cond"] for lane in lanes]
    combined = sum(lane.weight * output for lane, output in zip(lanes, by_lane, strict=True))
    reference = outputs["uncond"] + scale * (outputs["cond"] - outputs["uncond"])
    np.testing.assert_allclose(combined, reference, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.0, -2.0])
def test_without_guidance_there_is_one_lane_of_weight_one_and_it_is_the_prompts(resolved, scale):
    lanes = guidance_of(replace(resolved, guidance_scale=scale), COND, None).lanes(0)
    assert [(lane.prompt_embeds is COND, lane.weight) for lane in lanes] == [(True, 1.0)]


def test_the_negative_prompt_is_the_first_lane_as_in_the_reference(resolved):
    first, second = guidance_of(resolved, COND, UNCOND).lanes(0)
    assert first.prompt_embeds is UNCOND
    assert second.prompt_embeds is COND


def test_a_guided_request_without_a_negative_embedding_is_a_programming_error(resolved):
    with pytest.raises(ValueError, match="negative"):
        guidance_of(resolved, COND, None)


class TestIntervals:
    @pytest.mark.parametrize(
        ("start", "end", "rows"),
        [
            (0, 1, range(10)),
            (0.3, 1, range(3, 10)),
            (0, 0.7, range(7)),
            (0.2, 0.6, range(2, 6)),
        ],
    )
    def test_rows_are_guided_that_begin_inside(self, fake, start, end, rows):
        asked = Request(prompt="red", scheduler="ddim", num_inference_steps=10, guidance_start=start, guidance_end=end)
        resolved = fake().resolve(asked)
        assert resolved.guided_rows == rows
        lanes = guidance_of(resolved, COND, UNCOND)
        assert [row for row in range(10) if len(lanes.lanes(row)) == 2] == list(rows)

    def test_outside_the_prompt_alone_is_evaluated(self, fake):
        resolved = fake().resolve(Request(prompt="red", num_inference_steps=10, guidance_end=0.5))
        (lane,) = guidance_of(resolved, COND, UNCOND).lanes(9)
        assert lane.prompt_embeds is COND
        assert lane.weight == 1

    @pytest.mark.parametrize(("row", "end"), [(0, 2), (1, 2), (2, 6), (5, 6), (6, 10), (9, 10)])
    def test_rows_alike_end_where_lanes_change(self, fake, row, end):
        asked = Request(prompt="red", scheduler="ddim", num_inference_steps=10, guidance_start=0.2, guidance_end=0.6)
        assert guidance_of(fake().resolve(asked), COND, UNCOND).last_alike(row, 10) == end

    def test_without_guidance_all_rows_are_alike(self, fake):
        resolved = fake().resolve(Request(prompt="red", num_inference_steps=10, guidance_scale=1.0, guidance_end=0.5))
        assert guidance_of(resolved, COND, None).last_alike(0, 11) == 11

    @pytest.mark.parametrize(
        "interval", [(0.5, 0.5), (0.6, 0.4), (-0.1, 1), (0, 1.1), (float("nan"), 1), ("a", 1), (0, True)]
    )
    def test_what_is_no_interval_is_refused(self, fake, interval):
        with pytest.raises(RequestError, match=r"guidance_(start|end)"):
            fake().resolve(Request(prompt="red", guidance_start=interval[0], guidance_end=interval[1]))

    def test_an_image_is_that_of_guidance_switched_by_hand(self, fake):
        pipeline = fake()
        asked = Request(
            prompt="red", scheduler="ddim", num_inference_steps=6, guidance_start=0.34, guidance_end=0.67, seed=3
        )
        result = pipeline.generate(asked)
        (by_hand,) = pipeline.prepare(pipeline.resolve(replace(asked, guidance_start=0, guidance_end=1))).trajectories
        inside = by_hand.guidance.inside
        plain = (replace(inside[1], weight=1.0),)
        for row in range(6):
            lanes = inside if row in (3, 4) else plain
            by_hand.guidance = replace(by_hand.guidance, inside=lanes)
            assert step_trajectories(pipeline.runner, [by_hand]) == {}
        np.testing.assert_array_equal(result.latents[0], by_hand.latents)

    def test_what_it_saved_is_told(self, fake):
        result = fake().generate(Request(prompt="red", scheduler="ddim", num_inference_steps=4, guidance_end=0.5))
        timings = replace(result.timings, step_seconds=(2.0, 2.0, 1.0, 1.5))
        assert replace(result, timings=timings).saved_seconds == pytest.approx(1.5)
        assert fake().generate(Request(prompt="red", num_inference_steps=2)).saved_seconds is None
