"""The midpoint method over log sigma (DPM-Solver-2, Lu et al. 2022, arXiv:2206.00927, algorithm 1) as plan rows.

Two rows a step; state slots: x, and in the middle of a step the old x.
"""

from collections.abc import Mapping

import numpy as np

from sdrt.bundle import JsonValue
from sdrt.plan.asked import AskedSteps, refuse_noise, refuse_own_grid
from sdrt.plan.rows import SamplingPlan
from sdrt.plan.sigma_grid import (
    GRID_FIELDS,
    SigmaGrid,
    interleaved,
    network_scales,
    refuse_sample_prediction,
    sigma_grid,
    slope_coefficients,
    with_noise,
)
from sdrt.schedule import Floats, NoiseSchedule, read_flag

FIELDS: Mapping[str, JsonValue] = {**GRID_FIELDS, "beta_end": 0.012, "beta_start": 0.00085}


def kdpm2_plan(config: Mapping[str, JsonValue], schedule: NoiseSchedule, asked: AskedSteps) -> SamplingPlan:
    """Two rows a step: x'' = x + (√(σσ') - σ)·d, then x' = x + (σ' - σ)·d''; one for the step to sigma zero.

    RequestError where the network predicts x₀, and for a grid of one's own.
    """
    grid = _grid(config, schedule, asked)
    return _plan(schedule, grid, down=grid.sigmas[1:], up=np.zeros(len(grid.timesteps)))


def kdpm2_ancestral_plan(config: Mapping[str, JsonValue], schedule: NoiseSchedule, asked: AskedSteps) -> SamplingPlan:
    """`kdpm2_plan` that goes down to a smaller sigma, and adds the noise that is missing in the second row of a step.

    RequestError where the network predicts x₀, and for a grid of one's own.
    """
    grid = _grid(config, schedule, asked)
    down, up = _ancestral_sigmas(grid.sigmas[:-1], grid.sigmas[1:])
    return _plan(schedule, grid, down=down, up=up)


def _grid(config: Mapping[str, JsonValue], schedule: NoiseSchedule, asked: AskedSteps) -> SigmaGrid:
    refuse_noise(asked)
    refuse_own_grid(asked, "timesteps", "sigmas")
    refuse_sample_prediction(schedule)
    grid = sigma_grid(config, schedule, asked)
    if not read_flag(config, "use_karras_sigmas"):
        return grid
    # With Karras's sigmas the reference rounds the timesteps of whole steps, and keeps those of midpoints.
    return SigmaGrid(timesteps=grid.timesteps.round(), sigmas=grid.sigmas, initial_scale=grid.initial_scale)


def _ancestral_sigmas(sigmas: Floats, following: Floats) -> tuple[Floats, Floats]:
    """`ancestral_sigmas` in float32, as the reference reckons them: where steps are large, little is left of down."""
    before, after = sigmas.astype(np.float32), following.astype(np.float32)
    up = np.sqrt(after**2 * (before**2 - after**2) / before**2)
    down = np.sqrt(after**2 - up**2)
    return down.astype(np.float64), up.astype(np.float64)


def _plan(schedule: NoiseSchedule, grid: SigmaGrid, *, down: Floats, up: Floats) -> SamplingPlan:
    """down: float64 [steps], the sigma that each step goes down to; up: float64 [steps], that of its noise."""
    sigmas = grid.sigmas[:-1]
    middle = np.sqrt(sigmas * down)[:-1]
    evaluated = interleaved(sigmas, middle)
    slope_sample, slope_output = slope_coefficients(schedule.prediction_type, evaluated)
    transitions = np.zeros((len(evaluated), 2, 4))
    first, second = transitions[::2], transitions[1::2]
    half = np.append(middle, 0) - sigmas
    first[:, 0, 0] = 1 + half * slope_sample[::2]
    first[:, 0, 2] = half * slope_output[::2]
    first[:-1, 1, 0] = 1
    whole = (down - sigmas)[:-1]
    second[:, 0, 0] = whole * slope_sample[1::2]
    second[:, 0, 1] = 1
    second[:, 0, 2] = whole * slope_output[1::2]
    second[:, 0, 3] = up[:-1]
    return SamplingPlan(
        timesteps=interleaved(grid.timesteps, schedule.timesteps_at(middle)),
        input_scales=network_scales(evaluated),
        transitions=transitions,
        initial_scale=grid.initial_scale,
        noised=with_noise(interleaved(grid.sigmas[:-1], grid.sigmas[1:-1])),
    )
