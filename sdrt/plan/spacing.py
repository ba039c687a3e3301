"""Sigma spacings: other sigmas for a grid's steps, between its largest and its smallest. Shared by all families."""

from collections.abc import Mapping

import numpy as np

from sdrt.bundle import JsonValue
from sdrt.errors import RequestError
from sdrt.schedule import Floats, karras_sigmas, read_flag, read_number, unsupported_field

SPACING_FIELDS: Mapping[str, JsonValue] = {
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
}
_BETA = 0.6  # both parameters of the beta distribution, as its authors chose them
_BETA_TERMS = 64  # of the series, each at most half of the one before
_NEWTON_STEPS = 8


def respaced_sigmas(config: Mapping[str, JsonValue], sigmas: Floats, count: int | None = None) -> Floats | None:
    """The sigmas that the config asks for in the place of a descending grid's; None for none.

    float64 [count], or as many as the grid has.

    Karras et al. 2022, eq. 5 (`use_karras_sigmas`); evenly spaced logarithms (`use_exponential_sigmas`); quantiles of
    a beta distribution, Lee et al. 2024 (`use_beta_sigmas`). They go from the first to the last of `sigmas`, or
    between the config's own `sigma_min` and `sigma_max` where it has them. RequestError: more than one is asked for.
    """
    chosen = [name for name in SPACING_FIELDS if name in config and read_flag(config, name)]
    if not chosen:
        return None
    if len(chosen) > 1:
        raise RequestError(
            f"the scheduler config asks for {' and '.join(chosen)} at the same time", hint="leave one of them on"
        )
    low, high = sigma_bounds(config, float(sigmas[-1]), float(sigmas[0]))
    count = len(sigmas) if count is None else count
    if chosen == ["use_karras_sigmas"]:
        return karras_sigmas(low, high, count)
    if chosen == ["use_exponential_sigmas"]:
        return np.exp(np.linspace(np.log(high), np.log(low), count))
    quantiles = beta_quantiles(1 - np.linspace(0, 1, count))
    return np.asarray(low + quantiles * (high - low), np.float64)


def sigma_bounds(config: Mapping[str, JsonValue], sigma_min: float, sigma_max: float) -> tuple[float, float]:
    """(smallest, largest): the config's own `sigma_min` and `sigma_max` where it has them, else those given."""
    low = sigma_min if config.get("sigma_min") is None else read_number(config, "sigma_min")
    high = sigma_max if config.get("sigma_max") is None else read_number(config, "sigma_max")
    if not 0 < low <= high:
        raise unsupported_field("sigma_min", low)
    return low, high


def beta_quantiles(shares: Floats) -> Floats:
    """Below which value each share of the beta distribution with both parameters 0.6 lies: float64, as `shares`.

    The incomplete beta function as its power series (Abramowitz & Stegun 26.5.4), inverted by Newton's method over the
    lower half; the upper half is its mirror image. The root is sought in x^0.6, where the function is nearly straight.
    """
    order = np.arange(_BETA_TERMS)
    binomials = np.cumprod(np.concatenate([[1.0], (order[1:] - _BETA) / order[1:]]))
    coefficients = binomials / (_BETA + order)

    def mass(power: Floats) -> Floats:
        return np.asarray(power * np.polynomial.polynomial.polyval(power ** (1 / _BETA), coefficients), np.float64)

    wanted = np.minimum(shares, 1 - shares) * 2 * mass(np.array([0.5**_BETA]))
    power = wanted * _BETA
    for _ in range(_NEWTON_STEPS):
        slope = (1 - power ** (1 / _BETA)) ** (_BETA - 1) / _BETA
        power = power - (mass(power) - wanted) / slope
    found = power ** (1 / _BETA)
    return np.where(shares > 0.5, 1 - found, found)
