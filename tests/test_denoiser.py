"""A step over many trajectories is each one's own step: mixed, padded, or beside one that fails."""

import numpy as np
import pytest

from sdrt.denoiser import lasting_inputs, pad_inputs, row_inputs, step_inputs, step_trajectories
from sdrt.errors import BackendError, ParityError
from sdrt.request import Request
from sdrt.runners.fake import FakeRunner

MIXTURE = (
    Request(prompt="red circle", scheduler="ddim", num_inference_steps=7, guidance_scale=7.5, seed=0),
    Request(prompt="blue", scheduler="pndm", num_inference_steps=5, guidance_scale=1.0, seed=1),
    Request(prompt="", scheduler="euler_karras", num_inference_steps=9, guidance_scale=3.0, seed=2),
    Request(prompt="red", scheduler="dpmpp_2m", num_inference_steps=6, guidance_scale=0.0, seed=3),
    Request(prompt="circle", scheduler="ddim", num_inference_steps=8, guidance_scale=2.0, seed=4, eta=1.0),
)


def trajectories(pipeline, requests):
    return [path for request in requests for path in pipeline.prepare(pipeline.resolve(request)).trajectories]


def run_to_the_end(pipeline, paths):
    while active := [path for path in paths if not path.finished]:
        assert step_trajectories(pipeline.runner, active) == {}
    return [path.latents for path in paths]


def alone(pipeline, requests):
    return [run_to_the_end(pipeline, trajectories(pipeline, [request]))[0] for request in requests]


def test_a_mixed_batch_equals_each_request_alone_bit_for_bit(fake):
    pipeline = fake()
    together = run_to_the_end(pipeline, trajectories(pipeline, MIXTURE))
    for mixed, solo in zip(together, alone(pipeline, MIXTURE), strict=True):
        np.testing.assert_array_equal(mixed, solo)


def padded(paths, **counts):
    """The inputs of the first row, padded."""
    lasting = lasting_inputs(paths) | {"noise": np.stack([path.noise() for path in paths])}
    inputs, rows = pad_inputs(lasting, row_inputs(paths, 1), **counts)
    return inputs | {name: values[0] for name, values in rows.items()}


def test_padding_is_inert(fake):
    pipeline = fake()
    paths = trajectories(pipeline, MIXTURE[:3])
    inputs = padded(paths, requests=4, lanes=8)
    assert {name: array.dtype for name, array in inputs.items()} == {
        name: array.dtype for name, array in step_inputs(paths).items()
    }
    result = pipeline.runner.run("step", inputs)["next_state"]
    assert result.shape[0] == 4
    assert not result[3].any()
    np.testing.assert_array_equal(result[:3], pipeline.runner.run("step", step_inputs(paths))["next_state"])


def test_a_batch_that_needs_no_padding_stays_as_it_is(fake):
    paths = trajectories(fake(), MIXTURE[:3])
    exact = step_inputs(paths)
    for name, array in padded(paths, requests=3, lanes=len(exact["lane_request"])).items():
        np.testing.assert_array_equal(array, exact[name])


def test_guidance_weights_are_one_minus_s_and_s(fake):
    pipeline = fake()
    inputs = step_inputs(trajectories(pipeline, MIXTURE[:2]))
    np.testing.assert_array_equal(inputs["guidance"], np.array([[-6.5, 7.5, 0], [0, 0, 1]], np.float32))
    np.testing.assert_array_equal(inputs["lane_request"], [0, 0, 1])


def poisoned_runner(pipeline, fake):
    ids = pipeline._prompts._tokenizer.encode("poison").ids
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


def test_one_bad_lane_spoils_the_shared_step_of_the_fake_as_of_a_real_engine(fake):
    pipeline = fake(poisoned_runner(fake(), fake))
    bad = Request(prompt="poison", num_inference_steps=4, seed=9)
    result = pipeline.runner.run("step", step_inputs(trajectories(pipeline, [MIXTURE[0], bad])))
    assert np.isnan(result["next_state"][:, 0]).all()


def test_two_bad_requests_are_both_found_and_the_good_one_goes_on(fake):
    pipeline = fake(poisoned_runner(fake(), fake))
    bad = [Request(prompt="poison", num_inference_steps=4, seed=seed) for seed in (8, 9)]
    paths = trajectories(pipeline, [bad[0], MIXTURE[0], bad[1]])
    assert set(step_trajectories(pipeline.runner, paths)) == {paths[0], paths[2]}
    assert [path.row for path in paths] == [0, 1, 0]


def test_infinity_is_a_fault_too(fake):
    pipeline = fake()
    path = trajectories(pipeline, MIXTURE[:1])[0]
    path.state[0, 0, 0, 0] = np.inf
    assert isinstance(step_trajectories(pipeline.runner, [path])[path], ParityError)


@pytest.mark.parametrize(
    "change",
    [
        {"lane_request": np.array([0, 2])},
        {"guidance": np.zeros((2, 1), np.float32)},
        {"transition": np.zeros((1, 6, 6), np.float32)},
        {"noise": np.zeros((1, 4, 8, 9), np.float32)},
        {"timestep": np.zeros(2, np.float64)},
        {"prompt_embeds": np.zeros((2, 12, 9), np.float32)},
        {"conditioning": np.zeros(1, np.float32)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_fake_takes_what_a_step_graph_takes_and_nothing_else(fake, change):
    inputs = step_inputs(trajectories(fake(), MIXTURE[:1]))
    assert FakeRunner().run("step", inputs)["next_state"].shape == (1, 6, 4, 8, 8)
    with pytest.raises(BackendError):
        FakeRunner().run("step", inputs | change)


def test_a_step_that_is_tried_twice_draws_its_noise_once(fake):
    pipeline = fake()
    path = trajectories(pipeline, MIXTURE[4:])[0]
    np.testing.assert_array_equal(path.noise(), path.noise())
