"""DEIS, log-rho multistep (Zhang & Chen 2023, arXiv:2204.13902), as plan rows.

State slots: the latents, and the last estimates of the noise, one less than the order.
"""

from collections.abc import Mapping

import numpy as np

from sdrt.bundle import JsonValue
from sdrt.plan.asked import AskedSteps, refuse_noise, refuse_own_grid
from sdrt.plan.log_snr import (
    COMMON_FIELDS,
    FEW_STEPS,
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
from sdrt.schedule import NoiseSchedule, read_choice, read_flag, read_integer

FIELDS: Mapping[str, JsonValue] = {
    **COMMON_FIELDS,
    "algorithm_type": "deis",
    "lower_order_final": True,
    "solver_order": 2,
    "solver_type": "logrho",
    "steps_offset": 0,
    "time_shift_type": "exponential",
    "timestep_spacing": "linspace",
    "use_dynamic_shifting": False,
}

# Those of related solvers' configs mean deis and logrho here.
_ALGORITHMS = ("deis", "dpmsolver", "dpmsolver++")
_SOLVER_TYPES = ("logrho", "midpoint", "heun", "bh1", "bh2")


def deis_plan(config: Mapping[str, JsonValue], schedule: NoiseSchedule, asked: AskedSteps) -> SamplingPlan:
    """One row a step, eq. 14 with ρ-AB in log ρ: exact integrals of the polynomial through past noise estimates.

    The first steps are of the orders that their past allows; with `lower_order_final` and fewer than 15 steps the last
    one is of order 1, the one before of order 2 at most. The last sigma is never zero.
    """
    refuse_noise(asked)
    refuse_own_grid(asked, "timesteps", "sigmas")
    refuse_other_models(config, "use_dynamic_shifting")
    read_choice(config, "algorithm_type", _ALGORITHMS)
    read_choice(config, "solver_type", _SOLVER_TYPES)
    order = read_integer(config, "solver_order", minimum=1, maximum=3)
    grid = log_snr_grid(config, schedule, asked, own_end=True)
    orders = np.minimum(np.arange(1, len(grid) + 1), order)
    if read_flag(config, "lower_order_final") and grid.whole < FEW_STEPS:
        orders[-2:] = np.minimum(orders[-2:], 2)
        orders[-1] = 1
    steps = exponential_steps(grid.levels[:-1], grid.levels[1:], of_x0=False)
    exact = moments(steps, order)
    integrals = {count: exact[:, :count] for count in range(1, order + 1)}
    predictor = multistep_update(steps, grid.log_snr, orders, integrals, ahead=0)
    estimate = estimate_of(schedule, grid.levels[:-1], of_x0=False)
    return plan_on(config, schedule, grid, multistep_transitions(estimate, predictor))
