"""The pipeline on a fake runner: steps as events, results that say how to make them again, honest failures."""

import numpy as np
import pytest

from sdrt.errors import BackendError, ParityError, RequestError, SdrtError
from sdrt.noise import TorchGenerator
from sdrt.pipeline import Pipeline
from sdrt.request import Request
from sdrt.runners.fake import FakeRunner

OPTIONS = {"num_inference_steps": 4, "scheduler": "ddim", "seed": 0}


def test_every_network_evaluation_is_an_event_and_the_last_carries_the_result(fake):
    events = list(fake().stream("red circle", **OPTIONS))
    assert [event.row for event in events] == [1, 2, 3, 4]
    assert [event.result is not None for event in events] == [False, False, False, True]


@pytest.mark.parametrize("scheduler", ["ddim", "euler"])
def test_a_trajectory_starts_at_the_noise_of_its_seed_at_the_plans_scale(fake, scheduler):
    pipeline = fake()
    request = pipeline.resolve(Request(prompt="red", scheduler=scheduler, num_inference_steps=4, seed=6))
    state = pipeline.prepare(request).trajectories[0].state
    noise = TorchGenerator(6).randn((1, 4, 8, 8))[0]
    np.testing.assert_array_equal(state[0], noise * np.float32(request.plan.initial_scale))
    assert not state[1:].any()
    assert (request.plan.initial_scale > 2) is (scheduler == "euler")


def test_pndm_evaluates_the_network_once_more_than_it_has_steps(fake):
    events = list(fake().stream("red", scheduler="pndm", num_inference_steps=4, seed=0))
    assert len(events) == 5


def test_the_same_seed_gives_the_same_pixels(fake):
    pipeline = fake()
    first, second = (pipeline.generate("red circle", **OPTIONS).images[0] for _ in range(2))
    assert first.tobytes() == second.tobytes()


def test_image_k_of_several_is_the_image_of_its_own_seed(fake):
    pipeline = fake()
    several = pipeline.generate("red circle", **{**OPTIONS, "num_images_per_prompt": 3, "seed": 40})
    single = pipeline.generate("red circle", **{**OPTIONS, "seed": several.seeds[2]})
    assert several.images[2].tobytes() == single.images[0].tobytes()


def test_a_result_says_how_each_image_is_made_again(fake):
    pipeline = fake()
    result = pipeline.generate("red circle", **{**OPTIONS, "num_images_per_prompt": 2})
    saved = result.parameters(1)
    fields = {name: saved[name] for name in Request.__dataclass_fields__ if name in saved}
    again = pipeline.generate(Request(**fields))
    assert again.images[0].tobytes() == result.images[1].tobytes()


def test_more_images_than_the_profiles_batch_are_made_in_parts(fake):
    runner = FakeRunner()
    result = fake(runner, max_batch=2).generate("red", **{**OPTIONS, "num_images_per_prompt": 5})
    assert len(result.images) == 5
    assert max(runner.batches) == 2


def test_a_bad_request_computes_nothing(fake):
    runner = FakeRunner()
    pipeline = fake(runner)
    with pytest.raises(RequestError):
        pipeline.stream("red", num_inference_steps=0)
    with pytest.raises(RequestError, match="no nonsense"):
        pipeline.generate("red", nonsense=1)
    assert runner.calls == {}


def test_a_prompt_is_embedded_once(fake):
    runner = FakeRunner()
    pipeline = fake(runner)
    for _ in range(3):
        pipeline.generate("red circle", **OPTIONS)
    assert runner.calls["text_encoder"] == 2  # the prompt and the empty negative prompt


def test_without_guidance_there_is_one_lane(fake):
    lanes = []
    runner = FakeRunner(before=lambda name, feeds: lanes.append(len(feeds["timestep"])) if name == "step" else None)
    pipeline = fake(runner)
    pipeline.generate("red", **{**OPTIONS, "guidance_scale": 1.0})
    pipeline.generate("red", **{**OPTIONS, "guidance_scale": 1.5})
    assert set(lanes[:4]) == {1}
    assert set(lanes[4:]) == {2}


def test_a_prompt_over_the_models_length_is_a_warning_that_says_what_was_dropped(fake):
    result = fake().generate("red " * 15 + "circle", **OPTIONS)
    assert len(result.warnings) == 1
    assert "circle" in result.warnings[0]
    assert fake().generate("red", **OPTIONS).warnings == ()


def test_a_warning_quotes_no_more_than_can_be_read(fake):
    (warning,) = fake().generate("red " * 15 + "circle " * 1000, **OPTIONS).warnings
    assert len(warning) < 400
    assert "…" in warning


def test_nan_is_an_error_and_never_an_image(fake):
    def spoil(name, feeds):
        if name == "step" and float(feeds["timestep"][0]) < 500:
            feeds["state"][:] = np.nan

    with pytest.raises(ParityError, match="NaN"):
        fake(FakeRunner(before=spoil)).generate("red", **OPTIONS)


def test_a_preview_is_asked_for_comes_with_every_step_and_ends_with_the_image(fake):
    pipeline = fake()
    events = list(pipeline.stream("red circle", preview=True, **OPTIONS))
    shown = [event.preview[0].tobytes() for event in events]
    assert len(set(shown)) == len(events)
    assert (
        shown[-1]
        == events[-1].result.images[0].tobytes()
        == pipeline.generate("red circle", **OPTIONS).images[0].tobytes()
    )
    assert all(event.preview is None for event in pipeline.stream("red circle", **OPTIONS))


def test_a_preview_shows_the_latents_at_the_scale_in_which_the_network_sees_them(fake):
    pipeline = fake()
    first = next(pipeline.stream("red", preview=True, **{**OPTIONS, "scheduler": "euler"}))
    scale = np.float32(
        pipeline.resolve(Request(prompt="red", **{**OPTIONS, "scheduler": "euler"})).plan.input_scales[1]
    )
    assert scale < 0.5
    assert first.preview[0].tobytes() == pipeline.decode(first.latents * scale)[0].tobytes()


def test_a_pipeline_that_cannot_be_made_releases_its_engines(fake, monkeypatch, tmp_path):
    bundle = fake().bundle
    runner = FakeRunner()
    (tmp_path / "tokenizer" / "vocab.json").unlink()
    monkeypatch.setattr("sdrt.pipeline.Bundle.open", lambda path: bundle)
    monkeypatch.setattr("sdrt.pipeline.open_runner", lambda bundle, threads, provider: runner)
    with pytest.raises(SdrtError):
        Pipeline.open(tmp_path)
    with pytest.raises(BackendError, match="closed"):
        runner.run("text_encoder", {})


def test_closing_the_stream_stops_the_work(fake):
    runner = FakeRunner()
    stream = fake(runner).stream("red", **{**OPTIONS, "num_inference_steps": 50})
    next(stream)
    stream.close()
    assert runner.calls["step"] == 1


def test_encode_and_decode_are_inverse_on_what_the_vae_keeps(fake):
    pipeline = fake()
    image = pipeline.generate("red circle", **OPTIONS).images[0]
    latents = pipeline.encode(image)
    assert latents.shape == (1, 4, 8, 8)
    assert pipeline.decode(latents)[0].size == image.size


@pytest.mark.parametrize(
    "latents",
    [np.zeros((4, 8, 8), np.float32), np.zeros((1, 3, 8, 8), np.float32), np.zeros((1, 4, 8, 8)), [[[[0.0]]]]],
    ids=str,
)
def test_latents_of_another_form_are_refused(fake, latents):
    with pytest.raises(RequestError, match="latents are"):
        fake().decode(latents)


def test_an_image_is_encoded_as_every_task_takes_it(fake):
    from PIL import Image

    clear, white = Image.new("RGBA", (64, 64)), Image.new("RGB", (64, 64), "white")
    np.testing.assert_array_equal(fake().encode(clear), fake().encode(white))
    with pytest.raises(RequestError, match="image is str"):
        fake().encode("a.png")


@pytest.mark.parametrize("seed", [-1, 2**64, "7", 7.0, True, [7]], ids=repr)
def test_a_seed_that_is_none_is_refused_before_the_image_is_encoded(fake, seed):
    from PIL import Image

    pipeline = fake()
    with pytest.raises(RequestError, match="seed is") as raised:
        pipeline.encode(Image.new("RGB", (64, 64)), seed=seed)
    assert raised.value.hint
    assert not pipeline.runner.calls


@pytest.mark.parametrize(
    "options", [{"negative_prompt": "blue"}, {"guidance_rescale": 0.5}, {"guidance_end": 0.5}], ids=str
)
def test_what_does_nothing_without_guidance_is_told(fake, options):
    (warning,) = fake().generate("red", num_inference_steps=2, guidance_scale=1.0, **options).warnings
    assert warning == f"guidance_scale 1 is without guidance, so {next(iter(options))} did nothing"


def test_an_image_off_the_vaes_grid_is_refused(fake):
    from PIL import Image

    with pytest.raises(RequestError, match="65x64"):
        fake().encode(Image.new("RGB", (65, 64)))
