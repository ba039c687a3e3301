"""Latent consistency sampling (Luo et al. 2023, "Latent Consistency Models") as plan rows: one state slot."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from sdrt.bundle import JsonValue
from sdrt.errors import RequestError
from sdrt.plan.asked import AskedSteps, refuse_noise, refuse_own_grid, whole_timesteps
from sdrt.plan.clamping import CLIPPING_FIELDS, THRESHOLDING_FIELDS, asked_clamp
from sdrt.plan.ddim import noised_at
from sdrt.plan.rows import SamplingPlan
from sdrt.schedule import NoiseSchedule, denoised_coefficients, read_integer, read_number

FIELDS: Mapping[str, JsonValue] = {
    **CLIPPING_FIELDS,
    **THRESHOLDING_FIELDS,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "original_inference_steps": 50,
    "rescale_betas_zero_snr": False,
    # The grid is that of distillation, and its last timestep is never passed: these three mean nothing here.
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "timestep_spacing": "leading",
    "timestep_scaling": 10.0,
}

_SIGMA_DATA = 0.5


def lcm_plan(config: Mapping[str, JsonValue], schedule: NoiseSchedule, asked: AskedSteps) -> SamplingPlan:
    """One row a step, algorithm 3: f = c_skip·x + c_out·x₀, then x' = √ᾱ'·f + √(1 - ᾱ')·noise; the last x' is f.

    c_skip = σ²/(s² + σ²), c_out = s/√(s² + σ²) for s = t · `timestep_scaling`, σ = 0.5 (Song et al. 2023, eq. 5).
    RequestError for more steps than `original_inference_steps`.
    """
    refuse_noise(asked)
    refuse_own_grid(asked, "sigmas")
    timesteps = consistency_timesteps(config, schedule, asked)
    alpha_bar = schedule.alphas_cumprod[timesteps]
    x0_sample, x0_output = denoised_coefficients(schedule.prediction_type, np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar))
    scaled = timesteps * read_number(config, "timestep_scaling")
    c_skip = _SIGMA_DATA**2 / (scaled**2 + _SIGMA_DATA**2)
    c_out = scaled / np.sqrt(scaled**2 + _SIGMA_DATA**2)
    alpha_bar_next = np.append(alpha_bar[1:], 1.0)
    transitions = np.empty((len(timesteps), 1, 3))
    transitions[:, 0, 0] = np.sqrt(alpha_bar_next) * (c_out * x0_sample + c_skip)
    transitions[:, 0, 1] = np.sqrt(alpha_bar_next) * c_out * x0_output
    transitions[:, 0, 2] = np.sqrt(1 - alpha_bar_next)
    return SamplingPlan(
        timesteps=timesteps.astype(np.float64),
        input_scales=np.ones(len(timesteps)),
        transitions=transitions,
        initial_scale=1.0,
        noised=noised_at(schedule, timesteps),
        draws=np.arange(len(timesteps)) < len(timesteps) - 1,
        clamp=asked_clamp(config, estimates=(x0_sample, x0_output), weights=(np.sqrt(alpha_bar_next) * c_out)[:, None]),
    )


def consistency_timesteps(
    config: Mapping[str, JsonValue], schedule: NoiseSchedule, asked: AskedSteps
) -> npt.NDArray[np.int64]:
    """The steps' timesteps from `asked.first` on: evenly among those the model was distilled with, or one's own.

    The distillation's are k - 1, 2k - 1, … for k = T // `original_inference_steps`. int64 [n], descending.
    """
    if asked.timesteps is not None:
        return whole_timesteps(asked.timesteps, len(schedule))[asked.first :]
    distilled = read_integer(config, "original_inference_steps", minimum=1, maximum=len(schedule))
    if asked.num_inference_steps > distilled:
        raise RequestError(
            f"num_inference_steps is {asked.num_inference_steps}, but the scheduler config means"
            f" original_inference_steps={distilled}",
            hint=f"ask for at most {distilled} steps: a consistency model needs 1 to 8",
        )
    # Not index · distilled // count: the reference rounds the quotient first, and floors what may lie just below.
    chosen = np.floor(np.linspace(0, distilled, asked.num_inference_steps, endpoint=False)).astype(np.int64)
    return ((distilled - chosen) * (len(schedule) // distilled) - 1)[asked.first :]
