"""DPM-Solver and DPM-Solver++ singlestep (Lu et al. 2022, arXiv:2206.00927 and 2211.01095), the SDE too, as plan rows.

State slots: the latents; above order 1 also those at the start of the block, and the estimates since then.
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from sdrt.bundle import JsonValue
from sdrt.plan.asked import AskedSteps, refuse_noise, refuse_own_grid
from sdrt.plan.dpm_multistep import read_algorithm, read_solver_type, second_integral
from sdrt.plan.log_snr import (
    COMMON_FIELDS,
    Estimate,
    ExponentialSteps,
    Grid,
    Update,
    estimate_of,
    exponential_steps,
    log_snr_grid,
    moments,
    plan_on,
    polynomial_weights,
    refuse_other_models,
)
from sdrt.plan.rows import SamplingPlan
from sdrt.schedule import Floats, NoiseSchedule, read_flag, read_integer

FIELDS: Mapping[str, JsonValue] = {
    **COMMON_FIELDS,
    "algorithm_type": "dpmsolver++",
    "final_sigmas_type": "zero",
    "lambda_min_clipped": None,
    "lower_order_final": False,
    "solver_order": 2,
    "solver_type": "midpoint",
    "time_shift_type": "exponential",
    "use_dynamic_shifting": False,
    "variance_type": None,
}

_ALGORITHMS = ("dpmsolver", "dpmsolver++", "sde-dpmsolver++")


def dpm_singlestep_plan(config: Mapping[str, JsonValue], schedule: NoiseSchedule, asked: AskedSteps) -> SamplingPlan:
    """One row an evaluation, in blocks of `solver_order` rows: DPM-Solver's algorithms 1 and 2, and 1 of "++" (2S).

    Row k of a block steps anew from the block's start with all k evaluations since then.
    """
    refuse_noise(asked)
    refuse_own_grid(asked, "sigmas")
    refuse_other_models(config, "use_dynamic_shifting")
    algorithm = read_algorithm(config, _ALGORITHMS)
    order = read_integer(config, "solver_order", minimum=1, maximum=3)
    stochastic, of_x0 = algorithm.startswith("sde-"), algorithm.endswith("++")
    grid = log_snr_grid(config, schedule, asked)
    orders = _orders(config, grid, order)
    starts = np.arange(len(grid)) - orders + 1
    steps = exponential_steps(grid.levels[starts], grid.levels[1:], of_x0=of_x0, tau=float(stochastic))
    weights = np.zeros((len(grid), order))
    for each in range(1, order + 1):
        rows = np.flatnonzero(orders == each)
        weights[rows] = _weights(steps, grid.log_snr, rows, each, read_solver_type(config)) @ np.eye(each, order)
    update = Update(kept=steps.kept, weights=weights, noise=steps.noise)
    estimate = estimate_of(schedule, grid.levels[:-1], of_x0=of_x0)
    return plan_on(config, schedule, grid, _transitions(estimate, update, orders), draws=stochastic)


def _weights(
    steps: ExponentialSteps, log_snr: Floats, rows: npt.NDArray[np.int64], order: int, solver_type: str
) -> Floats:
    """What these rows, the `order`-th of their blocks, take of their block's estimates, newest first: [rows, order]."""
    with np.errstate(all="ignore"):
        integrals = moments(steps, order)
        if order == 2 and solver_type == "midpoint":
            integrals[:, 1] = integrals[:, 0] * steps.span / 2
        if order == 3:
            integrals[:, 2] = 2 * second_integral(steps, integrals[:, 2])
    # The midpoint solver of order 3 takes the newest estimate and the block's first one only.
    taken = [0, 2] if order == 3 and solver_type == "midpoint" else list(range(order))
    nodes = log_snr[rows[:, None] - taken] - log_snr[rows - order + 1, None]
    weights = np.zeros((len(rows), order))
    weights[:, taken] = steps.scale[rows, None] * polynomial_weights(nodes, integrals[rows, : len(taken)])
    return weights


def _orders(config: Mapping[str, JsonValue], grid: Grid, order: int) -> npt.NDArray[np.int64]:
    """Each row's place in its block, from 1: int64 [rows]. The last one may be lowered."""
    orders = np.arange(grid.whole) % order + 1
    if read_flag(config, "lower_order_final") or grid.levels[-1] == 0:
        # A last block that is not whole keeps its orders, unless it lands on sigma zero.
        orders[-1] = 1 if grid.whole % order == 0 or grid.levels[-1] == 0 else orders[-1]
    left = orders[grid.before :]
    return np.minimum(left, np.arange(1, len(left) + 1))


def _transitions(estimate: Estimate, update: Update, orders: npt.NDArray[np.int64]) -> Floats:
    rows, order = update.weights.shape
    kept = 1 if order == 1 else 2
    slots = kept + order - 1
    unit = np.eye(slots + 3)
    latest = estimate.parts(slots)
    known = np.concatenate([latest[:, None], np.broadcast_to(unit[kept:slots], (rows, order - 1, slots + 3))], axis=1)
    start = np.where(orders[:, None] == 1, unit[0], unit[kept - 1])
    transitions = np.zeros((rows, slots, slots + 3))
    transitions[:, 0] = update.kept[:, None] * start + update.noise[:, None] * unit[slots + 1]
    transitions[:, 0] += np.einsum("rk,rko->ro", update.weights, known)
    if order > 1:
        transitions[:, 1] = start
        transitions[:, kept:] = known[:, : order - 1]
    return transitions
