"""Parity: how far a result is from the reference's, in the measures that a seal and a report record."""

import numpy as np
import numpy.typing as npt

from sdrt.bundle import Metric, ParityRecord

Pixels = npt.NDArray[np.uint8]

LARGEST_PSNR_DB = 100.0  # stands for equal where a record must be finite


def max_relative(measured: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> float:
    """Largest error over the largest expected value; infinite where the shapes differ or something is not finite."""
    if measured.shape != expected.shape or not (np.isfinite(measured).all() and np.isfinite(expected).all()):
        return float("inf")
    scale = float(np.abs(expected).max(initial=0.0))
    error = float(np.abs(measured.astype(np.float64) - expected).max(initial=0.0))
    if scale == 0.0:
        return 0.0 if error == 0.0 else float("inf")
    return error / scale


def largest_level(made: Pixels, expected: Pixels) -> int:
    """The largest difference of two images of equal shape, in levels of 255."""
    return int(np.abs(made.astype(np.int16) - expected).max())


def psnr_db(made: Pixels, expected: Pixels) -> float:
    """Peak signal-to-noise ratio of two images of equal shape, in decibels; infinite when they are equal."""
    mean_square = float(np.mean((made.astype(np.float64) - expected) ** 2))
    return float("inf") if mean_square == 0 else float(10 * np.log10(255.0**2 / mean_square))


def image_parity(made: Pixels, expected: Pixels, *, metric: Metric, bound: float) -> ParityRecord:
    """Two images' parity, measured as a seal asks; "max_absolute" is of values in [0, 1]."""
    if metric == "psnr_db":
        measured = min(LARGEST_PSNR_DB, psnr_db(made, expected))
    elif metric == "max_absolute":
        measured = largest_level(made, expected) / 255
    else:
        measured = max_relative(made.astype(np.float32), expected.astype(np.float32))
    return ParityRecord(metric=metric, measured=measured, bound=bound)


def meets(parity: ParityRecord) -> bool:
    """Whether a measured parity is within its bound; a NaN never is."""
    if parity.metric == "psnr_db":
        return parity.measured >= parity.bound
    return parity.measured <= parity.bound
