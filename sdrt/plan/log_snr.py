"""What samplers in λ = log(α/σ) share: their grids, integrals over a step, multistep weights and rows.

They solve the diffusion equation as Lu et al. 2022 (DPM-Solver++, arXiv:2211.01095, eq. 8) and Xue et al. 2023
(SA-Solver, arXiv:2309.05019, eq. 8): the linear part exactly, a polynomial through network outputs under an integral.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sdrt.bundle import JsonValue
from sdrt.errors import RequestError
from sdrt.plan.asked import AskedSteps, whole_timesteps
from sdrt.plan.clamping import THRESHOLDING_FIELDS, asked_clamp
from sdrt.plan.rows import SamplingPlan
from sdrt.plan.spacing import SPACING_FIELDS, respaced_sigmas
from sdrt.schedule import (
    Floats,
    NoiseSchedule,
    denoised_coefficients,
    noise_coefficients,
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

COMMON_FIELDS: Mapping[str, JsonValue] = {
    "flow_shift": 1.0,
    "sigma_max": None,
    "sigma_min": None,
    "use_flow_sigmas": False,
    **SPACING_FIELDS,
    **THRESHOLDING_FIELDS,
}
# What a grid is made with by samplers that have no such field.
_GRID_FIELDS: Mapping[str, JsonValue] = {
    "final_sigmas_type": "sigma_min",
    "lambda_min_clipped": None,
    "steps_offset": 0,
    "timestep_spacing": "linspace",
    "use_lu_lambdas": False,
}
RELATED_SOLVER_TYPES = ("logrho", "bh1", "bh2")  # of related solvers' configs; where they are none, midpoint is meant
FEW_STEPS = 15  # below this, `lower_order_final` lowers the order of the last two steps
_SERIES_TERMS = 18  # of an integral over a short step, where λ changes by less than one


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Grid:
    """Where the steps are: timesteps float64 [rows], whole; levels float64 [rows + 1], σ/α, also after the last.

    before: how many steps of the whole grid were left out before the first.
    """

    timesteps: Floats
    levels: Floats
    before: int

    def __len__(self) -> int:
        """The number of steps that are left."""
        return len(self.timesteps)

    @property
    def whole(self) -> int:
        """The number of steps with those that were left out."""
        return self.before + len(self)

    @property
    def log_snr(self) -> Floats:
        """λ: float64 [rows + 1], ascending; infinite where the last level is zero."""
        with np.errstate(divide="ignore"):
            return np.negative(np.log(self.levels))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExponentialSteps:
    """The exact part of steps: x' = kept·x + scale·∫₀ʰ e^(-rate·(h - u))·estimate(λ + u) du + noise·n.

    All float64 [rows]. span: h, how much λ grows; decay: e⁻ʰ.
    """

    kept: Floats
    scale: Floats
    rate: Floats
    noise: Floats
    span: Floats
    decay: Floats


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Update:
    """A linear update: kept·x + Σ weights[:, k]·(estimate of k evaluations before) + noise·n.

    kept, noise: float64 [rows]; weights: float64 [rows, terms].
    """

    kept: Floats
    weights: Floats
    noise: Floats


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Estimate:
    """What a row estimates: sample·x + output·model_output + excess·(what clamping changes of x₀). float64 [rows]."""

    sample: Floats
    output: Floats
    excess: Floats

    def parts(self, slots: int) -> Floats:
        """Its parts of [state; model_output; noise; excess], with `slots` state slots: float64 [rows, slots + 3]."""
        unit = np.eye(slots + 3)
        columns = ((self.sample, 0), (self.output, slots), (self.excess, slots + 2))
        return np.asarray(sum(values[:, None] * unit[column] for values, column in columns), np.float64)


def refuse_other_models(config: Mapping[str, JsonValue], *more: str) -> None:
    """RequestError for flow sigmas, learned variances and any flag of `more` that is on."""
    refuse_flags(config, "use_flow_sigmas", *more)
    if config.get("variance_type") in ("learned", "learned_range"):
        raise unsupported_field("variance_type", config["variance_type"])


def log_snr_grid(
    config: Mapping[str, JsonValue],
    schedule: NoiseSchedule,
    asked: AskedSteps,
    *,
    truncates: bool = False,
    own_end: bool = False,
) -> Grid:
    """The grid that config and request ask for, from step `asked.first` on.

    truncates: Karras' sigmas get the timestep below, not the nearest one, as others always do. own_end: where the last
    sigma is "sigma_min", respaced sigmas end with their own smallest one twice, not with the schedule's.
    """
    fields = {**_GRID_FIELDS, **config}
    sigmas = _respaced(fields, schedule, asked)
    if sigmas is None:
        timesteps = _timesteps(fields, schedule, asked)
        sigmas = schedule.sigmas_at(timesteps)
        own_end = False
    else:
        timesteps = schedule.timesteps_at(sigmas)
        nearest = (read_flag(fields, "use_karras_sigmas") or read_flag(fields, "use_lu_lambdas")) and not truncates
        timesteps = timesteps.round() if nearest else np.trunc(timesteps)
    zero = read_choice(fields, "final_sigmas_type", ("zero", "sigma_min")) == "zero"
    smallest = sigmas[-1] if own_end else schedule.sigmas[0]
    levels = rounded_to_float32(np.append(sigmas, 0.0 if zero else smallest))
    return Grid(timesteps=timesteps[asked.first :], levels=levels[asked.first :], before=asked.first)


def _respaced(fields: Mapping[str, JsonValue], schedule: NoiseSchedule, asked: AskedSteps) -> Floats | None:
    """Sigmas of another spacing, over the whole schedule; None where the config asks for none."""
    chosen = [name for name in (*SPACING_FIELDS, "use_lu_lambdas") if read_flag(fields, name)]
    if not chosen:
        return None
    if asked.timesteps is not None:
        raise RequestError(
            f"timesteps of one's own do not go together with {chosen[0]}", hint=f"leave out timesteps or {chosen[0]}"
        )
    low, high, steps = float(schedule.sigmas[0]), float(schedule.sigmas[-1]), asked.num_inference_steps
    if chosen == ["use_lu_lambdas"]:  # Lu et al. 2022 (DPM-Solver), section 3.2: evenly spaced λ
        first, last = rounded_to_float32(np.log([high, low]))
        return np.exp(np.linspace(first, last, steps))
    if "use_lu_lambdas" in chosen:
        raise unsupported_field("use_lu_lambdas", True)
    return respaced_sigmas(fields, np.array([high, low]), steps)


def _timesteps(fields: Mapping[str, JsonValue], schedule: NoiseSchedule, asked: AskedSteps) -> Floats:
    """Whole timesteps, descending. Unlike other families' grids, n + 1 points of which the last is left out."""
    if asked.timesteps is not None:
        return whole_timesteps(asked.timesteps, len(schedule)).astype(np.float64)
    steps = asked.num_inference_steps
    spacing = read_spacing(fields)
    offset = read_integer(fields, "steps_offset", minimum=0, maximum=len(schedule))
    last = _last_timestep(fields, schedule)
    if spacing == "trailing":
        stride = len(schedule) / steps
        return np.arange(last, 0, -stride)[:steps].round() - 1
    points = spaced_timesteps(spacing, num_train_timesteps=last, num_inference_steps=steps + 1, steps_offset=offset)
    return points.round()[:-1]


def _last_timestep(fields: Mapping[str, JsonValue], schedule: NoiseSchedule) -> int:
    """How many training timesteps are left when those with λ below `lambda_min_clipped` are left out."""
    bound = fields["lambda_min_clipped"]
    # No bound is written as null or as minus infinity.
    if bound is None or bound == -np.inf:
        return len(schedule)
    log_snr = -np.log(schedule.sigmas)[::-1]
    last = len(schedule) - int(np.searchsorted(log_snr, read_number(fields, "lambda_min_clipped")))
    if last < 1:
        raise unsupported_field("lambda_min_clipped", bound)
    return last


def alpha_and_sigma(levels: Floats) -> tuple[Floats, Floats]:
    """α and σ of unit variance, α² + σ² = 1, whose ratios σ/α are `levels`; shaped like these."""
    alpha = 1 / np.sqrt(levels**2 + 1)
    return alpha, levels * alpha


def estimate_of(schedule: NoiseSchedule, levels: Floats, *, of_x0: bool, clamped: bool = True) -> Estimate:
    """The estimate of x₀ or of the noise at `levels`. clamped: whether it changes with an x₀ that is clamped."""
    alpha, sigma = alpha_and_sigma(levels)
    coefficients = denoised_coefficients if of_x0 else noise_coefficients
    sample, output = coefficients(schedule.prediction_type, alpha, sigma)
    excess = np.ones_like(alpha) if of_x0 else -alpha / sigma
    return Estimate(sample=sample, output=output, excess=excess if clamped else np.zeros_like(alpha))


def exponential_steps(start: Floats, end: Floats, *, of_x0: bool, tau: float | Floats = 0.0) -> ExponentialSteps:
    """From levels `start` to levels `end`, float64 [rows] each; tau: how stochastic, 0 for the ODE, 1 for the SDE.

    of_x0: SA-Solver's proposition 4.2 with a constant τ; τ = 0 is DPM-Solver++ eq. 8. Else DPM-Solver eq. 3.4, and its
    SDE in Xue et al. 2023, appendix B.
    """
    tau = np.broadcast_to(np.asarray(tau, np.float64), start.shape)
    (alpha, sigma), (next_alpha, next_sigma) = alpha_and_sigma(start), alpha_and_sigma(end)
    with np.errstate(all="ignore"):  # what is not finite shows in the plan, and is refused there
        decay = end / start
        if of_x0:
            kept, scale, rate = next_sigma / sigma * decay**tau**2, (1 + tau**2) * next_alpha, 1 + tau**2
            noise = next_sigma * np.sqrt(np.maximum(1 - decay ** (2 * tau**2), 0))
        else:
            kept, scale, rate = next_alpha / alpha, -(1 + tau**2) * next_sigma, np.full(start.shape, -1.0)
            noise = tau * next_sigma * np.sqrt(np.maximum(decay**-2.0 - 1, 0))
        span = -np.log(decay)
    return ExponentialSteps(kept=kept, scale=scale, rate=rate, noise=noise, span=span, decay=decay)


def moments(steps: ExponentialSteps, count: int) -> Floats:
    """∫₀ʰ e^(-rate·(h - u))·uᵏ du for k = 0 … count - 1: float64 [rows, count].

    By parts from each k to the next one; for short steps, where that cancels, from the highest k (a series) down.
    """
    h, rate = steps.span, steps.rate
    values = np.empty((len(h), count))
    with np.errstate(all="ignore"):
        values[:, 0] = (1 - steps.decay**rate) / rate
        for k in range(1, count):
            values[:, k] = (h**k - k * values[:, k - 1]) / rate
        short = np.abs(rate * h) < 1
        h, rate = h[short], rate[short]
        series = np.zeros_like(h)
        for term in range(_SERIES_TERMS, -1, -1):  # Σ (-rate·h)ʲ·k! / (k + j + 1)!, innermost first
            series = (1 - rate * h * series) / (count + term)
        downward = np.empty((len(h), count))
        downward[:, -1] = h**count * series
        for k in range(count - 1, 0, -1):
            downward[:, k - 1] = (h**k - rate * downward[:, k]) / k
        values[short] = downward
    return values


def polynomial_weights(nodes: Floats, integrals: Floats) -> Floats:
    """Weights w with Σ w·nodeᵏ = integrals[:, k]: how a polynomial through values at nodes is integrated.

    nodes, integrals and the weights: float64 [rows, terms]. Not a number where two nodes are the same.
    """
    powers = nodes[:, None, :] ** np.arange(nodes.shape[1])[None, :, None]
    try:
        return np.asarray(np.linalg.solve(powers, integrals[:, :, None])[:, :, 0], np.float64)
    except np.linalg.LinAlgError:
        return np.full(nodes.shape, np.nan)


def multistep_update(
    steps: ExponentialSteps,
    log_snr: Floats,
    orders: npt.NDArray[np.int64],
    integrals: Mapping[int, Floats],
    *,
    ahead: int,
) -> Update:
    """The update of each row through the `orders[row]` newest estimates: those before row + 1 + ahead.

    log_snr: λ of all evaluations, float64 [rows + 1]. integrals: for each order, float64 [rows, order] in powers of
    λ - λ(row). ahead: 0 for a predictor; 1 for a corrector, which also knows the estimate at the end of the step.
    """
    weights = np.zeros((len(steps.span), max(integrals)))
    for order, values in integrals.items():
        rows = np.flatnonzero(orders == order)
        evaluations = rows[:, None] + ahead - np.arange(order)
        nodes = log_snr[evaluations] - log_snr[rows, None]
        weights[rows, :order] = steps.scale[rows, None] * polynomial_weights(nodes, values[rows])
    return Update(kept=steps.kept, weights=weights, noise=steps.noise)


def multistep_transitions(
    estimate: Estimate, predictor: Update, corrector: Update | None = None, corrects: Floats | None = None
) -> Floats:
    """The rows of a multistep method, with a column for what clamping changes: float64 [rows, slots, slots + 3].

    State slots: the latents; with a corrector, all that the next row's correction can be made of already; then the past
    estimates, newest first. estimate: that of the latents as predicted. corrector: the update from each row to the next
    with that one's estimate as its first term; corrects: [rows], whether that one uses it.
    """
    rows, terms = predictor.weights.shape
    kept = 1 if corrector is None else 2
    past = max(terms, 0 if corrector is None else corrector.weights.shape[1] - 1) - 1
    slots = kept + past
    unit = np.eye(slots + 3)
    latest = estimate.parts(slots)
    known = np.concatenate([latest[:, None], np.broadcast_to(unit[kept:slots], (rows, past, slots + 3))], axis=1)
    sample = np.tile(unit[0], (rows, 1))
    if corrector is not None and corrects is not None:
        using = np.flatnonzero(corrects[:-1]) + 1
        sample[using] = unit[1] + corrector.weights[using - 1, :1] * latest[using]

    def updated(update: Update, weights: Floats) -> Floats:
        summed = np.einsum("rk,rko->ro", weights, known[:, : weights.shape[1]])
        return np.asarray(update.kept[:, None] * sample + summed + update.noise[:, None] * unit[slots + 1], np.float64)

    transitions = np.zeros((rows, slots, slots + 3))
    transitions[:, 0] = updated(predictor, predictor.weights)
    if corrector is not None:
        transitions[:, 1] = updated(corrector, corrector.weights[:, 1:])
    transitions[:, kept:] = known[:, :past]
    return transitions


def plan_on(
    config: Mapping[str, JsonValue],
    schedule: NoiseSchedule,
    grid: Grid,
    transitions: Floats,
    *,
    draws: bool = False,
) -> SamplingPlan:
    """The plan of these rows, for latents of unit variance.

    transitions: with a column for what clamping changes of x₀, [rows, slots, slots + 3]. draws: every row draws noise,
    added or not.
    """
    alpha, sigma = alpha_and_sigma(grid.levels[:-1])
    x0 = denoised_coefficients(schedule.prediction_type, alpha, sigma)
    return SamplingPlan(
        timesteps=grid.timesteps,
        input_scales=np.ones(len(grid)),
        transitions=transitions[:, :, :-1],
        initial_scale=1.0,
        noised=np.stack([alpha, sigma], axis=1),
        draws=np.ones(len(grid), np.bool_) if draws else None,
        clamp=asked_clamp(config, estimates=x0, weights=transitions[:, :, -1]),
    )
