"""Heun's method in sigma space (Karras et al. 2022, algorithm 1) as plan rows: two a step.

State slots: x, and in the middle of a step the old x with half of its slope.
"""

from collections.abc import Mapping

import numpy as np

from sdrt.bundle import JsonValue
from sdrt.plan.asked import AskedSteps, refuse_noise, refuse_own_grid
from sdrt.plan.clamping import CLIPPING_FIELDS, asked_clamp
from sdrt.plan.rows import SamplingPlan
from sdrt.plan.sigma_grid import GRID_FIELDS, interleaved, network_scales, sigma_grid, slope_coefficients, with_noise
from sdrt.schedule import Floats, NoiseSchedule, denoised_coefficients

FIELDS: Mapping[str, JsonValue] = {
    **GRID_FIELDS,
    "beta_end": 0.012,
    "beta_start": 0.00085,
    **CLIPPING_FIELDS,
}


def heun_plan(config: Mapping[str, JsonValue], schedule: NoiseSchedule, asked: AskedSteps) -> SamplingPlan:
    """Two rows a step, x'' = x + (σ' - σ)·d and x' = x + (σ' - σ)·(d + d'') / 2; one for the step to sigma zero.

    RequestError for sigmas of one's own.
    """
    refuse_noise(asked)
    refuse_own_grid(asked, "sigmas")
    grid = sigma_grid(config, schedule, asked)
    sigmas = grid.sigmas[:-1]
    evaluated = interleaved(sigmas, sigmas[1:])
    scales = network_scales(evaluated)
    x0_sample, x0_output = denoised_coefficients(schedule.prediction_type, scales, evaluated * scales)
    return SamplingPlan(
        timesteps=interleaved(grid.timesteps, grid.timesteps[1:]),
        input_scales=scales,
        transitions=heun_transitions(grid.sigmas, *slope_coefficients(schedule.prediction_type, sigmas)),
        initial_scale=grid.initial_scale,
        noised=with_noise(interleaved(grid.sigmas[:-1], grid.sigmas[1:-1])),
        clamp=asked_clamp(config, estimates=(x0_sample * scales, x0_output), weights=_denoised_weights(grid.sigmas)),
    )


def _denoised_weights(sigmas: Floats) -> Floats:
    """How much of each row's x₀, which slopes have as -x₀ / σ, the state takes: float64 [2 · steps - 1, 2]."""
    step, reached = np.diff(sigmas), sigmas[:-1]
    weights = np.zeros((2 * len(step) - 1, 2))
    weights[::2, 0] = -step / reached
    weights[:-1:2, 1] = -step[:-1] / 2 / reached[:-1]
    weights[1::2, 0] = -step[:-1] / 2 / reached[1:]
    return weights


def heun_transitions(sigmas: Floats, slope_sample: Floats, slope_output: Floats) -> Floats:
    """Transitions for slopes d = slope_sample·x + slope_output·model_output: float64 [2 · steps - 1, 2, 4].

    sigmas: float64 [steps + 1]; the slopes' coefficients: float64 [steps], one of each sigma but the last.
    """
    steps = len(slope_sample)
    step = np.diff(sigmas)
    transitions = np.zeros((2 * steps - 1, 2, 4))
    first, second = transitions[::2], transitions[1::2]
    first[:, 0, 0] = 1 + step * slope_sample
    first[:, 0, 2] = step * slope_output
    first[:-1, 1, 0] = 1 + step[:-1] / 2 * slope_sample[:-1]
    first[:-1, 1, 2] = step[:-1] / 2 * slope_output[:-1]
    second[:, 0, 0] = step[:-1] / 2 * slope_sample[1:]
    second[:, 0, 1] = 1
    second[:, 0, 2] = step[:-1] / 2 * slope_output[1:]
    return transitions
