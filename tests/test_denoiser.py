"""A step over many trajectories is each one's own step: mixed, padded, or beside one that fails."""

import numpy as np
import pytest

from sdrt.denoiser import next_size, step_inputs, step_trajectories
from sdrt.errors import ParityError
from sdrt.request import Request

MIXTURE = (
    Request(prompt="red circle", scheduler="ddim", num_inference_steps=7, guidance_scale=7.5, seed=0),
    Request(prompt="blue", scheduler="pndm", num_inference_steps=5, guidance_scale=1.0, seed=1),
    Request(prompt="", scheduler="euler_karras", num_inference_steps=9, guidance_scale=3.0, seed=2),
    Request(prompt="red", scheduler="dpmpp_2m", num_inference_steps=6, guidance_scale=0.0, seed=3),
    Request(prompt="circle", scheduler="ddim", num_inference_steps=8, guidance_scale=2.0, seed=4, eta=1.0),
)


def trajectories(pipeline, requests):
    return [path for request in requests for path in pipeline.prepare(pipeline.resolve(request)).trajectories]


def run_to_the_end(pipeline, paths, sizes=()):
    while active := [path for path in paths if not path.finished]:
        assert step_trajectories(pipeline.runner, active, sizes=sizes) == {}
    return [path.latents for path in paths]


def alone(pipeline, requests):
    return [run_to_the_end(pipeline, trajectories(pipeline, [request]))[0] for request in requests]


@pytest.mark.parametrize("sizes", [(), (4, 8, 16)])
def test_a_mixed_batch_equals_each_request_alone_bit_for_bit(fake, sizes):
    pipeline = fake()
    together = run_to_the_end(pipeline, trajectories(pipeline, MIXTURE), sizes)
    for mixed, solo in zip(together, alone(pipeline, MIXTURE), strict=True):
        np.testing.assert_array_equal(mixed, solo)


def test_padding_fills_up_to_the_next_size_with_inert_rows(fake):
    pipeline = fake()
    inputs = step_inputs(trajectories(pipeline, MIXTURE[:3]), sizes=(4, 8))
    assert inputs["state"].shape[0] == 4
    assert inputs["guidance"].shape == (4, 8)
    assert not inputs["guidance"][3].any()
    assert not inputs["guidance"][:, 5:].any()
    np.testing.assert_array_equal(inputs["transition"][3], np.eye(6, 8))


@pytest.mark.parametrize(("count", "expected"), [(1, 2), (2, 2), (3, 4), (5, 5)])
def test_the_next_size_holds_the_count(count, expected):
    assert next_size(count, (2, 4)) == expected


def test_guidance_weights_are_one_minus_s_and_s(fake):
    pipeline = fake()
    inputs = step_inputs(trajectories(pipeline, MIXTURE[:2]))
    np.testing.assert_array_equal(inputs["guidance"], np.array([[-6.5, 7.5, 0], [0, 0, 1]], np.float32))
    np.testing.assert_array_equal(inputs["lane_request"], [0, 0, 1])


def poisoned_runner(pipeline, fake):
    ids = pipeline._prompts._tokenizer.encode("poison").ids
    from sdrt.runners.fake import FakeRunner

    return FakeRunner(poison=int(ids[1]))


def test_a_request_that_is_not_finite_fails_alone_and_its_neighbours_do_not_notice(fake):
    plain = fake()
    pipeline = fake(poisoned_runner(plain, fake))
    bad = Request(prompt="poison", scheduler="ddim", num_inference_steps=7, guidance_scale=1.0, seed=9)
    good = trajectories(pipeline, MIXTURE[:2])
    culprit = trajectories(pipeline, [bad])[0]
    faults = step_trajectories(pipeline.runner, [good[0], culprit, good[1]])
    assert list(faults) == [culprit]
    assert isinstance(faults[culprit], ParityError)
    assert culprit.row == 0
    expected = trajectories(plain, MIXTURE[:2])
    step_trajectories(plain.runner, expected)
    for path, other in zip(good, expected, strict=True):
        np.testing.assert_array_equal(path.state, other.state)


def test_a_step_that_is_tried_twice_draws_its_noise_once(fake):
    pipeline = fake()
    path = trajectories(pipeline, MIXTURE[4:])[0]
    np.testing.assert_array_equal(path.noise(), path.noise())
