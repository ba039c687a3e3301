"""Resampling of arrays, as torch.nn.functional.interpolate does it where pictures' own resizing will not do."""

from typing import Literal

import numpy as np
import numpy.typing as npt

from sdrt.runners.base import FloatArray

Mode = Literal["nearest", "bilinear", "bicubic"]
_A = -0.75  # of the cubic kernel (Keys 1981), as PyTorch has it


def bicubic(values: FloatArray, height: int, width: int) -> FloatArray:
    """float32 [H, W] to [height, width]: mode "bicubic" without align_corners and without antialiasing."""
    return resample(values, height, width, "bicubic")


def resample(values: FloatArray, height: int, width: int, mode: Mode) -> FloatArray:
    """float32 [..., H, W] to [..., height, width]: that mode without align_corners and without antialiasing."""
    rows = _weights(values.shape[-2], height, mode)
    columns = _weights(values.shape[-1], width, mode)
    resampled: FloatArray = (rows @ values.astype(np.float64) @ columns.T).astype(np.float32)
    return resampled


def _weights(length: int, wanted: int, mode: Mode) -> npt.NDArray[np.float64]:
    """How much of each of `length` values there is in each of the `wanted`: [wanted, length]."""
    weights = np.zeros((wanted, length))
    if mode == "nearest":
        weights[np.arange(wanted), np.arange(wanted) * length // wanted] = 1
        return weights
    position = (np.arange(wanted) + 0.5) * length / wanted - 0.5
    below = np.floor(position).astype(int)
    offsets, kernel = (range(2), _linear) if mode == "bilinear" else (range(-1, 3), _cubic)
    for offset in offsets:
        at = below + offset
        np.add.at(weights, (np.arange(wanted), np.clip(at, 0, length - 1)), kernel(np.abs(position - at)))
    return weights


def _linear(distance: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.maximum(1 - distance, 0.0)


def _cubic(distance: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    near = ((_A + 2) * distance - (_A + 3)) * distance**2 + 1
    far = ((_A * distance - 5 * _A) * distance + 8 * _A) * distance - 4 * _A
    return np.where(distance <= 1, near, np.where(distance < 2, far, 0.0))
