"""Samplers for networks preconditioned as in EDM (Karras et al. 2022), which know sigmas only and no table of betas.

State slots: x, and for DPM-Solver++ multistep the denoised estimates of the rows before.
"""

from collections.abc import Mapping

import numpy as np

from sdrt.bundle import JsonValue
from sdrt.plan.asked import AskedSteps, refuse_noise, refuse_own_grid
from sdrt.plan.clamping import THRESHOLDING_FIELDS, asked_clamp
from sdrt.plan.log_snr import FEW_STEPS, RELATED_SOLVER_TYPES
from sdrt.plan.rows import Clamp, SamplingPlan
from sdrt.plan.sigma_grid import with_noise
from sdrt.schedule import (
    Floats,
    read_choice,
    read_flag,
    read_integer,
    read_number,
    rounded_to_float32,
    unsupported_field,
)

_FIELDS: Mapping[str, JsonValue] = {
    "final_sigmas_type": "zero",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "rho": 7.0,
    "sigma_data": 0.5,
    "sigma_max": 80.0,
    "sigma_min": 0.002,
    "sigma_schedule": "karras",
}
EULER_FIELDS: Mapping[str, JsonValue] = _FIELDS
DPM_MULTISTEP_FIELDS: Mapping[str, JsonValue] = {
    **_FIELDS,
    "algorithm_type": "dpmsolver++",
    "euler_at_final": False,
    "lower_order_final": True,
    "solver_order": 2,
    "solver_type": "midpoint",
    **THRESHOLDING_FIELDS,
}


def edm_euler_plan(config: Mapping[str, JsonValue], asked: AskedSteps) -> SamplingPlan:
    """One row a step, algorithm 2 without churn: x' = x + (σ' - σ)·(x - x₀) / σ; the network is told log(σ) / 4.

    RequestError for a grid of one's own (the reference takes sigmas for a ramp from 0 to 1 and spaces them anew).
    """
    refuse_noise(asked)
    refuse_own_grid(asked, "timesteps", "sigmas")
    sigmas = _sigmas(config, asked.num_inference_steps)
    final = sigmas[-1] if _ends_on_sigma_min(config) else 0.0
    levels = np.append(sigmas, final)[asked.first :]
    x0_sample, x0_output = _denoised(config, levels[:-1])
    kept = levels[1:] / levels[:-1]
    transitions = np.zeros((len(kept), 1, 3))
    transitions[:, 0, 0] = kept + (1 - kept) * x0_sample
    transitions[:, 0, 1] = (1 - kept) * x0_output
    return _plan(config, levels, transitions)


def edm_dpm_multistep_plan(config: Mapping[str, JsonValue], asked: AskedSteps) -> SamplingPlan:
    """One row a step, DPM-Solver++ of orders 1 to 3 and its SDE (Lu et al. 2022, arXiv:2211.01095) with α = 1.

    The first rows have fewer estimates behind them; the last is of order 1 if it lands on sigma zero, with
    `euler_at_final`, or with `lower_order_final` and fewer than 15 steps, which keeps the one before it to order 2.
    RequestError for a grid of one's own, and order 3 of the SDE, which is not defined.
    """
    refuse_noise(asked)
    refuse_own_grid(asked, "timesteps", "sigmas")
    order, stochastic = _solver(config)
    sigmas = _sigmas(config, asked.num_inference_steps)
    final = read_number(config, "sigma_min") if _ends_on_sigma_min(config) else 0.0
    levels = np.append(sigmas, rounded_to_float32(np.array([final])))[asked.first :]
    rows = len(levels) - 1
    estimates = _estimate_weights(config, levels, _orders(config, order, rows, asked.num_inference_steps))
    x0_sample, x0_output = _denoised(config, levels[:-1])
    kept = levels[1:] / levels[:-1]
    transitions = np.zeros((rows, order, order + 2))
    transitions[:, 0, 1:order] = estimates[:, 1:order]
    transitions[:, 0, 0] = (kept**2 if stochastic else kept) + estimates[:, 0] * x0_sample
    transitions[:, 0, order] = estimates[:, 0] * x0_output
    if order > 1:
        transitions[:, 1, 0], transitions[:, 1, order] = x0_sample, x0_output
        transitions[:, range(2, order), range(1, order - 1)] = 1
    if stochastic:
        transitions[:, 0, order + 1] = levels[1:] * np.sqrt(1 - kept**2)
    weights = np.zeros((rows, order))
    weights[:, 0], weights[:, 1:2] = estimates[:, 0], 1  # of x₀, in the latents and as the newest estimate
    clamp = asked_clamp(config, estimates=(x0_sample, x0_output), weights=weights)
    return _plan(config, levels, transitions, draws=np.full(rows, stochastic), clamp=clamp)


def _plan(
    config: Mapping[str, JsonValue],
    levels: Floats,
    transitions: Floats,
    *,
    draws: np.ndarray | None = None,
    clamp: Clamp | None = None,
) -> SamplingPlan:
    """levels: float64 [rows + 1], the sigmas before each row and after the last."""
    sigmas = levels[:-1]
    return SamplingPlan(
        timesteps=rounded_to_float32(np.log(sigmas) / 4),  # c_noise
        input_scales=1 / np.hypot(sigmas, read_number(config, "sigma_data")),  # c_in
        transitions=transitions,
        initial_scale=float(np.hypot(read_number(config, "sigma_max"), 1)),
        noised=with_noise(sigmas),
        draws=draws,
        clamp=clamp,
    )


def _denoised(config: Mapping[str, JsonValue], sigmas: Floats) -> tuple[Floats, Floats]:
    """(c_skip, c_out) with x₀ = c_skip·x + c_out·model_output (Karras et al. 2022, table 1); c_out < 0 where v."""
    data = read_number(config, "sigma_data")
    sign = 1 if read_choice(config, "prediction_type", ("epsilon", "v_prediction")) == "epsilon" else -1
    return data**2 / (sigmas**2 + data**2), sign * sigmas * data / np.hypot(sigmas, data)


def _sigmas(config: Mapping[str, JsonValue], count: int) -> Floats:
    """From `sigma_max` down to `sigma_min`, by eq. 5 or evenly in the logarithm: float64 [count]."""
    low, high = read_number(config, "sigma_min"), read_number(config, "sigma_max")
    if not 0 < low <= high:
        raise unsupported_field("sigma_min", low)
    if read_choice(config, "sigma_schedule", ("karras", "exponential")) == "exponential":
        logs = np.linspace(np.log(low), np.log(high), count).astype(np.float32)
        return np.exp(logs)[::-1].astype(np.float64)
    rho = read_number(config, "rho")
    if rho <= 0:
        raise unsupported_field("rho", rho)
    ramp = np.linspace(0, 1, count)
    first, last = high ** (1 / rho), low ** (1 / rho)
    return rounded_to_float32((first + ramp * (last - first)) ** rho)


def _ends_on_sigma_min(config: Mapping[str, JsonValue]) -> bool:
    return read_choice(config, "final_sigmas_type", ("zero", "sigma_min")) == "sigma_min"


def _solver(config: Mapping[str, JsonValue]) -> tuple[int, bool]:
    """The order, and whether it solves the SDE. "deis" comes from a related solver's config, and is the ODE here."""
    algorithm = read_choice(config, "algorithm_type", ("dpmsolver++", "sde-dpmsolver++", "deis"))
    order = read_integer(config, "solver_order", minimum=1, maximum=3)
    if algorithm == "deis" and not _ends_on_sigma_min(config):
        raise unsupported_field("final_sigmas_type", "zero")
    stochastic = algorithm == "sde-dpmsolver++"
    if stochastic and order == 3:
        raise unsupported_field("solver_order", 3)
    return order, stochastic


def _orders(config: Mapping[str, JsonValue], order: int, rows: int, steps: int) -> np.ndarray:
    """Each row's order: int64 [rows], of which the whole grid has `steps`."""
    orders = np.minimum(np.arange(rows) + 1, order)
    lowered = read_flag(config, "lower_order_final") and steps < FEW_STEPS
    if lowered and rows > 1:
        orders[-2] = min(orders[-2], 2)
    if lowered or read_flag(config, "euler_at_final") or not _ends_on_sigma_min(config):
        orders[-1] = 1
    return orders


def _estimate_weights(config: Mapping[str, JsonValue], levels: Floats, orders: np.ndarray) -> Floats:
    """How much of the x₀ of this row and the two before each row adds: float64 [rows, 3].

    The integrals of Lu et al. 2022, eq. 9, over a Taylor series in h = log(σ / σ') with finite differences.
    """
    stochastic = _solver(config)[1]
    kinds = ("midpoint", "heun", *RELATED_SOLVER_TYPES)
    heun = read_choice(config, "solver_type", kinds) == "heun"
    h = np.log(levels[:-1]) - np.log(levels[1:])
    rate = 2 if stochastic else 1
    gained = 1 - (levels[1:] / levels[:-1]) ** rate
    before, earlier = np.roll(h, 1), np.roll(h, 2)
    weights = np.zeros((len(h), 3))
    weights[:, 0] = gained
    second, third = np.flatnonzero(orders == 2), np.flatnonzero(orders == 3)
    slope = (1 - gained / (rate * h) if heun else gained / 2)[second] * (h / before)[second]
    weights[second, 0] += slope
    weights[second, 1] = -slope
    h, before, earlier, gained = h[third], before[third], earlier[third], gained[third]
    linear = 1 - gained / h  # of the first derivative times h, and `quadratic` of half of the second times h²
    quadratic = 0.5 - (h - gained) / h**2
    # Newton's divided differences: D1 = d₀ + r₀/(r₀ + r₁)·(d₀ - d₁) and D2 = (d₀ - d₁)/(r₀ + r₁).
    bend = (linear * before / (before + earlier)) + quadratic * h / (before + earlier)
    newest, oldest = (linear + bend) * h / before, bend * h / earlier
    weights[third] += np.stack([newest, -newest - oldest, oldest], axis=1)
    return weights
