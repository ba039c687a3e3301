"""Statistics of repeated timings: percentiles, confidence intervals of ratios, and distances between pictures."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sdrt.parity import largest_level, psnr_db

_RESAMPLES = 4_000
_INTERVAL = (2.5, 97.5)  # percentiles of the resampled values


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """A set of timings in seconds. `low` to `high` is the 95 % bootstrap interval of the median.

    A percentile past what `count` timings can resolve is close to their maximum: read it beside `count`.
    """

    count: int
    median: float
    low: float
    high: float
    p90: float
    p95: float
    p99: float
    minimum: float
    maximum: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """How many times as long the other takes: the ratio of the medians, with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float
    pairs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Parity:
    """How far pictures are from the reference's on the same seeds, at worst over `pictures` of them."""

    largest_difference: int  # of 255
    psnr_db: float
    pictures: int


def spread(seconds: Sequence[float], *, seed: int = 0) -> Spread:
    """Summarise timings. Raises ValueError when there are none."""
    if not len(seconds):
        raise ValueError("there are no timings to summarise")
    values = np.asarray(seconds, np.float64)
    median, p90, p95, p99 = np.percentile(values, [50, 90, 95, 99])
    low, high = np.percentile(np.median(values[_resampled(len(values), seed)], axis=1), _INTERVAL)
    return Spread(
        count=len(values),
        median=float(median),
        low=float(low),
        high=float(high),
        p90=float(p90),
        p95=float(p95),
        p99=float(p99),
        minimum=float(values.min()),
        maximum=float(values.max()),
    )


def ratio(other: Sequence[float], ours: Sequence[float], *, seed: int = 0) -> Ratio:
    """median(other) / median(ours), where other[i] and ours[i] were measured in the same round.

    The rounds are resampled as pairs, so a machine that was slow for a round was slow for both.
    Raises ValueError when they are not pairs.
    """
    if len(other) != len(ours) or not len(ours):
        raise ValueError(f"{len(other)} and {len(ours)} timings are not pairs")
    theirs, own = np.asarray(other, np.float64), np.asarray(ours, np.float64)
    picks = _resampled(len(own), seed)
    ratios = np.median(theirs[picks], axis=1) / np.median(own[picks], axis=1)
    low, high = np.percentile(ratios, _INTERVAL)
    return Ratio(value=float(np.median(theirs) / np.median(own)), low=float(low), high=float(high), pairs=len(own))


def parity(pictures: Sequence[npt.NDArray[np.uint8]], references: Sequence[npt.NDArray[np.uint8]]) -> Parity:
    """The worst of the pairs, each uint8 [H, W, 3]. Raises ValueError when they are not pairs of equal shapes."""
    pairs = list(zip(pictures, references, strict=True))
    if not pairs:
        raise ValueError("there are no pictures to compare")
    shapes = [(picture.shape, reference.shape) for picture, reference in pairs if picture.shape != reference.shape]
    if shapes:
        raise ValueError(f"a picture of shape {shapes[0][0]} cannot be compared with one of {shapes[0][1]}")
    return Parity(
        largest_difference=max(largest_level(a, b) for a, b in pairs),
        psnr_db=min(psnr_db(a, b) for a, b in pairs),
        pictures=len(pairs),
    )


def _resampled(count: int, seed: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, count, (_RESAMPLES, count))
