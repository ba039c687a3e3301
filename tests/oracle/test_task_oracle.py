"""Each task's whole image is the one of the diffusers pipeline of that task, in float32, with the same seed."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

import sdrt
from sdrt.models.shapes.scenes import held_out_captions
from sdrt.plan.catalog import NAMES

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

CHECKPOINT = Path(__file__).parents[2] / "models" / "shapes" / "checkpoint"
SCHEDULERS = ("ddim", "pndm", "lms", "euler_a", "heun", "dpm2", "dpmpp_2m", "dpmpp_2s", "unipc", "sa_solver", "lcm")


@pytest.fixture(scope="module")
def pipeline(shapes_bundle):
    with sdrt.open(shapes_bundle) as opened:
        yield opened


@pytest.fixture(scope="module")
def source(pipeline):
    """A picture to begin with."""
    return pipeline.generate(held_out_captions(1)[0], num_inference_steps=12, seed=1).images[0]


def reference_of(pipeline_class):
    """A reference pipeline as a function of a scheduler's name, the seeds and the arguments of a call."""
    import diffusers
    import torch

    reference = getattr(diffusers, pipeline_class).from_pretrained(
        CHECKPOINT, torch_dtype=torch.float32, safety_checker=None, local_files_only=True
    )
    reference.set_progress_bar_config(disable=True)
    own = reference.scheduler.config

    def draw(name, seeds, **arguments):
        named = NAMES[name]
        reference.scheduler = getattr(diffusers, named.family.class_name).from_config(own, **named.fields)
        images = []
        for seed in seeds:
            generator = torch.Generator("cpu").manual_seed(seed)
            images += reference(generator=generator, **arguments).images
        return images

    return draw


@pytest.fixture(scope="module")
def img2img():
    return reference_of("StableDiffusionImg2ImgPipeline")


@pytest.fixture(scope="module")
def inpaint():
    return reference_of("StableDiffusionInpaintPipeline")


def assert_same(images, references):
    for image, reference in zip(images, references, strict=True):
        assert np.abs(np.asarray(image).astype(int) - np.asarray(reference).astype(int)).max() <= 1


@pytest.mark.parametrize("index", range(len(SCHEDULERS)), ids=SCHEDULERS)
def test_image_to_image(pipeline, source, img2img, index):
    arguments = {
        "prompt": held_out_captions(len(SCHEDULERS))[index],
        "negative_prompt": "a small gray ring" if index % 2 else "",
        "image": source,
        "strength": (0.6, 0.35, 0.8, 1.0)[index % 4],
        "num_inference_steps": 5 + index % 4,
        "guidance_scale": (4.0, 1.0, 7.5)[index % 3],
    }
    seeds = (50 + index, 7) if index % 3 == 0 else (50 + index,)
    made = pipeline.generate(sdrt.Request(**arguments, scheduler=SCHEDULERS[index], seed=seeds)).images
    assert_same(made, img2img(SCHEDULERS[index], seeds, **arguments))


@pytest.mark.parametrize("index", range(len(SCHEDULERS)), ids=SCHEDULERS)
def test_inpainting_with_a_network_that_does_not_see_the_mask(pipeline, source, inpaint, index):
    hole = Image.new("L", source.size)
    ImageDraw.Draw(hole).rectangle((20, 30, 90, 100), fill=255)
    arguments = {
        "prompt": held_out_captions(len(SCHEDULERS))[index],
        "image": source,
        "mask_image": hole,
        "strength": (1.0, 0.6)[index % 2],
        "num_inference_steps": 5 + index % 3,
        "guidance_scale": (4.0, 1.0)[index % 2],
    }
    seeds = (50 + index, 7) if index % 4 == 0 else (50 + index,)
    made = pipeline.generate(sdrt.Request(**arguments, scheduler=SCHEDULERS[index], seed=seeds)).images
    assert_same(made, inpaint(SCHEDULERS[index], seeds, **arguments, height=source.height, width=source.width))


def test_it_shares_a_batch_with_text_to_image_and_inpainting(pipeline, source):
    requests = [
        sdrt.Request(prompt="a large red star", num_inference_steps=5, seed=1, scheduler="euler"),
        sdrt.Request(prompt="a large red star", num_inference_steps=9, seed=2, image=source, strength=0.5),
        sdrt.Request(prompt="a blue ring", num_inference_steps=6, seed=3, image=source, scheduler="euler_a"),
        sdrt.Request(
            prompt="a blue ring",
            num_inference_steps=7,
            seed=4,
            image=source,
            mask_image=Image.linear_gradient("L").resize(source.size),
            mask_mode="soft",
        ),
    ]
    with sdrt.Batcher(pipeline) as batcher:
        tickets = [batcher.submit(request) for request in requests]
        together = [ticket.result(60).images[0] for ticket in tickets]
    for request, image in zip(requests, together, strict=True):
        assert image.tobytes() == pipeline.generate(request).images[0].tobytes()
