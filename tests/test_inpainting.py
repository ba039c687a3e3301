"""Inpainting and outpainting: what is known stays, conventions of masks, crops, windows, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageDraw

from sdrt.errors import RequestError
from sdrt.request import Request
from sdrt.step_batch import open_batch
from sdrt.tasks import pictures
from sdrt.tasks.outpainting import parse_margins
from sdrt.windows import windows_over


def picture(width=64, height=64, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def mask_of(box, width=64, height=64, value=255):
    mask = Image.new("L", (width, height))
    ImageDraw.Draw(mask).rectangle(box, fill=value)
    return mask


HOLE = (16, 24, 47, 39)  # of whole latents
MASK = mask_of(HOLE)


def asked(**options):
    start = {"prompt": "red", "seed": 3, "num_inference_steps": 4, "scheduler": "ddim"}
    return Request(**{**start, "image": picture(), "mask_image": MASK, **options})


class TestWithAnyNetwork:
    def test_the_latents_outside_the_mask_are_the_image_s_own(self, fake):
        pipeline = fake()
        (path,) = pipeline.prepare(pipeline.resolve(asked())).trajectories
        batch = open_batch(pipeline.runner, [path])
        while not path.finished:
            batch.advance()
        kept = path.start.known.mask[0] == 0
        assert 0 < kept.sum() < kept.size
        np.testing.assert_array_equal(path.latents[:, kept], path.start.known.latents[:, kept])

    def test_after_a_row_they_are_as_noisy_as_the_rest_is(self, fake):
        pipeline = fake()
        request = pipeline.resolve(asked(strength=0.5))
        (path,) = pipeline.prepare(request).trajectories
        batch = open_batch(pipeline.runner, [path])
        batch.advance()
        known, (on_image, on_noise) = path.start.known, request.plan.noised[1]
        kept = known.mask[0] == 0
        expected = on_image * known.latents + on_noise * known.noise
        np.testing.assert_allclose(path.latents[:, kept], expected[:, kept], rtol=1e-5, atol=1e-5)

    def test_a_white_mask_is_text_to_image_and_said_to_be(self, fake):
        pipeline = fake()
        white = Image.new("L", (64, 64), 255)
        result = pipeline.generate(asked(mask_image=white))
        assert "all white" in result.warnings[0]
        assert not np.isnan(result.latents).any()

    def test_a_black_mask_gives_the_image_back_and_says_so(self, fake):
        pipeline = fake()
        result = pipeline.generate(asked(mask_image=Image.new("L", (64, 64)), preserve=True))
        assert "all black" in result.warnings[0]
        assert result.images[0].tobytes() == picture().tobytes()

    def test_it_is_the_same_in_a_batch_with_others(self, fake):
        pipeline = fake()
        others = [Request(prompt="red", seed=1, num_inference_steps=4), asked(strength=0.6, mask_image=None)]
        with_others = pipeline.prepare(pipeline.resolve(asked())).trajectories
        company = [path for each in others for path in pipeline.prepare(pipeline.resolve(each)).trajectories]
        batch = open_batch(pipeline.runner, [*with_others, *company])
        for _ in range(2):
            batch.advance()
        (alone,) = pipeline.prepare(pipeline.resolve(asked())).trajectories
        batch = open_batch(pipeline.runner, [alone])
        for _ in range(2):
            batch.advance()
        np.testing.assert_array_equal(with_others[0].state, alone.state)


class TestWithANetworkThatSeesTheMask:
    def test_it_is_conditioned_on_mask_and_masked_image(self, fake):
        pipeline = fake(task="inpainting")
        (path,) = pipeline.prepare(pipeline.resolve(asked())).trajectories
        assert path.start.known is None
        mask, masked = path.start.conditioning[0], path.start.conditioning[1:]
        assert masked.shape == (4, 8, 8)
        np.testing.assert_array_equal(mask, np.asarray(MASK)[::8, ::8] / 255)
        assert np.abs(masked[:, mask == 1]).max() < 1e-5  # grey
        assert np.abs(masked[:, mask == 0]).max() > 0.01

    def test_it_needs_an_image_and_a_mask(self, fake):
        with pytest.raises(RequestError, match="this bundle does inpainting, and the request has no image"):
            fake(task="inpainting").resolve(Request(prompt="red"))


class TestMasks:
    def test_greys_count_as_the_nearer_of_the_two(self, fake):
        pipeline = fake()
        grey = mask_of(HOLE, value=127)
        grey.paste(128, (16, 24, 32, 40))
        (path,) = pipeline.prepare(pipeline.resolve(asked(mask_image=grey))).trajectories
        mask = path.start.known.mask[0]
        assert set(np.unique(mask)) == {0, 1}
        assert mask.sum() == 4

    def test_soft_ones_blend(self, fake):
        pipeline = fake()
        (path,) = pipeline.prepare(pipeline.resolve(asked(mask_mode="soft"))).trajectories
        mask = path.start.known.mask[0]
        assert len(np.unique(mask)) > 4
        (sharp,) = pipeline.prepare(pipeline.resolve(asked(mask_mode="soft", mask_blur=0))).trajectories
        np.testing.assert_array_equal(sharp.start.known.mask[0], np.asarray(MASK)[::8, ::8] / 255)

    @pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
    def test_any_mode_is_grey(self, fake, mode):
        (path,) = fake().prepare(fake().resolve(asked(mask_image=MASK.convert("RGB").convert(mode)))).trajectories
        np.testing.assert_array_equal(path.start.known.mask[0], np.asarray(MASK)[::8, ::8] / 255)

    def test_what_is_transparent_is_kept(self, fake):
        strokes = Image.new("RGBA", (64, 64))
        ImageDraw.Draw(strokes).rectangle(HOLE, fill="white")
        (path,) = fake().prepare(fake().resolve(asked(mask_image=strokes))).trajectories
        assert path.start.known.mask.sum() == 8

    def test_every_pixel_outside_is_preserved(self, fake):
        image = picture()
        drawn = np.asarray(fake().generate(asked(preserve=True)).images[0])
        outside = np.asarray(MASK) == 0
        np.testing.assert_array_equal(drawn[outside], np.asarray(image)[outside])
        assert (drawn[~outside] != np.asarray(image)[~outside]).mean() > 0.9


class TestCrops:
    def test_only_the_mask_and_its_surroundings_are_worked_on(self, fake):
        image, mask = picture(200, 120), mask_of((150, 80, 159, 89), 200, 120)
        result = fake().generate(asked(image=image, mask_image=mask, padding_mask_crop=5, height=64, width=64))
        drawn = np.asarray(result.images[0])
        assert drawn.shape == (120, 200, 3)
        outside = np.asarray(mask) == 0
        np.testing.assert_array_equal(drawn[outside], np.asarray(image)[outside])
        assert result.request.task.box == (145, 75, 165, 95)

    def test_the_box_has_the_shape_of_the_result_and_stays_inside(self):
        mask = mask_of((0, 50, 9, 59), 100, 60)
        assert pictures.crop_box(mask, 0, 64, 64) == (0, 50, 10, 60)
        left, top, right, bottom = pictures.crop_box(mask, 0, 64, 128)
        assert (left, right - left, bottom - top, bottom) == (0, 20, 10, 60)

    def test_the_box_is_that_of_diffusers(self):
        from diffusers.image_processor import VaeImageProcessor

        random = np.random.default_rng(0)
        cases = [(mask_of((100, 100, 139, 189), 300, 300), 0, 640, 448)]
        for _ in range(3000):
            width, height = random.integers(2, 301, 2).tolist()
            left, right = sorted(random.integers(0, width, 2).tolist())
            top, bottom = sorted(random.integers(0, height, 2).tolist())
            padding = int(random.choice([0, 0, 1, 7, 32, 400]))
            wanted = [8 * side for side in random.integers(1, 129, 2).tolist()]
            cases.append((mask_of((left, top, right, bottom), width, height), padding, *wanted))
        for mask, padding, height, width in cases:
            theirs = VaeImageProcessor.get_crop_region(mask, width, height, pad=padding)
            assert pictures.crop_box(mask, padding, height, width) == theirs, (mask.getbbox(), mask.size, width, height)

    def test_every_pixel_outside_is_preserved_where_the_mask_is_soft_too(self, fake):
        image, mask = picture(200, 120), mask_of((150, 80, 159, 89), 200, 120)
        ImageDraw.Draw(mask).rectangle((140, 80, 149, 89), fill=100)  # counts as black
        asked_for = asked(image=image, mask_image=mask, padding_mask_crop=5, height=64, width=64)
        outside = np.asarray(mask) < 128
        for preserve in (True, None):
            drawn = np.asarray(fake().generate(replace(asked_for, preserve=preserve)).images[0])
            assert (drawn == np.asarray(image))[outside].all() == (preserve is True)

    @pytest.mark.parametrize("size", [(20_000, 40), (4_000, 5)])
    def test_a_strip_that_would_cover_a_wall_is_refused_and_a_thin_one_is_drawn(self, fake, size):
        image, mask = picture(*size), Image.new("L", size, 255)
        request = asked(image=image, mask_image=mask, padding_mask_crop=0, height=64, width=64)
        if size[0] ** 2 > pictures.LARGEST_PIXELS:
            with pytest.raises(RequestError, match="a strip too long for 64x64"):
                fake().resolve(request)
        else:
            assert fake().generate(request).images[0].size == size

    def test_of_an_empty_mask_there_is_none(self, fake):
        with pytest.raises(RequestError, match="all black"):
            fake().resolve(asked(mask_image=Image.new("L", (64, 64)), padding_mask_crop=8))


class TestOutpainting:
    def test_the_canvas_grows_and_the_source_is_kept(self, fake):
        pipeline = fake()
        source = picture(64, 48)
        result = pipeline.generate(
            asked(image=source, mask_image=None, outpaint={"left": 32, "bottom": 16}, num_inference_steps=3)
        )
        assert result.images[0].size == (96, 64)
        np.testing.assert_array_equal(np.asarray(result.images[0])[:48, 32:], np.asarray(source))
        parameters = result.parameters(0)
        assert parameters["outpaint"] == {"left": 32, "top": 0, "right": 0, "bottom": 16}

    def test_a_canvas_above_the_bundle_s_sizes_goes_through_windows(self, fake):
        pipeline = fake()
        result = pipeline.generate(asked(image=picture(128, 64), mask_image=None, outpaint={"right": 128}))
        assert result.images[0].size == (256, 64)
        assert result.request.windowed
        assert max(pipeline.runner.batches) <= 8

    @pytest.mark.parametrize("fill", ["edge", "noise", "white", "#204080"])
    def test_the_new_part_is_filled(self, fake, fill):
        request = fake().resolve(asked(mask_image=None, outpaint={"right": 32}, fill=fill))
        canvas = np.asarray(request.task.inside.image)
        new = canvas[:, 64:]
        if fill == "edge":
            np.testing.assert_array_equal(new, np.repeat(canvas[:, 63:64], 32, axis=1))
        elif fill == "noise":
            assert new.std() > 50
        else:
            assert tuple(new[0, 0]) == {"white": (255, 255, 255), "#204080": (0x20, 0x40, 0x80)}[fill]

    @pytest.mark.parametrize("task", ["text-to-image", "inpainting"])
    @pytest.mark.parametrize("options", [{}, {"mask_mode": "soft", "mask_blur": 0}], ids=str)
    @pytest.mark.parametrize(
        ("width", "height", "outpaint"),
        [(132, 128, {"right": 60}), (60, 64, {"right": 4}), (64, 59, {"left": 16, "bottom": 5}), (44, 64, {"left": 4})],
        ids=str,
    )
    def test_a_latent_that_holds_any_of_the_margin_is_drawn(self, fake, task, options, width, height, outpaint):
        pipeline = fake(task=task, sizes=((64, 48), (64, 64), (64, 80), (128, 128)))
        request = asked(image=picture(width, height), mask_image=None, outpaint=outpaint, **options)
        (path,) = pipeline.prepare(pipeline.resolve(request)).trajectories
        left, right, bottom = (outpaint.get(side, 0) for side in ("left", "right", "bottom"))
        margin = np.pad(np.zeros((height, width), bool), ((0, bottom), (left, right)), constant_values=True)
        rows, columns = (side // 8 for side in margin.shape)
        touched = margin.reshape(rows, 8, columns, 8).any((1, 3))
        mask = path.start.known.mask[0] if task == "text-to-image" else path.start.conditioning[0]
        np.testing.assert_array_equal(mask, touched)
        if task == "inpainting":  # the network is shown nothing of what it is to draw, and all of the rest
            shown = np.abs(path.start.conditioning[1:]).max(0)
            np.testing.assert_array_equal(shown > 1e-5, ~touched)

    @pytest.mark.parametrize("task", ["text-to-image", "inpainting"])
    def test_a_source_off_the_latents_grid_comes_back_and_all_of_the_margin_is_new(self, fake, task):
        source = picture(132, 128)
        request = asked(image=source, mask_image=None, outpaint={"right": 60}, fill="#010203")
        result = fake(task=task).generate(request)
        assert result.request.windowed
        drawn = np.asarray(result.images[0])
        np.testing.assert_array_equal(drawn[:, :132], np.asarray(source))
        assert (drawn[:, 132:] != (1, 2, 3)).any(2).mean() > 0.99
        assert result.warnings == ()

    def test_a_source_that_fills_no_latent_is_told(self, fake):
        result = fake().generate(asked(image=picture(12, 64), mask_image=None, outpaint={"left": 4, "right": 48}))
        assert result.warnings == ()
        result = fake().generate(asked(image=picture(12, 64), mask_image=None, outpaint={"left": 2, "right": 50}))
        assert "the image fills no 8x8 pixels" in result.warnings[0]

    def test_a_mask_of_one_s_own_follows_diffusers_still(self, fake):
        mask = mask_of((20, 20, 47, 39))
        (path,) = fake().prepare(fake().resolve(asked(mask_image=mask))).trajectories
        np.testing.assert_array_equal(path.start.known.mask[0], np.asarray(mask)[::8, ::8] / 255)

    @pytest.mark.parametrize(
        ("outpaint", "size", "says", "hint"),
        [
            ({"right": 60}, None, "does not make images of 188x128", "right=64 makes 192x128"),
            (
                {"right": 60},
                (192, 128),
                "outpaint makes 188x128, not the 192x128 of height and width",
                "right=64 makes",
            ),
            (
                {"right": 64},
                (256, 128),
                "outpaint makes 192x128, not the 256x128 of height and width",
                "right=128 makes",
            ),
            ({"right": 64}, (64, 64), "outpaint makes 192x128, not the 64x64 of height and width", "right=64 makes"),
            ({"right": 64}, (None, 144), "outpaint makes 192x128, not the 192x144 of height and width", "bottom=16"),
            ({"left": 33, "right": 30}, None, "191x128", "left=34,right=30 makes 192x128"),
            ({"top": 5, "bottom": 5}, None, "128x138", "top=5,bottom=11 makes 128x144"),
        ],
    )
    def test_a_size_that_is_not_the_canvas_s_is_refused_and_margins_named(self, fake, outpaint, size, says, hint):
        width, height = size or (None, None)
        request = asked(image=picture(128, 128), mask_image=None, outpaint=outpaint, width=width, height=height)
        pipeline = fake()
        with pytest.raises(RequestError, match=says) as raised:
            pipeline.generate(request)
        assert hint in raised.value.hint
        assert not pipeline.runner.calls

    def test_margins_that_are_named_are_taken(self, fake):
        fixed = {"sizes": ((96, 96), (64, 128))}
        for options, size in (({}, (40, 30)), (fixed, (40, 30)), (fixed, (130, 33))):
            request = asked(image=picture(*size), mask_image=None, outpaint={"right": 3})
            with pytest.raises(RequestError) as raised:
                fake(**options).resolve(request)
            margins, made = raised.value.hint.split(" makes ")
            resolved = fake(**options).resolve(replace(request, outpaint=parse_margins(margins)))
            assert f"{resolved.width}x{resolved.height}" == made

    def test_where_no_margins_fit_the_sizes_are_named(self, fake):
        with pytest.raises(RequestError) as raised:
            fake().resolve(asked(image=picture(3, 64), mask_image=None, outpaint={"right": 4096}))
        assert "the nearest is" in raised.value.hint

    def test_the_canvas_s_own_size_may_be_said(self, fake):
        request = asked(mask_image=None, outpaint={"right": 64}, width=128, height=64)
        assert fake().resolve(request).task.size == (64, 128)


class TestWindows:
    def test_one_window_is_the_plain_path(self, fake):
        pipeline = fake()
        plain, windowed = (pipeline.prepare(pipeline.resolve(asked())).trajectories[0] for _ in range(2))
        windowed.windows = windows_over(windowed.size, windowed.size, 8)
        for path in (plain, windowed):
            batch = open_batch(pipeline.runner, [path])
            while not path.finished:
                batch.advance()
        np.testing.assert_array_equal(plain.state, windowed.state)

    def test_weights_are_one_everywhere(self):
        windows = windows_over((11, 23), (8, 8), 4)
        whole = windows.joined([np.ones((2, 8, 8), np.float32)] * len(windows.parts))
        np.testing.assert_allclose(whole, 1, rtol=1e-6)
        assert all(part.weight.shape == (8, 8) for part in windows.parts)

    def test_a_network_that_looks_at_each_pixel_alone_gives_what_the_whole_gives(self, fake):
        pipeline = fake()
        request = Request(prompt="red", seed=3, num_inference_steps=5, scheduler="euler_a", height=128, width=128)
        whole = pipeline.generate(request)
        (path,) = pipeline.prepare(pipeline.resolve(request)).trajectories
        path.windows = windows_over(path.size, (8, 8), 3)
        batch = open_batch(pipeline.runner, [path])
        while not path.finished:
            batch.advance()
        np.testing.assert_allclose(path.latents, whole.latents[0], rtol=1e-4, atol=1e-5)

    def test_one_call_of_the_engines_at_a_time_and_the_row_is_taken_after_the_last(self, fake):
        pipeline = fake()
        request = Request(prompt="red", num_inference_steps=2, height=256, width=256, windowed=True)
        paths = [pipeline.prepare(pipeline.resolve(request)).trajectories[0] for _ in range(2)]
        calls = 2 * -(-len(paths[0].windows.parts) // paths[0].windows.at_once)
        assert calls > 2
        batch = open_batch(pipeline.runner, paths)
        for call in range(1, calls + 1):
            assert batch.advance() == {}
            assert pipeline.runner.calls["step"] == call
            assert batch.within_row == (call < calls)
            assert [path.row for path in paths] == [int(call == calls)] * 2
            assert len(batch.take_seconds()) == int(call == calls)

    def test_are_asked_for(self, fake):
        big = Request(prompt="red", height=256, width=128, num_inference_steps=2)
        with pytest.raises(RequestError) as raised:
            fake().resolve(big)
        assert "larger ones with windowed=True, up to 16777216 pixels" in raised.value.hint
        result = fake().generate(Request(prompt="red", height=256, width=128, num_inference_steps=2, windowed=True))
        assert result.images[0].size == (128, 256)
        assert result.parameters(0)["windowed"] is True

    @pytest.mark.parametrize(
        ("size", "windowed", "says", "hint"),
        [
            ((6000, 4000), True, "6000x4000 is more than 16777216 pixels, even in windows", "such as 4992x3328"),
            ((6000, 4000), False, "does not make images of 6000x4000", "with windowed=True, up to 16777216 pixels"),
            ((250, 120), True, "both sides must be multiples of 16", "up to 16777216 pixels; the nearest is 256x128"),
            ((16, 256), True, "does not make images of 16x256", "the nearest is 32x256"),
        ],
    )
    def test_their_limit_is_named(self, fake, size, windowed, says, hint):
        with pytest.raises(RequestError, match=says) as raised:
            fake().resolve(Request(prompt="red", width=size[0], height=size[1], windowed=windowed))
        assert hint in raised.value.hint


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"image": None}, "mask_image is given, but there is no image"),
        ({"mask_image": mask_of(HOLE, 32, 64)}, "image has 64x64 pixels, mask_image 32x64"),
        ({"mask_image": "mask.png"}, "mask_image is str"),
        ({"mask_mode": "hard"}, "mask_mode is 'hard'"),
        ({"mask_blur": 4}, "the mask has no greys"),
        ({"mask_mode": "soft", "mask_blur": -1}, "mask_blur is -1"),
        ({"mask_mode": "soft", "mask_blur": float("nan")}, "mask_blur"),
        ({"padding_mask_crop": -1}, "padding_mask_crop"),
        ({"strength": 0}, "strength is 0"),
        ({"preserve": "yes"}, "preserve is 'yes'"),
        ({"outpaint": {"left": 8}}, "mask_image means nothing in outpainting"),
        ({"mask_image": None, "outpaint": {"up": 8}}, "outpaint names 'up'"),
        ({"mask_image": None, "outpaint": {"left": -8}}, "outpaint's left is -8"),
        ({"mask_image": None, "outpaint": {}}, "outpaint grows no side"),
        ({"mask_image": None, "outpaint": 64}, "outpaint is 64"),
        ({"mask_image": None, "outpaint": {"left": 16}, "fill": "purplish"}, "fill is 'purplish'"),
        ({"mask_image": None, "outpaint": {"left": 16}, "fill": 128}, "fill is 128"),
        ({"mask_image": None, "outpaint": {"left": 16}, "fill": "rgb(300,0,0)"}, r"fill is 'rgb\(300,0,0\)'"),
        ({"mask_image": None, "outpaint": {"left": 5}}, "69x64"),
        (
            {"mask_image": None, "image": picture(65_536, 16), "outpaint": {"top": 4096, "bottom": 4096}},
            "outpaint makes 65536x16 pixels 65536x8208, more than 16777216",
        ),
        ({"mask_image": None, "fill": "edge"}, "fill is given, but there is no outpaint"),
        ({"mask_image": None, "mask_mode": "soft"}, "mask_mode is given, but there is no mask_image"),
        ({"noise_level": 3}, "noise_level is for upscaling, which this bundle cannot do"),
        ({"depth_map": np.zeros((8, 8))}, "depth_map is for depth-to-image"),
        ({"windowed": 1}, "windowed is 1"),
    ],
)
def test_what_cannot_be_is_refused_with_a_hint(fake, options, reason):
    with pytest.raises(RequestError, match=reason) as raised:
        fake().resolve(asked(**options))
    assert raised.value.hint
