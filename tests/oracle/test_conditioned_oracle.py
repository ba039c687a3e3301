"""Every task draws what its diffusers pipeline draws, on random checkpoints, in any size, in float32.

`make test` has one small case of each task that needs a checkpoint of its own, `make oracle` every size and option.
"""

import numpy as np
import pytest
from PIL import Image, ImageDraw

import sdrt
from sdrt.plan.catalog import NAMES

pytestmark = pytest.mark.filterwarnings("ignore")
exhaustive = pytest.mark.exhaustive

PROMPT = "a large red circle on a white background"
SEEDS = (4, 9)
PLAIN_SCHEDULERS = (None, "euler_a", "dpmpp_2m_sde")  # the last two draw noise in every step
SIZES = ((72, 56), (64, 128), (104, 80))  # (width, height), most no multiples of the UNet's grid
SMALL_SIZES = ((24, 20), (32, 32), (20, 44))  # of what is upscaled
PLAIN = "StableDiffusionPipeline"
INPAINTING = "StableDiffusionInpaintPipeline"
UPSCALING = "StableDiffusionUpscalePipeline"
DEPTH = "StableDiffusionDepth2ImgPipeline"
EDITING = "StableDiffusionInstructPix2PixPipeline"


@pytest.fixture(scope="module")
def opened(tiny_of, tmp_path_factory):
    """A function of a pipeline's class: a random checkpoint of it, and sdrt's pipeline on its bundle.

    depth, slim: see `make_tiny_checkpoint`.
    """
    from sdrt.engines.build import BuildOptions, build_bundle
    from sdrt.progress import silent

    made = {}

    def make(kind, **options):
        key = (kind, *sorted(options.items()))
        if key not in made:
            checkpoint, onnx = tiny_of(kind, **options)
            bundle = tmp_path_factory.mktemp(kind) / "tiny.sdrt"
            profile = BuildOptions(backend="openvino", precision="fp32", sizes="48..192", batch="1..4")
            build_bundle(onnx, bundle, profile, silent)
            made[key] = (checkpoint, sdrt.open(bundle))
        return made[key]

    yield make
    for _, pipeline in made.values():
        pipeline.close()


@pytest.fixture(scope="module")
def pair(opened):
    """A function of a pipeline's class: that pipeline of diffusers on a random checkpoint, and sdrt's on its bundle.

    of: the checkpoint's class, where that is another. scheduler: by sdrt's name, unless the checkpoint's own.
    """
    import diffusers
    import torch

    def make(kind, of=None, scheduler=None, **options):
        checkpoint, pipeline = opened(kind if of is None else of, **options)
        absent = {"safety_checker": None} if kind != DEPTH else {}
        if kind == DEPTH and "depth" not in options:
            absent = {"depth_estimator": None, "feature_extractor": None}
        reference = getattr(diffusers, kind).from_pretrained(
            checkpoint, torch_dtype=torch.float32, local_files_only=True, **absent
        )
        if scheduler is not None:
            named = NAMES[scheduler]
            own = reference.scheduler.config
            reference.scheduler = getattr(diffusers, named.family.class_name).from_config(own, **named.fields)
        reference.set_progress_bar_config(disable=True)
        return reference, pipeline

    return make


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


def test_a_small_case_of_inpainting(pair):
    brought = {"image": picture(76, 52), "mask_image": mask(76, 52), "width": 76, "height": 52, "strength": 0.7}
    assert_same(pair(INPAINTING, slim=True), brought)


def test_a_small_case_of_upscaling(pair):
    assert_same(pair(UPSCALING, slim=True), {"image": picture(24, 20), "noise_level": 20, "guidance_scale": 5.0})


def test_a_small_case_of_depth_to_image(pair):
    assert_depth_to_image_is_the_same(pair(DEPTH, slim=True), 76, 52, 0.7)


def test_a_small_case_of_editing(pair):
    assert_same(pair(EDITING, slim=True), {"image": picture(76, 52), "negative_prompt": "blue"})


@exhaustive
@pytest.mark.parametrize("scheduler", PLAIN_SCHEDULERS)
@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_image_to_image(pair, width, height, strength, scheduler):
    both = pair("StableDiffusionImg2ImgPipeline", of=PLAIN, scheduler=scheduler)
    brought = {"image": picture(width, height), "strength": strength}
    assert_same(both, {**brought, "num_inference_steps": 8}, ours={"scheduler": scheduler})


@exhaustive
@pytest.mark.parametrize("scheduler", PLAIN_SCHEDULERS)
@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_inpainting_with_a_network_that_does_not_see_the_mask(pair, width, height, strength, scheduler):
    both = pair(INPAINTING, of=PLAIN, scheduler=scheduler)
    brought = {"image": picture(width, height), "mask_image": mask(width, height), "strength": strength}
    brought |= {"height": height, "width": width, "num_inference_steps": 8}
    assert_same(both, brought, ours={"scheduler": scheduler})


@exhaustive
@pytest.mark.parametrize("strength", [1.0, 0.7])
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_inpainting(pair, width, height, strength):
    brought = {"image": picture(width, height), "mask_image": mask(width, height), "strength": strength}
    assert_same(pair(INPAINTING), {**brought, "height": height, "width": width, "guidance_scale": 3.0})


@exhaustive
@pytest.mark.parametrize("padding", [0, 12, 40])
def test_inpainting_of_a_crop(pair, padding):
    hole = Image.new("L", (200, 150))
    ImageDraw.Draw(hole).rectangle((120, 60, 150, 100), fill=255)
    brought = {"image": picture(200, 150), "mask_image": hole, "padding_mask_crop": padding}
    assert_same(pair(INPAINTING), {**brought, "height": 64, "width": 96})


@exhaustive
@pytest.mark.parametrize("noise_level", [0, 20, 350])
@pytest.mark.parametrize(("width", "height"), SMALL_SIZES)
def test_upscaling(pair, width, height, noise_level):
    scale = 1.0 if noise_level == 0 else 5.0
    brought = {"image": picture(width, height), "noise_level": noise_level, "guidance_scale": scale}
    assert_same(pair(UPSCALING), brought)


@exhaustive
@pytest.mark.parametrize(("width", "height"), [(1, 1), (5, 9), (11, 40), (12, 9)])
def test_upscaling_of_a_small_image_is_that_of_the_padded_one(pair, width, height):
    import torch

    reference, pipeline = pair(UPSCALING)
    small, options = picture(width, height), {"prompt": PROMPT, "num_inference_steps": 5, "guidance_scale": 5.0}
    beyond = ((0, max(12 - height, 0)), (0, max(12 - width, 0)), (0, 0))  # the bundle makes nothing below 48 pixels
    padded = Image.fromarray(np.pad(np.asarray(small), beyond, mode="edge"))
    made = pipeline.generate(sdrt.Request(image=small, seed=4, **options)).images[0]
    drawn = reference(image=padded, generator=torch.Generator("cpu").manual_seed(4), **options).images[0]
    assert made.size == (4 * width, 4 * height)
    within = np.asarray(drawn.crop((0, 0, *made.size)))
    assert np.abs(np.asarray(made).astype(int) - within.astype(int)).max() <= 1


@exhaustive
@pytest.mark.parametrize("strength", [1.0, 0.7])
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_depth_to_image(pair, width, height, strength):
    assert_depth_to_image_is_the_same(pair(DEPTH), width, height, strength)


def assert_depth_to_image_is_the_same(pair, width, height, strength):
    import torch

    depth = np.random.default_rng(1).random((height // 2, width // 2)).astype(np.float32)
    assert_same(
        pair,
        {"image": picture(width, height), "strength": strength},
        ours={"depth_map": depth},
        theirs={"depth_map": torch.from_numpy(depth)[None]},
    )


@exhaustive
@pytest.mark.parametrize("strength", [1.0, 0.7])
@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("estimator", ["hybrid", "vit", "dinov2"])
def test_depth_to_image_of_estimated_depth(pair, estimator, width, height, strength):
    assert_same(pair(DEPTH, depth=estimator), {"image": picture(width, height), "strength": strength})


@exhaustive
@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("estimator", ["hybrid", "vit", "dinov2"])
def test_estimated_depth(pair, estimator, width, height):
    """The values themselves, image processor included."""
    import torch

    from sdrt.depth import estimate_depth

    reference, pipeline = pair(DEPTH, depth=estimator)
    given = reference.feature_extractor(images=picture(width, height), return_tensors="pt").pixel_values
    with torch.no_grad():
        theirs = reference.depth_estimator(given).predicted_depth[0].numpy()
    ours = estimate_depth(pipeline.runner, picture(width, height), pipeline.bundle.manifest.model.depth_estimation)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= 1e-3 * np.abs(theirs).max()


@exhaustive
@pytest.mark.parametrize("scales", [(7.5, 1.5), (3.0, 1.0), (1.0, 1.5)])
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_editing(pair, width, height, scales):
    guidance_scale, image_guidance_scale = scales
    brought = {"image": picture(width, height), "negative_prompt": "blue"}
    assert_same(
        pair(EDITING),
        {**brought, "guidance_scale": guidance_scale, "image_guidance_scale": image_guidance_scale},
    )
