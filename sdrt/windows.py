"""Overlapping windows over latents that are larger than the engines take, and how they are one again.

MultiDiffusion (Bar-Tal et al. 2023, arXiv:2302.08113): every step evaluates all windows and blends them. A step is
linear in what the network says, so blending the windows' next states is blending their predictions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from sdrt.runners.base import FloatArray
from sdrt.vae import blend_weights, tile_spans

OVERLAP_FRACTION = 2  # half a window: what one decides, its neighbours see before they decide


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Window:
    """Where a window lies in the latents, and how much it counts there: float32 [h, w]."""

    rows: slice
    columns: slice
    weight: FloatArray

    def cut(self, array: FloatArray) -> FloatArray:
        """What of an array [..., H, W] lies in it: [..., h, w]."""
        return np.ascontiguousarray(array[..., self.rows, self.columns])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Windows:
    """All windows over latents of a size (H, W), `at_once` of which go through the engines together."""

    size: tuple[int, int]
    parts: tuple[Window, ...]
    at_once: int

    def joined(self, pieces: Sequence[FloatArray]) -> FloatArray:
        """The windows' arrays [..., h, w] as one [..., H, W]."""
        whole = np.zeros((*pieces[0].shape[:-2], *self.size), np.float32)
        for window, piece in zip(self.parts, pieces, strict=True):
            whole[..., window.rows, window.columns] += piece * window.weight
        return whole


def windows_over(size: tuple[int, int], window: tuple[int, int], at_once: int) -> Windows:
    """Windows of one size (h, w) over latents of another, at least as large, in latent pixels."""
    axes = []
    for length, part in zip(size, window, strict=True):
        spans = tile_spans(length, part, overlap=part // OVERLAP_FRACTION)
        axes.append(list(zip(spans, blend_weights(spans, 1), strict=True)))
    parts = tuple(
        Window(rows=rows.scaled(1), columns=columns.scaled(1), weight=across[:, None] * along)
        for (rows, across), (columns, along) in product(*axes)
    )
    return Windows(size=size, parts=parts, at_once=at_once)
