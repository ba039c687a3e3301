"""DPM-Solver++ SDE of second order (Lu et al. 2022, arXiv:2211.01095, section 5; singlestep) as plan rows.

Two rows a step; state slots: x, and in the middle of a step what the second row keeps of the old x and its noise.
"""

from collections.abc import Mapping

import numpy as np

from sdrt.bundle import JsonValue
from sdrt.plan.asked import AskedSteps, refuse_noise, refuse_own_grid
from sdrt.plan.lms import heeded_bounds
from sdrt.plan.rows import SamplingPlan
from sdrt.plan.sigma_grid import (
    GRID_FIELDS,
    ancestral_sigmas,
    asked_timesteps,
    cut_grid,
    interleaved,
    network_scales,
    refuse_sample_prediction,
    with_noise,
)
from sdrt.plan.spacing import respaced_sigmas
from sdrt.schedule import (
    Floats,
    NoiseSchedule,
    denoised_coefficients,
    rounded_to_float32,
    unsupported_field,
)

FIELDS: Mapping[str, JsonValue] = {
    **GRID_FIELDS,
    "beta_end": 0.012,
    "beta_start": 0.00085,
    "noise_sampler_seed": None,
}


def dpm_sde_plan(config: Mapping[str, JsonValue], schedule: NoiseSchedule, asked: AskedSteps) -> SamplingPlan:
    """Two rows a step, to the midpoint m = √(σσ') and from σ to σ' with the midpoint's x₀; one for that to sigma zero.

    Each is x' = down/σ·x + (1 - down/σ)·x₀ + up·w, with `ancestral_sigmas`. The reference's w come of one Brownian
    path B over sigma: w₁ = (B(m) - B(σ)) / √(σ - m) and w₂ = (B(σ') - B(σ)) / √(σ - σ'). Each has variance 1; as the
    way to m is part of the way to σ', their correlation is r = √((σ - m) / (σ - σ')), and steps share no way. So
    w₁ = n₁ and w₂ = r·n₁ + √(1 - r²)·n₂ with independent normal n₁, n₂, one drawn in each row, have the same joint
    distribution. RequestError for a `noise_sampler_seed`, where the network predicts x₀, and for an own grid.
    """
    refuse_noise(asked)
    refuse_own_grid(asked, "timesteps", "sigmas")
    refuse_sample_prediction(schedule)
    if config["noise_sampler_seed"] is not None:
        raise unsupported_field("noise_sampler_seed", config["noise_sampler_seed"])
    timesteps, sigmas = _whole_grid(heeded_bounds(config), schedule, asked)
    middle_timesteps = schedule.timesteps_at(np.sqrt(sigmas[:-1] * sigmas[1:]))[asked.first :]
    grid = cut_grid(config, asked, timesteps, np.append(rounded_to_float32(sigmas), 0))
    sigmas, following = grid.sigmas[:-2], grid.sigmas[1:-1]  # of the steps of two rows
    middle = np.sqrt(sigmas * following)
    evaluated = interleaved(grid.sigmas[:-1], middle)
    return SamplingPlan(
        timesteps=interleaved(grid.timesteps, middle_timesteps),
        input_scales=network_scales(evaluated),
        transitions=_transitions(schedule, evaluated, sigmas, middle, following),
        initial_scale=grid.initial_scale,
        noised=with_noise(interleaved(grid.sigmas[:-1], grid.sigmas[1:-1])),
    )


def _transitions(
    schedule: NoiseSchedule, evaluated: Floats, sigmas: Floats, middle: Floats, following: Floats
) -> Floats:
    """float64 [2 · steps - 1, 2, 4]; evaluated: the sigma of each row; the others: float64 [steps - 1]."""
    scales = network_scales(evaluated)
    x0_sample, x0_output = denoised_coefficients(schedule.prediction_type, scales, evaluated * scales)
    x0_sample = x0_sample * scales
    transitions = np.zeros((len(evaluated), 2, 4))
    first, second = transitions[:-1:2], transitions[1::2]
    down, up = ancestral_sigmas(sigmas, middle)
    kept = down / sigmas
    first[:, 0, 0] = kept + (1 - kept) * x0_sample[:-1:2]
    first[:, 0, 2] = (1 - kept) * x0_output[:-1:2]
    first[:, 0, 3] = up
    down, up = ancestral_sigmas(sigmas, following)
    kept = down / sigmas
    shared = (sigmas - middle) / (sigmas - following)
    first[:, 1, 0] = kept
    first[:, 1, 3] = up * np.sqrt(shared)
    second[:, 0, 0] = (1 - kept) * x0_sample[1::2]
    second[:, 0, 1] = 1
    second[:, 0, 2] = (1 - kept) * x0_output[1::2]
    second[:, 0, 3] = up * np.sqrt(1 - shared)
    transitions[-1, 0, 0], transitions[-1, 0, 2] = x0_sample[-1], x0_output[-1]
    return transitions


def _whole_grid(config: Mapping[str, JsonValue], schedule: NoiseSchedule, asked: AskedSteps) -> tuple[Floats, Floats]:
    """Timesteps and sigmas of all steps, float64 [steps] each, not rounded: midpoints are counted from these."""
    timesteps = asked_timesteps(config, schedule, asked)
    sigmas = schedule.sigmas_at(timesteps)
    respaced = respaced_sigmas(config, sigmas)
    return (timesteps, sigmas) if respaced is None else (schedule.timesteps_at(respaced), respaced)
