"""The same seed gives the same image as diffusers: every scheduler, alone and inside a mixed batch, on `shapes`."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import sdrt
from sdrt.models.shapes.scenes import held_out_captions
from sdrt.parity import psnr_db
from sdrt.runners.cpu import native_precision

CHECKPOINT = Path(__file__).parents[2] / "models" / "shapes" / "checkpoint"
STEPS = 12
CASES = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "pndm": ("PNDMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_karras": ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp_2m_karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
}
GUIDANCE = (4.0, 1.0, 7.5, 2.0, 5.0, 4.0)


def request(index, name):
    return sdrt.Request(
        prompt=held_out_captions(len(CASES))[index],
        negative_prompt="a small gray ring" if index % 2 else "",
        scheduler=name,
        num_inference_steps=STEPS + index,
        guidance_scale=GUIDANCE[index],
        seed=100 + index,
    )


REQUESTS = [request(index, name) for index, name in enumerate(CASES)]


@pytest.fixture(scope="module")
def references():
    """What diffusers draws in float32 for each request."""
    import diffusers
    import torch

    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
        CHECKPOINT, torch_dtype=torch.float32, safety_checker=None, local_files_only=True
    )
    pipeline.set_progress_bar_config(disable=True)
    own = pipeline.scheduler.config
    pictures = {}
    for asked in REQUESTS:
        class_name, overrides = CASES[asked.scheduler]
        pipeline.scheduler = getattr(diffusers, class_name).from_config(own, **overrides)
        image = pipeline(
            asked.prompt,
            negative_prompt=asked.negative_prompt,
            num_inference_steps=asked.num_inference_steps,
            guidance_scale=asked.guidance_scale,
            generator=torch.Generator("cpu").manual_seed(asked.seed),
        ).images[0]
        pictures[asked.scheduler] = np.asarray(image)
    return pictures


def largest_difference(image, reference):
    return int(np.abs(np.asarray(image).astype(int) - reference.astype(int)).max())


@pytest.fixture(scope="module")
def pipeline(shapes_bundle):
    with sdrt.open(shapes_bundle) as opened:
        yield opened


@pytest.mark.parametrize("asked", REQUESTS, ids=lambda asked: asked.scheduler)
def test_every_pixel_is_within_one_level_of_diffusers(asked, pipeline, references):
    image = pipeline.generate(asked).images[0]
    assert largest_difference(image, references[asked.scheduler]) <= 1


def test_inside_a_mixed_batch_too_and_there_bit_equal_to_alone(pipeline, references):
    with sdrt.Batcher(pipeline, max_batch=4) as batcher:
        tickets = [batcher.submit(asked) for asked in REQUESTS]
        mixed = [ticket.result(120).images[0] for ticket in tickets]
        assert batcher.stats().occupancy > 2
    for asked, image in zip(REQUESTS, mixed, strict=True):
        assert largest_difference(image, references[asked.scheduler]) <= 1
        assert image.tobytes() == pipeline.generate(asked).images[0].tobytes()


def build_shapes(target, *flags):
    command = [str(Path(sys.executable).with_name("sdrt")), "build", "shapes", *flags, "--out", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_bf16_stays_above_35_db(tmp_path, references, capsys):
    """For these requests. Where a picture hangs in the balance, rounding can tip it, and it shows something else."""
    if native_precision() != "bf16":
        pytest.skip("this CPU has no bfloat16 instructions, so no bf16 bundle can be built on it")
    target = tmp_path / "bf16.sdrt"
    build_shapes(target, "--precision", "bf16")
    with sdrt.open(target) as pipeline:
        images = [np.asarray(pipeline.generate(asked).images[0]) for asked in REQUESTS]
    qualities = [psnr_db(image, references[asked.scheduler]) for image, asked in zip(images, REQUESTS, strict=True)]
    with capsys.disabled():
        print("\nbf16 against PyTorch float32, dB:", ", ".join(f"{quality:.1f}" for quality in qualities))
    assert min(qualities) >= 35


def test_the_onnxruntime_backend_draws_the_same(tmp_path, references):
    target = tmp_path / "ort.sdrt"
    build_shapes(target, "--backend", "onnxruntime", "--precision", "fp32")
    with sdrt.open(target) as pipeline:
        for asked in REQUESTS:
            assert largest_difference(pipeline.generate(asked).images[0], references[asked.scheduler]) <= 1
