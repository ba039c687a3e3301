"""With ControlNets each task draws what its diffusers pipeline draws with them, in float32, with the same seeds."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

import sdrt
from tests.conftest import make_tiny_checkpoint, make_tiny_controlnet, run_build

pytestmark = pytest.mark.filterwarnings("ignore")

MODELS = Path(__file__).parents[2] / "models" / "shapes"
PROMPT = "a large red circle on a white background"
SEEDS = (4, 9)
SIZES = ((72, 56), (64, 128), (104, 80))  # (width, height), most no multiples of the UNet's grid
STEERING = {
    "controlnet_conditioning_scale": [0.8, 1.3],
    "control_guidance_start": [0.0, 0.25],
    "control_guidance_end": [0.7, 1.0],
}


@pytest.fixture(scope="module")
def pipeline(steered_bundle):
    with sdrt.open(steered_bundle) as opened:
        yield opened


@pytest.fixture(scope="module")
def reference(tiny_checkpoint, tiny_controlnets):
    """A function of a pipeline's class: that pipeline of diffusers on the same checkpoint and ControlNets."""
    return lambda kind: reference_of(kind, tiny_checkpoint, tiny_controlnets)


@pytest.fixture(scope="module")
def inpainting(tmp_path_factory):
    """sdrt's pipeline and that of diffusers on a checkpoint whose UNet takes 9 channels, with two ControlNets."""
    from sdrt.engines.build import BuildOptions, build_bundle
    from sdrt.export.package import export_model
    from sdrt.progress import silent

    folder = tmp_path_factory.mktemp("inpainting")
    made_for = make_tiny_checkpoint(
        folder / "model", pipeline_class="StableDiffusionInpaintPipeline", conditioning_channels=5
    )
    plain = make_tiny_checkpoint(folder / "plain")  # ControlNets see the latents alone, as one of these UNets does
    controlnets = [
        make_tiny_controlnet(folder / "rgb", plain, seed=1),
        make_tiny_controlnet(folder / "bgr", plain, seed=2, order="bgr"),
    ]
    export_model(made_for, folder / "onnx", controlnets=controlnets)
    options = BuildOptions(backend="openvino", precision="fp32", sizes="48..128", batch="1..4")
    build_bundle(folder / "onnx", folder / "tiny.sdrt", options, silent)
    theirs = reference_of("StableDiffusionControlNetInpaintPipeline", made_for, controlnets)
    with sdrt.open(folder / "tiny.sdrt") as opened:
        yield opened, theirs


def reference_of(kind, checkpoint, controlnets):
    import diffusers
    import torch

    networks = [diffusers.ControlNetModel.from_pretrained(folder, local_files_only=True) for folder in controlnets]
    made = getattr(diffusers, kind).from_pretrained(
        checkpoint,
        controlnet=networks if len(networks) > 1 else networks[0],
        torch_dtype=torch.float32,
        safety_checker=None,
        local_files_only=True,
    )
    made.set_progress_bar_config(disable=True)
    return made


def picture(width, height):
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8))


def controls(width, height):
    """A picture of the result's size, and a larger one of another shape."""
    return [picture(width + 1, height).crop((0, 0, width, height)), picture(150, 90)]


def mask(width, height):
    drawn = Image.new("L", (width, height))
    ImageDraw.Draw(drawn).ellipse((width // 4, height // 4, width * 3 // 4, height - 5), fill=255)
    return drawn


def assert_same(pipeline, reference, arguments, *, ours, theirs):
    """Both draw the same with each seed: sdrt's two in one batch. ours, theirs: arguments that differ in name."""
    import torch

    arguments = {"prompt": PROMPT, "negative_prompt": "blue", "num_inference_steps": 5, **arguments}
    made = pipeline.generate(sdrt.Request(**arguments, seed=SEEDS, **ours)).images
    for seed, image in zip(SEEDS, made, strict=True):
        generator = torch.Generator("cpu").manual_seed(seed)
        drawn = reference(generator=generator, **arguments, **theirs).images[0]
        assert image.size == drawn.size
        assert np.abs(np.asarray(image).astype(int) - np.asarray(drawn).astype(int)).max() <= 1


def assert_text_to_image_is_the_same(pipeline, reference, width, height, **arguments):
    shown = controls(width, height)
    arguments = {"width": width, "height": height, **STEERING, **arguments}
    theirs = reference("StableDiffusionControlNetPipeline")
    if arguments.pop("scheduler", None) == "heun":
        import diffusers

        theirs.scheduler = diffusers.HeunDiscreteScheduler.from_config(theirs.scheduler.config)
        assert_same(
            pipeline, theirs, arguments, ours={"control_image": shown, "scheduler": "heun"}, theirs={"image": shown}
        )
        return
    assert_same(pipeline, theirs, arguments, ours={"control_image": shown}, theirs={"image": shown})


def test_text_to_image(pipeline, reference):
    assert_text_to_image_is_the_same(pipeline, reference, *SIZES[0])


@pytest.mark.exhaustive
@pytest.mark.parametrize("options", [{}, {"guidance_scale": 1.0}, {"scheduler": "heun"}], ids=str)
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_text_to_image_of_any_size(pipeline, reference, width, height, options):
    assert_text_to_image_is_the_same(pipeline, reference, width, height, **options)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_values_that_no_picture_has(pipeline, reference, width, height):
    """As ControlNets for inpainting want them: -1 where something is to be drawn."""
    import torch

    values = [np.asarray(each.resize((width, height)), np.float32) / 255 for each in controls(width, height)]
    values = [np.where(np.asarray(mask(width, height))[..., None] > 0, np.float32(-1), each) for each in values]
    as_torch = [torch.from_numpy(each).permute(2, 0, 1)[None] for each in values]
    assert_same(
        pipeline,
        reference("StableDiffusionControlNetPipeline"),
        {"width": width, "height": height, **STEERING},
        ours={"control_image": values},
        theirs={"image": as_torch},
    )


@pytest.mark.exhaustive
@pytest.mark.parametrize("strength", [1.0, 0.7])
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_image_to_image(pipeline, reference, width, height, strength):
    brought = {"image": picture(width, height), "strength": strength, "control_image": controls(width, height)}
    theirs = {"width": width, "height": height}
    assert_same(
        pipeline,
        reference("StableDiffusionControlNetImg2ImgPipeline"),
        {**brought, **STEERING},
        ours={},
        theirs=theirs,
    )


def inpainted(width, height, strength):
    brought = {"image": picture(width, height), "mask_image": mask(width, height), "strength": strength}
    return {**brought, "control_image": controls(width, height), "width": width, "height": height, **STEERING}


@pytest.mark.exhaustive
@pytest.mark.parametrize("strength", [1.0, 0.7])
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_inpainting_with_any_network(pipeline, reference, width, height, strength):
    theirs = reference("StableDiffusionControlNetInpaintPipeline")
    assert_same(pipeline, theirs, inpainted(width, height, strength), ours={}, theirs={})


@pytest.mark.exhaustive
@pytest.mark.timeout(900)  # a checkpoint of its own is exported
@pytest.mark.parametrize("strength", [1.0, 0.7])
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_inpainting_with_a_network_that_sees_the_mask(inpainting, width, height, strength):
    assert_same(*inpainting, inpainted(width, height, strength), ours={}, theirs={})


@pytest.mark.exhaustive
@pytest.mark.timeout(900)  # a build of the embedded model
def test_the_embedded_model_with_its_controlnet(tmp_path):
    from sdrt.models.shapes.task_cases import task_cases

    options = ("--precision", "fp32", "--sizes", "128x128", "--batch", "1..2", "--controlnet", str(MODELS / "edges"))
    run_build("shapes", tmp_path / "edges.sdrt", *options)
    theirs = reference_of("StableDiffusionControlNetPipeline", MODELS / "checkpoint", [MODELS / "edges"])
    with sdrt.open(tmp_path / "edges.sdrt") as pipeline:
        for case in task_cases("edges", 2):
            shown = Image.fromarray(case.edges)
            arguments = {"prompt": case.caption, "num_inference_steps": 12, "guidance_scale": 4.0}
            assert_same(pipeline, theirs, arguments, ours={"control_image": shown}, theirs={"image": shown})
