"""Composed prompts against diffusers' own parts, put together as Liu et al. 2022 (arXiv:2206.01714, eq. 11) say."""

import numpy as np
import pytest

import sdrt

PROMPT, COMPOSED = "a large red circle", [("a small blue star", 0.7), ("a white background", -0.2)]
SCALE, STEPS, SEED = 5.0, 6, 11
HEIGHT, WIDTH = 72, 104


@pytest.fixture(scope="module")
def reference(tiny_checkpoint):
    """The image that the checkpoint's network, scheduler and VAE make in PyTorch."""
    import torch
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(tiny_checkpoint, safety_checker=None)
    scheduler = pipeline.scheduler
    scheduler.set_timesteps(STEPS)

    def embedded(text):
        return pipeline.encode_prompt(text, "cpu", 1, False)[0]

    texts = [embedded(text) for text in ("", PROMPT, *(text for text, _ in COMPOSED))]
    weights = [1.0, *(weight for _, weight in COMPOSED)]
    generator = torch.Generator("cpu").manual_seed(SEED)
    latents = torch.randn((1, 4, HEIGHT // 8, WIDTH // 8), generator=generator) * scheduler.init_noise_sigma
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            scaled = scheduler.scale_model_input(latents, timestep)
            empty, *each = (pipeline.unet(scaled, timestep, encoder_hidden_states=text).sample for text in texts)
            away = sum(weight * (output - empty) for weight, output in zip(weights, each, strict=True))
            latents = scheduler.step(empty + SCALE * away, timestep, latents).prev_sample
        decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    return np.asarray(pipeline.image_processor.postprocess(decoded)[0], int)


def test_every_pixel_is_within_one_level(tiny_bundle, reference):
    with sdrt.open(tiny_bundle) as pipeline:
        image = pipeline.generate(
            PROMPT,
            composed_prompts=COMPOSED,
            guidance_scale=SCALE,
            num_inference_steps=STEPS,
            seed=SEED,
            height=HEIGHT,
            width=WIDTH,
        ).images[0]
    assert np.abs(np.asarray(image, int) - reference).max() <= 1
