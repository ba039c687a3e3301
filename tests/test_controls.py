"""ControlNets: what steers a request, in which rows, in whatever batch, size and task; and what is refused."""

import time
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageDraw

from sdrt.errors import RequestError
from sdrt.request import Request
from sdrt.runners.fake import FakeRunner
from sdrt.step_batch import advance_row, open_batch
from sdrt.windows import windows_over

ONE = ("edges",)
TWO = ("edges", "depth")


def picture(width=64, height=64, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def asked(**options):
    start = {"prompt": "red", "negative_prompt": "blue", "seed": 3, "num_inference_steps": 4, "scheduler": "ddim"}
    return Request(**{**start, "control_image": picture(), **options})


def prepared(pipeline, request):
    return list(pipeline.prepare(pipeline.resolve(request)).trajectories)


def run(pipeline, paths, rows=None):
    """Step trajectories together to their end, or so many rows."""
    batch = open_batch(pipeline.runner, paths)
    for _ in range(len(paths[0].plan) if rows is None else rows):
        assert advance_row(batch) == {}
    batch.collect()
    return paths


def latents(pipeline, request):
    return pipeline.generate(request).latents


def kept(rows, start, end):
    """`controlnet_keep` of the diffusers pipelines."""
    return [1.0 - float(row / rows < start or (row + 1) / rows > end) for row in range(rows)]


def in_latents(image, height=8, width=8):
    """What the fake's embedding makes of a picture: the mean of each latent's pixels."""
    pixels = np.asarray(image, np.float32).transpose(2, 0, 1) / np.float32(255)
    return pixels.reshape(3, height, 8, width, 8).mean((2, 4))


class TestSteering:
    def test_the_picture_is_embedded_once_and_shown_in_every_row(self, fake):
        pipeline = fake(controlnets=ONE)
        (path,) = prepared(pipeline, asked())
        np.testing.assert_allclose(path.steering.control, in_latents(picture())[None], rtol=1e-5)
        np.testing.assert_array_equal(path.steering.scales, np.ones((4, 1)))
        pipeline.generate(asked(num_images_per_prompt=3))
        assert pipeline.runner.calls["control_embedding"] == 2

    def test_it_changes_the_image_and_by_its_scale(self, fake):
        pipeline = fake(controlnets=ONE)
        plain = latents(pipeline, asked(control_image=None))
        one, two, none = (
            latents(pipeline, asked(controlnet_conditioning_scale=scale)) - plain for scale in (1.0, 2.0, 0.0)
        )
        assert np.abs(one).max() > 0.01
        assert np.abs(two).max() > 1.5 * np.abs(one).max()
        np.testing.assert_array_equal(none, 0)

    @pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (0.3, 0.8), (0.25, 0.26), (0.5, 1), (0, 0.7), (0.1, 0.2)])
    @pytest.mark.parametrize(("scheduler", "steps"), [("ddim", 10), ("pndm", 7), ("heun", 5), ("euler", 1)])
    def test_the_rows_that_count_are_those_of_diffusers(self, fake, scheduler, steps, start, end):
        brought = {"control_guidance_start": start, "control_guidance_end": end, "controlnet_conditioning_scale": 0.7}
        (path,) = prepared(fake(controlnets=ONE), asked(scheduler=scheduler, num_inference_steps=steps, **brought))
        expected = np.float32(0.7) * np.array(kept(len(path.plan), start, end), np.float32)
        np.testing.assert_array_equal(path.steering.scales[:, 0], expected)

    def test_a_part_of_the_steps_is_the_whole_up_to_there(self, fake):
        pipeline = fake(controlnets=ONE)
        (whole,), (half,) = (prepared(pipeline, asked(control_guidance_end=end)) for end in (1.0, 0.5))
        run(pipeline, [whole], 2), run(pipeline, [half], 2)
        np.testing.assert_array_equal(whole.state, half.state)
        run(pipeline, [whole], 1), run(pipeline, [half], 1)
        assert not np.array_equal(whole.state, half.state)

    def test_each_of_several_has_its_own_scale_and_part(self, fake):
        pipeline = fake(controlnets=TWO)
        images = [picture(seed=1), picture(seed=2)]
        brought = {"controlnet_conditioning_scale": [0.5, 2.0], "control_guidance_start": [0.0, 0.5]}
        (path,) = prepared(pipeline, asked(control_image=images, control_guidance_end=[0.75, 1.0], **brought))
        np.testing.assert_array_equal(path.steering.scales, [[0.5, 0], [0.5, 0], [0.5, 2], [0, 2]])
        np.testing.assert_allclose(path.steering.control, [in_latents(image) for image in images], rtol=1e-5)

    def test_one_number_is_for_each_of_several(self, fake):
        images = [picture(seed=1), picture(seed=2)]
        (path,) = prepared(fake(controlnets=TWO), asked(control_image=images, controlnet_conditioning_scale=0.5))
        np.testing.assert_array_equal(path.steering.scales, np.full((4, 2), 0.5))

    def test_one_of_several_can_be_left_out(self, fake):
        second = picture(seed=2)
        request = asked(control_image=[None, second], controlnet_conditioning_scale=[5, 1])
        (path,) = prepared(fake(controlnets=TWO), request)
        np.testing.assert_array_equal(path.steering.scales, np.tile([0, 1], (4, 1)))  # a black picture would steer too
        two = latents(fake(controlnets=TWO), request)
        one = latents(fake(controlnets=ONE), asked(control_image=second))
        np.testing.assert_array_equal(two, one)

    def test_a_plain_request_of_such_a_bundle_is_that_of_any_bundle(self, fake):
        plain = asked(control_image=None)
        np.testing.assert_array_equal(latents(fake(controlnets=TWO), plain), latents(fake(), plain))


class TestBatches:
    def test_it_is_the_same_in_a_batch_with_others(self, fake):
        pipeline = fake(controlnets=ONE)
        others = [
            asked(control_image=None),
            asked(control_image=picture(seed=9), control_guidance_start=0.5, scheduler="euler_a"),
            asked(image=picture(seed=4), strength=1.0, guidance_scale=1.0),
        ]
        company = [path for each in others for path in prepared(pipeline, each)]
        (steered,) = prepared(pipeline, asked())
        run(pipeline, [company[0], steered, *company[1:]], 4)
        (alone,) = run(pipeline, prepared(pipeline, asked()))
        np.testing.assert_array_equal(steered.state, alone.state)
        for path, request in zip(company, others, strict=True):
            (alone,) = run(pipeline, prepared(pipeline, request), 4)
            np.testing.assert_array_equal(path.state, alone.state)


class TestSizes:
    def test_the_picture_says_the_size_down_to_the_bundle_s_grid(self, fake):
        request = fake(controlnets=ONE).resolve(asked(control_image=picture(107, 90)))
        assert (request.width, request.height) == (96, 80)

    def test_the_first_picture_of_several_says_it(self, fake):
        request = fake(controlnets=TWO).resolve(asked(control_image=[None, picture(96, 80)]))
        assert (request.width, request.height) == (96, 80)

    def test_the_request_s_own_size_wins_and_the_picture_is_resized(self, fake):
        pipeline = fake(controlnets=ONE)
        (path,) = prepared(pipeline, asked(control_image=picture(107, 90), width=64, height=48))
        small = picture(107, 90).resize((64, 48), Image.Resampling.LANCZOS)
        np.testing.assert_allclose(path.steering.control[0], in_latents(small, 6, 8), rtol=1e-5)

    def test_an_image_that_is_begun_with_says_it_before_the_control(self, fake):
        request = fake(controlnets=ONE).resolve(asked(image=picture(48, 96), control_image=picture(64, 64)))
        assert (request.width, request.height) == (48, 96)


class TestTasks:
    def test_image_to_image_counts_its_own_rows(self, fake):
        pipeline = fake(controlnets=ONE)
        brought = {"image": picture(seed=5), "strength": 0.5, "num_inference_steps": 10}
        request = asked(**brought, control_guidance_start=0.4)
        (path,) = prepared(pipeline, request)
        np.testing.assert_array_equal(path.steering.scales[:, 0], kept(5, 0.4, 1.0))
        assert not np.array_equal(latents(pipeline, request), latents(pipeline, asked(**brought, control_image=None)))

    @pytest.mark.parametrize("task", ["text-to-image", "inpainting"])
    def test_inpainting_is_steered_where_it_draws(self, fake, task):
        pipeline = fake(task=task, controlnets=ONE)
        mask = Image.new("L", (64, 64))
        ImageDraw.Draw(mask).rectangle((16, 16, 47, 47), fill=255)
        brought = {"image": picture(seed=5), "mask_image": mask, "preserve": True}
        steered, plain = (pipeline.generate(asked(**brought, control_image=image)) for image in (picture(), None))
        assert not np.array_equal(steered.latents[0, :, 2:6, 2:6], plain.latents[0, :, 2:6, 2:6])
        outside = np.asarray(mask) == 0
        np.testing.assert_array_equal(np.asarray(steered.images[0])[outside], np.asarray(picture(seed=5))[outside])

    def test_outpainting_is_steered_by_a_picture_of_the_grown_canvas(self, fake):
        pipeline = fake(controlnets=ONE)
        brought = {"image": picture(seed=5), "outpaint": {"right": 32}}
        (path,) = prepared(pipeline, asked(**brought, control_image=picture(96, 64)))
        np.testing.assert_allclose(path.steering.control[0], in_latents(picture(96, 64), 8, 12), rtol=1e-5)
        steered, plain = (latents(pipeline, asked(**brought, control_image=each)) for each in (picture(96, 64), None))
        assert not np.array_equal(steered, plain)

    def test_the_second_pass_of_two_is_steered_in_its_own_size_and_rows(self, fake):
        pipeline = fake(controlnets=ONE)
        request = pipeline.resolve(
            asked(hires_scale=2.0, hires_strength=0.5, num_inference_steps=10, control_guidance_end=0.6)
        )
        first = pipeline.prepare(request)
        run(pipeline, list(first.trajectories))
        second = pipeline.follow(first, 0).trajectory
        large = picture().resize((128, 128), Image.Resampling.LANCZOS)
        np.testing.assert_allclose(second.steering.control[0], in_latents(large, 16, 16), rtol=1e-5)
        np.testing.assert_array_equal(second.steering.scales[:, 0], kept(5, 0.0, 0.6))

    def test_the_time_that_its_picture_takes_in_both_passes_is_counted(self, fake):
        def before(name, feeds):
            time.sleep(0.2 if name == "control_embedding" else 0)

        pipeline = fake(FakeRunner(before=before), controlnets=ONE)
        timings = pipeline.generate(asked(hires_scale=2.0, num_inference_steps=2)).timings
        assert timings.vae_encoder_seconds > 0.4


class TestWindows:
    def test_one_window_is_the_plain_path(self, fake):
        pipeline = fake(controlnets=ONE)
        (plain,), (windowed,) = (prepared(pipeline, asked()) for _ in range(2))
        windowed.windows = windows_over(windowed.size, windowed.size, 8)
        run(pipeline, [plain]), run(pipeline, [windowed])
        np.testing.assert_array_equal(plain.state, windowed.state)

    def test_each_window_sees_its_own_part_of_the_picture(self, fake):
        pipeline = fake(controlnets=ONE)
        request = asked(control_image=picture(128, 128))
        (whole,), (windowed,) = (prepared(pipeline, request) for _ in range(2))
        windowed.windows = windows_over(windowed.size, (8, 8), 3)
        run(pipeline, [whole]), run(pipeline, [windowed])
        np.testing.assert_allclose(windowed.latents, whole.latents, rtol=1e-4, atol=1e-5)

    def test_an_image_above_the_bundle_s_sizes_is_steered(self, fake):
        pipeline = fake(controlnets=ONE)
        result = pipeline.generate(asked(control_image=picture(256, 128), windowed=True))
        assert result.images[0].size == (256, 128)
        assert not np.array_equal(
            result.latents, latents(pipeline, asked(control_image=None, windowed=True, width=256, height=128))
        )


def test_an_image_remembers_what_steered_it_by_its_hash(fake):
    pipeline = fake(controlnets=TWO)
    first = picture(seed=1)
    brought = {"controlnet_conditioning_scale": 0.5, "control_guidance_end": [0.5, 1]}
    parameters = pipeline.generate(asked(control_image=[first, None], **brought)).parameters(0)
    ours = {name: value for name, value in parameters.items() if name.startswith("control")}
    again = pipeline.resolve(asked(control_image=[picture(seed=1), None]))
    assert len(parameters["control_image_sha256"][0]) == 64
    assert ours == {
        "control_image_sha256": [again.controls[0].image_sha256, None],
        "controlnet_conditioning_scale": [0.5, 0.5],
        "control_guidance_start": [0.0, 0.0],
        "control_guidance_end": [0.5, 1.0],
    }
    plain = pipeline.generate(asked(control_image=None)).parameters(0)
    assert not [name for name in plain if name.startswith("control")]


def test_a_picture_is_upright_rgb_on_white(fake):
    clear = Image.new("RGBA", (64, 64))
    (path,) = prepared(fake(controlnets=ONE), asked(control_image=clear))
    np.testing.assert_array_equal(path.steering.control, 1)


class TestArrays:
    def test_are_shown_as_they_are(self, fake):
        pipeline, image = fake(controlnets=ONE), picture()
        values = np.asarray(image, np.float32) / np.float32(255)
        (seen,), (same,) = (prepared(pipeline, asked(control_image=each)) for each in (image, values))
        np.testing.assert_array_equal(seen.steering.control, same.steering.control)
        (other,) = prepared(pipeline, asked(control_image=np.where(values > 0.5, -1, values)))
        assert np.abs(other.steering.control - same.steering.control).max() > 0

    def test_say_the_size_and_are_known_again_by_their_hash(self, fake):
        values = np.zeros((96, 64, 3), np.float32)
        results = [fake(controlnets=ONE).generate(asked(control_image=each)) for each in (values, values - 1)]
        assert results[0].images[0].size == (64, 96)
        first, second = (result.parameters(0)["control_image_sha256"] for result in results)
        assert len({*first, *second}) == 2

    @pytest.mark.parametrize(
        ("values", "reason"),
        [
            (np.zeros((64, 64), np.float32), r"float32 \[64, 64\]"),
            (np.zeros((3, 64, 64), np.float32), r"float32 \[3, 64, 64\]"),
            (np.zeros((64, 64, 3), np.uint8), r"uint8 \[64, 64, 3\]"),
            (np.zeros((0, 64, 3), np.float32), r"\[0, 64, 3\]"),
            (np.full((64, 64, 3), np.nan), "NaN or infinite"),
            (np.full((64, 64, 3), 1e300), "NaN or infinite"),
        ],
        ids=lambda value: str(getattr(value, "shape", "")),
    )
    def test_of_another_form_are_refused(self, fake, values, reason):
        with pytest.raises(RequestError, match=reason) as raised:
            fake(controlnets=ONE).resolve(asked(control_image=values))
        assert raised.value.hint

    def test_are_not_resized(self, fake):
        values = np.zeros((64, 64, 3), np.float32)
        for options in ({"width": 128}, {"hires_scale": 2.0}, {"image": picture(96, 64)}):
            with pytest.raises(RequestError, match="control_image is an array of 64x64 for an image of"):
                fake(controlnets=ONE).resolve(asked(control_image=values, **options))


def test_a_part_of_the_steps_that_holds_none_is_told(fake):
    pipeline = fake(controlnets=ONE)
    (warning,) = pipeline.generate(asked(control_guidance_end=0.05)).warnings
    assert "control_guidance_end 0.05 holds none of" in warning
    assert pipeline.generate(asked(controlnet_conditioning_scale=0.0, control_guidance_end=0.05)).warnings == ()


REFUSED = [
    ((), {}, "this bundle has no ControlNet"),
    (ONE, {"control_image": "edges.png"}, "control_image is str"),
    (ONE, {"control_image": [picture(), picture()]}, "control_image lists 2, but this bundle has 1: edges"),
    (ONE, {"control_image": []}, "control_image lists 0"),
    (ONE, {"control_image": [None]}, "control_image names no image"),
    (TWO, {}, "control_image is one image, but this bundle has 2 ControlNets: edges, depth"),
    (TWO, {"control_image": [None, None]}, "control_image names no image"),
    (TWO, {"control_image": [picture(), 3]}, "control_image is int"),
    (ONE, {"controlnet_conditioning_scale": [1, 1]}, "controlnet_conditioning_scale lists 2"),
    (ONE, {"controlnet_conditioning_scale": float("nan")}, "controlnet_conditioning_scale is nan"),
    (ONE, {"controlnet_conditioning_scale": [float("inf")]}, "controlnet_conditioning_scale is inf"),
    (ONE, {"controlnet_conditioning_scale": "1"}, "controlnet_conditioning_scale is '1', not a number"),
    (ONE, {"controlnet_conditioning_scale": True}, "controlnet_conditioning_scale is True"),
    (ONE, {"control_guidance_start": 0.5, "control_guidance_end": 0.5}, "control_guidance_start is 0.5"),
    (ONE, {"control_guidance_start": -0.1}, "control_guidance_start is -0.1"),
    (ONE, {"control_guidance_end": 1.1}, "control_guidance_end 1.1"),
    (ONE, {"control_guidance_end": float("nan")}, "control_guidance_end is nan"),
    (TWO, {"control_image": [picture(), None], "control_guidance_end": [0.5]}, "control_guidance_end lists 1"),
    (ONE, {"control_image": None, "controlnet_conditioning_scale": 1}, "there is no control_image"),
    (ONE, {"control_image": None, "control_guidance_end": 1}, "there is no control_image"),
    (ONE, {"control_image": picture(200, 64)}, "192x64"),
    (ONE, {"windowed": True, "width": 640, "height": 64}, "640x64 is more than 4 times this bundle's size"),
    (ONE, {"width": 128, "height": 128, "hires_scale": 5.0}, "more than 4 times this bundle's size"),
    (
        ONE,
        {"image": picture(), "mask_image": Image.new("L", (64, 64), 255), "padding_mask_crop": 8},
        "padding_mask_crop is given beside a control_image",
    ),
]


@pytest.mark.parametrize(("controlnets", "options", "reason"), REFUSED)
def test_what_cannot_be_is_refused_with_a_hint(fake, controlnets, options, reason):
    with pytest.raises(RequestError, match=reason) as raised:
        fake(controlnets=controlnets).resolve(asked(**options))
    assert raised.value.hint


def test_a_second_pass_may_be_as_large_as_windows_may(fake):
    resolved = fake(controlnets=ONE).resolve(replace(asked(), hires_scale=8.0))
    assert (resolved.hires.width, resolved.hires.windowed) == (512, True)
