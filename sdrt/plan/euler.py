"""Euler's method in sigma space (Karras et al. 2022, algorithm 2 without churn) as plan rows: one state slot."""

from collections.abc import Mapping

import numpy as np

from sdrt.bundle import JsonValue
from sdrt.plan.asked import AskedSteps, refuse_noise, refuse_own_grid
from sdrt.plan.rows import SamplingPlan
from sdrt.plan.spacing import respaced_sigmas
from sdrt.schedule import (
    Floats,
    NoiseSchedule,
    denoised_coefficients,
    read_choice,
    read_integer,
    read_spacing,
    rounded_to_float32,
    spaced_timesteps,
    unsupported_field,
)

FIELDS: Mapping[str, JsonValue] = {
    "final_sigmas_type": "zero",
    "interpolation_type": "linear",
    "rescale_betas_zero_snr": False,
    "sigma_max": None,
    "sigma_min": None,
    "steps_offset": 0,
    "timestep_spacing": "linspace",
    "timestep_type": "discrete",
    "use_beta_sigmas": False,
    "use_exponential_sigmas": False,
    "use_karras_sigmas": False,
}


def euler_plan(config: Mapping[str, JsonValue], schedule: NoiseSchedule, asked: AskedSteps) -> SamplingPlan:
    """One row a step: x' = x + (σ' - σ)·(x - x₀) / σ, the network seeing x / √(σ² + 1).

    Timesteps are fractional. The first x has the largest sigma of the grid as its scale, √(σ² + 1) with "leading".
    RequestError for other interpolations and timestep types than linear and discrete.
    """
    _refuse_unsupported(config, schedule)
    refuse_noise(asked)
    refuse_own_grid(asked, "timesteps", "sigmas")
    timesteps, sigmas = _grid(config, schedule, asked.num_inference_steps)
    largest = float(sigmas.max())
    timesteps, sigmas = timesteps[asked.first :], sigmas[asked.first :]
    following = np.append(sigmas[1:], final_sigma(config, schedule))
    input_scales = 1 / np.sqrt(sigmas**2 + 1)
    # The network's x is a unit-variance one: alpha = 1 / √(σ² + 1), and sigma times that.
    x0_sample, x0_output = denoised_coefficients(schedule.prediction_type, input_scales, sigmas * input_scales)
    kept = following / sigmas
    transitions = np.zeros((len(sigmas), 1, 3))
    transitions[:, 0, 0] = kept + (1 - kept) * x0_sample * input_scales
    transitions[:, 0, 1] = (1 - kept) * x0_output
    return SamplingPlan(
        timesteps=timesteps,
        input_scales=input_scales,
        transitions=transitions,
        initial_scale=float(np.hypot(largest, 1)) if read_spacing(config) == "leading" else largest,
        noised=(1.0, float(sigmas[0])),
    )


def final_sigma(config: Mapping[str, JsonValue], schedule: NoiseSchedule) -> float:
    """The sigma after the last step, as `final_sigmas_type` says."""
    kind = read_choice(config, "final_sigmas_type", ("zero", "sigma_min"))
    return 0.0 if kind == "zero" else float(schedule.sigmas[0])


def _grid(config: Mapping[str, JsonValue], schedule: NoiseSchedule, num_inference_steps: int) -> tuple[Floats, Floats]:
    """Timesteps and sigmas: float64 [n] each, rounded to float32."""
    timesteps = spaced_timesteps(
        read_spacing(config),
        num_train_timesteps=len(schedule),
        num_inference_steps=num_inference_steps,
        steps_offset=read_integer(config, "steps_offset", minimum=0, maximum=len(schedule)),
    )
    timesteps = rounded_to_float32(timesteps)
    sigmas = schedule.sigmas_at(timesteps)
    respaced = respaced_sigmas(config, sigmas)  # between the grid's ends, which move with spacing and step count
    if respaced is not None:
        sigmas = respaced
        timesteps = rounded_to_float32(schedule.timesteps_at(sigmas))
    return timesteps, rounded_to_float32(sigmas)


def _refuse_unsupported(config: Mapping[str, JsonValue], schedule: NoiseSchedule) -> None:
    if config["interpolation_type"] != "linear":
        raise unsupported_field("interpolation_type", config["interpolation_type"])
    # Continuous timesteps change what the network sees only where it predicts v.
    if config["timestep_type"] != "discrete" and schedule.prediction_type == "v_prediction":
        raise unsupported_field("timestep_type", config["timestep_type"])
