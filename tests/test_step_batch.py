"""Trajectories that step together, with their state on a simulated GPU that enforces CUDA's rules."""

import threading

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sdrt.batcher import Batcher
from sdrt.denoiser import lasting_inputs, row_inputs, step_trajectories
from sdrt.errors import BackendError, ParityError
from sdrt.pipeline import Pipeline
from sdrt.request import Request
from sdrt.runners.base import STEP, TEXT_ENCODER, SteppingRunner
from sdrt.runners.onnxruntime import OnnxRuntimeRunner
from sdrt.runners.tensorrt import TensorRtRunner
from sdrt.step_batch import open_batch
from tests.simulated_cuda import SimulatedCuda

STOCHASTIC = {"scheduler": "ddim", "eta": 1.0}


@pytest.fixture
def cuda(onnx_profiles):
    return SimulatedCuda(onnx_profiles)


@pytest.fixture
def pipeline(onnx_bundle, cuda):
    with Pipeline(onnx_bundle, TensorRtRunner(onnx_bundle, cuda)) as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def host(onnx_bundle):
    """The same files, one call of the runner a row."""
    with Pipeline(onnx_bundle, OnnxRuntimeRunner(onnx_bundle, threads=1)) as pipeline:
        yield pipeline


def request(**options):
    return Request(prompt="a red circle", **{"num_inference_steps": 4, "seed": 1, **options})


def trajectories(pipeline, *requests):
    prepared = [pipeline.prepare(pipeline.resolve(each)) for each in requests]
    return [path for each in prepared for path in each.trajectories]


def finish(batch):
    while not any(path.finished for path in batch.trajectories):
        assert batch.advance() == {}


def images(pipeline, each):
    return [image.tobytes() for image in pipeline.generate(each).images]


def drawn(pipeline, each):
    return [np.asarray(image) for image in pipeline.generate(each).images]


MIXTURE = (
    request(),
    request(scheduler="euler", guidance_scale=1.0, seed=2),
    request(scheduler="sa_solver", seed=3),
    request(**STOCHASTIC, generator="cuda", seed=4),
    request(guidance_start=0.25, guidance_end=0.75, guidance_rescale=0.6, seed=5),
)


class TestStates:
    def test_a_gpu_keeps_them_and_a_cpu_does_not(self, pipeline, host):
        assert isinstance(pipeline.runner, SteppingRunner)
        assert not isinstance(host.runner, SteppingRunner)

    @pytest.mark.parametrize("mixture", [MIXTURE[:4], MIXTURE[1:]])
    def test_are_those_of_steps_on_the_host_to_the_bit(self, pipeline, host, mixture):
        ours, theirs = trajectories(pipeline, *mixture), trajectories(host, *mixture)
        finish(open_batch(pipeline.runner, ours))
        finish(open_batch(host.runner, theirs))
        assert [path.row for path in ours] == [path.row for path in theirs]
        for path, other in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(path.state, other.state)

    def test_can_be_collected_after_any_row(self, pipeline, host):
        (ours,), (theirs,) = trajectories(pipeline, MIXTURE[2]), trajectories(host, MIXTURE[2])
        device, plain = open_batch(pipeline.runner, [ours]), open_batch(host.runner, [theirs])
        for row in range(1, 5):
            device.advance()
            plain.advance()
            assert device.collect() == {}
            assert ours.row == row
            np.testing.assert_array_equal(ours.state, theirs.state)

    def test_stay_as_they_were_until_they_are_collected(self, pipeline):
        (path,) = trajectories(pipeline, request())
        before = path.state.copy()
        batch = open_batch(pipeline.runner, [path])
        batch.advance()
        assert path.row == 0
        np.testing.assert_array_equal(path.state, before)
        batch.close()

    def test_survive_a_call_of_the_step_by_another(self, pipeline, host):
        ours, other = trajectories(pipeline, request(), request(seed=9))
        (theirs,) = trajectories(host, request())
        batch, between = open_batch(pipeline.runner, [ours]), open_batch(pipeline.runner, [other])
        for row in range(5):
            batch.advance()
            if row % 2:
                between.advance()
        finish(open_batch(host.runner, [theirs]))
        np.testing.assert_array_equal(ours.state, theirs.state)
        between.close()

    def test_survive_other_components_and_a_growing_arena(self, pipeline, host):
        (ours,), (theirs,) = trajectories(pipeline, request()), trajectories(host, request())
        batch = open_batch(pipeline.runner, [ours])
        batch.advance()
        pipeline.generate(request(height=128, width=128, num_inference_steps=1))
        pipeline.runner.run(TEXT_ENCODER, {"input_ids": np.zeros((1, 77), np.int64)})
        finish(batch)
        finish(open_batch(host.runner, [theirs]))
        np.testing.assert_array_equal(ours.state, theirs.state)

    def test_survive_that_their_graph_is_dropped(self, onnx_bundle, onnx_profiles, host):
        (theirs,) = trajectories(host, request())
        with Pipeline(
            onnx_bundle, TensorRtRunner(onnx_bundle, SimulatedCuda(onnx_profiles), most_graphs=1)
        ) as pipeline:
            (ours,) = trajectories(pipeline, request())
            batch = open_batch(pipeline.runner, [ours])
            while not ours.finished:
                batch.advance()
                pipeline.runner.run(TEXT_ENCODER, {"input_ids": np.zeros((1, 77), np.int64)})
            assert pipeline.runner.counters.evictions > 3
            batch.close()
        finish(open_batch(host.runner, [theirs]))
        np.testing.assert_array_equal(ours.state, theirs.state)


class TestSteps:
    def test_need_nothing_of_the_host_but_launches(self, pipeline, cuda):
        """Between two rows: one copy a plan input on the device, the graph, two events, one wait for the row before."""
        (path,) = trajectories(pipeline, request(num_inference_steps=8))
        batch = open_batch(pipeline.runner, [path])
        for _ in range(3):
            batch.advance()
        cuda.log.clear()
        batch.advance()
        assert cuda.log == ["event", *["copy"] * 5, "launch", "event", "wait"]
        batch.close()

    def test_share_one_graph_whatever_the_count_of_requests_that_need_as_many_lanes(self, pipeline):
        guided, unguided = {"guidance_scale": 7.5}, {"guidance_scale": 1.0}
        for options in ([guided, guided], [guided, unguided, unguided], [unguided] * 4):
            batch = open_batch(pipeline.runner, trajectories(pipeline, *(request(**each) for each in options)))
            before = pipeline.runner.counters.captures
            finish(batch)
            batch.close()
        assert pipeline.runner.counters.captures == before == 2  # the text encoder's and the step's

    def test_take_turns_with_others_on_the_device_alone(self, pipeline, cuda):
        """Another's state is copied away and ours in: nothing goes through the host, and nobody waits for all."""
        paths = trajectories(pipeline, request(num_inference_steps=8), request(num_inference_steps=8, seed=2))
        batches = [open_batch(pipeline.runner, [path]) for path in paths]
        for batch in batches * 2:
            batch.advance()
        cuda.log.clear()
        for batch in batches:
            batch.advance()
        assert cuda.log == ["copy", *["copy"] * 9, "event", *["copy"] * 5, "launch", "event", "wait"] * 2
        assert cuda.pending()
        for batch in batches:
            batch.close()

    def test_that_take_turns_count_no_gap_for_the_turns_of_others(self, pipeline):
        paths = trajectories(pipeline, request(), request(seed=2))
        batches = [open_batch(pipeline.runner, [path]) for path in paths]
        for batch in batches * 3:
            batch.advance()
        for batch in batches:
            batch.collect()
            assert batch.gap_seconds() == 0
            batch.close()

    def test_are_queued_one_ahead_of_the_device(self, pipeline, cuda):
        (path,) = trajectories(pipeline, request(num_inference_steps=8))
        batch = open_batch(pipeline.runner, [path])
        for _ in range(3):
            batch.advance()
            assert len(batch.take_seconds()) <= 1
        assert cuda.pending()
        batch.collect()
        assert not cuda.pending()
        batch.close()

    def test_bring_noise_only_where_a_row_draws_some(self, pipeline, cuda):
        plain, drawing, device = trajectories(pipeline, *MIXTURE[1:4])
        batch = open_batch(pipeline.runner, [plain, drawing, device])
        for _ in range(2):
            batch.advance()
        cuda.log.clear()
        batch.advance()
        assert cuda.log.count("upload") == 1
        assert cuda.log.count("fill_normal") == 1
        batch.close()

    def test_have_a_time_each_and_a_gap_in_all(self, pipeline):
        (path,) = trajectories(pipeline, request())
        batch = open_batch(pipeline.runner, [path])
        finish(batch)
        seconds = batch.take_seconds()
        assert len(seconds) == len(path.plan)
        assert all(second > 0 for second in seconds)
        assert batch.gap_seconds() > 0
        assert batch.take_seconds() == ()

    def test_change_their_lanes_where_guidance_begins_and_ends(self, pipeline):
        (path,) = trajectories(pipeline, request(num_inference_steps=8, guidance_start=0.25, guidance_end=0.75))
        batch = open_batch(pipeline.runner, [path])
        captured = []
        while not path.finished:
            assert batch.advance() == {}
            captured.append((path.row, len(path.lanes)))
        rows = len(path.plan)
        first, end = path.guidance.interval.start, path.guidance.interval.stop
        assert (first, rows) in ((2, 8), (3, 9))
        # Collected where the lanes change, and only there.
        assert [row for row, _ in captured] == [0] * (first - 1) + [first] * (end - first) + [end] * (rows - end) + [
            rows
        ]
        assert len(batch.take_seconds()) == rows
        batch.close()

    def test_beyond_the_last_row_are_refused(self, pipeline):
        paths = trajectories(pipeline, request())
        inputs = {**lasting_inputs(paths), "noise": np.zeros((1, 4, 8, 8), np.float32)}
        steps = pipeline.runner.open_steps(inputs, row_inputs(paths, 2))
        steps.advance([None])
        steps.advance([None])
        with pytest.raises(BackendError, match="row 2 of 2 was asked for"):
            steps.advance([None])
        assert steps.state().shape == (1, 6, 4, 8, 8)

    def test_after_closing_are_refused(self, pipeline):
        batch = open_batch(pipeline.runner, trajectories(pipeline, request()))
        batch.close()
        batch.close()
        with pytest.raises(BackendError, match="are closed"):
            batch.advance()

    def test_that_failed_are_not_continued(self, pipeline, monkeypatch):
        batch = open_batch(pipeline.runner, trajectories(pipeline, request()))
        batch.advance()
        with monkeypatch.context() as patch:
            patch.setattr("tests.simulated_cuda.SimulatedCuda.launch", refuse)
            with pytest.raises(BackendError, match="refused"):
                batch.advance()
        with pytest.raises(BackendError, match="failed before"):
            batch.advance()
        batch.close()
        assert images(pipeline, request())

    def test_of_a_size_outside_every_profile_are_refused_at_the_start(self, pipeline):
        (path,) = trajectories(pipeline, request())
        path.state = np.zeros((6, 4, 64, 64), np.float32)
        with pytest.raises(BackendError, match="was built for other shapes"):
            open_batch(pipeline.runner, [path])

    def test_closing_the_runner_ends_open_batches(self, onnx_bundle, cuda):
        runner = TensorRtRunner(onnx_bundle, cuda)
        with Pipeline(onnx_bundle, runner) as pipeline:
            batch = open_batch(runner, trajectories(pipeline, request()))
            batch.advance()
        assert not cuda.blocks  # the simulated driver also raises for what is left
        with pytest.raises(BackendError, match="are closed"):
            batch.advance()


def refuse(*arguments):
    raise BackendError("the launch was refused", hint="none")


class TestFaults:
    def test_are_those_of_the_one_trajectory_and_it_does_not_advance(self, pipeline, host):
        first, culprit, last = trajectories(pipeline, request(), request(seed=2), request(seed=3))
        culprit.state[0, 0, 0, 0] = np.inf
        batch = open_batch(pipeline.runner, [first, culprit, last])
        faults = {}
        while not first.finished:
            faults |= batch.advance()
        assert set(faults) == {culprit}
        assert culprit.row == 0
        assert "one of the steps 1 to 5 of 5 gave NaN or infinity" in str(faults[culprit])
        (theirs,) = trajectories(host, request())
        finish(open_batch(host.runner, [theirs]))
        np.testing.assert_array_equal(first.state, theirs.state)

    def test_end_an_image_with_an_error(self, pipeline, cuda):
        cuda.poison = (STEP, "next_state")
        with pytest.raises(ParityError, match="gave NaN or infinity"):
            pipeline.generate(request())
        assert images(pipeline, request())


class TestPipeline:
    @pytest.mark.parametrize("each", MIXTURE)
    def test_draws_what_the_host_draws_to_the_bit(self, pipeline, host, each):
        assert images(pipeline, each) == images(host, each)

    def test_draws_more_images_than_fit_a_batch(self, pipeline, host):
        each = request(num_images_per_prompt=6, num_inference_steps=2)
        assert images(pipeline, each) == images(host, each)

    def test_shows_latents_of_every_step_only_when_asked(self, pipeline, host):
        ours, theirs = list(pipeline.stream(request())), list(host.stream(request()))
        for event, other in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(event.latents, other.latents)
        events = list(pipeline.stream(request(), latents=False))
        assert [event.latents is None for event in events] == [True] * 4 + [False]

    def test_reports_the_gaps_between_steps_of_a_gpu_only(self, pipeline, host):
        assert pipeline.generate(request()).timings.gap_seconds > 0
        assert host.generate(request()).timings.gap_seconds is None

    def test_that_is_left_midway_gives_the_device_back(self, pipeline, cuda):
        events = pipeline.stream(request())
        next(events)
        events.close()
        assert not cuda.events
        assert images(pipeline, request())

    def test_noise_of_a_cuda_generator_differs_from_that_of_a_cpu_generator(self, host):
        assert images(host, request(generator="cuda")) != images(host, request())


class TestBatcher:
    def test_requests_that_come_and_go_get_what_each_gets_alone(self, pipeline, host):
        requests = [
            request(seed=seed, num_inference_steps=1 + seed % 4, height=64 + 64 * (seed % 5 == 0), **extra)
            for seed, extra in enumerate([{}, STOCHASTIC, {"guidance_scale": 1.0}, {"scheduler": "euler"}] * 4)
        ]
        with Batcher(pipeline, max_batch=4) as batcher:
            tickets = [batcher.submit(each) for each in requests]
            results = [ticket.result(60) for ticket in tickets]
        for result, each in zip(results, requests, strict=True):
            assert len(result.timings.step_seconds) == len(result.request.plan)
            # Another batch size rounds elsewhere: the bits are not the same, the image is.
            for image, alone in zip(result.images, drawn(host, each), strict=True):
                assert np.abs(np.asarray(image).astype(int) - alone).max() <= 1

    def test_a_request_that_fails_leaves_the_others_going(self, pipeline, host):
        held = threading.Event()
        with Batcher(pipeline, max_batch=4) as batcher:
            good = batcher.submit(request(num_inference_steps=6))
            doomed = batcher.submit(request(seed=5, num_inference_steps=3))
            original = pipeline.preparing

            def spoiled(resolved):
                prepared = yield from original(resolved)
                if resolved.seed == 77:
                    prepared.trajectories[0].state[:] = np.nan
                    held.set()
                return prepared

            pipeline.preparing = spoiled
            bad = batcher.submit(request(seed=77))
            with pytest.raises(ParityError):
                bad.result(60)
            assert held.is_set()
            assert good.result(60).images
            assert doomed.result(60).images


CALLS = st.lists(st.sampled_from(["first", "second", "collect", "call", "vae"]), min_size=1, max_size=14)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(calls=CALLS, most_graphs=st.integers(1, 3), kinds=st.tuples(st.integers(0, 4), st.integers(0, 4)))
def test_whatever_happens_between_steps_their_states_are_those_of_the_host(
    onnx_bundle, onnx_profiles, host, calls, most_graphs, kinds
):
    requests = [MIXTURE[kind] for kind in kinds]
    runner = TensorRtRunner(onnx_bundle, SimulatedCuda(onnx_profiles), most_graphs=most_graphs)
    with Pipeline(onnx_bundle, runner) as pipeline:
        ours, theirs = trajectories(pipeline, *requests), trajectories(host, *requests)
        batches = dict(zip(["first", "second"], [open_batch(runner, [path]) for path in ours], strict=True))
        plain = dict(zip(["first", "second"], [open_batch(host.runner, [path]) for path in theirs], strict=True))
        for call in calls:
            if call in batches and not plain[call].trajectories[0].finished:
                batches[call].advance()
                plain[call].advance()
            elif call == "collect":
                batches["first"].collect()
            elif call == "call":
                images(pipeline, request(num_inference_steps=1))
            elif call == "vae":
                pipeline.decode(np.zeros((1, 4, 8, 8), np.float32))
        for name, batch in batches.items():
            batch.collect()
            assert batch.trajectories[0].row == plain[name].trajectories[0].row
            np.testing.assert_array_equal(batch.trajectories[0].state, plain[name].trajectories[0].state)
            batch.close()


class TestOnTheHost:
    """A batch puts together once what stays, and draws noise ahead: both must not be seen."""

    def test_rows_are_those_of_steps_that_put_everything_together_anew(self, host):
        requests = [each for each in MIXTURE if each.generator == "cpu"]
        batched, alone = (trajectories(host, *requests) for _ in range(2))
        batch = open_batch(host.runner, batched)
        for _ in range(min(len(path.plan) for path in batched)):
            assert batch.advance() == {}
            assert step_trajectories(host.runner, alone) == {}
            for ours, theirs in zip(batched, alone, strict=True):
                assert np.array_equal(ours.state, theirs.state)
        batch.close()

    def test_noise_drawn_ahead_is_kept_when_the_batch_changes(self, host):
        paths, alone = (trajectories(host, request(scheduler="euler_a")) for _ in range(2))
        for _ in range(len(paths[0].plan)):
            batch = open_batch(host.runner, paths)
            assert batch.advance() == {}
            batch.close()
            assert step_trajectories(host.runner, alone) == {}
        assert np.array_equal(paths[0].state, alone[0].state)

    def test_a_sum_too_large_for_float32_is_no_fault(self, host):
        (path,) = trajectories(host, request())
        path.state[5] = 3e38  # a slot that its plan does not use, and that therefore stays what it is
        before = path.row
        batch = open_batch(FakeStep(), [path])
        assert batch.advance() == {}
        assert path.row == before + 1
        batch.close()


class FakeStep:
    """Gives back the state."""

    def run(self, component, feeds):
        return {"next_state": feeds["state"].copy()}

    def close(self):
        pass
