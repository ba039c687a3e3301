"""Tiles: where they lie, how they blend, what goes through the engines, and results that are not finite."""

from collections.abc import Mapping
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdrt.errors import BundleError, ParityError, RequestError
from sdrt.progress import advance, complete
from sdrt.runners.base import VAE_DECODER, VAE_DECODER_FLOAT32
from sdrt.vae import Spare, blend_weights, decode_latents, encode_posterior, largest_tile, tile_spans

FACTOR = 8
SCALING = 0.5


class PointwiseVae:
    """A VAE without context: each latent pixel is a block of 8x8 pixels, so tiling must change nothing."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def run(self, component: str, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        (fed,) = feeds.values()
        assert fed.dtype == np.float32
        assert fed.flags.c_contiguous
        self.shapes.append(fed.shape)
        if component == "vae_decoder":
            assert set(feeds) == {"latent_sample"}
            return {"sample": self.decode(fed)}
        assert component == "vae_encoder"
        assert set(feeds) == {"sample"}
        return {"latent_parameters": self.encode(fed)}

    def decode(self, latents: np.ndarray) -> np.ndarray:
        return np.repeat(np.repeat(latents[:, :3] - latents[:, 3:4], FACTOR, axis=2), FACTOR, axis=3)

    def encode(self, image: np.ndarray) -> np.ndarray:
        corner = image[:, :, ::FACTOR, ::FACTOR]
        mean = np.concatenate([corner, corner[:, :1]], axis=1)
        return np.concatenate([mean, 0.1 * mean], axis=1)


class BiasedVae(PointwiseVae):
    """Each tile comes out at another brightness, as statistics over a tile make it."""

    def decode(self, latents: np.ndarray) -> np.ndarray:
        return np.full_like(super().decode(latents), len(self.shapes))


class SpoiltVae(PointwiseVae):
    """The last value of the given run is not finite."""

    def __init__(self, value: float, run: int) -> None:
        super().__init__()
        self.value = value
        self.spoilt_run = run

    def decode(self, latents: np.ndarray) -> np.ndarray:
        return self.spoil(super().decode(latents))

    def encode(self, image: np.ndarray) -> np.ndarray:
        return self.spoil(super().encode(image))

    def spoil(self, result: np.ndarray) -> np.ndarray:
        if len(self.shapes) == self.spoilt_run:
            result[..., -1, -1] = self.value
        return result


class TwoDecoders(PointwiseVae):
    """Two decoders of one VAE, of which those named give NaN."""

    def __init__(self, spoilt: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.spoilt = spoilt
        self.asked: list[str] = []

    def run(self, component: str, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.asked.append(component)
        sample = super().run(VAE_DECODER, feeds)["sample"]
        return {"sample": np.full_like(sample, np.nan) if component in self.spoilt else sample}


def latents_of(height: int, width: int, batch: int = 1) -> np.ndarray:
    return np.random.default_rng(height * 1000 + width).standard_normal((batch, 4, height, width), np.float32)


def decode(runner, latents, **options):
    return complete(decode_latents(runner, latents, scaling_factor=SCALING, vae_downsample=FACTOR, **options))


def encode(runner, image, noise=None, **options):
    posterior = complete(encode_posterior(runner, image, scaling_factor=SCALING, vae_downsample=FACTOR, **options))
    return posterior.mode() if noise is None else posterior.sample(noise)


SIZES = [(1, 1), (3, 8), (8, 8), (8, 9), (9, 9), (10, 24), (15, 40), (16, 17), (33, 2)]


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_tiles_of_a_decoder_without_context_are_the_whole(height, width):
    latents = latents_of(height, width)
    whole = PointwiseVae().decode(latents / np.float32(SCALING))
    tiled = decode(PointwiseVae(), latents, tile=(8, 8))
    assert tiled.dtype == np.float32
    assert tiled.shape == (1, 3, height * FACTOR, width * FACTOR)
    np.testing.assert_allclose(tiled, whole, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_tiles_of_an_encoder_without_context_are_the_whole(height, width):
    image = np.clip(np.random.default_rng(7).standard_normal((1, 3, height * 8, width * 8), np.float32), -1, 1)
    whole = PointwiseVae().encode(image)[:, :4] * np.float32(SCALING)
    np.testing.assert_allclose(encode(PointwiseVae(), image, tile=(8, 8)), whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("side", [64, 65, 72, 128])
def test_nothing_larger_than_a_tile_goes_through_the_engine(side):
    runner = PointwiseVae()
    decode(runner, latents_of(side, 64))
    assert set(runner.shapes) == {(1, 4, 64, 64)}
    assert len(runner.shapes) == len(tile_spans(side, 64))


def test_an_image_that_fits_a_tile_is_decoded_as_it_is():
    runner = PointwiseVae()
    latents = latents_of(12, 20)
    result = decode(runner, latents, tile=(64, 64))
    assert runner.shapes == [(1, 4, 12, 20)]
    np.testing.assert_array_equal(result, runner.decode(latents / np.float32(SCALING)))


def test_an_image_does_not_depend_on_its_batch():
    latents = latents_of(9, 12, batch=3)
    together = decode(BiasedVae(), latents, tile=(64, 64))
    assert [float(image.max()) for image in together] == [1, 2, 3]
    np.testing.assert_array_equal(
        decode(PointwiseVae(), latents, tile=(8, 8))[1:2], decode(PointwiseVae(), latents[1:2], tile=(8, 8))
    )


@pytest.mark.parametrize("side", [9, 16, 30])
def test_tiles_fade_into_each_other_without_a_seam(side):
    picture = decode(BiasedVae(), latents_of(side, side), tile=(8, 8))[0, 0]
    tiles = len(tile_spans(side, 8)) ** 2
    # Two latent pixels of overlap, or more: a ramp of 16 pixels at least, between tiles of 1 … `tiles`.
    steepest = max(np.abs(np.diff(picture, axis=0)).max(), np.abs(np.diff(picture, axis=1)).max())
    assert steepest <= (tiles - 1) / (2 * FACTOR)
    assert picture.min() >= 1 - 1e-5
    assert picture.max() <= tiles + 1e-5


@given(length=st.integers(1, 400), tile=st.integers(2, 96))
@settings(deadline=None)
def test_tiles_cover_an_axis_with_one_size_and_overlap(length, tile):
    spans = tile_spans(length, tile)
    assert {span.size for span in spans} == {min(length, tile)}
    assert spans[0].start == 0
    assert spans[-1].start + spans[-1].size == length
    for one, following in pairwise(spans):
        assert following.start > one.start
        assert one.start + one.size - following.start >= max(1, tile // 4)


@given(length=st.integers(1, 200), tile=st.integers(2, 96), scale=st.sampled_from([1, 8]))
@settings(deadline=None)
def test_weights_are_positive_and_sum_to_one_everywhere(length, tile, scale):
    spans = tile_spans(length, tile)
    total = np.zeros(length * scale)
    for span, weight in zip(spans, blend_weights(spans, scale), strict=True):
        assert weight.min() > 0
        total[span.scaled(scale)] += weight
    np.testing.assert_allclose(total, 1, atol=1e-6)


def test_the_models_own_size_fits_its_tile_and_the_engines_take_it():
    assert largest_tile((512, 512), (768, 768), 8) == (64, 64)
    assert largest_tile((768, 512), (1024, 1024), 8) == (96, 96)
    assert largest_tile((128, 128), (1024, 1024), 8) == (64, 64)
    assert largest_tile((512, 512), (384, 768), 8) == (48, 64)


def test_tiles_need_not_be_square():
    latents = latents_of(20, 20)
    runner = PointwiseVae()
    whole = decode(PointwiseVae(), latents)
    np.testing.assert_allclose(decode(runner, latents, tile=(8, 16)), whole, rtol=0, atol=1e-6)
    assert {shape[2:] for shape in runner.shapes} == {(8, 16)}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("run", [1, 4])
def test_a_decoder_that_overflows_in_any_tile_is_an_error(value, run):
    with pytest.raises(ParityError, match="vae_decoder") as caught:
        decode(SpoiltVae(value, run), latents_of(9, 9), tile=(8, 8))
    assert "fp32" in caught.value.hint


class TestSpareDecoder:
    """What decodes again in higher precision, when the decoder's own result is not finite."""

    def decoded(self, runner):
        used = []
        spare = Spare(component=VAE_DECODER_FLOAT32, used=lambda: used.append(1))
        return decode(runner, latents_of(9, 9), tile=(8, 8), spare=spare), len(used)

    def test_is_left_alone_by_a_finite_result(self):
        sample, used = self.decoded(runner := TwoDecoders())
        assert used == 0
        assert VAE_DECODER_FLOAT32 not in runner.asked
        assert np.isfinite(sample).all()

    def test_takes_over_when_the_decoder_overflows(self):
        runner = TwoDecoders(spoilt=(VAE_DECODER,))
        sample, used = self.decoded(runner)
        assert used == runner.asked.count(VAE_DECODER_FLOAT32) == 4  # each of the four tiles
        np.testing.assert_array_equal(sample, self.decoded(TwoDecoders())[0])

    def test_that_overflows_too_is_an_error(self):
        with pytest.raises(ParityError, match="the result of vae_decoder_float32"):
            self.decoded(TwoDecoders(spoilt=(VAE_DECODER, VAE_DECODER_FLOAT32)))


def test_an_encoder_that_overflows_is_an_error_before_its_variance_is_clipped():
    image = np.zeros((1, 3, 64, 64), np.float32)
    with pytest.raises(ParityError, match="vae_encoder") as caught:
        encode(SpoiltVae(float("inf"), 1), image, noise=np.zeros((1, 4, 8, 8), np.float32))
    assert "fp32" in caught.value.hint


def test_latents_that_are_not_finite_never_reach_the_decoder():
    runner = PointwiseVae()
    latents = latents_of(4, 4)
    latents[0, 2, 1, 1] = np.nan
    with pytest.raises(ParityError, match="the latents: 1 of 64 values"):
        decode(runner, latents)
    assert runner.shapes == []


def test_a_sample_is_the_mean_and_noise_times_the_deviation():
    image = np.linspace(-1, 1, 3 * 16 * 24, dtype=np.float32).reshape(1, 3, 16, 24)
    noise = latents_of(2, 3)
    mean, log_variance = np.split(PointwiseVae().encode(image), 2, axis=1)
    expected = (mean + np.exp(0.5 * log_variance) * noise) * SCALING
    np.testing.assert_allclose(encode(PointwiseVae(), image, noise), expected, rtol=1e-6)


def test_a_huge_log_variance_is_limited():
    class Wide(PointwiseVae):
        def encode(self, image: np.ndarray) -> np.ndarray:
            return np.full((1, 8, 1, 1), 500, np.float32)

    result = encode(Wide(), np.zeros((1, 3, 8, 8), np.float32), noise=np.ones((1, 4, 1, 1), np.float32))
    np.testing.assert_allclose(result, (500 + np.exp(10)) * SCALING, rtol=1e-6)


@pytest.mark.parametrize("size", [(513, 512), (512, 520 - 1), (7, 8)])
def test_an_image_off_the_latent_grid_is_refused(size):
    with pytest.raises(RequestError, match=f"{size[1]}x{size[0]} pixels") as caught:
        encode(PointwiseVae(), np.zeros((1, 3, *size), np.float32))
    assert "multiples of 8" in caught.value.hint


@pytest.mark.parametrize("shape", [(4, 8, 8), (0, 4, 8, 8), (1, 4, 0, 8)])
def test_an_array_that_is_no_batch_is_refused(shape):
    with pytest.raises(RequestError, match="shape"):
        decode(PointwiseVae(), np.zeros(shape, np.float32))


def test_noise_of_another_shape_is_refused():
    with pytest.raises(RequestError, match="noise"):
        encode(PointwiseVae(), np.zeros((1, 3, 16, 16), np.float32), noise=np.zeros((1, 4, 1, 1), np.float32))


def test_a_tile_without_room_to_overlap_is_refused():
    with pytest.raises(RequestError, match="tiles of 1"):
        decode(PointwiseVae(), latents_of(4, 4), tile=(1, 1))


def test_an_engine_of_another_factor_is_a_bundle_error():
    with pytest.raises(BundleError, match="vae_decoder made an array of shape"):
        complete(decode_latents(PointwiseVae(), latents_of(4, 4), scaling_factor=1.0, vae_downsample=4))


def test_it_rests_between_two_tiles_and_the_image_is_the_same():
    runner, latents = BiasedVae(), latents_of(9, 16)
    work = decode_latents(runner, latents, scaling_factor=SCALING, vae_downsample=FACTOR, tile=(8, 8))
    for tiles in range(1, 6):
        assert advance(work) is None
        assert len(runner.shapes) == tiles
    np.testing.assert_array_equal(advance(work), decode(BiasedVae(), latents, tile=(8, 8)))
    assert len(runner.shapes) == 6


def test_an_image_that_fits_a_tile_is_one_part():
    work = decode_latents(PointwiseVae(), latents_of(8, 8), scaling_factor=SCALING, vae_downsample=FACTOR, tile=(8, 8))
    assert advance(work) is not None
