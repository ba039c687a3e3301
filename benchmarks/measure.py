"""Statistics of repeated timings: percentiles, and confidence intervals of ratios between contestants."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_RESAMPLES = 4_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """A set of timings in seconds."""

    count: int
    median: float
    p90: float
    p99: float
    minimum: float
    maximum: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """How many times as long the other takes: median of the ratios pair by pair, with a 95 % interval."""

    median: float
    low: float
    high: float
    pairs: int


def spread(seconds: Sequence[float]) -> Spread:
    """Summarise timings. Raises ValueError when there are none."""
    if len(seconds) == 0:
        raise ValueError("there are no timings to summarise")
    values = np.asarray(seconds, np.float64)
    median, p90, p99 = np.percentile(values, [50, 90, 99])
    return Spread(
        count=len(values),
        median=float(median),
        p90=float(p90),
        p99=float(p99),
        minimum=float(values.min()),
        maximum=float(values.max()),
    )


def ratio(other: Sequence[float], ours: Sequence[float], *, seed: int = 0) -> Ratio:
    """other / ours, pair by pair: both were measured in the same round, so drift of the machine cancels.

    The interval is the bootstrap percentile interval of the median over resampled pairs.
    """
    if len(other) != len(ours) or len(ours) == 0:
        raise ValueError(f"{len(other)} and {len(ours)} timings are not pairs")
    pairs = np.asarray(other, np.float64) / np.asarray(ours, np.float64)
    rng = np.random.default_rng(seed)
    medians = np.median(pairs[rng.integers(0, len(pairs), (_RESAMPLES, len(pairs)))], axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    return Ratio(median=float(np.median(pairs)), low=float(low), high=float(high), pairs=len(pairs))


def psnr(actual: np.ndarray, expected: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 images; infinite when they are equal."""
    error = np.mean((actual.astype(np.float64) - expected.astype(np.float64)) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255.0**2 / error))
