"""Random numbers of a CUDA generator: the stream of `torch.randn(..., device="cuda")`, made with numpy alone."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sdrt.errors import RequestError

_SEED_LIMIT = 2**64
_ROUNDS = 10
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
# curand's constants, as float32: 2^-32 as it writes it, and that times 2 pi as it writes it.
_UNIT = np.float32(2.3283064e-10)
_ANGLE_UNIT = np.float32(2.3283064e-10 * 6.2831855)


@dataclass(frozen=True, slots=True, kw_only=True)
class PhiloxDraw:
    """One call of `torch.randn` on a CUDA generator, as data: `count` normal numbers after `offset` earlier calls.

    The numbers follow from this alone, so whoever needs them may make them, on the host or on a GPU.
    """

    seed: int
    offset: int
    count: int

    def values(self) -> npt.NDArray[np.float32]:
        """The numbers: float32 [count]."""
        words = philox(self.seed, self.offset, self.count)
        uniform, angle = _centred(words[0], _UNIT), _centred(words[1], _ANGLE_UNIT)
        # float32 roundings where CUDA has them; the functions in float64, so that every machine agrees.
        logarithm = np.log(uniform.astype(np.float64)).astype(np.float32)
        sine = np.sin(angle.astype(np.float64)).astype(np.float32)
        values: npt.NDArray[np.float32] = np.sqrt(np.float32(-2) * logarithm) * sine
        return values


class PhiloxGenerator:
    """The numbers that ``torch.Generator("cuda").manual_seed(seed)`` gives to ``torch.randn``. Not thread-safe.

    Philox 4x32-10 (Salmon et al. 2011) as curand seeds it: number i of a call is the first of Box & Muller's pair from
    subsequence i. On a GPU the logarithm and the sine are approximate, so numbers agree to about 1e-6. A GPU with few
    processors spreads calls of more than 2,048 numbers a processor over fewer subsequences: those are not reproduced.
    """

    def __init__(self, seed: int) -> None:
        """`seed` from 0 to 2**64 - 1; RequestError otherwise."""
        if not 0 <= seed < _SEED_LIMIT:
            raise RequestError(f"seed is {seed}", hint=f"give a whole number from 0 to {_SEED_LIMIT - 1}")
        self._seed = seed
        self._offset = 0

    def draw(self, count: int) -> PhiloxDraw:
        """The next `count` numbers, not made yet."""
        drawn = PhiloxDraw(seed=self._seed, offset=self._offset, count=count)
        if count:
            self._offset += 1
        return drawn

    def randn(self, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
        """The next standard normal numbers: float32 [*shape]. Successive calls continue the stream."""
        return self.draw(math.prod(shape)).values().reshape(shape)

    def row_noise(self, shape: tuple[int, ...]) -> PhiloxDraw:
        """The next numbers of a row's noise, in the order of float32 [*shape]."""
        return self.draw(math.prod(shape))


def philox(seed: int, offset: int, count: int) -> tuple[npt.NDArray[np.uint64], ...]:
    """Four 32-bit words for each of `count` subsequences, at position `offset`: 4 arrays uint64 [count]."""
    counter = [np.full(count, offset & 0xFFFFFFFF, np.uint64), np.full(count, offset >> 32, np.uint64)]
    counter += [np.arange(count, dtype=np.uint64), np.zeros(count, np.uint64)]
    key = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(_ROUNDS):
        first, second = counter[0] * _MULTIPLIERS[0], counter[2] * _MULTIPLIERS[1]
        counter = [
            (second >> _HALF) ^ counter[1] ^ np.uint64(key[0]),
            second & _LOW,
            (first >> _HALF) ^ counter[3] ^ np.uint64(key[1]),
            first & _LOW,
        ]
        key = [(part + increment) & 0xFFFFFFFF for part, increment in zip(key, _KEY_INCREMENTS, strict=True)]
    return tuple(counter)


def _centred(words: npt.NDArray[np.uint64], unit: np.float32) -> npt.NDArray[np.float32]:
    """(word + 1/2) · unit, rounded as a GPU does: the word to float32 first, product and sum together last."""
    exact = words.astype(np.float32).astype(np.float64) * np.float64(unit) + np.float64(unit) / 2
    return exact.astype(np.float32)
