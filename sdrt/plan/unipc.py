"""UniPC (Zhao et al. 2023, arXiv:2302.04867) as plan rows: a multistep predictor, and a corrector without evaluations.

State slots: the latents, what the next correction is made of, and past estimates of x₀ (or of the noise).
"""

from collections.abc import Mapping

import numpy as np

from sdrt.bundle import JsonValue
from sdrt.plan.asked import AskedSteps, refuse_noise, refuse_own_grid
from sdrt.plan.dpm_multistep import refuse_final_zero
from sdrt.plan.log_snr import (
    COMMON_FIELDS,
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
    "disable_corrector": [],
    "final_sigmas_type": "zero",
    "lower_order_final": True,
    "predict_x0": True,
    "rescale_betas_zero_snr": False,
    "shift_terminal": None,
    "solver_order": 2,
    "solver_p": None,
    "solver_type": "bh2",
    "steps_offset": 0,
    "time_shift_type": "exponential",
    "timestep_spacing": "linspace",
    "use_dynamic_shifting": False,
}

_SOLVER_TYPES = ("bh1", "bh2", "midpoint", "heun", "logrho")  # those of related solvers mean bh2 here


def unipc_plan(config: Mapping[str, JsonValue], schedule: NoiseSchedule, asked: AskedSteps) -> SamplingPlan:
    """One row a step: UniC on what the row before predicted (algorithm 1), then UniP (algorithm 2).

    Orders grow with the past, and with `lower_order_final` shrink with the steps that are left.
    """
    refuse_noise(asked)
    refuse_own_grid(asked, "timesteps", "sigmas")
    refuse_other_models(config, "use_dynamic_shifting")
    for name in ("solver_p", "shift_terminal"):
        if config[name] is not None:
            raise unsupported_field(name, config[name])
    order = read_integer(config, "solver_order", minimum=1, maximum=3)
    of_x0 = read_flag(config, "predict_x0")
    if not of_x0:
        refuse_final_zero(config)
    _refuse_infinite_last_step(config)
    grid = log_snr_grid(config, schedule, asked, own_end=True)
    corrects = _corrects(config, grid)
    steps = exponential_steps(grid.levels[:-1], grid.levels[1:], of_x0=of_x0)
    predicted, corrected = _integrals(config, steps, order)
    left = len(grid) - np.arange(len(grid))
    orders = np.minimum(np.arange(1, len(grid) + 1), order)
    if read_flag(config, "lower_order_final"):
        orders = np.minimum(orders, left)
    predictor = multistep_update(steps, grid.log_snr, orders, predicted, ahead=0)
    # No row comes after the last one to be corrected.
    corrector = multistep_update(steps, grid.log_snr, np.where(left > 1, orders + 1, 0), corrected, ahead=1)
    estimate = estimate_of(schedule, grid.levels[:-1], of_x0=of_x0, clamped=of_x0)
    return plan_on(config, schedule, grid, multistep_transitions(estimate, predictor, corrector, corrects))


def _refuse_infinite_last_step(config: Mapping[str, JsonValue]) -> None:
    """RequestError for options with which the step to sigma zero is not finite."""
    if config["final_sigmas_type"] != "zero":
        return
    if not read_flag(config, "lower_order_final"):
        raise unsupported_field("lower_order_final", False)
    if config["solver_type"] == "bh1":
        raise unsupported_field("solver_type", "bh1")


def _integrals(
    config: Mapping[str, JsonValue], steps: ExponentialSteps, order: int
) -> tuple[dict[int, Floats], dict[int, Floats]]:
    """For predictor and corrector, by how many estimates they take: exact, but for two the paper's B(h)/2 (eq. 5)."""
    with np.errstate(all="ignore"):
        exact = moments(steps, order + 1)
        scale = steps.span if read_choice(config, "solver_type", _SOLVER_TYPES) == "bh1" else exact[:, 0]
        two = np.column_stack([exact[:, 0], scale * steps.span / 2])
    every = {1: exact[:, :1], 2: two, **{count: exact[:, :count] for count in range(3, order + 2)}}
    return {count: every[count] for count in range(1, order + 1)}, {
        count: every[count] for count in range(2, order + 2)
    }


def _corrects(config: Mapping[str, JsonValue], grid: Grid) -> Floats:
    """Whether what each row predicts is corrected: [rows], by `disable_corrector`, the numbers of rows that are not."""
    disabled = config["disable_corrector"]
    numbers = disabled if isinstance(disabled, list) else None
    if numbers is None or not all(isinstance(row, int) and not isinstance(row, bool) for row in numbers):
        raise unsupported_field("disable_corrector", disabled)
    return np.array([row + grid.before not in numbers for row in range(len(grid))], np.float64)
