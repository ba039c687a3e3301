"""What samplers in sigma space share: the grid of a request's steps, the slope dx/dσ, and rows of two evaluations."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from sdrt.bundle import JsonValue
from sdrt.errors import RequestError
from sdrt.plan.asked import AskedSteps, check_descending
from sdrt.plan.spacing import SPACING_FIELDS, respaced_sigmas
from sdrt.schedule import (
    Floats,
    NoiseSchedule,
    PredictionType,
    denoised_coefficients,
    read_choice,
    read_flag,
    read_integer,
    read_spacing,
    rounded_to_float32,
    spaced_timesteps,
    unsupported_field,
)

# What a grid is made with. Not every scheduler has the two bounds, but all with a sigma spacing heed another's.
GRID_FIELDS: Mapping[str, JsonValue] = {
    "sigma_max": None,
    "sigma_min": None,
    "steps_offset": 0,
    "timestep_spacing": "linspace",
    **SPACING_FIELDS,
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SigmaGrid:
    """timesteps: float64 [steps]; sigmas: float64 [steps + 1], before each step and after the last.

    initial_scale: of the first x, the largest sigma of the whole grid, or √(σ² + 1) with the spacing "leading".
    """

    timesteps: Floats
    sigmas: Floats
    initial_scale: float

    @property
    def noised(self) -> Floats:
        """How an image enters before each step: its latents and σ of noise, float64 [steps, 2]."""
        return with_noise(self.sigmas[:-1])


def sigma_grid(
    config: Mapping[str, JsonValue], schedule: NoiseSchedule, asked: AskedSteps, *, final: float = 0.0
) -> SigmaGrid:
    """The steps from `asked.first` on, ending on the sigma `final`, or on the last one of `asked.sigmas`.

    Numbers are those of float32 grids; timesteps are fractional. Sigmas of one's own come before any sigma spacing,
    and timesteps of one's own exclude it. RequestError for those, and for grids that do not descend.
    """
    if asked.sigmas is not None:
        largest = float(np.finfo(np.float32).max)
        check_descending("sigmas", asked.sigmas, low=0.0, high=largest)
        sigmas = rounded_to_float32(np.array(asked.sigmas, np.float64))
        if len(sigmas) < 2 or sigmas[-2] <= 0:
            raise RequestError("sigmas has no step", hint="give the sigma before each step and that after the last")
        return cut_grid(config, asked, rounded_to_float32(schedule.timesteps_at(sigmas[:-1])), sigmas)
    timesteps = rounded_to_float32(asked_timesteps(config, schedule, asked))
    sigmas = schedule.sigmas_at(timesteps)
    respaced = respaced_sigmas(config, sigmas)  # between the grid's ends, which move with spacing and step count
    if respaced is not None:
        sigmas = respaced
        timesteps = rounded_to_float32(schedule.timesteps_at(sigmas))
    return cut_grid(config, asked, timesteps, np.append(rounded_to_float32(sigmas), final))


def cut_grid(config: Mapping[str, JsonValue], asked: AskedSteps, timesteps: Floats, sigmas: Floats) -> SigmaGrid:
    """A whole grid, timesteps [steps] and sigmas [steps + 1], without the steps before `asked.first`."""
    largest = float(sigmas.max())
    leading = read_spacing(config) == "leading"
    return SigmaGrid(
        timesteps=timesteps[asked.first :],
        sigmas=sigmas[asked.first :],
        initial_scale=float(np.hypot(largest, 1)) if leading else largest,
    )


def asked_timesteps(config: Mapping[str, JsonValue], schedule: NoiseSchedule, asked: AskedSteps) -> Floats:
    """One's own timesteps, or those of the config's `timestep_spacing`: float64 [steps]."""
    if asked.timesteps is None:
        return spaced_timesteps(
            read_spacing(config),
            num_train_timesteps=len(schedule),
            num_inference_steps=asked.num_inference_steps,
            steps_offset=read_integer(config, "steps_offset", minimum=0, maximum=len(schedule)),
        )
    for name in SPACING_FIELDS:
        if name in config and read_flag(config, name):
            raise RequestError(
                f"timesteps of one's own contradict {name}", hint="leave the timesteps out, or the sigma spacing"
            )
    check_descending("timesteps", asked.timesteps, low=0, high=len(schedule) - 1)
    return np.array(asked.timesteps, np.float64)


def final_sigma(config: Mapping[str, JsonValue], schedule: NoiseSchedule) -> float:
    """The sigma after the last step, as `final_sigmas_type` says."""
    kind = read_choice(config, "final_sigmas_type", ("zero", "sigma_min"))
    return 0.0 if kind == "zero" else float(schedule.sigmas[0])


def with_noise(sigmas: Floats) -> Floats:
    """(1, σ) of each sigma: float64 [rows, 2]."""
    return np.stack([np.ones_like(sigmas), sigmas], axis=1)


def network_scales(sigmas: Floats) -> Floats:
    """What makes x = x₀ + σ·ε one of unit variance, as the network sees it: 1 / √(σ² + 1), shaped like `sigmas`."""
    return 1 / np.sqrt(sigmas**2 + 1)


def slope_coefficients(prediction_type: PredictionType, sigmas: Floats) -> tuple[Floats, Floats]:
    """(a, b) with dx/dσ = (x - x₀) / σ = a·x + b·model_output (Karras et al. 2022, eq. 3); shaped like `sigmas`."""
    if prediction_type == "epsilon":
        return np.zeros_like(sigmas), np.ones_like(sigmas)
    scales = network_scales(sigmas)
    x0_sample, x0_output = denoised_coefficients(prediction_type, scales, sigmas * scales)
    return (1 - x0_sample * scales) / sigmas, -x0_output / sigmas


def ancestral_sigmas(sigmas: Floats, following: Floats) -> tuple[Floats, Floats]:
    """(down, up): the sigma to go down to, and that of the noise that is then added to arrive at `following`.

    down² + up² = σ'² with up² = σ'²·(σ² - σ'²) / σ², the variance of the forward process's posterior (Ho et al. 2020,
    eq. 7), which makes down = σ'² / σ.
    """
    return following**2 / sigmas, following * np.sqrt(1 - (following / sigmas) ** 2)


def interleaved(outer: Floats, inner: Floats) -> Floats:
    """Values of a step's two evaluations in turn, the last step having one only: float64 [2 · steps - 1]."""
    both = np.empty(len(outer) + len(inner))
    both[::2], both[1::2] = outer, inner
    return both


def refuse_sample_prediction(schedule: NoiseSchedule) -> None:
    """RequestError where the network predicts x₀ itself, by a sampler that is not defined for that."""
    if schedule.prediction_type == "sample":
        raise unsupported_field("prediction_type", "sample")
