"""The numbers of a CUDA generator: in numpy, and as the kernel that makes them on a GPU."""

import hashlib
from importlib.resources import files

import numpy as np
import pytest

from sdrt.errors import RequestError
from sdrt.philox import PhiloxDraw, PhiloxGenerator, philox
from tests.simulated_ptx import run_kernel

KERNELS = files("sdrt.runners") / "kernels"
# torch.manual_seed(0); torch.randn(3, 4, device="cuda"), as published with stable-diffusion-webui's rng_philox.py.
PUBLISHED = [
    [-0.92466259, -0.42534415, -2.6438457, 0.14518388],
    [-0.12086647, -0.57972564, -0.62285122, -0.32838709],
    [-1.07454231, -0.36314407, -1.67105067, 2.26550497],
]
# The GPU's sine and logarithm are approximate: 2^-21 and a few last places, times a radius of up to 6.
TOLERANCE = 2e-6
THREADS = 256


class TestNumbers:
    def test_are_the_published_ones_of_torch_on_cuda(self):
        np.testing.assert_allclose(PhiloxGenerator(0).randn((3, 4)), PUBLISHED, rtol=0, atol=TOLERANCE)

    @pytest.mark.parametrize(
        ("seed", "offset", "expected"),
        [  # the known answers of the authors' Random123, kat_vectors, philox4x32 10, for counters that a draw can have
            (0, 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ],
    )
    def test_come_from_the_published_words_of_philox(self, seed, offset, expected):
        assert tuple(int(words[0]) for words in philox(seed, offset, 1)) == expected

    def test_are_normal(self):
        numbers = PhiloxGenerator(5).randn((200_000,))
        assert abs(numbers.mean()) < 0.01
        assert abs(numbers.std() - 1) < 0.01
        assert np.abs(numbers).max() < 7

    def test_of_successive_calls_continue_the_stream(self):
        generator = PhiloxGenerator(3)
        first, second = generator.randn((64,)), generator.randn((64,))
        assert not np.array_equal(first, second)
        np.testing.assert_array_equal(second, PhiloxDraw(seed=3, offset=1, count=64).values())

    def test_that_are_none_take_no_place_in_the_stream(self):
        generator = PhiloxGenerator(3)
        assert generator.randn((0,)).shape == (0,)
        np.testing.assert_array_equal(generator.randn((8,)), PhiloxGenerator(3).randn((8,)))

    def test_have_a_shape_and_a_type(self):
        numbers = PhiloxGenerator(0).randn((1, 4, 8, 9))
        assert (numbers.shape, numbers.dtype) == ((1, 4, 8, 9), np.float32)

    @pytest.mark.parametrize("seed", [-1, 2**64])
    def test_of_a_seed_that_cannot_be_are_refused(self, seed):
        with pytest.raises(RequestError, match="seed is"):
            PhiloxGenerator(seed)

    def test_of_seeds_that_differ_in_the_high_half_differ(self):
        assert not np.array_equal(PhiloxGenerator(1).randn((8,)), PhiloxGenerator(1 + 2**32).randn((8,)))


class TestKernel:
    """The committed PTX, interpreted."""

    @pytest.mark.parametrize(
        "draw",
        [
            PhiloxDraw(seed=0, offset=0, count=12),
            PhiloxDraw(seed=2**64 - 1, offset=7, count=1000),
            PhiloxDraw(seed=2**40 + 3, offset=2**31, count=16_384),
        ],
    )
    def test_makes_the_numbers_of_the_draw(self, draw):
        blocks = -(-draw.count // THREADS)
        result = run_kernel(
            (KERNELS / "philox_normal.ptx").read_text(),
            "philox_normal",
            [
                np.full(draw.count, np.nan, np.float32),
                np.uint32(draw.count),
                np.uint32(draw.seed & 0xFFFFFFFF),
                np.uint32(draw.seed >> 32),
                np.uint32(draw.offset),
            ],
            blocks=blocks,
            threads=THREADS,
        )
        np.testing.assert_allclose(result, draw.values(), rtol=0, atol=TOLERANCE)

    def test_is_compiled_from_the_source_beside_it(self):
        digest = hashlib.sha256((KERNELS / "philox_normal.cu").read_bytes()).hexdigest()
        assert digest in (KERNELS / "philox_normal.ptx").read_text(), "run: make kernels"
