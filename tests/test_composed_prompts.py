"""Composed prompts: several prompts guided at once, as lanes of one request."""

from dataclasses import replace

import numpy as np
import pytest

from sdrt.batcher import Batcher
from sdrt.errors import RequestError
from sdrt.request import Request

REQUEST = Request(
    prompt="a red circle",
    composed_prompts=[("a blue star", 0.6), ("a white background", 0.3)],
    num_inference_steps=5,
    guidance_scale=4.0,
    scheduler="ddim",
    seed=3,
)


def drawn(pipeline, request):
    return pipeline.generate(request).latents


def counted_lanes(pipeline):
    """A list that grows by the lanes of each step that the pipeline runs."""
    lanes = []

    def count(name, feeds):
        if name == "step":
            lanes.append(len(feeds["lane_request"]))

    pipeline.runner.before = count
    return lanes


def test_the_same_prompt_twice_is_guided_by_the_sum_of_both_weights(fake):
    twice = replace(REQUEST, composed_prompts=[(REQUEST.prompt, 0.5)])
    once = replace(REQUEST, composed_prompts=None, guidance_scale=6.0)
    with fake() as pipeline:
        np.testing.assert_allclose(drawn(pipeline, twice), drawn(pipeline, once), atol=1e-5)


def test_a_weight_of_nothing_changes_nothing(fake):
    none = replace(REQUEST, composed_prompts=[("a blue star", 0.0)])
    with fake() as pipeline:
        np.testing.assert_array_equal(drawn(pipeline, none), drawn(pipeline, replace(REQUEST, composed_prompts=None)))


def test_each_prompt_and_each_weight_counts(fake):
    others = [
        replace(REQUEST, composed_prompts=[("a blue star", 0.6)]),
        replace(REQUEST, composed_prompts=[("a blue star", 0.6), ("a white background", -0.3)]),
        replace(REQUEST, composed_prompts=[("a green star", 0.6), ("a white background", 0.3)]),
    ]
    with fake() as pipeline:
        images = [drawn(pipeline, request).tobytes() for request in (REQUEST, *others)]
    assert len(set(images)) == len(images)


def test_rows_without_guidance_draw_the_mean_of_the_prompts(fake):
    request = replace(REQUEST, guidance_end=0.5, composed_prompts=[("a blue star", 1.0)])
    with fake() as pipeline:
        lanes = pipeline.prepare(pipeline.resolve(request)).trajectories[0].guidance.outside
    assert [lane.weight for lane in lanes] == [0.5, 0.5]


def test_in_a_mixed_batch_it_is_what_it_is_alone_and_takes_the_room_of_its_lanes(fake):
    plain = replace(REQUEST, composed_prompts=None, seed=9)
    with fake() as pipeline:
        most = pipeline.bundle.manifest.profile.max_batch
        lanes = counted_lanes(pipeline)
        with Batcher(pipeline) as batcher:
            tickets = [batcher.submit(request) for request in (REQUEST, *[plain] * most, REQUEST)]
            results = [ticket.result(60) for ticket in tickets]
        assert max(lanes) <= 2 * most
        assert max(lanes) > 4  # they did share steps
        np.testing.assert_array_equal(results[0].latents, drawn(pipeline, REQUEST))
        np.testing.assert_array_equal(results[1].latents, drawn(pipeline, plain))


def test_several_images_go_through_the_engines_as_the_lanes_allow(fake):
    with fake() as pipeline:
        most = pipeline.bundle.manifest.profile.max_batch
        lanes = counted_lanes(pipeline)
        many = pipeline.generate(replace(REQUEST, num_images_per_prompt=most)).latents
        assert max(lanes) <= 2 * most
        np.testing.assert_array_equal(many[:1], drawn(pipeline, REQUEST))


def test_they_are_remembered(fake):
    with fake() as pipeline:
        result = pipeline.generate(REQUEST)
    assert result.parameters(0)["composed_prompts"] == [["a blue star", 0.6], ["a white background", 0.3]]


def test_a_long_one_is_cut_with_a_warning(fake):
    long = "star " * 200
    with fake() as pipeline:
        result = pipeline.generate(replace(REQUEST, composed_prompts=[(long, 0.5)]))
    assert any("composed prompt" in warning for warning in result.warnings)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"composed_prompts": []}, "composed_prompts is"),
        ({"composed_prompts": "a blue star"}, "composed_prompts is"),
        ({"composed_prompts": [("a", 1, 2)]}, "composed_prompts is"),
        ({"composed_prompts": [(3, 1.0)]}, "not text"),
        ({"composed_prompts": [("a", float("nan"))]}, "weight of a composed prompt"),
        ({"composed_prompts": [("a", -1.0)]}, "add up to 0"),
        ({"guidance_scale": 1.0}, "guides nothing"),
        ({"composed_prompts": [("a", 1.0)] * 500}, "network evaluations a step"),
    ],
)
def test_what_cannot_be_composed_is_refused(fake, changes, words):
    with fake() as pipeline, pytest.raises(RequestError, match=words):
        pipeline.resolve(replace(REQUEST, **changes))


def test_more_images_than_the_lanes_allow_are_refused_by_the_batcher(fake):
    with fake() as pipeline, Batcher(pipeline) as batcher:
        most = pipeline.bundle.manifest.profile.max_batch
        with pytest.raises(RequestError, match="with 2 composed prompts"):
            batcher.submit(replace(REQUEST, num_images_per_prompt=most))


@pytest.mark.parametrize(
    ("text", "pair"),
    [
        ("a blue star:0.6", ("a blue star", 0.6)),
        ("a blue star", ("a blue star", 1.0)),
        ("ratio 3:2:.5", ("ratio 3:2", 0.5)),
        ("a clock: late", ("a clock: late", 1.0)),
        ("fog:-0.4", ("fog", -0.4)),
    ],
)
def test_the_command_line_takes_a_weight_after_the_last_colon(text, pair):
    from sdrt.cli.run import _weighted

    assert _weighted(text) == pair
