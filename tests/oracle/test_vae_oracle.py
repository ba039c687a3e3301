"""The VAE path against diffusers: decoding, sampling while encoding, pixels, and tiles against the whole."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from sdrt.image import from_pixels, to_pixels
from sdrt.models.shapes.scenes import scenes
from sdrt.noise import TorchGenerator
from sdrt.progress import complete
from sdrt.vae import DEFAULT_TILE, decode_latents, encode_posterior

CHECKPOINT = Path(__file__).parents[2] / "models" / "shapes" / "checkpoint"
SCALING = 0.18215
NEVER_TILED = 10_000


class TorchVae:
    """PyTorch behind the runner's interface."""

    def __init__(self, vae: AutoencoderKL) -> None:
        self.vae = vae.eval()

    @torch.no_grad()
    def run(self, component: str, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        if component == "vae_decoder":
            return {"sample": self.vae.decode(torch.from_numpy(feeds["latent_sample"])).sample.numpy()}
        distribution = self.vae.encode(torch.from_numpy(feeds["sample"])).latent_dist
        return {"latent_parameters": distribution.parameters.numpy()}


@pytest.fixture(scope="module")
def runner() -> TorchVae:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    return TorchVae(AutoencoderKL(**blocks, block_out_channels=(8, 8, 16, 16), norm_num_groups=4))


@pytest.fixture(scope="module")
def shapes_runner() -> TorchVae:
    return TorchVae(AutoencoderKL.from_pretrained(CHECKPOINT, subfolder="vae"))


def decode(runner: TorchVae, latents: np.ndarray, tile: int = NEVER_TILED) -> np.ndarray:
    return complete(decode_latents(runner, latents, scaling_factor=SCALING, vae_downsample=8, tile=(tile, tile)))


def encode(runner: TorchVae, image: np.ndarray, noise: np.ndarray | None, tile: int = NEVER_TILED) -> np.ndarray:
    posterior = complete(encode_posterior(runner, image, scaling_factor=SCALING, vae_downsample=8, tile=(tile, tile)))
    return posterior.mode() if noise is None else posterior.sample(noise)


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    """In decibels, of samples in [-1, 1] after clipping."""
    difference = (np.clip(one, -1, 1) - np.clip(other, -1, 1)).astype(np.float64)
    return float(10 * np.log10(4 / np.mean(difference**2)))


def test_decoding_is_that_of_the_pipeline(runner):
    latents = TorchGenerator(1).randn((2, 4, 6, 9))
    with torch.no_grad():
        expected = runner.vae.decode(torch.from_numpy(latents) / SCALING).sample.numpy()
    np.testing.assert_allclose(decode(runner, latents), expected, atol=1e-5 * np.abs(expected).max(), rtol=0)


def test_encoding_with_a_seed_is_that_of_the_pipeline(runner):
    image = np.clip(TorchGenerator(2).randn((1, 3, 48, 72)), -1, 1)
    with torch.no_grad():
        distribution = runner.vae.encode(torch.from_numpy(image)).latent_dist
        expected = distribution.sample(torch.Generator("cpu").manual_seed(7)).numpy() * SCALING
    sampled = encode(runner, image, TorchGenerator(7).randn((1, 4, 6, 9)))
    np.testing.assert_allclose(sampled, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)


def test_encoding_without_noise_is_the_mode(runner):
    image = np.clip(TorchGenerator(3).randn((1, 3, 32, 32)), -1, 1)
    with torch.no_grad():
        expected = runner.vae.encode(torch.from_numpy(image)).latent_dist.mode().numpy() * SCALING
    np.testing.assert_allclose(encode(runner, image, None), expected, atol=1e-5 * np.abs(expected).max(), rtol=0)


def test_pixels_are_those_of_the_image_processor():
    sample = TorchGenerator(4).randn((2, 3, 64, 48)) * np.float32(0.8)
    images = VaeImageProcessor(vae_scale_factor=8).postprocess(torch.from_numpy(sample), output_type="pil")
    np.testing.assert_array_equal(to_pixels(sample), np.stack([np.asarray(image) for image in images]))


def test_samples_are_those_of_the_image_processor():
    pixels = np.random.default_rng(5).integers(0, 256, (1, 64, 48, 3), np.uint8)
    expected = VaeImageProcessor(vae_scale_factor=8).preprocess(Image.fromarray(pixels[0])).numpy()
    np.testing.assert_array_equal(from_pixels(pixels), expected)


@pytest.mark.parametrize("side", [DEFAULT_TILE + 1, pytest.param(96, marks=pytest.mark.exhaustive)])
def test_tiles_of_the_trained_model_are_as_good_as_the_whole(shapes_runner, side):
    scene = next(scenes(3, held_out=True))[1]
    image = from_pixels(np.asarray(Image.fromarray(scene).resize((side * 8, side * 8), Image.Resampling.LANCZOS))[None])
    latents = encode(shapes_runner, image, None)
    assert psnr(decode(shapes_runner, latents, tile=DEFAULT_TILE), decode(shapes_runner, latents)) >= 40


def test_encoding_in_tiles_keeps_the_picture(shapes_runner):
    side = DEFAULT_TILE + 1
    scene = next(scenes(4, held_out=True))[1]
    image = from_pixels(np.asarray(Image.fromarray(scene).resize((side * 8, side * 8), Image.Resampling.LANCZOS))[None])
    whole, tiled = encode(shapes_runner, image, None), encode(shapes_runner, image, None, tile=DEFAULT_TILE)
    assert psnr(decode(shapes_runner, tiled), decode(shapes_runner, whole)) >= 40
