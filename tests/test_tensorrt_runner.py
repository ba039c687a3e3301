"""The TensorRT runner on a simulated GPU that enforces CUDA's rules: whole images, graphs, memory, errors."""

import threading
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from sdrt.errors import BackendError, ParityError
from sdrt.pipeline import Pipeline
from sdrt.runners.base import STEP, VAE_DECODER, VAE_ENCODER
from sdrt.runners.onnxruntime import OnnxRuntimeRunner
from sdrt.runners.tensorrt import TensorRtRunner
from tests.simulated_cuda import BrokenRuleError, SimulatedContext, SimulatedCuda


@pytest.fixture
def bundle(onnx_bundle):
    return onnx_bundle


@pytest.fixture
def profiles(onnx_profiles):
    return onnx_profiles


@pytest.fixture
def expected(bundle):
    """Images by another runner on the same files."""
    with Pipeline(bundle, OnnxRuntimeRunner(bundle, threads=1)) as pipeline:
        yield lambda **options: draw(pipeline, **options)


def draw(pipeline, prompt="a red circle", **options):
    return np.asarray(pipeline.generate(prompt, **{"num_inference_steps": 3, "seed": 1, **options}).images[0])


@pytest.fixture
def cuda(profiles):
    return SimulatedCuda(profiles)


@pytest.fixture
def pipeline(bundle, cuda):
    with Pipeline(bundle, TensorRtRunner(bundle, cuda)) as pipeline:
        yield pipeline


def step_feeds(lanes=2, side=8, seed=0):
    random = np.random.default_rng(seed)
    return {
        "state": random.standard_normal((1, 6, 4, side, side), np.float32),
        "input_scale": np.ones(1, np.float32),
        "lane_request": np.zeros(lanes, np.int64),
        "timestep": np.full(lanes, 500, np.float32),
        "prompt_embeds": random.standard_normal((lanes, 77, 32), np.float32),
        "guidance": np.full((1, lanes), 1 / lanes, np.float32),
        "rescale_lanes": np.full((1, lanes), 1 / lanes, np.float32),
        "guidance_rescale": np.zeros(1, np.float32),
        "clamp": np.zeros((1, 3), np.float32),
        "transition": random.standard_normal((1, 6, 9)).astype(np.float32),
        "noise": random.standard_normal((1, 4, side, side), np.float32),
        "mask": np.full((1, 1, side, side), 0.5, np.float32),
        "known": random.standard_normal((1, 2, 4, side, side), np.float32),
        "known_weights": np.full((1, 2), 0.5, np.float32),
    }


class TestImages:
    def test_are_those_of_another_runner_to_the_bit(self, pipeline, expected):
        assert np.array_equal(draw(pipeline), expected())

    @pytest.mark.parametrize(
        "options", [{"guidance_scale": 1.0}, {"height": 128, "width": 64}, {"num_images_per_prompt": 3}]
    )
    def test_are_so_for_other_shapes(self, pipeline, expected, options):
        assert np.array_equal(draw(pipeline, **options), expected(**options))

    def test_are_so_again_after_other_shapes(self, pipeline, expected):
        draw(pipeline)
        draw(pipeline, height=128)
        assert np.array_equal(draw(pipeline), expected())

    def test_an_image_that_is_not_finite_is_an_error_and_never_a_picture(self, pipeline, cuda, expected):
        cuda.poison = (VAE_DECODER, "sample")
        with pytest.raises(ParityError):
            draw(pipeline)
        assert np.array_equal(draw(pipeline), expected())

    def test_latents_that_are_not_finite_are_an_error(self, pipeline, cuda):
        cuda.poison = (STEP, "next_state")
        with pytest.raises(ParityError, match="gave NaN or infinity"):
            draw(pipeline)


class TestGraphs:
    def test_a_shape_runs_plainly_once_then_is_replayed(self, bundle, cuda):
        with TensorRtRunner(bundle, cuda) as runner:
            for seed in range(4):
                runner.run(STEP, step_feeds(seed=seed))
            assert (runner.counters.plain_launches, runner.counters.captures, runner.counters.replays) == (1, 1, 3)
            assert cuda.log.count("launch") == 3

    def test_a_replay_is_equal_to_a_plain_launch_to_the_bit(self, bundle, profiles):
        results = []
        for plain in (False, True):
            with TensorRtRunner(bundle, SimulatedCuda(profiles), capture=not plain) as runner:
                results.append([runner.run(STEP, step_feeds(seed=seed))["next_state"] for seed in range(3)])
        assert np.array_equal(*results)

    def test_where_capture_fails_plain_launches_serve_and_it_is_counted_once(self, bundle, profiles, expected):
        runner = TensorRtRunner(bundle, SimulatedCuda(profiles, refuse_capture=True))
        with Pipeline(bundle, runner) as pipeline, pytest.warns(UserWarning, match="no CUDA graph") as warned:
            assert np.array_equal(draw(pipeline), expected())
        assert len(warned) == 3
        assert runner.counters.captures == runner.counters.replays == 0
        assert runner.counters.failed_captures == 3  # text encoder, step and VAE decoder: once each
        assert runner.counters.plain_launches == 7  # two prompts, four rows of PNDM, one image

    def test_work_that_fails_while_it_is_captured_leaves_no_graph(self, bundle, cuda, monkeypatch):
        enqueue = SimulatedContext.enqueue

        def refuse_in_capture(context, stream):
            if cuda.streams[stream].capturing is not None:
                raise BackendError("not while capturing", hint="none")
            enqueue(context, stream)

        monkeypatch.setattr(SimulatedContext, "enqueue", refuse_in_capture)
        with TensorRtRunner(bundle, cuda) as runner:
            with pytest.warns(UserWarning, match="not while capturing"):
                runner.run(STEP, step_feeds())
            assert not cuda.graphs
            runner.run(STEP, step_feeds())
            assert runner.counters.plain_launches == 2

    def test_what_a_first_launch_compiled_is_kept_at_once(self, bundle, cuda):
        with TensorRtRunner(bundle, cuda) as runner:
            for _ in range(3):
                runner.run(STEP, step_feeds())
            assert cuda.log.count("keep") == 1

    def test_each_shape_has_its_own_and_comes_back(self, bundle, cuda):
        with TensorRtRunner(bundle, cuda) as runner:
            for _ in range(3):
                for lanes in (2, 1):  # the larger first: growing drops graphs
                    runner.run(STEP, step_feeds(lanes=lanes))
            assert runner.counters.captures == 2
            assert runner.counters.replays == 4

    def test_the_least_recently_used_is_dropped(self, bundle, cuda):
        with TensorRtRunner(bundle, cuda, most_graphs=2) as runner:
            for lanes in (3, 1, 3, 2, 3):  # 2 drops 1
                runner.run(STEP, step_feeds(lanes=lanes))
            assert runner.counters.evictions == 1
            assert runner.counters.replays == 2
            assert len(cuda.graphs) == 2

    def test_results_belong_to_the_caller(self, bundle, cuda):
        with TensorRtRunner(bundle, cuda) as runner:
            first = runner.run(STEP, step_feeds(seed=0))["next_state"]
            copy = first.copy()
            runner.run(STEP, step_feeds(seed=1))
            assert np.array_equal(first, copy)


class TestMemory:
    def test_the_arena_is_the_largest_need_and_not_the_sum(self, bundle, cuda):
        with TensorRtRunner(bundle, cuda) as runner:
            before = cuda.used()
            runner.run(STEP, step_feeds(side=8))
            small = cuda.used() - before
            runner.run(STEP, step_feeds(side=16))
            large = cuda.used() - before
            runner.run(STEP, step_feeds(side=8))
            assert small < large == cuda.used() - before

    def test_growing_the_arena_drops_the_graphs_that_used_the_old_one(self, bundle, cuda):
        with TensorRtRunner(bundle, cuda) as runner:
            feeds = step_feeds(side=8)
            exact = runner.run(STEP, feeds)["next_state"]
            runner.run(STEP, step_feeds(side=16))
            assert np.array_equal(runner.run(STEP, feeds)["next_state"], exact)
            assert runner.counters.captures == 3

    def test_nothing_is_left_after_closing(self, bundle, cuda):
        runner = TensorRtRunner(bundle, cuda)
        runner.run(STEP, step_feeds())
        runner.close()  # the simulated driver raises for what is left
        runner.close()
        assert not cuda.blocks

    def test_too_little_memory_for_a_shape_is_an_error_and_leaves_the_rest_working(self, bundle, cuda):
        with TensorRtRunner(bundle, cuda) as runner:
            exact = runner.run(STEP, step_feeds(side=8))["next_state"]
            cuda.memory_limit = cuda.used() + 1000
            with pytest.raises(BackendError, match="MemoryAllocation"):
                runner.run(STEP, step_feeds(side=16))
            assert np.array_equal(runner.run(STEP, step_feeds(side=8))["next_state"], exact)

    def test_too_little_memory_for_a_component_that_is_opened_late_is_an_error_once(self, bundle, cuda):
        with TensorRtRunner(bundle, cuda) as runner:
            pixels = {"sample": np.zeros((1, 3, 64, 64), np.float32)}
            limit, cuda.memory_limit = cuda.memory_limit, cuda.used() + 1000
            for _ in range(2):
                with pytest.raises(BackendError, match="MemoryAllocation"):
                    runner.run(VAE_ENCODER, pixels)
            cuda.memory_limit = limit
            assert runner.run(VAE_ENCODER, pixels)

    def test_closing_releases_the_rest_when_something_fails(self, bundle, cuda, monkeypatch):
        runner = TensorRtRunner(bundle, cuda)
        runner.run(STEP, step_feeds())
        monkeypatch.setattr(cuda, "keep", refuse)
        with pytest.raises(BackendError, match="was refused"):
            runner.close()
        assert not cuda.blocks
        assert not cuda.pinned

    def test_too_little_memory_to_open_leaves_nothing(self, bundle, profiles):
        cuda = SimulatedCuda(profiles, memory_limit=100_000)
        with pytest.raises(BackendError, match="MemoryAllocation"):
            TensorRtRunner(bundle, cuda)
        assert not cuda.blocks
        assert not cuda.engines


class TestErrors:
    def test_a_shape_outside_every_profile_is_refused_before_the_device_is_touched(self, bundle, cuda):
        with TensorRtRunner(bundle, cuda) as runner:
            cuda.log.clear()
            with pytest.raises(BackendError, match=r"step was built for other shapes than .*state \[1, 6, 4, 32, 32\]"):
                runner.run(STEP, step_feeds(side=32))
            assert cuda.log == []

    def test_a_closed_runner_says_so(self, bundle, cuda):
        runner = TensorRtRunner(bundle, cuda)
        runner.close()
        with pytest.raises(BackendError, match="closed"):
            runner.run(STEP, step_feeds())

    def test_an_engine_that_fails_leaves_the_runner_usable(self, bundle, cuda, monkeypatch):
        with TensorRtRunner(bundle, cuda) as runner:
            exact = runner.run(STEP, step_feeds(lanes=1))["next_state"]
            with monkeypatch.context() as patch:
                patch.setattr("tests.simulated_cuda.SimulatedContext.enqueue", refuse)
                with pytest.raises(BackendError, match="the kernel was refused"):
                    runner.run(STEP, step_feeds(lanes=2))
            assert np.array_equal(runner.run(STEP, step_feeds(lanes=1))["next_state"], exact)
            assert runner.run(STEP, step_feeds(lanes=2))["next_state"].shape == (1, 6, 4, 8, 8)


def refuse(*arguments):
    raise BackendError("the kernel was refused", hint="none")


class TestThreads:
    def test_many_callers_get_what_each_would_get_alone(self, bundle, cuda):
        with TensorRtRunner(bundle, cuda) as runner:
            feeds = [step_feeds(lanes=1 + seed % 3, seed=seed) for seed in range(12)]
            alone = [runner.run(STEP, each)["next_state"] for each in feeds]
            results = [None] * len(feeds)

            def call(index):
                results[index] = runner.run(STEP, feeds[index])["next_state"]

            threads = [threading.Thread(target=call, args=(index,)) for index in range(len(feeds))]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert all(np.array_equal(*pair) for pair in zip(results, alone, strict=True))


CALLS = st.lists(st.tuples(st.integers(1, 4), st.sampled_from([8, 12, 16]), st.integers(0, 3)), min_size=1, max_size=12)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(calls=CALLS, most_graphs=st.integers(1, 3))
def test_any_sequence_of_shapes_gives_what_each_gives_alone(bundle, profiles, calls, most_graphs):
    exact = OnnxRuntimeRunner(bundle, threads=1)
    with TensorRtRunner(bundle, SimulatedCuda(profiles), most_graphs=most_graphs) as runner:
        for lanes, side, seed in calls:
            feeds = step_feeds(lanes=lanes, side=side, seed=seed)
            assert np.array_equal(runner.run(STEP, feeds)["next_state"], exact.run(STEP, feeds)["next_state"])


class TestTheSimulationItself:
    """A rule that nobody enforces proves nothing."""

    def test_refuses_waiting_while_a_stream_is_captured(self, cuda):
        stream = cuda.create_stream()
        cuda.begin_capture(stream)
        with pytest.raises(BrokenRuleError, match="synchronize while a stream is captured"):
            cuda.synchronize(stream)
        with pytest.raises(BrokenRuleError, match="allocate while a stream is captured"):
            cuda.allocate(8)

    def test_refuses_memory_that_is_not_pinned(self, cuda):
        stream, address = cuda.create_stream(), cuda.allocate(8)
        cuda.upload(address, np.zeros(8, np.uint8).ctypes.data, 8, stream)
        with pytest.raises(BrokenRuleError, match="not pinned"):
            cuda.synchronize(stream)

    def test_refuses_memory_that_was_freed(self, cuda):
        stream, pinned, address = cuda.create_stream(), cuda.allocate_pinned(8), cuda.allocate(8)
        cuda.begin_capture(stream)
        cuda.upload(address, pinned.address, 8, stream)
        graph = cuda.end_capture(stream)
        cuda.free(address)
        cuda.launch(graph, stream)
        with pytest.raises(BrokenRuleError, match="not allocated on the device"):
            cuda.synchronize(stream)

    def test_runs_nothing_before_somebody_waits(self, cuda):
        stream, pinned, address = cuda.create_stream(), cuda.allocate_pinned(4), cuda.allocate(4)
        pinned.bytes[:] = 7
        cuda.upload(address, pinned.address, 4, stream)
        assert (cuda.view(address, 4) != 7).all()
        cuda.synchronize(stream)
        assert (cuda.view(address, 4) == 7).all()


class TestRefit:
    @pytest.fixture
    def weights(self, tiny_checkpoint):
        """Some of the network's weights; the graph has them under the checkpoint's names."""
        stored = load_file(tiny_checkpoint / "unet" / "diffusion_pytorch_model.safetensors")
        return lambda factor: {"conv_out.weight": stored["conv_out.weight"] * np.float32(factor)}

    def test_changes_the_results_and_back_again_to_the_bit(self, bundle, cuda, weights):
        with TensorRtRunner(bundle, cuda) as runner:
            feeds = step_feeds()
            exact = runner.run(STEP, feeds)["next_state"]
            runner.refit(STEP, weights(2))
            changed = runner.run(STEP, feeds)["next_state"]
            assert not np.array_equal(changed, exact)
            runner.refit(STEP, weights(1))
            assert np.array_equal(runner.run(STEP, feeds)["next_state"], exact)

    def test_of_a_closed_runner_is_refused(self, bundle, cuda):
        runner = TensorRtRunner(bundle, cuda)
        runner.close()
        with pytest.raises(BackendError, match="closed"):
            runner.refit(STEP, {})


def test_without_capturing_every_launch_is_plain(bundle, cuda, expected):
    runner = TensorRtRunner(bundle, cuda, capture=False)
    with Pipeline(bundle, runner) as pipeline:
        assert np.array_equal(draw(pipeline), expected())
    assert runner.counters.captures == runner.counters.replays == runner.counters.failed_captures == 0


@pytest.mark.parametrize(
    ("needed", "padded"),
    [
        ((1, 1), (12, 1)),
        ((3, 5), (12, 5)),
        ((8, 8), (12, 8)),
        ((8, 9), (12, 10)),
        ((9, 17), (12, 20)),
        ((12, 24), (12, 24)),
    ],
)
def test_a_batch_is_padded_to_few_sizes(bundle, cuda, needed, padded):
    profile = replace(bundle.manifest.profile, max_batch=12)
    larger = replace(bundle, manifest=replace(bundle.manifest, profile=profile))
    with TensorRtRunner(larger, cuda) as runner:
        assert runner.batch_size(*needed) == padded
