"""Resampling of arrays, as torch.nn.functional.interpolate does it where pictures' own resizing will not do."""

import numpy as np
import numpy.typing as npt

from sdrt.runners.base import FloatArray

_A = -0.75  # of the cubic kernel (Keys 1981), as PyTorch has it


def bicubic(values: FloatArray, height: int, width: int) -> FloatArray:
    """float32 [H, W] to [height, width]: mode "bicubic" without align_corners and without antialiasing."""
    rows = _weights(values.shape[0], height)
    columns = _weights(values.shape[1], width)
    resampled: FloatArray = (rows @ values.astype(np.float64) @ columns.T).astype(np.float32)
    return resampled


def _weights(length: int, wanted: int) -> npt.NDArray[np.float64]:
    """How much of each of `length` values there is in each of the `wanted`: [wanted, length]."""
    position = (np.arange(wanted) + 0.5) * length / wanted - 0.5
    below = np.floor(position).astype(int)
    weights = np.zeros((wanted, length))
    for offset in range(-1, 3):
        at = below + offset
        np.add.at(weights, (np.arange(wanted), np.clip(at, 0, length - 1)), _kernel(np.abs(position - at)))
    return weights


def _kernel(distance: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    near = ((_A + 2) * distance - (_A + 3)) * distance**2 + 1
    far = ((_A * distance - 5 * _A) * distance + 8 * _A) * distance - 4 * _A
    return np.where(distance <= 1, near, np.where(distance < 2, far, 0.0))
