"""The noise schedule: tables over the training timesteps, grids of inference timesteps and sigmas, prediction types."""

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, cast, get_args

import numpy as np
import numpy.typing as npt

from sdrt.bundle import JsonValue
from sdrt.errors import RequestError

PredictionType = Literal["epsilon", "v_prediction", "sample"]
TimestepSpacing = Literal["leading", "trailing", "linspace"]
PREDICTION_TYPES: tuple[PredictionType, ...] = get_args(PredictionType)
Floats = npt.NDArray[np.float64]

KARRAS_RHO = 7.0
MAX_TRAIN_TIMESTEPS = 100_000
_LARGEST = sys.float_info.max
TERMINAL_ALPHA_CUMPROD = 2.0**-24  # stands for zero where a sigma must stay finite
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "exp", "laplace")
_LARGEST_BETA = 0.999  # of schedules that say how much signal is left

SCHEDULE_FIELDS: Mapping[str, JsonValue] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NoiseSchedule:
    """How much signal and noise each training timestep holds, and what the network predicts.

    alphas_cumprod: float64 [T], ᾱ of Ho et al. 2020; sigmas: float64 [T], √((1 - ᾱ) / ᾱ), ascending.
    The values are those of float32 tables, with which models are trained; all later arithmetic is float64.
    With `rescale_betas_zero_snr` the last ᾱ is 0, and the last sigma that of ᾱ = 2**-24. The arrays are read-only.
    """

    prediction_type: PredictionType
    alphas_cumprod: Floats
    sigmas: Floats

    def __post_init__(self) -> None:
        self.alphas_cumprod.setflags(write=False)
        self.sigmas.setflags(write=False)

    def __len__(self) -> int:
        """T, the number of training timesteps."""
        return len(self.alphas_cumprod)

    @classmethod
    def from_config(cls, config: Mapping[str, JsonValue]) -> "NoiseSchedule":
        """From a scheduler's config; fields it lacks take their usual defaults. RequestError names a bad field."""
        fields = {**SCHEDULE_FIELDS, **{name: config[name] for name in SCHEDULE_FIELDS if name in config}}
        rescaled = read_flag(fields, "rescale_betas_zero_snr")
        with np.errstate(all="ignore"):  # what comes out not finite is refused: betas here, an infinite sigma by plans
            betas = _rescaled_to_zero_terminal_snr(_betas(fields)) if rescaled else _betas(fields)
            alphas_cumprod = _cumulative_product(np.float32(1) - betas)
            positive = alphas_cumprod.copy()
            if rescaled:
                positive[-1] = TERMINAL_ALPHA_CUMPROD
            sigmas = np.sqrt((np.float32(1) - positive) / positive)
        if not np.all((betas >= 0) & (betas <= 1)):
            raise RequestError(
                f"the noise schedule has betas from {betas.min():g} to {betas.max():g}, outside 0 to 1",
                hint="check beta_start, beta_end and trained_betas in the checkpoint's scheduler_config.json",
            )
        prediction_type = cast("PredictionType", read_choice(fields, "prediction_type", PREDICTION_TYPES))
        return cls(
            prediction_type=prediction_type,
            alphas_cumprod=alphas_cumprod.astype(np.float64),
            sigmas=sigmas.astype(np.float64),
        )

    def sigmas_at(self, timesteps: Floats) -> Floats:
        """Sigmas at (fractional) timesteps, linear in between: float64, shaped like `timesteps`."""
        return np.interp(timesteps, np.arange(len(self)), self.sigmas)

    def timesteps_at(self, sigmas: Floats) -> Floats:
        """Fractional timesteps whose sigmas these are, linear in log sigma in between: float64 [len(sigmas)]."""
        # float32 table and differences: the timesteps are rounded later, and must round as the reference's do.
        table = np.log(self.sigmas.astype(np.float32))
        wanted = np.log(np.maximum(sigmas, 1e-10))
        low = np.clip(np.searchsorted(table, wanted, side="right") - 1, 0, len(self) - 2)
        weight = np.clip((table[low] - wanted) / (table[low] - table[low + 1]), 0, 1)
        return cast("Floats", (1 - weight) * low + weight * (low + 1))


def spaced_timesteps(
    spacing: TimestepSpacing, *, num_train_timesteps: int, num_inference_steps: int, steps_offset: int
) -> Floats:
    """Timesteps from noise to image: float64 [num_inference_steps], descending (Lin et al. 2023, table 2).

    "linspace" is not rounded; `steps_offset` counts for "leading" only.
    """
    if spacing == "leading":
        whole_ratio = num_train_timesteps // num_inference_steps
        return np.arange(num_inference_steps, dtype=np.float64)[::-1] * whole_ratio + steps_offset
    if spacing == "trailing":
        ratio = num_train_timesteps / num_inference_steps
        # Rounding of the ratio can make arange one longer than was asked: that last one is no timestep.
        return cast("Floats", np.arange(num_train_timesteps, 0, -ratio)[:num_inference_steps].round() - 1)
    return np.linspace(0, num_train_timesteps - 1, num_inference_steps)[::-1]


def rounded_to_float32(values: Floats) -> Floats:
    """The nearest float32 numbers, in which the reference holds its grids: float64, shaped like `values`."""
    return values.astype(np.float32).astype(np.float64)


def karras_sigmas(sigma_min: float, sigma_max: float, num_inference_steps: int) -> Floats:
    """Sigmas from `sigma_max` down to `sigma_min`: float64 [num_inference_steps] (Karras et al. 2022, eq. 5, ρ = 7)."""
    ramp = np.linspace(0, 1, num_inference_steps)
    low, high = sigma_min ** (1 / KARRAS_RHO), sigma_max ** (1 / KARRAS_RHO)
    return cast("Floats", (high + ramp * (low - high)) ** KARRAS_RHO)


def denoised_coefficients(prediction_type: PredictionType, alpha: Floats, sigma: Floats) -> tuple[Floats, Floats]:
    """(a, b) with x₀ = a·x + b·model_output for x = alpha·x₀ + sigma·ε, alpha² + sigma² = 1; shaped like `alpha`.

    Ho et al. 2020, eq. 15 for epsilon; Salimans & Ho 2022, appendix D for v_prediction.
    """
    if prediction_type == "epsilon":
        return 1 / alpha, -sigma / alpha
    if prediction_type == "v_prediction":
        return alpha, -sigma
    return np.zeros_like(alpha), np.ones_like(alpha)


def noise_coefficients(prediction_type: PredictionType, alpha: Floats, sigma: Floats) -> tuple[Floats, Floats]:
    """(a, b) with ε = a·x + b·model_output; the counterpart of `denoised_coefficients`."""
    if prediction_type == "epsilon":
        return np.zeros_like(alpha), np.ones_like(alpha)
    if prediction_type == "v_prediction":
        return sigma, alpha
    return 1 / sigma, -alpha / sigma


def read_number(config: Mapping[str, JsonValue], name: str) -> float:
    """A finite number from a scheduler's config."""
    value = config[name]
    # Compared, not converted: a whole number may be too large for a float.
    if isinstance(value, bool) or not isinstance(value, int | float) or not -_LARGEST <= value <= _LARGEST:
        raise _bad_field(name, value, "a finite number")
    return float(value)


def read_integer(config: Mapping[str, JsonValue], name: str, *, minimum: int, maximum: int) -> int:
    """A whole number from `minimum` to `maximum` from a scheduler's config."""
    value = config[name]
    if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
        raise _bad_field(name, value, f"a whole number from {minimum} to {maximum}")
    return value


def read_flag(config: Mapping[str, JsonValue], name: str) -> bool:
    """A truth value from a scheduler's config; null means false."""
    value = config[name]
    if value is None:
        return False
    if not isinstance(value, bool):
        raise _bad_field(name, value, "true or false")
    return value


def read_choice(config: Mapping[str, JsonValue], name: str, choices: tuple[str, ...]) -> str:
    """One of `choices` from a scheduler's config."""
    value = config[name]
    if not isinstance(value, str) or value not in choices:
        raise _bad_field(name, value, "one of " + ", ".join(choices))
    return value


def read_spacing(config: Mapping[str, JsonValue]) -> TimestepSpacing:
    """The config's `timestep_spacing`."""
    return cast("TimestepSpacing", read_choice(config, "timestep_spacing", get_args(TimestepSpacing)))


def refuse_flags(config: Mapping[str, JsonValue], *names: str) -> None:
    """RequestError for the first of these options that is on: options that would change the image and do not exist."""
    for name in names:
        if read_flag(config, name):
            raise unsupported_field(name, True)


def unsupported_field(name: str, value: JsonValue) -> RequestError:
    """The error for a config field whose value sdrt cannot honour."""
    return RequestError(
        f"the checkpoint's scheduler config means {name}={_shown(value)}, which is not supported",
        hint="choose another scheduler; or, if the model does not need the field, change it in the checkpoint's "
        "scheduler_config.json and build again",
    )


def _bad_field(name: str, value: JsonValue, expected: str) -> RequestError:
    return RequestError(
        f"the checkpoint's scheduler config has {name}={_shown(value)}",
        hint=f"it must be {expected}: correct scheduler_config.json, or choose another scheduler",
    )


def _shown(value: JsonValue) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _betas(fields: Mapping[str, JsonValue]) -> npt.NDArray[np.float32]:
    """The training betas: float32 [T]."""
    steps = read_integer(fields, "num_train_timesteps", minimum=2, maximum=MAX_TRAIN_TIMESTEPS)
    if fields["trained_betas"] is not None:
        return _trained_betas(fields["trained_betas"], steps)
    kind = read_choice(fields, "beta_schedule", BETA_SCHEDULES)
    if kind in _SIGNAL_LEFT:
        return _betas_of_signal(_SIGNAL_LEFT[kind](np.arange(steps + 1) / steps))
    start, end = read_number(fields, "beta_start"), read_number(fields, "beta_end")
    if kind == "linear":
        return _float32_linspace(start, end, steps)
    if kind == "sigmoid":  # Xu et al. 2022 (GeoDiff, arXiv:2203.02923)
        return np.float32(end - start) / (np.float32(1) + np.exp(-_float32_linspace(-6, 6, steps))) + np.float32(start)
    if min(start, end) < 0:
        raise _bad_field("beta_start", fields["beta_start"], "not negative, nor may beta_end be")
    return np.square(_float32_linspace(math.sqrt(start), math.sqrt(end), steps))


def _trained_betas(values: JsonValue, steps: int) -> npt.NDArray[np.float32]:
    if not isinstance(values, list) or not all(_is_probability(value) for value in values):
        raise _bad_field("trained_betas", values, "a list of numbers from 0 to 1")
    if len(values) != steps:
        raise _bad_field("trained_betas", values, f"as long as num_train_timesteps, {steps}, not {len(values)}")
    return np.array(values, np.float32)


def _is_probability(value: JsonValue) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _betas_of_signal(alphas_bar: Floats) -> npt.NDArray[np.float32]:
    """Betas that leave this much signal, float64 [T + 1], each at most 0.999: float32 [T]."""
    return np.minimum(1 - alphas_bar[1:] / alphas_bar[:-1], _LARGEST_BETA).astype(np.float32)


def _cosine(time: Floats) -> Floats:
    """Nichol & Dhariwal 2021, eq. 17."""
    return np.square(np.cos((time + 0.008) / 1.008 * math.pi / 2))


def _exponential(time: Floats) -> Floats:
    """ᾱ = exp(-12 t)."""
    return np.exp(time * -12.0)


def _laplace(time: Floats) -> Floats:
    """The square root of ᾱ where log SNR follows a Laplace distribution, Hang et al. 2024 (arXiv:2407.03297)."""
    log_snr = -0.5 * np.copysign(1, 0.5 - time) * np.log(1 - 2 * np.abs(0.5 - time) + 1e-6)
    snr = np.exp(log_snr)
    left: Floats = np.sqrt(snr / (1 + snr))
    return left


# How much signal is left at each time from 0 to 1.
_SIGNAL_LEFT: Mapping[str, Callable[[Floats], Floats]] = {
    "squaredcos_cap_v2": _cosine,
    "exp": _exponential,
    "laplace": _laplace,
}


def _float32_linspace(start: float, end: float, count: int) -> npt.NDArray[np.float32]:
    """Evenly spaced float32 numbers, each half counted from its own end and rounded once, as training code does."""
    first, last = np.float32(start), np.float32(end)
    step = float((last - first) / np.float32(count - 1))
    index = np.arange(count)
    rising, falling = float(first) + step * index, float(last) - step * (count - 1 - index)
    return np.where(index < count // 2, rising, falling).astype(np.float32)


def _cumulative_product(alphas: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """float32 products that were accumulated in float64."""
    return np.cumprod(alphas.astype(np.float64)).astype(np.float32)


def _rescaled_to_zero_terminal_snr(betas: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Betas whose last cumulative alpha is zero (Lin et al. 2023, algorithm 1)."""
    roots = np.sqrt(_cumulative_product(np.float32(1) - betas))
    first, last = roots[0], roots[-1]
    shifted = (roots - last) * (first / (first - last))
    alphas_bar = shifted**2
    alphas = np.concatenate([alphas_bar[:1], alphas_bar[1:] / alphas_bar[:-1]])
    return cast("npt.NDArray[np.float32]", np.float32(1) - alphas)
