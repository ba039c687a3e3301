"""Random numbers: the streams of PyTorch's generators by name, and the CPU's, made with numpy alone."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from sdrt.errors import RequestError
from sdrt.philox import PhiloxDraw, PhiloxGenerator

_BLOCK = 16  # the reference fills in blocks of 16: 8 radii, then 8 angles
_SEED_LIMIT = 2**64
_PARALLEL = 1e-6  # the sine of an angle between noises that are the same


GeneratorName = Literal["cpu", "cuda"]


class Generator(Protocol):
    """A stream of standard normal numbers. Not thread-safe."""

    def randn(self, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
        """The next numbers: float32 [*shape]."""
        ...

    def row_noise(self, shape: tuple[int, ...]) -> "npt.NDArray[np.float32] | PhiloxDraw":
        """The next numbers of a row's noise: float32 [*shape], or where a device can make them too, their recipe."""
        ...


class TorchGenerator:
    """The numbers that ``torch.Generator("cpu").manual_seed(seed)`` gives to ``torch.randn``.

    The stream is MT19937 (Matsumoto & Nishimura 1998) seeded with the low 32 bits of `seed`, turned into normal
    numbers by Box & Muller (1958). The 32-bit stream is the reference's, bit for bit; the normal numbers agree to
    the last place or two of float32, because vendors' logarithms and cosines differ there. Not thread-safe.
    """

    def __init__(self, seed: int) -> None:
        """`seed` from 0 to 2**64 - 1; RequestError otherwise."""
        if not 0 <= seed < _SEED_LIMIT:
            raise RequestError(f"seed is {seed}", hint=f"give a whole number from 0 to {_SEED_LIMIT - 1}")
        self._words = np.random.RandomState(seed % 2**32)  # the one seeding of MT19937 that numpy keeps as it was
        self._spare: float | None = None  # the second number of the last scalar pair

    def randn(self, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
        """The next standard normal numbers: float32 [*shape]. Successive calls continue the stream."""
        count = math.prod(shape)
        values = self._one_by_one(count) if count < _BLOCK else self._in_blocks(count)
        return values.reshape(shape)

    def row_noise(self, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
        """See `Generator.row_noise`: numbers, since Mersenne Twister goes one after the other."""
        return self.randn(shape)

    def _in_blocks(self, count: int) -> npt.NDArray[np.float32]:
        uniforms = self._uniforms(count)
        whole = count - count % _BLOCK
        if whole == count:
            return _box_muller(uniforms)
        values = np.empty(count, np.float32)
        values[:whole] = _box_muller(uniforms[:whole])
        # A last block that is not full is drawn again, over the last 16 values of the whole.
        values[-_BLOCK:] = _box_muller(self._uniforms(_BLOCK))
        return values

    def _one_by_one(self, count: int) -> npt.NDArray[np.float32]:
        values = np.empty(count, np.float32)
        for index in range(count):
            values[index] = self._next_normal()
        return values

    def _next_normal(self) -> float:
        if self._spare is not None:
            value, self._spare = self._spare, None
            return value
        angle = 2.0 * math.pi * self._uniform_double()
        radius = math.sqrt(-2.0 * math.log1p(-self._uniform_double()))
        self._spare = radius * math.sin(angle)
        return radius * math.cos(angle)

    def _next_words(self, count: int) -> npt.NDArray[np.uint32]:
        """The generator's next outputs as they are: uint32 [count]."""
        return self._words.randint(2**32, size=count, dtype=np.uint32)

    def _uniforms(self, count: int) -> npt.NDArray[np.float32]:
        """float32 [count] in [0, 1): the low 24 bits of one output each."""
        return (self._next_words(count) & np.uint32(0xFFFFFF)).astype(np.float32) * np.float32(2**-24)

    def _uniform_double(self) -> float:
        """A number in [0, 1): the low 53 bits of two outputs, the first of them the high half."""
        high, low = (int(word) for word in self._next_words(2))
        return float((high << 32 | low) & (2**53 - 1)) * 2.0**-53


@dataclass(frozen=True, slots=True, kw_only=True)
class Variation:
    """Towards which other seed's noise a request's own goes, and how far: share 0 is the own one, 1 the other."""

    seed: int
    share: float
    generator: GeneratorName

    def apply(self, noise: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """`noise` and the other one interpolated on the sphere (Shoemake 1985), so that the variance stays: float32."""
        other = GENERATORS[self.generator](self.seed).randn(noise.shape)
        own, aim = noise.astype(np.float64), other.astype(np.float64)
        cosine = np.clip(np.vdot(own, aim) / (np.linalg.norm(own) * np.linalg.norm(aim)), -1, 1)
        angle = math.acos(cosine)
        if math.sin(angle) < _PARALLEL:
            return noise
        weights = np.sin((1 - self.share) * angle), np.sin(self.share * angle)
        varied: npt.NDArray[np.float32] = ((weights[0] * own + weights[1] * aim) / math.sin(angle)).astype(np.float32)
        return varied


# The device of a torch.Generator → its stream.
GENERATORS: Mapping[GeneratorName, Callable[[int], Generator]] = {"cpu": TorchGenerator, "cuda": PhiloxGenerator}


def _box_muller(uniforms: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Normal numbers from whole blocks: float32 [16 k] -> float32 [16 k]."""
    pairs = uniforms.reshape(-1, 2, _BLOCK // 2)
    # float32 roundings where the reference has them; the functions in float64, so that every machine agrees.
    logarithm = np.log((np.float32(1) - pairs[:, 0]).astype(np.float64)).astype(np.float32)
    radius = np.sqrt(np.float32(-2) * logarithm)
    angle = (np.float32(2 * math.pi) * pairs[:, 1]).astype(np.float64)
    values = np.empty_like(pairs)
    np.multiply(radius, np.cos(angle).astype(np.float32), out=values[:, 0])
    np.multiply(radius, np.sin(angle).astype(np.float32), out=values[:, 1])
    return values.reshape(-1)
