"""Upscaling, depth-to-image and editing: what conditions each step, and what is refused before any compute."""

import numpy as np
import pytest
import torch
from PIL import Image

from sdrt.batcher import Batcher
from sdrt.errors import RequestError
from sdrt.image import open_depth
from sdrt.request import Request
from sdrt.runners.fake import FakeRunner
from sdrt.tasks.depth_to_image import normalised
from sdrt.tasks.resampling import bicubic

BASE = {"prompt": "red", "seed": 3, "num_inference_steps": 4, "scheduler": "ddim"}
MAP = np.linspace(0, 1, 64 * 64, dtype=np.float32).reshape(64, 64)


def picture(width=64, height=64, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def asked(image, **options):
    return Request(**{**BASE, **options}, image=image)


def grown(image, width, height):
    """The image with its last row and column again on the right and below."""
    below, beside = height - image.height, width - image.width
    return Image.fromarray(np.pad(np.asarray(image), ((0, below), (0, beside), (0, 0)), mode="edge"))


def start_of(pipeline, **options):
    request = pipeline.resolve(Request(**{**BASE, **options}))
    return pipeline.prepare(request).trajectories[0].start


class TestUpscaling:
    def test_the_result_is_four_times_as_large_and_the_small_image_conditions_each_step(self, fake):
        pipeline = fake(task="upscaling")
        small = picture(20, 16)
        start = start_of(pipeline, image=small, noise_level=0)
        assert start.latents.shape == (4, 16, 20)
        assert start.class_label == 0
        sample = np.asarray(small, np.float32).transpose(2, 0, 1) / 127.5 - 1
        assert np.abs(start.conditioning - sample).mean() < 0.1  # level 0 is nearly clean
        noisy = start_of(pipeline, image=small, noise_level=350).conditioning
        assert np.abs(noisy - sample).mean() > 0.3

    def test_a_large_one_goes_through_windows(self, fake):
        request = fake(task="upscaling").resolve(Request(prompt="red", image=picture(64, 40)))
        assert (request.width, request.height, request.windowed) == (256, 160, True)

    @pytest.mark.parametrize(
        ("sizes", "small", "drawn"),  # as (width, height); the bundle makes 32x32 to 128x128 in steps of 16, or `sizes`
        [
            ((), (1, 1), (8, 8)),
            ((), (7, 5), (8, 8)),
            ((), (17, 8), (20, 8)),
            ((), (100, 3), (100, 8)),  # in windows
            ((), (33, 61), (36, 64)),  # in windows
            (((64, 64),), (1, 1), (16, 16)),
            (((64, 64),), (15, 23), (16, 24)),
            (((64, 128), (96, 64)), (10, 17), (16, 24)),
        ],
    )
    def test_any_size_is_padded_to_the_next_one_and_the_result_is_four_times_the_image(self, fake, sizes, small, drawn):
        pipeline = fake(FakeRunner(downsample=4), task="upscaling", sizes=sizes)
        image = picture(*small)
        result = pipeline.generate(asked(image))
        assert result.latents.shape[2:] == drawn[::-1]
        assert result.images[0].size == (4 * small[0], 4 * small[1])
        larger = grown(image, *drawn)
        np.testing.assert_array_equal(
            start_of(pipeline, image=image).conditioning, start_of(pipeline, image=larger).conditioning
        )
        whole = pipeline.generate(asked(larger)).images[0]
        assert result.images[0].tobytes() == whole.crop((0, 0, 4 * small[0], 4 * small[1])).tobytes()

    @pytest.mark.parametrize(("sizes", "small"), [((), (8, 12)), ((), (64, 40)), (((64, 64),), (20, 32))])
    def test_what_the_bundle_makes_is_not_padded(self, fake, sizes, small):
        pipeline, image = fake(FakeRunner(downsample=4), task="upscaling", sizes=sizes), picture(*small)
        request = pipeline.resolve(asked(image))
        assert request.drawn_size == (request.height, request.width) == (4 * image.height, 4 * image.width)
        assert start_of(pipeline, image=image).conditioning.shape == (3, image.height, image.width)

    def test_a_padded_one_remembers_its_own_size_by_which_it_is_drawn_again(self, fake):
        pipeline, image = fake(FakeRunner(downsample=4), task="upscaling"), picture(5, 33)
        result = pipeline.generate(asked(image))
        said = result.parameters(0)
        assert (said["width"], said["height"]) == (20, 132)
        again = pipeline.generate(asked(image, width=said["width"], height=said["height"], windowed=said["windowed"]))
        assert again.images[0].tobytes() == result.images[0].tobytes()

    def test_previews_of_a_padded_one_show_what_was_asked_for(self, fake):
        pipeline = fake(FakeRunner(downsample=4), task="upscaling")
        events = list(pipeline.stream(asked(picture(5, 7)), preview=True))
        assert [event.preview[0].size for event in events] == [(20, 28)] * 4

    def test_padded_ones_share_batches_with_others(self, fake):
        requests = [asked(picture(*size), seed=[1, 2]) for size in ((3, 5), (8, 8), (6, 1), (33, 40))]
        with Batcher(fake(FakeRunner(downsample=4), task="upscaling")) as batcher:
            together = [ticket.result(30).images for ticket in [batcher.submit(each) for each in requests]]
        alone = [fake(FakeRunner(downsample=4), task="upscaling").generate(each).images for each in requests]
        for ours, theirs in zip(together, alone, strict=True):
            assert [image.tobytes() for image in ours] == [image.tobytes() for image in theirs]

    @pytest.mark.parametrize(
        ("small", "example"), [((1500, 1000), "1248x832"), ((1025, 1024), "1016x1016"), ((200_000, 1), "130000x8")]
    )
    def test_too_many_pixels_are_refused_with_the_limit_of_the_image_and_one_that_would_do(self, fake, small, example):
        pipeline = fake(task="upscaling")
        says = f"an image of {small[0]}x{small[1]} pixels makes more than 16777216 in the sizes that this"
        with pytest.raises(RequestError, match=says) as raised:
            pipeline.resolve(asked(picture(*small)))
        assert f"at most 1048576 pixels, such as {example}" in raised.value.hint
        assert "those below 8x8 as that" in raised.value.hint
        width, height = map(int, example.split("x"))
        assert pipeline.resolve(asked(picture(width, height))).windowed

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({}, "this bundle does upscaling, and the request has no image"),
            ({"image": picture(16, 16), "noise_level": 351}, "noise_level is 351"),
            ({"image": picture(16, 16), "noise_level": -1}, "noise_level is -1"),
            ({"image": picture(16, 16), "strength": 0.5}, "strength is for image-to-image"),
            ({"image": picture(16, 16), "width": 66}, "66x64 is not 4 times a size"),
        ],
    )
    def test_what_cannot_be_is_refused(self, fake, options, reason):
        with pytest.raises(RequestError, match=reason) as raised:
            fake(task="upscaling").resolve(Request(prompt="red", **options))
        assert raised.value.hint


class TestDepth:
    def test_the_map_is_one_channel_from_far_to_near(self, fake):
        start = start_of(fake(task="depth-to-image"), depth_map=MAP)
        assert start.conditioning.shape == (1, 8, 8)
        assert (start.conditioning.min(), start.conditioning.max()) == (-1, 1)
        assert start.conditioning[0, -1, -1] == 1

    def test_a_map_of_any_scale_and_size_says_the_same(self, fake):
        pipeline = fake(task="depth-to-image")
        one = start_of(pipeline, depth_map=MAP).conditioning
        larger = start_of(pipeline, depth_map=7 * np.kron(MAP, np.ones((2, 2), np.float32)) - 3).conditioning
        np.testing.assert_allclose(one, larger, atol=0.02)

    def test_a_constant_one_is_all_far_and_says_so(self, fake):
        pipeline = fake(task="depth-to-image")
        result = pipeline.generate(Request(prompt="red", depth_map=np.full((64, 64), 3.0), num_inference_steps=2))
        assert "the same everywhere" in result.warnings[0]
        assert np.isfinite(result.latents).all()
        np.testing.assert_array_equal(normalised(np.full((2, 2), 3, np.float32)), -1)

    def test_an_image_is_begun_with_where_there_is_one(self, fake):
        pipeline = fake(task="depth-to-image")
        asked = Request(
            prompt="red", depth_map=MAP, image=picture(), num_inference_steps=10, scheduler="ddim", strength=0.5
        )
        assert len(pipeline.resolve(asked).plan) == 5

    @pytest.mark.parametrize("bits", [8, 16])
    def test_files_of_8_and_16_bits_keep_their_values(self, tmp_path, bits):
        values = np.arange(256, dtype=np.uint16).reshape(16, 16) * (1 if bits == 8 else 257)
        kept = values.astype(np.uint8) if bits == 8 else values
        Image.fromarray(kept).save(tmp_path / "depth.png")
        np.testing.assert_array_equal(open_depth(tmp_path / "depth.png"), values)
        np.save(tmp_path / "depth.npy", values)
        np.testing.assert_array_equal(open_depth(tmp_path / "depth.npy"), values)

    def test_a_coloured_picture_is_read_as_depth_with_a_warning(self, fake, tmp_path):
        picture().save(tmp_path / "photo.png")
        with pytest.warns(UserWarning, match="the depth map has colours"):
            open_depth(tmp_path / "photo.png")
        with pytest.warns(UserWarning, match="the depth map has colours"):
            start_of(fake(task="depth-to-image"), depth_map=picture())

    @pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P"])
    def test_a_grey_picture_is_depth_in_whatever_mode_it_was_saved(self, tmp_path, mode, recwarn):
        grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
        Image.fromarray(grey).convert(mode).save(tmp_path / "depth.png")
        np.testing.assert_array_equal(open_depth(tmp_path / "depth.png"), grey)
        assert not recwarn.list

    def test_colours_that_are_transparent_do_not_count(self, tmp_path, recwarn):
        pixels = np.zeros((8, 8, 4), np.uint8)
        pixels[:4] = 90, 90, 90, 255
        pixels[4:] = 200, 10, 10, 0
        Image.fromarray(pixels).save(tmp_path / "depth.png")
        open_depth(tmp_path / "depth.png")
        assert not recwarn.list

    @pytest.mark.parametrize("shape", [(4,), (4, 4, 1), ()])
    def test_a_file_holds_one_map(self, tmp_path, shape):
        np.save(tmp_path / "depth.npy", np.zeros(shape))
        with pytest.raises(RequestError, match=r"holds an array of shape \["):
            open_depth(tmp_path / "depth.npy")
        np.savez(tmp_path / "several.npz", a=np.zeros((8, 8)))
        (tmp_path / "several.npz").rename(tmp_path / "depth.npy")
        with pytest.raises(RequestError, match="holds several arrays"):
            open_depth(tmp_path / "depth.npy")

    @pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no archive", b"\x93NUMPY"])
    def test_a_damaged_file_is_refused(self, tmp_path, content):
        (tmp_path / "depth.npy").write_bytes(content)
        with pytest.raises(RequestError, match="holds no depth map"):
            open_depth(tmp_path / "depth.npy")

    @pytest.mark.parametrize("gap", [3.4e38, -3.4e38])
    def test_a_map_that_marks_gaps_with_the_largest_number_is_near_or_far_there(self, gap):
        depth = np.full((4, 4), 2.0, np.float32)
        depth[0, 0] = gap
        unit = normalised(depth)
        assert np.isfinite(unit).all()
        assert unit[0, 0] == np.sign(gap)

    def test_a_file_must_not_move(self, tmp_path):
        frames = [Image.new("L", (8, 8), shade) for shade in (0, 200)]
        frames[0].save(tmp_path / "moving.webp", save_all=True, append_images=frames[1:])
        with pytest.raises(RequestError, match="animation"):
            open_depth(tmp_path / "moving.webp")

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({}, "no depth_map"),
            ({"depth_map": np.zeros((8, 8, 3))}, r"float64 \[8, 8, 3\]"),
            ({"depth_map": np.zeros((0, 8))}, r"\[0, 8\]"),
            ({"depth_map": "depth.png"}, "depth_map is str"),
            ({"depth_map": [[1.0], [1.0, 2.0]]}, "depth_map is no array"),
            ({"depth_map": np.full((64, 64), np.nan)}, "NaN or infinite"),
            ({"depth_map": np.full((64, 64), np.inf)}, "NaN or infinite"),
            ({"depth_map": np.zeros((64, 32))}, "32x64 values for an image of 64x64"),
            ({"depth_map": MAP, "strength": 0.5}, "there is no image"),
            ({"depth_map": MAP, "image": picture(), "mask_image": picture()}, "mask_image is for inpainting"),
        ],
    )
    def test_what_cannot_be_is_refused(self, fake, options, reason):
        with pytest.raises(RequestError, match=reason) as raised:
            fake(task="depth-to-image").resolve(Request(prompt="red", **options))
        assert raised.value.hint

    @pytest.mark.parametrize("size", [(8, 8), (5, 9), (16, 3), (1, 1), (40, 33)])
    def test_maps_are_resampled_as_torch_does(self, size):
        values = np.random.default_rng(0).standard_normal((12, 17)).astype(np.float32)
        theirs = torch.nn.functional.interpolate(torch.from_numpy(values)[None, None], size, mode="bicubic")
        np.testing.assert_allclose(bicubic(values, *size), theirs[0, 0].numpy(), rtol=1e-4, atol=1e-5)


class TestEditing:
    def test_a_guided_row_has_three_lanes_of_which_one_does_not_see_the_image(self, fake):
        pipeline = fake(task="editing")
        request = pipeline.resolve(Request(prompt="red", image=picture(), guidance_scale=7, image_guidance_scale=1.5))
        (path,) = pipeline.prepare(request).trajectories
        assert [lane.weight for lane in path.lanes] == [7, -5.5, -0.5]
        assert [lane.conditioning for lane in path.lanes] == [1, 1, 0]
        assert sum(lane.weight for lane in path.lanes) == 1

    def test_without_guidance_there_is_one(self, fake):
        pipeline = fake(task="editing")
        (path,) = pipeline.prepare(
            pipeline.resolve(Request(prompt="red", image=picture(), guidance_scale=1))
        ).trajectories
        assert [(lane.weight, lane.conditioning) for lane in path.lanes] == [(1, 1)]

    def test_it_draws(self, fake):
        result = fake(task="editing").generate(Request(prompt="red", image=picture(80, 64), num_inference_steps=3))
        assert result.images[0].size == (80, 64)
        assert result.parameters(0)["image_guidance_scale"] == 1.5

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({}, "no image"),
            ({"image": picture(), "image_guidance_scale": 0.5}, r"image_guidance_scale is 0\.5"),
            ({"image": picture(), "image_guidance_scale": float("inf")}, "image_guidance_scale"),
        ],
    )
    def test_what_cannot_be_is_refused(self, fake, options, reason):
        with pytest.raises(RequestError, match=reason):
            fake(task="editing").resolve(Request(prompt="red", **options))
