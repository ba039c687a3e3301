"""Euler's method with ancestral noise (Karras et al. 2022, eq. 3; Ho et al. 2020, eq. 7) as plan rows: one slot."""

from collections.abc import Mapping

import numpy as np

from sdrt.bundle import JsonValue
from sdrt.plan.asked import AskedSteps, refuse_noise, refuse_own_grid
from sdrt.plan.rows import SamplingPlan
from sdrt.plan.sigma_grid import (
    ancestral_sigmas,
    network_scales,
    refuse_sample_prediction,
    sigma_grid,
    slope_coefficients,
)
from sdrt.schedule import NoiseSchedule

FIELDS: Mapping[str, JsonValue] = {
    "rescale_betas_zero_snr": False,
    "steps_offset": 0,
    "timestep_spacing": "linspace",
}


def euler_ancestral_plan(config: Mapping[str, JsonValue], schedule: NoiseSchedule, asked: AskedSteps) -> SamplingPlan:
    """One row a step: x' = x + (down - σ)·(x - x₀) / σ + up·noise with down² + up² = σ'².

    Noise is drawn for the last row too, where it counts nothing. RequestError where the network predicts x₀.
    """
    refuse_noise(asked)
    refuse_own_grid(asked, "timesteps", "sigmas")
    refuse_sample_prediction(schedule)
    grid = sigma_grid(config, schedule, asked)
    sigmas = grid.sigmas[:-1]
    down, up = ancestral_sigmas(sigmas, grid.sigmas[1:])
    slope_sample, slope_output = slope_coefficients(schedule.prediction_type, sigmas)
    transitions = np.zeros((len(sigmas), 1, 3))
    transitions[:, 0, 0] = 1 + (down - sigmas) * slope_sample
    transitions[:, 0, 1] = (down - sigmas) * slope_output
    transitions[:, 0, 2] = up
    return SamplingPlan(
        timesteps=grid.timesteps,
        input_scales=network_scales(sigmas),
        transitions=transitions,
        initial_scale=grid.initial_scale,
        noised=grid.noised,
        draws=np.ones(len(sigmas), np.bool_),
    )
