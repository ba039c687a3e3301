"""PNDM without Runge-Kutta steps, also called PLMS (Liu et al. 2022), as plan rows.

State slots: the latents, the latents before the first step (which the second row steps from again), and the three
last model outputs, newest first.
"""

from collections.abc import Mapping

import numpy as np

from sdrt.bundle import JsonValue
from sdrt.plan.asked import AskedSteps, refuse_noise, refuse_own_grid
from sdrt.plan.ddim import alphas_cumprod_or_final, integer_timesteps, noised_at
from sdrt.plan.rows import SamplingPlan
from sdrt.schedule import Floats, NoiseSchedule, read_flag, unsupported_field

FIELDS: Mapping[str, JsonValue] = {
    "set_alpha_to_one": False,
    "skip_prk_steps": False,
    "steps_offset": 0,
    "timestep_spacing": "leading",
}

_SLOTS = 5
_LATENTS, _RESTORED, _NEWEST_OUTPUT = 0, 1, 2
# Adams-Bashforth: weights of the model output and of the outputs before it, newest first (eq. 12; lower orders first).
_ADAMS_BASHFORTH = (
    np.array([1.0, 0.0, 0.0, 0.0]),
    np.array([3.0, -1.0, 0.0, 0.0]) / 2,
    np.array([23.0, -16.0, 5.0, 0.0]) / 12,
    np.array([55.0, -59.0, 37.0, -9.0]) / 24,
)
_AVERAGE = np.array([0.5, 0.5, 0.0, 0.0])


def pndm_plan(config: Mapping[str, JsonValue], schedule: NoiseSchedule, asked: AskedSteps) -> SamplingPlan:
    """n + 1 rows for n ≥ 2 steps (1 for 1): the first step is made twice, as a predictor and with its correction.

    RequestError unless `skip_prk_steps`, and for prediction_type "sample", which the family does not define.
    """
    if not read_flag(config, "skip_prk_steps"):
        raise unsupported_field("skip_prk_steps", config["skip_prk_steps"])
    if schedule.prediction_type == "sample":
        raise unsupported_field("prediction_type", "sample")
    refuse_noise(asked)
    refuse_own_grid(asked, "timesteps", "sigmas")
    grid = integer_timesteps(config, schedule, asked.num_inference_steps)
    evaluated = np.concatenate([grid[:2], grid[1:]])
    evaluated = evaluated[asked.first :]
    stride = len(schedule) // asked.num_inference_steps
    start, end = evaluated.copy(), evaluated - stride
    if len(evaluated) > 1:
        start[1], end[1] = evaluated[1] + stride, evaluated[1]
    sample, output = _transfer(schedule, schedule.alphas_cumprod[start], alphas_cumprod_or_final(config, schedule, end))
    transitions = np.zeros((len(evaluated), _SLOTS, _SLOTS + 2))
    for row, transition in enumerate(transitions):
        _fill(transition, row, sample[row], output[row])
    return SamplingPlan(
        timesteps=evaluated.astype(np.float64),
        input_scales=np.ones(len(evaluated)),
        transitions=transitions,
        initial_scale=1.0,
        noised=noised_at(schedule, evaluated[0]),
    )


def _transfer(
    schedule: NoiseSchedule,
    alpha_bar: Floats,
    alpha_bar_next: Floats,
) -> tuple[Floats, Floats]:
    """(a, b) with x' = a·x + b·model_output, eq. 9 (for v_prediction, ε = √ᾱ·v + √(1 - ᾱ)·x first)."""
    scale = np.sqrt(alpha_bar_next / alpha_bar)
    remainder = alpha_bar * np.sqrt(1 - alpha_bar_next) + np.sqrt(alpha_bar * (1 - alpha_bar) * alpha_bar_next)
    noise = -(alpha_bar_next - alpha_bar) / remainder
    if schedule.prediction_type == "v_prediction":
        return scale + noise * np.sqrt(1 - alpha_bar), noise * np.sqrt(alpha_bar)
    return scale, noise


def _fill(transition: Floats, row: int, sample: float, output: float) -> None:
    """Write one row's matrix: the latents' line, then what is kept for later rows."""
    model_output = _SLOTS
    correcting = row == 1
    weights = _AVERAGE if correcting else _ADAMS_BASHFORTH[min(max(row - 1, 0), 3)]
    transition[_LATENTS, _RESTORED if correcting else _LATENTS] = sample
    transition[_LATENTS, model_output] = output * weights[0]
    transition[_LATENTS, _NEWEST_OUTPUT:model_output] = output * weights[1:]
    if row == 0:
        transition[_RESTORED, _LATENTS] = 1
    if correcting:
        transition[_NEWEST_OUTPUT, _NEWEST_OUTPUT] = 1  # this output corrects the step and is not remembered
        return
    transition[_NEWEST_OUTPUT, model_output] = 1
    for older in range(_NEWEST_OUTPUT + 1, _SLOTS):
        transition[older, older - 1] = 1
