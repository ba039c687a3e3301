"""Two passes: the second is image-to-image of what the first drew, whatever the batch; and what is refused."""

import threading

import numpy as np
import pytest
import torch
from PIL import Image

import sdrt
from sdrt.batcher import Batcher
from sdrt.cli import run_command
from sdrt.denoiser import run_step
from sdrt.errors import BackendError, Cancelled, RequestError
from sdrt.request import Request
from sdrt.runners.fake import FakeRunner
from sdrt.tasks.resampling import resample

BASE = {"prompt": "red", "negative_prompt": "blue", "seed": 3, "num_inference_steps": 10, "scheduler": "euler_a"}
MODES = {"latent": "bilinear", "latent-nearest": "nearest", "latent-bicubic": "bicubic"}


def asked(**options):
    return Request(**{**BASE, "hires_scale": 2.0, "hires_upscaler": "lanczos", **options})


def by_hand(pipeline, *, upscaler="lanczos", size=(128, 128), strength=0.7, steps=10, **options):
    """The images of two requests: text-to-image, and image-to-image of what it drew in its VAE's pixels."""
    base = pipeline.generate(Request(**{**BASE, **options})).images
    seeds = [options.get("seed", BASE["seed"]) + index for index in range(len(base))]
    rest = {name: value for name, value in options.items() if name not in ("height", "width", "num_images_per_prompt")}
    return [
        pipeline.generate(
            Request(
                **{**BASE, **rest, "num_inference_steps": steps, "seed": seed},
                image=image.resize(size, Image.Resampling.LANCZOS),
                strength=strength,
                windowed=True,
            )
        ).images[0]
        for image, seed in zip(base, seeds, strict=True)
    ]


def pixels(images):
    return [(image.size, image.tobytes()) for image in images]


@pytest.mark.parametrize("mode", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(16, 16), (11, 30), (24, 9), (8, 13)])
def test_arrays_are_resampled_as_torch_resamples_them(mode, size):
    values = np.random.default_rng(0).standard_normal((2, 4, 8, 9), np.float32)
    options = {} if mode == "nearest" else {"align_corners": False}
    expected = torch.nn.functional.interpolate(torch.from_numpy(values), size=size, mode=mode, **options).numpy()
    np.testing.assert_allclose(resample(values, *size, mode), expected, atol=1e-5)  # float32 there


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_images_per_prompt": 3},
        {"variation_seed": 9, "variation_strength": 0.4},
        {"guidance_scale": 4.0, "guidance_end": 0.6, "guidance_rescale": 0.5},
        {"width": 32, "height": 64},
        {"generator": "cuda", "scheduler": "dpmpp_2m_karras"},
    ],
    ids=lambda options: " ".join(options) or "plain",
)
def test_pixels_are_drawn_again_as_a_caller_would_with_two_requests(fake, options):
    pipeline = fake()
    size = (2 * options.get("width", 64), 2 * options.get("height", 64))
    result = pipeline.generate(asked(**options))
    assert pixels(result.images) == pixels(by_hand(pipeline, size=size, **options))


def test_strength_and_steps_of_the_second_pass_are_its_own(fake):
    pipeline = fake()
    result = pipeline.generate(asked(hires_strength=0.4, hires_steps=15))
    assert pixels(result.images) == pixels(by_hand(pipeline, strength=0.4, steps=15))
    assert len(result.timings.step_seconds) == 10 + 6


@pytest.mark.parametrize("upscaler", MODES)
def test_latents_are_enlarged_and_made_noisy_with_the_seed_s_first_numbers(fake, upscaler):
    pipeline = fake()
    request = pipeline.resolve(asked(hires_upscaler=upscaler, num_images_per_prompt=2))
    base = pipeline.generate(Request(**BASE, num_images_per_prompt=2)).latents
    prepared = pipeline.prepare(request)
    for trajectory, latents in zip(prepared.trajectories, base, strict=True):
        trajectory.state[0], trajectory.row = latents, len(trajectory.plan)
    on_image, on_noise = request.hires.plan.noised[0]
    for index, latents in enumerate(base):
        noise = torch.randn((4, 16, 16), generator=torch.Generator().manual_seed(3 + index)).numpy()
        expected = on_image * resample(latents, 16, 16, MODES[upscaler]) + on_noise * noise
        start = pipeline.follow(prepared, index).trajectory
        np.testing.assert_allclose(start.state[0], expected, rtol=1e-5, atol=1e-5)
        while not start.finished:
            start.advance(run_step(pipeline.runner, [start])[0])
        image = pipeline.decode(start.latents[None])[0]
        assert pixels([image]) == pixels([pipeline.generate(request_of(request, index)).images[0]])


def request_of(resolved, index):
    """The request for one of several images alone."""
    return asked(hires_upscaler=resolved.hires.task.upscaler, seed=resolved.seeds[index])


def test_a_second_pass_above_the_bundle_s_sizes_works_in_windows(fake):
    pipeline = fake()
    request = asked(hires_scale=3.0, width=64, height=96)
    assert [each.windowed for each in pipeline.resolve(request).passes] == [False, True]
    result = pipeline.generate(request)
    assert result.images[0].size == (192, 288)
    assert pixels(result.images) == pixels(by_hand(pipeline, width=64, height=96, size=(192, 288)))


def test_the_final_size_is_the_nearest_that_the_vae_takes(fake):
    second = fake().resolve(asked(hires_scale=1.4, width=64, height=96)).hires
    assert (second.width, second.height) == (96, 128)  # of 89.6 and 134.4, in steps of 16


class TestInABatch:
    def requests(self):
        rng = np.random.default_rng(0)
        upscalers = ("lanczos", *MODES)
        plain = [
            Request(**{**BASE, "seed": i, "num_inference_steps": 3 + i, "height": 64 + 64 * (i % 2)}) for i in range(8)
        ]
        two = [
            asked(
                seed=100 + i,
                hires_upscaler=upscalers[i % 4],
                hires_scale=(2.0, 1.5, 3.0)[i % 3],
                num_inference_steps=2 + i,
                num_images_per_prompt=1 + i % 3,
            )
            for i in range(8)
        ]
        return [request for i in rng.permutation(8) for request in (plain[i], two[i])]

    def test_two_passes_equal_the_same_alone_and_never_overfill_it(self, fake):
        submitted = threading.Event()
        runner = FakeRunner(before=lambda name, feeds: submitted.wait(10))
        requests = self.requests()
        with Batcher(fake(runner), max_batch=4) as batcher:
            tickets = [batcher.submit(request) for request in requests]
            submitted.set()
            results = [ticket.result(60) for ticket in tickets]
            assert batcher.stats().occupancy > 1.5
        alone = fake()
        for request, result in zip(requests, results, strict=True):
            expected = alone.generate(request)
            assert pixels(result.images) == pixels(expected.images)
            assert len(result.timings.step_seconds) == len(expected.timings.step_seconds)
        plain_windows = 8  # a windowed trajectory's windows go through the engines together
        assert max(runner.batches) <= plain_windows

    def test_places_are_kept_between_the_passes(self, fake):
        """What waits does not take the place of a request between its passes, which would find a full batch."""
        together = []

        def before(name, feeds):
            if name == "step":
                together.append(len(feeds["state"]))
            submitted.wait(10)

        submitted = threading.Event()
        pipeline = fake(FakeRunner(before=before))
        big = Request(**{**BASE, "height": 128, "width": 128, "num_images_per_prompt": 3, "num_inference_steps": 40})
        with Batcher(pipeline, max_batch=3) as batcher:
            tickets = [batcher.submit(asked(num_images_per_prompt=2)), *(batcher.submit(big) for _ in range(2))]
            submitted.set()
            for ticket in tickets:
                ticket.result(60)
        assert max(together) <= 3

    @pytest.mark.parametrize("row", [2, 12])
    def test_a_cancel_frees_it_in_either_pass(self, fake, row):
        reached, go_on = threading.Event(), threading.Event()

        def pause(name, feeds):
            if name == "step" and len(runner.batches) == row:
                reached.set()
                go_on.wait(10)

        runner = FakeRunner(before=pause)
        with Batcher(fake(runner)) as batcher:
            ticket = batcher.submit(asked(hires_strength=1.0))
            assert reached.wait(10)
            ticket.cancel()
            go_on.set()
            with pytest.raises(Cancelled):
                ticket.result(10)
        assert len(runner.batches) == row + 1

    def test_a_decoder_that_fails_between_the_passes_fails_this_request_alone(self, fake):
        def before(name, feeds):
            if name == "vae_encoder":
                raise BackendError("no encoder today", hint="wait")

        with Batcher(fake(FakeRunner(before=before))) as batcher:
            doomed, other = batcher.submit(asked()), batcher.submit(Request(**BASE))
            with pytest.raises(BackendError, match="no encoder today"):
                doomed.result(10)
            assert other.result(10).images


class TestStream:
    def test_events_count_the_rows_of_both_passes(self, fake):
        events = list(fake().stream(asked(hires_steps=20, hires_strength=0.5)))
        assert [(event.row, event.rows) for event in events] == [(row, 20) for row in range(1, 21)]
        assert [event.latents.shape[2:] for event in events] == [(8, 8)] * 10 + [(16, 16)] * 10
        assert [event.result is not None for event in events] == [False] * 19 + [True]

    def test_previews_are_of_the_pass_s_size_and_the_first_one_s_result_is_whole(self, fake):
        pipeline = fake()
        events = list(pipeline.stream(asked(), preview=True))
        assert [event.preview[0].size for event in events] == [(64, 64)] * 10 + [(128, 128)] * 7
        assert pixels(events[9].preview) == pixels(pipeline.generate(Request(**BASE)).images)
        assert pixels(events[-1].preview) == pixels(events[-1].result.images)

    def test_closing_it_stops_the_work_in_either_pass(self, fake):
        for row in (3, 13):
            pipeline = fake()
            stream = pipeline.stream(asked())
            for _ in range(row):
                next(stream)
            stream.close()
            assert len(pipeline.runner.batches) == row


def test_parameters_make_the_same_again(fake):
    pipeline = fake()
    result = pipeline.generate(asked(hires_scale=1.5, hires_upscaler="latent-bicubic", num_images_per_prompt=2))
    parameters = result.parameters(1)
    assert (parameters["width"], parameters["height"], parameters["hires_steps"]) == (64, 64, None)
    fields = {name: value for name, value in parameters.items() if name in Request.__dataclass_fields__}
    assert pixels(pipeline.generate(Request(**fields)).images) == pixels(result.images[1:])


def test_time_saved_by_guidance_is_told_of_each_pass_by_its_own_steps(fake):
    result = fake().generate(asked(guidance_end=0.5))
    seconds = (*[2.0] * 5, *[1.0] * 5, *[20.0] * 4, *[10.0] * 3)
    timings = result.timings
    assert len(timings.step_seconds) == len(seconds)
    object.__setattr__(timings, "step_seconds", seconds)
    assert result.saved_seconds == pytest.approx(5 * 1.0 + 3 * 10.0)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"hires_scale": 1.0}, "hires_scale is 1"),
        ({"hires_scale": 9.0}, "hires_scale is 9"),
        ({"hires_scale": float("nan")}, "hires_scale"),
        ({"hires_scale": "2"}, "hires_scale is '2'"),
        ({"hires_scale": 1.05}, "makes 64x64 of 64x64, which is no larger"),
        ({"hires_scale": None, "hires_upscaler": None, "hires_strength": 0.5}, "there is no hires_scale"),
        ({"hires_upscaler": "esrgan"}, "hires_upscaler is 'esrgan'"),
        ({"hires_upscaler": ["latent"]}, "hires_upscaler"),
        ({"hires_strength": 0.0}, "hires_strength is 0"),
        ({"hires_strength": 1.5}, "hires_strength is 1.5"),
        ({"hires_strength": 0.05}, "hires_strength 0.05 of 10 steps is none"),
        ({"hires_steps": 0}, "hires_steps is 0"),
        ({"hires_steps": 2.5}, "hires_steps is 2.5"),
        ({"image": Image.new("RGB", (64, 64))}, "hires_scale means nothing in image-to-image"),
        ({"guidance_start": 0.95, "num_inference_steps": 20}, "none of 14 rows is guided"),
    ],
)
def test_what_cannot_be_is_refused_before_any_compute(fake, options, reason):
    pipeline = fake()
    with pytest.raises(RequestError, match=reason) as raised:
        pipeline.stream(asked(**options))
    assert raised.value.hint
    assert not pipeline.runner.calls


def test_a_final_size_above_any_image_s_is_refused(fake):
    with pytest.raises(RequestError, match="makes 8192x8192 of 1024x1024, more than") as raised:
        fake().resolve(asked(width=1024, height=1024, hires_scale=8, windowed=True))
    assert "smaller hires_scale" in raised.value.hint


@pytest.mark.parametrize("sizes", [((64, 128), (128, 64)), ((64, 64),)])
def test_a_bundle_for_a_list_of_sizes_makes_the_second_pass_in_windows_of_these(fake, sizes):
    height, width = sizes[0]
    request = asked(width=width, height=height, hires_scale=1.5)
    assert [each.windowed for each in fake(sizes=sizes).resolve(request).passes] == [False, True]
    assert fake(sizes=sizes).generate(request).images[0].size == (width * 3 // 2, height * 3 // 2)


def test_a_plan_of_one_s_own_and_other_checkpoints_are_refused(fake):
    plan = fake().resolve(Request(**BASE)).plan
    with pytest.raises(RequestError, match="a plan of one's own"):
        fake().resolve(Request(prompt="red", scheduler=plan, hires_scale=2.0))
    with pytest.raises(RequestError, match="hires_scale is for text-to-image, which this bundle cannot do"):
        fake(task="editing").resolve(asked(image=Image.new("RGB", (64, 64))))


OPTIONS = {"prompt": "a red circle", "num_inference_steps": 4, "guidance_scale": 4.0, "scheduler": "euler_a"}


@pytest.fixture(scope="module")
def tiny(tiny_bundle):
    with sdrt.open(tiny_bundle, threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def reference(tiny_checkpoint):
    """Text-to-image and image-to-image of diffusers."""
    import diffusers

    drawing = diffusers.StableDiffusionPipeline.from_pretrained(tiny_checkpoint, safety_checker=None)
    drawing.scheduler = diffusers.EulerAncestralDiscreteScheduler.from_config(drawing.scheduler.config)
    again = diffusers.StableDiffusionImg2ImgPipeline(**drawing.components, requires_safety_checker=False)
    for each in (drawing, again):
        each.set_progress_bar_config(disable=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more cost more than such a small network takes
    yield drawing, again
    torch.set_num_threads(threads)


@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")
class TestOnEngines:
    """Against diffusers, against two requests, and from the command line, with the tiny model."""

    @pytest.mark.parametrize("upscaler", ["lanczos", "latent", "latent-bicubic"])
    def test_it_is_the_reference_s_two_pipelines(self, tiny, reference, upscaler):
        drawing, again = reference
        arguments = {name: value for name, value in OPTIONS.items() if name != "scheduler"}
        first = drawing(
            **arguments,
            height=64,
            width=64,
            generator=torch.Generator().manual_seed(5),
            output_type="pil" if upscaler == "lanczos" else "latent",
        ).images
        if upscaler == "lanczos":
            larger = first[0].resize((128, 128), Image.Resampling.LANCZOS)
        else:
            larger = torch.nn.functional.interpolate(first, size=(16, 16), mode=MODES[upscaler], align_corners=False)
        expected = again(**arguments, image=larger, strength=0.75, generator=torch.Generator().manual_seed(5)).images[0]
        hires = {"hires_scale": 2, "hires_upscaler": upscaler, "hires_strength": 0.75}
        made = tiny.generate(Request(**OPTIONS, **hires, seed=5, height=64, width=64)).images[0]
        assert np.abs(np.asarray(made, int) - np.asarray(expected, int)).max() <= 1

    def test_two_requests_and_a_mixed_batch_give_every_bit_of_it(self, tiny):
        options = {**OPTIONS, "seed": 5}
        request = Request(**options, num_images_per_prompt=2, hires_scale=2, hires_upscaler="lanczos")
        together = tiny.generate(request)
        with sdrt.Batcher(tiny) as batcher:
            tickets = [batcher.submit(each) for each in (request, Request(**options, height=128))]
            batched = tickets[0].result(60)
        assert pixels(batched.images) == pixels(together.images)
        for index, image in enumerate(tiny.generate(Request(**options, num_images_per_prompt=2)).images):
            larger = image.resize((128, 128), Image.Resampling.LANCZOS)
            again = Request(**{**options, "seed": 5 + index}, image=larger, strength=0.7)
            assert pixels(tiny.generate(again).images) == pixels([together.images[index]])

    def test_the_command_line_draws_it_and_from_its_image_again(self, tiny_bundle, tmp_path, capsys):
        first, again = (str(tmp_path / f"{name}.png") for name in ("first", "again"))
        command = ["run", str(tiny_bundle), "a red circle", "--steps", "4", "--seed", "5", "--hires-scale", "1.5"]
        command += ["--hires-upscaler", "latent-bicubic", "--hires-strength", "0.6", "--hires-steps", "5"]
        assert run_command([*command, "--out", first]) == 0
        assert "64x64, then 96x96" in capsys.readouterr().out
        assert run_command(["run", str(tiny_bundle), "--from-image", first, "--out", again]) == 0
        with Image.open(first) as one, Image.open(again) as other:
            assert one.size == (96, 96)
            assert pixels([one]) == pixels([other])
