"""Depth of a picture: the image processor in numpy, what of it is refused, and requests that leave the depth out."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from sdrt.bundle import DepthEstimation
from sdrt.depth import check_estimable, input_bounds, input_size, read_depth_estimation, to_pixel_values
from sdrt.errors import CheckpointError, ParityError, RequestError
from sdrt.request import Request
from sdrt.runners.fake import FakeRunner
from sdrt.tasks.depth_to_image import normalised
from sdrt.tasks.resampling import bicubic

HYBRID = {"is_hybrid": True, "image_size": 64, "backbone_config": {"model_type": "bit"}}
PLAIN = {"is_hybrid": False, "image_size": 64, "patch_size": 16}
ANY_SIZE = {"is_hybrid": False, "backbone_config": {"model_type": "dinov2"}}
OPTIONS = {"prompt": "red", "num_inference_steps": 4, "scheduler": "ddim"}
SQUARE = {"size": {"height": 64, "width": 64}}


def read(processor, estimator=ANY_SIZE):
    return read_depth_estimation(processor, estimator, "preprocessor_config.json")


def picture(width=64, height=64):
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8))


@pytest.mark.parametrize("size", [(64, 64), (72, 56), (50, 131), (300, 201)], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"size": {"height": 96, "width": 80}, "resample": 0},
        {"resample": 2, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.3, 0.2, 0.1]},
        {"keep_aspect_ratio": True},
        {"keep_aspect_ratio": True, "ensure_multiple_of": 14, "resample": 1},
        {"keep_aspect_ratio": True, "do_pad": True, "size_divisor": 14},
        {"ensure_multiple_of": 48, "rescale_factor": 0.01, "do_normalize": False},
        {"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [127.5] * 3},
    ],
    ids=str,
)
def test_a_picture_becomes_what_the_reference_makes_of_it(options, size, tmp_path):
    from transformers import DPTImageProcessorPil

    theirs = DPTImageProcessorPil(**SQUARE | options)
    theirs.save_pretrained(tmp_path)
    expected = theirs(images=picture(*size), return_tensors="np").pixel_values
    estimation = read(json.loads((tmp_path / "preprocessor_config.json").read_text()))
    np.testing.assert_array_equal(to_pixel_values(estimation, picture(*size)), expected)
    assert input_size(estimation, size[1], size[0]) == expected.shape[2:]


def test_an_older_file_says_the_same():
    older = {"feature_extractor_type": "DPTFeatureExtractor", "size": 64, "resample": 2, "image_mean": [0.5] * 3}
    newer = {"image_processor_type": "DPTImageProcessor", **SQUARE, "resample": 2, "image_mean": 0.5}
    assert read(older) == read(newer)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("do_center_crop", True),
        ("do_resize", False),
        ("default_to_square", False),
        ("size", {"shortest_edge": 384}),
        ("size", {"height": 64, "width": 0}),
        ("resample", 9),
        ("ensure_multiple_of", 0),
        ("image_mean", [0.5, 0.5]),
        ("image_std", [0.5, 0.5, 0]),
        ("rescale_factor", "1/255"),
        ("keep_aspect_ratio", "yes"),
        ("size_divisor", 1.5),
        ("sharpen", 3),
        ("image_processor_type", "CLIPImageProcessor"),
    ],
)
def test_a_field_that_is_not_honoured_is_named(field, value):
    with pytest.raises(CheckpointError, match=field) as raised:
        read({**SQUARE, "do_pad": True, field: value})
    assert "depth_estimator to [null, null]" in raised.value.hint


@pytest.mark.parametrize(
    ("processor", "estimator", "takes"),
    [
        (SQUARE, HYBRID, (64, 64)),
        (SQUARE | {"keep_aspect_ratio": True}, HYBRID, (64, 64)),
        (SQUARE | {"keep_aspect_ratio": True}, PLAIN, (64, 64)),
        (SQUARE, ANY_SIZE, (64, 64)),
        (SQUARE | {"keep_aspect_ratio": True}, ANY_SIZE, None),
        ({"size": 100, "ensure_multiple_of": 32}, PLAIN, (96, 96)),
    ],
)
def test_the_size_is_fixed_unless_processor_and_estimator_leave_it_open(processor, estimator, takes):
    assert read(processor, estimator).takes == takes


@pytest.mark.parametrize(
    ("size", "estimator", "reason"),
    [
        (96, HYBRID, "makes 96x96, but the depth estimator takes 64x64 alone"),
        ({"height": 64, "width": 96}, PLAIN, "makes 96x64, but the depth estimator takes squares alone"),
    ],
)
def test_a_processor_that_its_estimator_does_not_take_is_refused(size, estimator, reason):
    with pytest.raises(CheckpointError, match=reason):
        read({"size": size}, estimator)


def test_an_image_that_would_become_another_size_is_refused():
    estimation = read(SQUARE | {"keep_aspect_ratio": True}, HYBRID)
    check_estimable(estimation, 80, 80)
    with pytest.raises(RequestError, match=r"given 96x64 pixels of an image of 96x64, and takes only 64x64") as raised:
        check_estimable(estimation, 64, 96)
    assert "depth_map" in raised.value.hint


def test_every_image_of_a_profile_becomes_a_size_within_the_bounds():
    estimation = read({"size": {"height": 96, "width": 128}, "keep_aspect_ratio": True, "ensure_multiple_of": 14})
    (low, narrow), (high, wide) = input_bounds(estimation, (48, 64), (192, 256))
    sizes = [input_size(estimation, h, w) for h in range(48, 193, 8) for w in range(64, 257, 8)]
    heights, widths = (np.array(sides) for sides in zip(*sizes, strict=True))
    assert low <= heights.min() <= heights.max() <= high
    assert narrow <= widths.min() <= widths.max() <= wide


class TestRequests:
    ESTIMATION = DepthEstimation(
        height=32,
        width=48,
        keep_aspect_ratio=False,
        multiple_of=1,
        resample=3,
        scale=1 / 255,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        pad_to=None,
        takes=(32, 48),
    )

    @pytest.fixture
    def estimating(self, fake):
        """A function that makes pipelines of a bundle with a depth estimator, over this runner."""

        def make(runner=None, estimation=self.ESTIMATION):
            pipeline = fake(FakeRunner() if runner is None else runner, task="depth-to-image")
            manifest = pipeline.bundle.manifest
            model = replace(manifest.model, depth_estimation=estimation)
            pipeline.bundle = replace(pipeline.bundle, manifest=replace(manifest, model=model))
            return pipeline

        return make

    def test_an_image_alone_is_conditioned_by_the_depth_that_is_seen_in_it(self, estimating):
        pipeline = estimating()
        image = picture(80, 64)
        (path,) = pipeline.prepare(pipeline.resolve(Request(**OPTIONS, image=image))).trajectories
        seen = to_pixel_values(self.ESTIMATION, image).mean(1)[0]  # what the fake estimator makes of it
        np.testing.assert_array_equal(path.start.conditioning, normalised(bicubic(seen, 8, 10))[None])
        assert pipeline.resolve(Request(**OPTIONS, image=image)).task.strength == 0.8

    def test_it_is_that_of_the_image_in_the_size_that_is_asked_for(self, estimating):
        pipeline = estimating()
        image = picture(160, 128)
        smaller = image.resize((80, 64), Image.Resampling.LANCZOS)
        one, other = (
            pipeline.prepare(pipeline.resolve(Request(**OPTIONS, **brought))).trajectories[0].start.conditioning
            for brought in ({"image": image, "width": 80, "height": 64}, {"image": smaller})
        )
        np.testing.assert_array_equal(one, other)

    def test_several_results_of_one_image_look_at_it_once(self, estimating):
        runner = FakeRunner()
        estimating(runner).generate(Request(**OPTIONS, image=picture(), seed=[1, 2, 3]))
        assert runner.calls["depth_estimator"] == 1

    def test_a_depth_map_that_is_given_counts(self, estimating):
        runner = FakeRunner()
        estimating(runner).generate(Request(**OPTIONS, image=picture(), depth_map=np.eye(64)))
        assert "depth_estimator" not in runner.calls

    def test_what_made_the_image_tells_no_depth_map(self, estimating):
        parameters = estimating().generate(Request(**OPTIONS, image=picture(), strength=0.5)).parameters(0)
        assert parameters["task"] == "depth-to-image"
        assert "image_sha256" in parameters
        assert "depth_map_sha256" not in parameters

    def test_a_flat_one_is_all_far_and_says_so_once(self, estimating):
        image = Image.new("RGB", (64, 64), "gray")
        result = estimating().generate(Request(**OPTIONS, image=image, seed=[1, 2]))
        assert [warning for warning in result.warnings if "the same everywhere" in warning] == list(result.warnings)
        assert len(result.warnings) == 1

    def test_one_that_is_not_finite_is_an_error(self, estimating, monkeypatch):
        nothing = {"predicted_depth": np.full((1, 4, 4), np.nan, np.float32)}
        runner = FakeRunner()
        inner = runner.run
        monkeypatch.setattr(runner, "run", lambda name, feeds: nothing if "depth" in name else inner(name, feeds))
        with pytest.raises(ParityError, match="16 of 16 values of the depth are NaN"):
            estimating(runner).generate(Request(**OPTIONS, image=picture()))

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({}, "the request has no image"),
            ({"strength": 0.5}, "the request has no image"),
            ({"image": picture(), "mask_image": picture()}, "mask_image is for"),
        ],
    )
    def test_what_cannot_be_is_refused(self, estimating, options, reason):
        with pytest.raises(RequestError, match=reason):
            estimating().resolve(Request(**OPTIONS, **options))

    def test_a_shape_that_the_estimator_does_not_take_is_refused_before_any_compute(self, estimating):
        runner = FakeRunner()
        keeping = replace(self.ESTIMATION, keep_aspect_ratio=True)
        with pytest.raises(RequestError, match="takes only 48x32"):
            estimating(runner, keeping).generate(Request(**OPTIONS, image=picture(64, 64)))
        assert runner.calls == {}

    def test_a_bundle_without_an_estimator_says_why_it_needs_a_map(self, fake):
        with pytest.raises(RequestError, match=r"no depth_map; its checkpoint brought no depth estimator") as raised:
            fake(task="depth-to-image").resolve(Request(**OPTIONS, image=picture()))
        assert "give depth_map" in raised.value.hint
