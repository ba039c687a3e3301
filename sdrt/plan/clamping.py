"""Clamped estimates of x₀: what a config asks for (`clip_sample`, `thresholding`), and the clamp of a plan's rows."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from sdrt.bundle import JsonValue
from sdrt.plan.rows import Clamp
from sdrt.schedule import Floats, read_flag, read_number, unsupported_field

CLIPPING_FIELDS: Mapping[str, JsonValue] = {
    # Absent, it would default to clipping at ±1, which no latent model wants: Stable Diffusion pipelines turn it off.
    "clip_sample": False,
    "clip_sample_range": 1.0,
}
THRESHOLDING_FIELDS: Mapping[str, JsonValue] = {
    "dynamic_thresholding_ratio": 0.995,
    "sample_max_value": 1.0,
    "thresholding": False,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholding:
    """Dynamic thresholding (Saharia et al. 2022, section 2.3): x₀ is cut to ± s and divided by s.

    s is the `ratio` quantile of |x₀|, at least 1 and at most `maximum`. The quantile is taken in the step graph.
    """

    ratio: float
    maximum: float


def read_thresholding(config: Mapping[str, JsonValue]) -> Thresholding | None:
    """What a scheduler config asks for; fields it lacks take their usual defaults. RequestError names a bad field."""
    fields = {**THRESHOLDING_FIELDS, **config}
    if not read_flag(fields, "thresholding"):
        return None
    ratio, maximum = read_number(fields, "dynamic_thresholding_ratio"), read_number(fields, "sample_max_value")
    if not 0 < ratio <= 1:
        raise unsupported_field("dynamic_thresholding_ratio", ratio)
    if maximum < 1:
        raise unsupported_field("sample_max_value", maximum)
    return Thresholding(ratio=ratio, maximum=maximum)


def asked_clamp(config: Mapping[str, JsonValue], *, estimates: tuple[Floats, Floats], weights: Floats) -> Clamp | None:
    """The clamp that a config asks for, thresholding before clipping; None where it asks for neither.

    estimates: (a, b) with x₀ = a·x + b·model_output, float64 [rows] each; weights: those of `Clamp`, [rows, n].
    """
    thresholding = read_thresholding(config)
    if thresholding is not None:
        limit = thresholding.maximum
    elif read_flag({**CLIPPING_FIELDS, **config}, "clip_sample"):
        limit = read_number(config, "clip_sample_range")
        if limit <= 0:
            raise unsupported_field("clip_sample_range", limit)
    else:
        return None
    a, b = estimates
    both = np.stack([np.broadcast_to(a, weights.shape[:1]), np.broadcast_to(b, weights.shape[:1])], axis=1)
    return Clamp(
        estimates=both, weights=weights, limit=limit, ratio=None if thresholding is None else thresholding.ratio
    )
