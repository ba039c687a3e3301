"""SA-Solver (Xue et al. 2023, arXiv:2309.05019), stochastic Adams predictor and corrector, as plan rows.

State slots: the latents, what the next correction is made of, and past estimates of x₀ (or of the noise).
"""

from collections.abc import Mapping

import numpy as np

from sdrt.bundle import JsonValue
from sdrt.plan.asked import AskedSteps, refuse_noise, refuse_own_grid
from sdrt.plan.log_snr import (
    COMMON_FIELDS,
    estimate_of,
    exponential_steps,
    log_snr_grid,
    moments,
    multistep_transitions,
    multistep_update,
    plan_on,
    refuse_other_models,
)
from sdrt.plan.rows import SamplingPlan
from sdrt.schedule import NoiseSchedule, read_choice, read_flag, read_integer, unsupported_field

FIELDS: Mapping[str, JsonValue] = {
    **COMMON_FIELDS,
    "algorithm_type": "data_prediction",
    "corrector_order": 2,
    "lambda_min_clipped": None,
    "lower_order_final": True,
    "predictor_order": 2,
    "steps_offset": 0,
    "tau_func": None,
    "timestep_spacing": "linspace",
    "variance_type": None,
}

_STOCHASTIC = (200, 800)  # the timesteps for which τ is 1; for others it is 0
_LARGEST_ORDER = 4


def sa_solver_plan(config: Mapping[str, JsonValue], schedule: NoiseSchedule, asked: AskedSteps) -> SamplingPlan:
    """One row a step, algorithm 1: corrector (eq. 17) on what the row before predicted, then predictor (eq. 14).

    The corrector adds the noise that its predictor added. Every row draws noise, with τ = 0 for nothing.
    """
    refuse_noise(asked)
    refuse_own_grid(asked, "timesteps", "sigmas")
    refuse_other_models(config)
    if config["tau_func"] is not None:
        raise unsupported_field("tau_func", config["tau_func"])
    of_x0 = read_choice(config, "algorithm_type", ("data_prediction", "noise_prediction")) == "data_prediction"
    predicting = read_integer(config, "predictor_order", minimum=1, maximum=_LARGEST_ORDER)
    correcting = read_integer(config, "corrector_order", minimum=1, maximum=_LARGEST_ORDER)
    grid = log_snr_grid(config, schedule, asked, own_end=True)
    low, high = _STOCHASTIC
    tau = ((grid.timesteps >= low) & (grid.timesteps <= high)).astype(np.float64)
    steps = exponential_steps(grid.levels[:-1], grid.levels[1:], of_x0=of_x0, tau=tau)
    exact = moments(steps, max(predicting, correcting, 2))
    integrals = {count: exact[:, :count] for count in range(1, max(predicting, correcting) + 1)}
    if of_x0 and 2 in integrals:  # the authors' code takes the linear term's integral without the exponential
        integrals[2] = np.column_stack([exact[:, 0], steps.span**2 / 2])
    row = np.arange(len(grid))
    left = len(grid) - row if read_flag(config, "lower_order_final") else np.full(len(grid), _LARGEST_ORDER)
    orders = np.minimum(np.minimum(predicting, left), row + 1)
    predictor = multistep_update(
        steps, grid.log_snr, orders, {count: integrals[count] for count in range(1, predicting + 1)}, ahead=0
    )
    orders = np.where(row < len(grid) - 1, np.minimum(np.minimum(correcting, left + 1), row + 2), 0)
    corrector = multistep_update(
        steps, grid.log_snr, orders, {count: integrals[count] for count in range(1, correcting + 1)}, ahead=1
    )
    estimate = estimate_of(schedule, grid.levels[:-1], of_x0=of_x0)
    return plan_on(
        config, schedule, grid, multistep_transitions(estimate, predictor, corrector, np.ones(len(grid))), draws=True
    )
