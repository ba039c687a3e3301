"""The trained variants of `shapes` draw their held-out cases as their diffusers pipelines do, in float32."""

import numpy as np
import pytest
from PIL import Image

import sdrt
from sdrt.models.shapes.task_cases import task_cases
from sdrt.models.shapes.variants import variant_checkpoint
from tests.conftest import run_build

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.timeout(900),  # every test builds its variant
    pytest.mark.filterwarnings("ignore"),
]

STEPS = 12
CASES = 3


def assert_same(tmp_path, variant, kind, cases, *, sizes, ours, theirs=lambda case: {}, **absent):
    """sdrt draws every case as diffusers' pipeline of that class does.

    ours: arguments of both for a case. theirs: those that the reference needs in another form, or besides.
    """
    import diffusers
    import torch

    run_build(f"shapes-{variant}", tmp_path / "variant.sdrt", "--precision", "fp32", "--sizes", sizes, "--batch", "1")
    reference = getattr(diffusers, kind).from_pretrained(
        variant_checkpoint(variant, tmp_path), torch_dtype=torch.float32, local_files_only=True, **absent
    )
    reference.set_progress_bar_config(disable=True)
    with sdrt.open(tmp_path / "variant.sdrt") as pipeline:
        for case in cases:
            arguments = {"prompt": case.caption, "num_inference_steps": STEPS, "guidance_scale": 4.0, **ours(case)}
            made = pipeline.generate(sdrt.Request(**arguments, seed=case.seed)).images[0]
            generator = torch.Generator("cpu").manual_seed(case.seed)
            drawn = reference(generator=generator, **{**arguments, **theirs(case)}).images[0]
            assert made.size == drawn.size
            assert np.abs(np.asarray(made).astype(int) - np.asarray(drawn).astype(int)).max() <= 1


def masked(case):
    """A case of inpainting, or one of outpainting as a canvas with a hole, which diffusers can be asked for."""
    whole = case.source if case.outpaint is None else np.where(case.mask[..., None], np.uint8(128), case.truth)
    mask = Image.fromarray(case.mask.astype(np.uint8) * 255)
    height, width = case.mask.shape
    return {"image": Image.fromarray(whole), "mask_image": mask, "height": height, "width": width}


def test_inpaint(tmp_path):
    cases = [*task_cases("inpaint", CASES), *task_cases("outpaint", CASES)]
    kind = "StableDiffusionInpaintPipeline"
    assert_same(tmp_path, "inpaint", kind, cases, sizes="128..160", ours=masked, safety_checker=None)


def test_depth(tmp_path):
    import torch

    assert_same(
        tmp_path,
        "depth",
        "StableDiffusionDepth2ImgPipeline",
        task_cases("depth", CASES),
        sizes="128x128",
        ours=lambda case: {"image": Image.fromarray(case.source), "depth_map": case.depth, "strength": 0.9},
        theirs=lambda case: {"depth_map": torch.from_numpy(case.depth)[None]},
        depth_estimator=None,
        feature_extractor=None,
    )


def test_upscale(tmp_path):
    assert_same(
        tmp_path,
        "upscale",
        "StableDiffusionUpscalePipeline",
        task_cases("upscale", CASES),
        sizes="128x128",
        ours=lambda case: {"image": Image.fromarray(case.small), "noise_level": 20},
    )
