"""Classifier-free guidance as lanes and weights: the reference's formula, and no lane that is not needed."""

from dataclasses import replace

import numpy as np
import pytest

from sdrt.guidance import lanes_of
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
    lanes = lanes_of(replace(resolved, guidance_scale=scale), COND, UNCOND)
    by_lane = [outputs["uncond" if lane.prompt_embeds is UNCOND else "cond"] for lane in lanes]
    combined = sum(lane.weight * output for lane, output in zip(lanes, by_lane, strict=True))
    reference = outputs["uncond"] + scale * (outputs["cond"] - outputs["uncond"])
    np.testing.assert_allclose(combined, reference, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.0, -2.0])
def test_without_guidance_there_is_one_lane_of_weight_one_and_it_is_the_prompts(resolved, scale):
    lanes = lanes_of(replace(resolved, guidance_scale=scale), COND, None)
    assert [(lane.prompt_embeds is COND, lane.weight) for lane in lanes] == [(True, 1.0)]


def test_the_negative_prompt_is_the_first_lane_as_in_the_reference(resolved):
    first, second = lanes_of(resolved, COND, UNCOND)
    assert first.prompt_embeds is UNCOND
    assert second.prompt_embeds is COND


def test_a_guided_request_without_a_negative_embedding_is_a_programming_error(resolved):
    with pytest.raises(ValueError, match="negative"):
        lanes_of(resolved, COND, None)
