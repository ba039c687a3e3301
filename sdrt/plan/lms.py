"""Linear multistep in sigma space (Adams-Bashforth over uneven steps; Hairer et al. 1993, III.5) as plan rows.

State slots: x and the last three slopes dx/dσ.
"""

from collections.abc import Mapping

import numpy as np

from sdrt.bundle import JsonValue
from sdrt.plan.asked import AskedSteps, refuse_noise, refuse_own_grid
from sdrt.plan.rows import SamplingPlan
from sdrt.plan.sigma_grid import GRID_FIELDS, cut_grid, network_scales, sigma_grid, slope_coefficients
from sdrt.schedule import Floats, NoiseSchedule, read_flag

FIELDS: Mapping[str, JsonValue] = GRID_FIELDS

ORDER = 4


def lms_plan(config: Mapping[str, JsonValue], schedule: NoiseSchedule, asked: AskedSteps) -> SamplingPlan:
    """One row a step: x' = x + Σ cₖ·dₖ, cₖ the integral from σ to σ' of the Lagrange polynomial of slope k steps ago.

    Step i of the whole grid is of order min(i + 1, 4). Begun later it is so too, as in the reference: slopes of steps
    that were left out are missing from the sum. RequestError for a grid of one's own.
    """
    refuse_noise(asked)
    refuse_own_grid(asked, "timesteps", "sigmas")
    whole = sigma_grid(heeded_bounds(config), schedule, _from_the_start(asked))
    weights = lagrange_integrals(whole.sigmas)[asked.first :]
    grid = cut_grid(config, asked, whole.timesteps, whole.sigmas)
    sigmas = grid.sigmas[:-1]
    slope_sample, slope_output = slope_coefficients(schedule.prediction_type, sigmas)
    transitions = np.zeros((len(sigmas), ORDER, ORDER + 2))
    transitions[:, 0, 0] = 1 + weights[:, 0] * slope_sample
    transitions[:, 0, 1:ORDER] = weights[:, 1:]
    transitions[:, 0, ORDER] = weights[:, 0] * slope_output
    transitions[:, 1, 0], transitions[:, 1, ORDER] = slope_sample, slope_output
    transitions[:, range(2, ORDER), range(1, ORDER - 1)] = 1
    return SamplingPlan(
        timesteps=grid.timesteps,
        input_scales=network_scales(sigmas),
        transitions=transitions,
        initial_scale=grid.initial_scale,
        noised=grid.noised,
    )


def heeded_bounds(config: Mapping[str, JsonValue]) -> Mapping[str, JsonValue]:
    """The config without `sigma_min` and `sigma_max` where the reference passes them over: with Karras's sigmas."""
    return {**config, "sigma_min": None, "sigma_max": None} if read_flag(config, "use_karras_sigmas") else config


def lagrange_integrals(sigmas: Floats) -> Floats:
    """cₖ of each step i, of order min(i + 1, 4): float64 [steps, 4] for sigmas float64 [steps + 1].

    Gauss-Legendre quadrature with two nodes, which is exact for cubics.
    """
    steps = len(sigmas) - 1
    nodes, node_weights = np.polynomial.legendre.leggauss(2)
    center, radius = (sigmas[:-1] + sigmas[1:]) / 2, np.diff(sigmas) / 2
    at = center[:, None] + radius[:, None] * nodes
    known = np.arange(steps)[:, None] - np.arange(ORDER)
    past = sigmas[np.maximum(known, 0)]
    weights = np.zeros((steps, ORDER))
    for k in range(ORDER):
        values = np.ones_like(at)
        for other in range(ORDER):
            if other != k:
                factor = (at - past[:, other, None]) / (past[:, k] - past[:, other])[:, None]
                values = np.where(known[:, other, None] >= 0, values * factor, values)
        weights[:, k] = np.where(known[:, k] >= 0, radius * (values @ node_weights), 0)
    return weights


def _from_the_start(asked: AskedSteps) -> AskedSteps:
    return AskedSteps(num_inference_steps=asked.num_inference_steps)
