"""Conditioned tasks draw what their diffusers pipelines draw, on random checkpoints of any size, in float32."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

import sdrt
from tests.conftest import make_tiny_checkpoint

pytestmark = [pytest.mark.exhaustive, pytest.mark.filterwarnings("ignore")]

PROMPT = "a large red circle on a white background"
SEEDS = (4, 9)
SIZES = ((72, 56), (64, 128), (104, 80))  # (width, height), most no multiples of the UNet's grid
SMALL_SIZES = ((24, 20), (32, 32), (20, 44))  # of what is upscaled
KINDS = {
    "StableDiffusionInpaintPipeline": (5, {"safety_checker": None}),
    "StableDiffusionUpscalePipeline": (3, {"safety_checker": None}),
    "StableDiffusionDepth2ImgPipeline": (1, {"depth_estimator": None, "feature_extractor": None}),
    "StableDiffusionInstructPix2PixPipeline": (4, {"safety_checker": None}),
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A function of a pipeline's class: that pipeline of diffusers on a random checkpoint, and sdrt's on its bundle.

    depth: the kind of depth estimator in the checkpoint.
    """
    import diffusers
    import torch

    from sdrt.engines.build import BuildOptions, build_bundle
    from sdrt.export.package import export_model
    from sdrt.progress import silent

    made = {}

    def make(name, depth=None):
        if (name, depth) not in made:
            channels, absent = KINDS[name]
            absent = absent if depth is None else {}
            folder = tmp_path_factory.mktemp(name)
            make_tiny_checkpoint(folder / "model", pipeline_class=name, conditioning_channels=channels, depth=depth)
            export_model(folder / "model", folder / "onnx", progress=silent)
            options = BuildOptions(backend="openvino", precision="fp32", sizes="48..192", batch="1..4")
            build_bundle(folder / "onnx", folder / "tiny.sdrt", options, silent)
            reference = getattr(diffusers, name).from_pretrained(
                folder / "model", torch_dtype=torch.float32, local_files_only=True, **absent
            )
            reference.set_progress_bar_config(disable=True)
            made[name, depth] = (reference, sdrt.open(folder / "tiny.sdrt"))
        return made[name, depth]

    yield make
    for _, pipeline in made.values():
        pipeline.close()


def picture(width, height):
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8))


def mask(width, height):
    drawn = Image.new("L", (width, height))
    ImageDraw.Draw(drawn).ellipse((width // 4, height // 4, width * 3 // 4, height - 5), fill=255)
    return drawn


def assert_same(pair, arguments, *, ours=None, theirs=None):
    """Both draw the same with each seed: sdrt's two in one batch. ours, theirs: arguments that differ in form."""
    import torch

    reference, pipeline = pair
    arguments = {"prompt": PROMPT, "num_inference_steps": 5, **arguments}
    made = pipeline.generate(sdrt.Request(**arguments, seed=SEEDS, **(ours or {}))).images
    for seed, image in zip(SEEDS, made, strict=True):
        generator = torch.Generator("cpu").manual_seed(seed)
        drawn = reference(generator=generator, **arguments, **(theirs or {})).images[0]
        assert image.size == drawn.size
        assert np.abs(np.asarray(image).astype(int) - np.asarray(drawn).astype(int)).max() <= 1


@pytest.mark.parametrize("strength", [1.0, 0.7])
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_inpainting(pair, width, height, strength):
    brought = {"image": picture(width, height), "mask_image": mask(width, height), "strength": strength}
    assert_same(
        pair("StableDiffusionInpaintPipeline"), {**brought, "height": height, "width": width, "guidance_scale": 3.0}
    )


@pytest.mark.parametrize("padding", [0, 12, 40])
def test_inpainting_of_a_crop(pair, padding):
    hole = Image.new("L", (200, 150))
    ImageDraw.Draw(hole).rectangle((120, 60, 150, 100), fill=255)
    brought = {"image": picture(200, 150), "mask_image": hole, "padding_mask_crop": padding}
    assert_same(pair("StableDiffusionInpaintPipeline"), {**brought, "height": 64, "width": 96})


@pytest.mark.parametrize("noise_level", [0, 20, 350])
@pytest.mark.parametrize(("width", "height"), SMALL_SIZES)
def test_upscaling(pair, width, height, noise_level):
    scale = 1.0 if noise_level == 0 else 5.0
    brought = {"image": picture(width, height), "noise_level": noise_level, "guidance_scale": scale}
    assert_same(pair("StableDiffusionUpscalePipeline"), brought)


@pytest.mark.parametrize("strength", [1.0, 0.7])
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_depth_to_image(pair, width, height, strength):
    import torch

    depth = np.random.default_rng(1).random((height // 2, width // 2)).astype(np.float32)
    assert_same(
        pair("StableDiffusionDepth2ImgPipeline"),
        {"image": picture(width, height), "strength": strength},
        ours={"depth_map": depth},
        theirs={"depth_map": torch.from_numpy(depth)[None]},
    )


@pytest.mark.parametrize("strength", [1.0, 0.7])
@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("estimator", ["hybrid", "vit", "dinov2"])
def test_depth_to_image_of_estimated_depth(pair, estimator, width, height, strength):
    both = pair("StableDiffusionDepth2ImgPipeline", estimator)
    assert_same(both, {"image": picture(width, height), "strength": strength})


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("estimator", ["hybrid", "vit", "dinov2"])
def test_estimated_depth(pair, estimator, width, height):
    """The values themselves, image processor included."""
    import torch

    from sdrt.depth import estimate_depth

    reference, pipeline = pair("StableDiffusionDepth2ImgPipeline", estimator)
    given = reference.feature_extractor(images=picture(width, height), return_tensors="pt").pixel_values
    with torch.no_grad():
        theirs = reference.depth_estimator(given).predicted_depth[0].numpy()
    ours = estimate_depth(pipeline.runner, picture(width, height), pipeline.bundle.manifest.model.depth_estimation)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= 1e-3 * np.abs(theirs).max()


@pytest.mark.parametrize("scales", [(7.5, 1.5), (3.0, 1.0), (1.0, 1.5)])
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_editing(pair, width, height, scales):
    guidance_scale, image_guidance_scale = scales
    brought = {"image": picture(width, height), "negative_prompt": "blue"}
    assert_same(
        pair("StableDiffusionInstructPix2PixPipeline"),
        {**brought, "guidance_scale": guidance_scale, "image_guidance_scale": image_guidance_scale},
    )
