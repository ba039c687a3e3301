"""PNDM (Liu et al. 2022), with Runge-Kutta steps first or without them (PLMS), as plan rows.

State slots without them: the latents, the latents before the first step (which the second row steps from again), and
the three last model outputs, newest first. With them: also the weighted sum of a Runge-Kutta step's outputs.
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from sdrt.bundle import JsonValue
from sdrt.errors import RequestError
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

_LATENTS, _RESTORED, _NEWEST_OUTPUT, _OLDEST_OUTPUT = 0, 1, 2, 4
_SLOTS = 5
_SUM, _SLOTS_WITH_RUNGE_KUTTA = 5, 6
# Adams-Bashforth: weights of the model output and of the outputs before it, newest first (eq. 12; lower orders first).
_ADAMS_BASHFORTH = (
    np.array([1.0, 0.0, 0.0, 0.0]),
    np.array([3.0, -1.0, 0.0, 0.0]) / 2,
    np.array([23.0, -16.0, 5.0, 0.0]) / 12,
    np.array([55.0, -59.0, 37.0, -9.0]) / 24,
)
_AVERAGE = np.array([0.5, 0.5, 0.0, 0.0])
# Runge-Kutta (eq. 13): four evaluations a step, of which the sum makes the step.
_STAGES = 4
_RUNGE_KUTTA = np.array([1.0, 2.0, 2.0, 1.0]) / 6
_RUNGE_KUTTA_STEPS = 3  # as many as give the four outputs of the multistep rule its first three
_RUNGE_KUTTA_ROWS = _STAGES * _RUNGE_KUTTA_STEPS

_Indices = npt.NDArray[np.int64]


def pndm_plan(config: Mapping[str, JsonValue], schedule: NoiseSchedule, asked: AskedSteps) -> SamplingPlan:
    """n + 1 rows for n ≥ 2 steps (1 for 1): the first step is made twice, as a predictor and with its correction.

    Without `skip_prk_steps` n + 9 for n ≥ 4: three Runge-Kutta steps of four rows, a fourth of one row, and so on.
    RequestError for fewer steps of those, and for prediction_type "sample", which the family does not define.
    """
    if schedule.prediction_type == "sample":
        raise unsupported_field("prediction_type", "sample")
    refuse_noise(asked)
    refuse_own_grid(asked, "timesteps", "sigmas")
    grid = integer_timesteps(config, schedule, asked.num_inference_steps)
    stride = len(schedule) // asked.num_inference_steps
    skipped = read_flag(config, "skip_prk_steps")
    if skipped:
        evaluated = np.concatenate([grid[:2], grid[1:]])[asked.first :]
        start, end = _multistep_ends(evaluated, stride)
    else:
        evaluated, start, end = _runge_kutta_grid(grid, stride, asked.first)
    sample, output = _transfer(schedule, schedule.alphas_cumprod[start], alphas_cumprod_or_final(config, schedule, end))
    slots = _SLOTS if skipped else _SLOTS_WITH_RUNGE_KUTTA
    transitions = np.zeros((len(evaluated), slots, slots + 2))
    for row, transition in enumerate(transitions):
        if not skipped and row < _RUNGE_KUTTA_ROWS:
            _fill_runge_kutta(transition, row % _STAGES, sample[row], output[row])
        else:
            _fill_multistep(transition, row, sample[row], output[row])
    return SamplingPlan(
        timesteps=evaluated.astype(np.float64),
        input_scales=np.ones(len(evaluated)),
        transitions=transitions,
        initial_scale=1.0,
        noised=noised_at(schedule, evaluated),
    )


def _multistep_ends(evaluated: _Indices, stride: int) -> tuple[_Indices, _Indices]:
    """(from, to) of each row's transfer; the second row makes the first one's again."""
    start, end = evaluated.copy(), evaluated - stride
    if len(evaluated) > 1:
        start[1], end[1] = evaluated[1] + stride, evaluated[1]
    return start, end


def _runge_kutta_grid(grid: _Indices, stride: int, first: int) -> tuple[_Indices, _Indices, _Indices]:
    """(evaluated, from, to) of each row: twelve Runge-Kutta rows, then multistep ones.

    What a row does is counted from `first`, while the timesteps that Runge-Kutta steps begin at are the grid's own.
    """
    if len(grid) <= _RUNGE_KUTTA_STEPS:
        raise RequestError(
            f"num_inference_steps is {len(grid)}, but skip_prk_steps is off and Runge-Kutta steps need 4",
            hint="ask for 4 steps or more, or use another scheduler",
        )
    half = stride // 2
    begun = grid[:_RUNGE_KUTTA_STEPS]
    reached = grid[1 : _RUNGE_KUTTA_STEPS + 1]
    steps = np.stack([begun, reached + half, reached + half, reached], axis=1)
    evaluated = np.concatenate([steps.reshape(-1), grid[_RUNGE_KUTTA_STEPS:]])[first:]
    start, end = evaluated.copy(), evaluated - stride
    rows = np.arange(min(_RUNGE_KUTTA_ROWS, len(evaluated)))
    start[rows] = begun[rows // _STAGES]
    end[rows] = evaluated[rows] - np.where(rows % 2 == 0, half, 0)
    return evaluated, start, end


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


def _fill_multistep(transition: Floats, row: int, sample: float, output: float) -> None:
    """Write one row's matrix: the latents' line, then what is kept for later rows."""
    model_output = len(transition)
    correcting = row == 1
    weights = _AVERAGE if correcting else _ADAMS_BASHFORTH[min(max(row - 1, 0), 3)]
    transition[_LATENTS, _RESTORED if correcting else _LATENTS] = sample
    transition[_LATENTS, model_output] = output * weights[0]
    transition[_LATENTS, _NEWEST_OUTPUT : _OLDEST_OUTPUT + 1] = output * weights[1:]
    if row == 0:
        transition[_RESTORED, _LATENTS] = 1
    if correcting:
        transition[_NEWEST_OUTPUT, _NEWEST_OUTPUT] = 1  # this output corrects the step and is not remembered
        return
    _remember_output(transition)


def _fill_runge_kutta(transition: Floats, stage: int, sample: float, output: float) -> None:
    """Write the matrix of one of a Runge-Kutta step's four rows, each of which steps from the step's own latents."""
    model_output = len(transition)
    begins, ends = stage == 0, stage == _STAGES - 1
    from_slot = _LATENTS if begins else _RESTORED
    transition[_LATENTS, from_slot] = sample
    transition[_LATENTS, model_output] = output * (_RUNGE_KUTTA[stage] if ends else 1)
    if ends:
        transition[_LATENTS, _SUM] = output
    else:
        transition[_RESTORED, from_slot] = 1
        transition[_SUM, _SUM] = 0 if begins else 1
        transition[_SUM, model_output] = _RUNGE_KUTTA[stage]
    if begins:
        _remember_output(transition)
    else:
        kept = range(_NEWEST_OUTPUT, _OLDEST_OUTPUT + 1)
        transition[kept, kept] = 1


def _remember_output(transition: Floats) -> None:
    """The model output becomes the newest of those kept, and the oldest is forgotten."""
    transition[_NEWEST_OUTPUT, len(transition)] = 1
    for older in range(_NEWEST_OUTPUT + 1, _OLDEST_OUTPUT + 1):
        transition[older, older - 1] = 1
