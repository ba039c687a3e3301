"""DPM-Solver++ multistep, orders 1 and 2 (Lu et al. 2022, arXiv:2211.01095), as plan rows.

State slots: the latents, and the last denoised estimate for order 2.
"""

from collections.abc import Mapping

import numpy as np

from sdrt.bundle import JsonValue
from sdrt.plan.asked import AskedSteps, refuse_noise, refuse_own_grid
from sdrt.plan.euler import final_sigma
from sdrt.plan.rows import SamplingPlan
from sdrt.plan.spacing import sigma_bounds
from sdrt.schedule import (
    Floats,
    NoiseSchedule,
    denoised_coefficients,
    karras_sigmas,
    read_choice,
    read_flag,
    read_integer,
    read_number,
    read_spacing,
    refuse_flags,
    rounded_to_float32,
    spaced_timesteps,
    unsupported_field,
)

FIELDS: Mapping[str, JsonValue] = {
    "algorithm_type": "dpmsolver++",
    "dynamic_thresholding_ratio": 0.995,
    "euler_at_final": False,
    "final_sigmas_type": "zero",
    "flow_shift": 1.0,
    "lambda_min_clipped": None,
    "lower_order_final": True,
    "rescale_betas_zero_snr": False,
    "sample_max_value": 1.0,
    "sigma_max": None,
    "sigma_min": None,
    "solver_order": 2,
    "solver_type": "midpoint",
    "steps_offset": 0,
    "thresholding": False,
    "time_shift_type": "exponential",
    "timestep_spacing": "linspace",
    "use_beta_sigmas": False,
    "use_dynamic_shifting": False,
    "use_exponential_sigmas": False,
    "use_flow_sigmas": False,
    "use_karras_sigmas": False,
    "use_lu_lambdas": False,
    "variance_type": None,
}

_FEW_STEPS = 15  # below this, `lower_order_final` makes the last step a first-order one
_RELATED_SOLVER_TYPES = ("logrho", "bh1", "bh2")  # of related solvers' configs; they mean midpoint here


def dpm_multistep_plan(config: Mapping[str, JsonValue], schedule: NoiseSchedule, asked: AskedSteps) -> SamplingPlan:
    """One row a step, in x₀ and λ = log(α/σ): order 1 is DDIM, order 2 the paper's algorithm 2 ("2M").

    The first step is of order 1, and so is the last one if it lands on sigma zero, with `euler_at_final`, or with
    `lower_order_final` and fewer than 15 steps. RequestError for other algorithms, orders and sigma spacings.
    """
    order = _solver_order(config)
    refuse_noise(asked)
    refuse_own_grid(asked, "timesteps", "sigmas")
    timesteps, ratios = _grid(config, schedule, asked.num_inference_steps)
    few = len(timesteps) < _FEW_STEPS
    timesteps, ratios = timesteps[asked.first :], ratios[asked.first :]
    rows = len(timesteps)
    end = final_sigma(config, schedule)
    levels = np.append(ratios, end)  # σ/α, before each step and after the last
    alpha = 1 / np.sqrt(levels**2 + 1)
    sigma = levels * alpha
    x0_sample, x0_output = denoised_coefficients(schedule.prediction_type, alpha[:-1], sigma[:-1])
    kept = sigma[1:] / sigma[:-1]
    gained = alpha[1:] * (1 - levels[1:] / levels[:-1])  # α'·(1 - e⁻ʰ)
    slope = np.zeros(rows)
    if order == 2:
        slope[1:] = _slopes(config, levels, alpha)[1:]
        if end == 0 or read_flag(config, "euler_at_final") or (few and read_flag(config, "lower_order_final")):
            slope[-1] = 0
    now, before = gained + slope, -slope
    transitions = np.zeros((rows, order, order + 2))
    transitions[:, 0, 0] = kept + now * x0_sample
    transitions[:, 0, order] = now * x0_output
    if order == 2:
        transitions[:, 0, 1] = before
        transitions[:, 1, 0] = x0_sample
        transitions[:, 1, order] = x0_output
    return SamplingPlan(
        timesteps=timesteps,
        input_scales=np.ones(rows),
        transitions=transitions,
        initial_scale=1.0,
        noised=(float(alpha[0]), float(sigma[0])),
    )


def _slopes(config: Mapping[str, JsonValue], levels: Floats, alpha: Floats) -> Floats:
    """How much of x₀ - (x₀ of the row before) each second-order row adds: float64 [rows]; the first is meaningless."""
    h = np.log(levels[:-1]) - np.log(levels[1:])
    gained = alpha[1:] * (1 - levels[1:] / levels[:-1])
    inverse_r: Floats = h / np.roll(h, 1)
    per_slope: Floats = alpha[1:] - gained / h if _solver_type(config) == "heun" else 0.5 * gained
    return np.multiply(per_slope, inverse_r)


def _grid(config: Mapping[str, JsonValue], schedule: NoiseSchedule, num_inference_steps: int) -> tuple[Floats, Floats]:
    """Timesteps (whole numbers) and σ/α (rounded to float32): float64 [rows] each."""
    if read_flag(config, "use_karras_sigmas"):
        low, high = sigma_bounds(config, float(schedule.sigmas[0]), float(schedule.sigmas[-1]))
        sigmas = karras_sigmas(low, high, num_inference_steps)
        timesteps = schedule.timesteps_at(sigmas)
        # Cosine schedules keep the fraction, which the integer timesteps then drop.
        whole = np.trunc(timesteps) if config["beta_schedule"] == "squaredcos_cap_v2" else timesteps.round()
        return whole, rounded_to_float32(sigmas)
    timesteps = _timesteps(config, schedule, num_inference_steps)
    return timesteps, rounded_to_float32(schedule.sigmas_at(timesteps))


def _timesteps(config: Mapping[str, JsonValue], schedule: NoiseSchedule, num_inference_steps: int) -> Floats:
    """Whole timesteps, descending. Unlike other families' grids, n + 1 points of which the last is left out."""
    spacing = read_spacing(config)
    offset = read_integer(config, "steps_offset", minimum=0, maximum=len(schedule))
    last = _last_timestep(config, schedule)
    if spacing == "trailing":
        stride = len(schedule) / num_inference_steps
        return np.arange(last, 0, -stride)[:num_inference_steps].round() - 1
    points = spaced_timesteps(
        spacing, num_train_timesteps=last, num_inference_steps=num_inference_steps + 1, steps_offset=offset
    )
    return points.round()[:-1]


def _last_timestep(config: Mapping[str, JsonValue], schedule: NoiseSchedule) -> int:
    """How many training timesteps are left when those with λ below `lambda_min_clipped` are left out."""
    bound = config["lambda_min_clipped"]
    # No bound is written as null or as minus infinity.
    if bound is None or bound == -np.inf:
        return len(schedule)
    log_snr = -np.log(schedule.sigmas)[::-1]
    last = len(schedule) - int(np.searchsorted(log_snr, read_number(config, "lambda_min_clipped")))
    if last < 1:
        raise unsupported_field("lambda_min_clipped", bound)
    return last


def _solver_order(config: Mapping[str, JsonValue]) -> int:
    refuse_flags(
        config,
        "thresholding",
        "use_beta_sigmas",
        "use_dynamic_shifting",
        "use_exponential_sigmas",
        "use_flow_sigmas",
        "use_lu_lambdas",
    )
    # "deis" comes from a related solver's config and means the same here.
    if config["algorithm_type"] not in ("dpmsolver++", "deis"):
        raise unsupported_field("algorithm_type", config["algorithm_type"])
    if config["variance_type"] is not None:
        raise unsupported_field("variance_type", config["variance_type"])
    if config["solver_order"] not in (1, 2):
        raise unsupported_field("solver_order", config["solver_order"])
    return read_integer(config, "solver_order", minimum=1, maximum=2)


def _solver_type(config: Mapping[str, JsonValue]) -> str:
    kind = read_choice(config, "solver_type", ("midpoint", "heun", *_RELATED_SOLVER_TYPES))
    return "heun" if kind == "heun" else "midpoint"
