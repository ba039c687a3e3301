"""Image-to-image: the start between an image and noise, its steps, and what is refused before any compute."""

import numpy as np
import pytest
from PIL import Image

from sdrt.errors import RequestError
from sdrt.noise import TorchGenerator
from sdrt.request import Request


def picture(width=64, height=64, mode="RGB", seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


def asked(**options):
    return Request(prompt="red", **{"seed": 3, "num_inference_steps": 10, "scheduler": "ddim", **options})


@pytest.mark.parametrize(
    ("strength", "steps", "rows"), [(1.0, 10, 10), (0.8, 10, 8), (0.1, 10, 1), (0.58, 50, 28), (0.99, 10, 9)]
)
def test_strength_is_the_share_of_the_steps_rounded_as_the_reference_rounds(fake, strength, steps, rows):
    resolved = fake().resolve(asked(image=picture(), strength=strength, num_inference_steps=steps))
    assert len(resolved.plan) == rows
    whole = fake().resolve(asked(num_inference_steps=steps)).plan
    np.testing.assert_array_equal(resolved.plan.timesteps, whole.timesteps[steps - rows :])


def test_the_start_is_the_image_s_latents_with_noise_drawn_after_the_vae_s(fake):
    pipeline = fake()
    request = pipeline.resolve(asked(image=picture(), strength=0.5))
    (path,) = pipeline.prepare(request).trajectories
    generator = TorchGenerator(3)
    known = pipeline.posterior(picture()).sample(generator.randn((1, 4, 8, 8)))
    on_image, on_noise = request.plan.noised[0]
    expected = on_image * known + on_noise * generator.randn((1, 4, 8, 8))
    np.testing.assert_allclose(path.state[0], expected[0], rtol=1e-5, atol=1e-6)
    assert not path.state[1:].any()


def test_the_image_is_encoded_once_however_many_are_made_of_it(fake):
    pipeline = fake()
    result = pipeline.generate(asked(image=picture(), num_images_per_prompt=3))
    assert pipeline.runner.calls["vae_encoder"] == 1
    alone = pipeline.generate(asked(image=picture(), seed=4))
    assert result.images[1].tobytes() == alone.images[0].tobytes()


def test_the_result_has_the_size_of_the_image_unless_another_is_asked_for(fake):
    pipeline = fake()
    assert pipeline.generate(asked(image=picture(96, 64))).images[0].size == (96, 64)
    assert pipeline.generate(asked(image=picture(96, 64), width=64)).images[0].size == (64, 64)
    with pytest.raises(RequestError, match="70x64"):
        pipeline.resolve(asked(image=picture(70, 64)))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_any_mode_is_an_rgb_image(fake, mode):
    source = Image.fromarray(np.full((64, 64), 300, np.uint16)) if mode == "I;16" else picture(mode=mode)
    assert fake().resolve(asked(image=source)).task.image.mode == "RGB"


def test_an_image_that_was_held_sideways_stands_upright(fake):
    source = picture(64, 96)
    source.getexif()[0x0112] = 6
    assert fake().resolve(asked(image=source)).task.image.size == (96, 64)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"strength": 0.5}, "there is no image"),
        ({"image": picture(), "strength": 0.0}, "strength is 0"),
        ({"image": picture(), "strength": 1.01}, r"strength is 1\.01"),
        ({"image": picture(), "strength": float("nan")}, "strength"),
        ({"image": picture(), "strength": 0.05}, r"strength 0\.05 of 10 steps is none"),
        ({"image": "picture.png"}, "image is str"),
        ({"image": Image.new("L", (5000, 5000))}, "5000x5000"),
        ({"variation_strength": 0.5}, "of no other seed"),
        ({"variation_seed": 5, "variation_strength": 1.5}, r"variation_strength is 1\.5"),
        ({"variation_seed": -1}, "variation_seed"),
    ],
)
def test_what_cannot_be_is_refused_with_a_hint(fake, options, reason):
    with pytest.raises(RequestError, match=reason) as raised:
        fake().resolve(asked(**options))
    assert raised.value.hint


def test_a_plan_that_no_image_can_enter_is_refused(fake):
    from dataclasses import replace

    pipeline = fake()
    plan = replace(pipeline.resolve(asked(num_inference_steps=50)).plan, noised=np.full((50, 2), np.nan))
    with pytest.raises(RequestError, match="how an image enters"):
        pipeline.resolve(Request(prompt="red", scheduler=plan, image=picture()))


class TestVariations:
    def test_go_from_one_seed_s_image_to_the_other_s(self, fake):
        pipeline = fake()
        own, other = (pipeline.generate(asked(seed=seed)).latents for seed in (3, 9))
        none, whole = (
            pipeline.generate(asked(variation_seed=9, variation_strength=share)).latents for share in (0.0, 1.0)
        )
        np.testing.assert_allclose(none, own, atol=1e-5)
        np.testing.assert_allclose(whole, other, atol=1e-5)

    def test_keep_the_variance(self, fake):
        pipeline = fake()
        request = asked(variation_seed=9, variation_strength=0.5, width=128, height=128)
        (path,) = pipeline.prepare(pipeline.resolve(request)).trajectories
        assert path.state[0].std() == pytest.approx(1, abs=0.1)

    def test_of_several_images_go_from_one_seed_towards_seeds_that_count_up(self, fake):
        pipeline = fake()
        options = {"variation_seed": 9, "variation_strength": 0.3}
        result = pipeline.generate(asked(num_images_per_prompt=2, **options))
        assert result.seeds == (3, 3)
        second = result.parameters(1)
        assert (second["seed"], second["variation_seed"]) == (3, 10)
        alone = pipeline.generate(asked(variation_seed=10, variation_strength=0.3))
        assert alone.images[0].tobytes() == result.images[1].tobytes()
