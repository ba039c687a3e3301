"""Samplers for flow matching (Lipman et al. 2023; Esser et al. 2024, arXiv:2403.03206), where x = (1 - σ)·x₀ + σ·ε.

State slots: x, and for Heun's method the old x with half of its velocity.
"""

from collections.abc import Mapping

import numpy as np

from sdrt.bundle import JsonValue
from sdrt.errors import RequestError
from sdrt.plan.asked import AskedSteps, check_descending, refuse_noise, refuse_own_grid
from sdrt.plan.heun import heun_transitions
from sdrt.plan.rows import SamplingPlan
from sdrt.plan.sigma_grid import interleaved
from sdrt.plan.spacing import SPACING_FIELDS, respaced_sigmas
from sdrt.schedule import (
    MAX_TRAIN_TIMESTEPS,
    Floats,
    read_choice,
    read_flag,
    read_integer,
    read_number,
    rounded_to_float32,
    unsupported_field,
)

HEUN_FIELDS: Mapping[str, JsonValue] = {"num_train_timesteps": 1000, "shift": 1.0}
EULER_FIELDS: Mapping[str, JsonValue] = {
    **HEUN_FIELDS,
    **SPACING_FIELDS,
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "invert_sigmas": False,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    # No field of the scheduler's: the mu that pipelines reckon from the four above and the image's size, where shifting
    # is dynamic.
    "mu": None,
    "shift_terminal": None,
    # Nor these two: bounds of respaced sigmas, which it heeds where a config has them.
    "sigma_max": None,
    "sigma_min": None,
    "stochastic_sampling": False,
    "time_shift_type": "exponential",
    "use_dynamic_shifting": False,
}


def flow_match_euler_plan(config: Mapping[str, JsonValue], asked: AskedSteps) -> SamplingPlan:
    """One row a step: x' = x + (σ' - σ)·v, or with `stochastic_sampling` (1 - σ')·(x - σ·v) + σ'·noise.

    Sigmas of one's own are those before each step, and are shifted as all are; timesteps of one's own are told to the
    network as they are. RequestError for `use_dynamic_shifting` without a mu.
    """
    refuse_noise(asked)
    timesteps, levels = _euler_grid(config, asked)
    sigmas, following = levels[:-1], levels[1:]
    transitions = np.zeros((len(sigmas), 1, 3))
    stochastic = read_flag(config, "stochastic_sampling")
    if stochastic:
        transitions[:, 0, 0] = 1 - following
        transitions[:, 0, 1] = -(1 - following) * sigmas
        transitions[:, 0, 2] = following
    else:
        transitions[:, 0, 0] = 1
        transitions[:, 0, 1] = following - sigmas
    return SamplingPlan(
        timesteps=timesteps,
        input_scales=np.ones(len(sigmas)),
        transitions=transitions,
        initial_scale=1.0,
        noised=np.stack([1 - sigmas, sigmas], axis=1),
        draws=np.full(len(sigmas), stochastic),
    )


def flow_match_heun_plan(config: Mapping[str, JsonValue], asked: AskedSteps) -> SamplingPlan:
    """Two rows a step, x'' = x + (σ' - σ)·v and x' = x + (σ' - σ)·(v + v'') / 2; one for the step to sigma zero.

    RequestError for a grid of one's own.
    """
    refuse_noise(asked)
    refuse_own_grid(asked, "timesteps", "sigmas")
    train_timesteps = _train_timesteps(config)
    shift = _shift(config)
    sigmas = _shifted(_unshifted(train_timesteps, asked.num_inference_steps, shift), shift)
    sigmas = rounded_to_float32(sigmas)[asked.first :]
    timesteps = rounded_to_float32(sigmas * train_timesteps)
    rows = 2 * len(sigmas) - 1
    evaluated = interleaved(sigmas, sigmas[1:])
    return SamplingPlan(
        timesteps=interleaved(timesteps, timesteps[1:]),
        input_scales=np.ones(rows),
        transitions=heun_transitions(np.append(sigmas, 0), np.zeros(len(sigmas)), np.ones(len(sigmas))),
        initial_scale=1.0,
        noised=np.stack([1 - evaluated, evaluated], axis=1),
    )


def _euler_grid(config: Mapping[str, JsonValue], asked: AskedSteps) -> tuple[Floats, Floats]:
    """Timesteps float64 [steps] and sigmas float64 [steps + 1], from `asked.first` on."""
    train_timesteps = _train_timesteps(config)
    sigmas = _start_sigmas(config, asked, train_timesteps)
    sigmas = _dynamically_shifted(config, sigmas) if _dynamic(config) else _shifted(sigmas, _shift(config))
    sigmas = _stretched(config, sigmas)
    respaced = respaced_sigmas(config, sigmas)
    sigmas = rounded_to_float32(sigmas if respaced is None else respaced)
    timesteps = sigmas * train_timesteps if asked.timesteps is None else np.array(asked.timesteps, np.float64)
    final = 0.0
    if read_flag(config, "invert_sigmas"):  # from image to noise, whatever timesteps were asked for
        sigmas, final = rounded_to_float32(1 - sigmas), 1.0
        timesteps = sigmas * train_timesteps
    return rounded_to_float32(timesteps)[asked.first :], np.append(sigmas, final)[asked.first :]


def _start_sigmas(config: Mapping[str, JsonValue], asked: AskedSteps, train_timesteps: int) -> Floats:
    """Sigmas before they are shifted: one's own, those of one's own timesteps, or even ones; float64 [steps]."""
    smallest = float(np.finfo(np.float32).tiny)
    if asked.sigmas is not None:
        check_descending("sigmas", asked.sigmas, low=smallest, high=1.0)
        return rounded_to_float32(np.array(asked.sigmas, np.float64))
    if asked.timesteps is not None:
        check_descending("timesteps", asked.timesteps, low=smallest, high=train_timesteps)
        return rounded_to_float32(rounded_to_float32(np.array(asked.timesteps, np.float64)) / train_timesteps)
    return _unshifted(train_timesteps, asked.num_inference_steps, 1.0 if _dynamic(config) else _shift(config))


def _unshifted(train_timesteps: int, steps: int, shift: float) -> Floats:
    """Even sigmas from 1 to the smallest of training, which is shifted already and will be again: float64 [steps]."""
    smallest = np.float32(1) / np.float32(train_timesteps)
    smallest = np.float32(shift) * smallest / (np.float32(1) + np.float32(shift - 1) * smallest)
    return np.linspace(1.0, float(smallest), steps)


def _shifted(sigmas: Floats, shift: float) -> Floats:
    """Esser et al. 2024, eq. 23, with `shift` for √(m/n)."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def _dynamically_shifted(config: Mapping[str, JsonValue], sigmas: Floats) -> Floats:
    """The same with e^mu, or mu, for the shift, as `time_shift_type` says."""
    if config.get("mu") is None:
        raise RequestError(
            "the checkpoint's scheduler config means use_dynamic_shifting=True, but has no mu",
            hint="give a mu, or turn use_dynamic_shifting off and choose a shift in scheduler_config.json",
        )
    mu = read_number(config, "mu")
    shift = np.exp(mu) if read_choice(config, "time_shift_type", ("exponential", "linear")) == "exponential" else mu
    if not shift > 0:
        raise unsupported_field("mu", mu)
    return np.asarray(shift / (shift + (1 / sigmas - 1)), np.float64)


def _stretched(config: Mapping[str, JsonValue], sigmas: Floats) -> Floats:
    """Stretched away from 1 so that the last sigma is `shift_terminal`, where there is one other than zero."""
    if config["shift_terminal"] is None or config["shift_terminal"] == 0:
        return sigmas
    terminal = read_number(config, "shift_terminal")
    if not 0 < terminal < 1:
        raise unsupported_field("shift_terminal", terminal)
    return np.asarray(1 - (1 - sigmas) * (1 - terminal) / (1 - sigmas[-1]), np.float64)


def _dynamic(config: Mapping[str, JsonValue]) -> bool:
    return read_flag(config, "use_dynamic_shifting")


def _shift(config: Mapping[str, JsonValue]) -> float:
    shift = read_number(config, "shift")
    if shift <= 0:
        raise unsupported_field("shift", shift)
    return shift


def _train_timesteps(config: Mapping[str, JsonValue]) -> int:
    return read_integer(config, "num_train_timesteps", minimum=2, maximum=MAX_TRAIN_TIMESTEPS)
