"""DPM-Solver and DPM-Solver++ multistep (Lu et al. 2022, arXiv:2206.00927 and 2211.01095), SDEs too, as plan rows.

State slots: the latents, and the last estimates of x₀ (or of the noise), one less than the order.
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from sdrt.bundle import JsonValue
from sdrt.plan.asked import AskedSteps, refuse_noise, refuse_own_grid
from sdrt.plan.log_snr import (
    COMMON_FIELDS,
    FEW_STEPS,
    RELATED_SOLVER_TYPES,
    ExponentialSteps,
    Grid,
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
from sdrt.schedule import Floats, NoiseSchedule, read_choice, read_flag, read_integer, unsupported_field

FIELDS: Mapping[str, JsonValue] = {
    **COMMON_FIELDS,
    "algorithm_type": "dpmsolver++",
    "euler_at_final": False,
    "final_sigmas_type": "zero",
    "lambda_min_clipped": None,
    "lower_order_final": True,
    "rescale_betas_zero_snr": False,
    "solver_order": 2,
    "solver_type": "midpoint",
    "steps_offset": 0,
    "time_shift_type": "exponential",
    "timestep_spacing": "linspace",
    "use_dynamic_shifting": False,
    "use_lu_lambdas": False,
    "variance_type": None,
}

_ALGORITHMS = ("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++")


def dpm_multistep_plan(config: Mapping[str, JsonValue], schedule: NoiseSchedule, asked: AskedSteps) -> SamplingPlan:
    """One row a step: order 1 is DDIM, order 2 DPM-Solver++'s algorithm 2 ("2M"), order 3 its multistep third order.

    The first steps are of the orders that their past allows. The last one is of order 1 if it lands on sigma zero, with
    `euler_at_final`, or with `lower_order_final` and fewer than 15 steps, which also limits the one before to order 2.
    """
    refuse_noise(asked)
    refuse_own_grid(asked, "sigmas")
    refuse_other_models(config, "use_dynamic_shifting")
    algorithm = read_algorithm(config, _ALGORITHMS)
    order = read_integer(config, "solver_order", minimum=1, maximum=3)
    if algorithm == "sde-dpmsolver" and order == 3:  # which nobody has worked out
        raise unsupported_field("solver_order", order)
    stochastic, of_x0 = algorithm.startswith("sde-"), algorithm.endswith("++")
    grid = log_snr_grid(config, schedule, asked, truncates=config["beta_schedule"] == "squaredcos_cap_v2")
    steps = exponential_steps(grid.levels[:-1], grid.levels[1:], of_x0=of_x0, tau=float(stochastic))
    predictor = multistep_update(
        steps, grid.log_snr, _orders(config, grid, order), _integrals(steps, order, read_solver_type(config)), ahead=0
    )
    estimate = estimate_of(schedule, grid.levels[:-1], of_x0=of_x0)
    return plan_on(config, schedule, grid, multistep_transitions(estimate, predictor), draws=stochastic)


def read_algorithm(config: Mapping[str, JsonValue], choices: tuple[str, ...]) -> str:
    """The config's `algorithm_type`, one of `choices`. RequestError where it cannot land on its final sigma."""
    algorithm = config["algorithm_type"]
    if algorithm == "deis":  # comes from a related solver's config
        algorithm = "dpmsolver++"
    if not isinstance(algorithm, str) or algorithm not in choices:
        raise unsupported_field("algorithm_type", algorithm)
    if not algorithm.endswith("++"):
        refuse_final_zero(config)
    return algorithm


def refuse_final_zero(config: Mapping[str, JsonValue]) -> None:
    """RequestError where the last sigma is zero: what estimates the noise cannot go there, as λ is infinite."""
    if read_choice(config, "final_sigmas_type", ("zero", "sigma_min")) == "zero":
        raise unsupported_field("final_sigmas_type", "zero")


def read_solver_type(config: Mapping[str, JsonValue]) -> str:
    """midpoint or heun: how the first derivative's integral is taken."""
    kind = read_choice(config, "solver_type", ("midpoint", "heun", *RELATED_SOLVER_TYPES))
    return "heun" if kind == "heun" else "midpoint"


def second_integral(steps: ExponentialSteps, exact: Floats) -> Floats:
    """The second derivative's share in a third-order step, as the solvers have it: float64 [rows].

    Half of the integral of u² (the Taylor term is u²/2); for the SDE of x₀ the reference subtracts h²/2 from what it
    should add that to, and pictures made with it depend on that.
    """
    return 0.5 * exact - np.where(steps.rate == 2, steps.span**2 / 2, 0.0)


def _integrals(steps: ExponentialSteps, order: int, solver_type: str) -> dict[int, Floats]:
    with np.errstate(all="ignore"):
        exact = moments(steps, max(order, 2))
        first = exact[:, 1] if solver_type == "heun" else exact[:, 0] * steps.span / 2
        all_orders = {1: exact[:, :1], 2: np.column_stack([exact[:, 0], first])}
        if order == 3:
            all_orders[3] = np.column_stack([exact[:, :2], second_integral(steps, exact[:, 2])])
    return {each: all_orders[each] for each in range(1, order + 1)}


def _orders(config: Mapping[str, JsonValue], grid: Grid, order: int) -> npt.NDArray[np.int64]:
    """Each row's order: int64 [rows]."""
    orders = np.minimum(np.arange(1, len(grid) + 1), order)
    lowered = read_flag(config, "lower_order_final") and grid.whole < FEW_STEPS
    if lowered:
        orders[-2:] = np.minimum(orders[-2:], 2)
    if lowered or grid.levels[-1] == 0 or read_flag(config, "euler_at_final"):
        orders[-1] = 1
    return orders
