"""Euler's method in sigma space (Karras et al. 2022, algorithm 2 without churn) as plan rows: one state slot."""

from collections.abc import Mapping

import numpy as np

from sdrt.bundle import JsonValue
from sdrt.plan.asked import AskedSteps, refuse_noise, refuse_own_grid
from sdrt.plan.rows import SamplingPlan
from sdrt.plan.sigma_grid import (
    GRID_FIELDS,
    SigmaGrid,
    asked_timesteps,
    cut_grid,
    final_sigma,
    network_scales,
    sigma_grid,
    slope_coefficients,
)
from sdrt.plan.spacing import respaced_sigmas
from sdrt.schedule import Floats, NoiseSchedule, read_choice, rounded_to_float32

FIELDS: Mapping[str, JsonValue] = {
    **GRID_FIELDS,
    "final_sigmas_type": "zero",
    "interpolation_type": "linear",
    "rescale_betas_zero_snr": False,
    "timestep_type": "discrete",
}


def euler_plan(config: Mapping[str, JsonValue], schedule: NoiseSchedule, asked: AskedSteps) -> SamplingPlan:
    """One row a step: x' = x + (σ' - σ)·(x - x₀) / σ, the network seeing x / √(σ² + 1).

    Timesteps are fractional, and log(σ) / 4 with the `timestep_type` "continuous" where the network predicts v.
    The first x has the largest sigma of the grid as its scale, √(σ² + 1) with "leading".
    """
    refuse_noise(asked)
    continuous = read_choice(config, "timestep_type", ("discrete", "continuous")) == "continuous"
    continuous = continuous and schedule.prediction_type == "v_prediction"
    if continuous:
        refuse_own_grid(asked, "timesteps")
    if read_choice(config, "interpolation_type", ("linear", "log_linear")) == "log_linear" and asked.sigmas is None:
        grid = _log_linear_grid(config, schedule, asked)
    else:
        grid = sigma_grid(config, schedule, asked, final=final_sigma(config, schedule))
    sigmas = grid.sigmas[:-1]
    slope_sample, slope_output = slope_coefficients(schedule.prediction_type, sigmas)
    step = np.diff(grid.sigmas)
    transitions = np.zeros((len(step), 1, 3))
    transitions[:, 0, 0] = 1 + step * slope_sample
    transitions[:, 0, 1] = step * slope_output
    return SamplingPlan(
        timesteps=rounded_to_float32(np.log(sigmas) / 4) if continuous else grid.timesteps,
        input_scales=network_scales(sigmas),
        transitions=transitions,
        initial_scale=grid.initial_scale,
        noised=grid.noised,
    )


def _log_linear_grid(config: Mapping[str, JsonValue], schedule: NoiseSchedule, asked: AskedSteps) -> SigmaGrid:
    """Sigmas whose logarithms are even over the whole table, ending on its smallest, whatever the timesteps are."""
    timesteps: Floats = rounded_to_float32(asked_timesteps(config, schedule, asked))
    logs = np.log(schedule.sigmas[[-1, 0]].astype(np.float32))
    sigmas: Floats = np.exp(np.linspace(logs[0], logs[1], len(timesteps) + 1).astype(np.float32)).astype(np.float64)
    # The spacing goes from the first to the last of as many sigmas as there are steps: both ends of the table.
    ends = np.concatenate([sigmas[:1], sigmas[2:]]) if len(timesteps) > 1 else sigmas[:1]
    respaced = respaced_sigmas(config, ends)
    if respaced is not None:
        timesteps = rounded_to_float32(schedule.timesteps_at(respaced))
        sigmas = np.append(rounded_to_float32(respaced), final_sigma(config, schedule))
    return cut_grid(config, asked, timesteps, sigmas)
