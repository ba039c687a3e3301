"""DDIM (Song et al. 2021, "Denoising Diffusion Implicit Models") as plan rows: one state slot, the latents."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from sdrt.bundle import JsonValue
from sdrt.errors import RequestError
from sdrt.plan.asked import AskedSteps, refuse_own_grid
from sdrt.plan.clamping import CLIPPING_FIELDS, THRESHOLDING_FIELDS, asked_clamp
from sdrt.plan.rows import SamplingPlan
from sdrt.schedule import (
    Floats,
    NoiseSchedule,
    denoised_coefficients,
    noise_coefficients,
    read_flag,
    read_integer,
    read_spacing,
    spaced_timesteps,
)

FIELDS: Mapping[str, JsonValue] = {
    **CLIPPING_FIELDS,
    **THRESHOLDING_FIELDS,
    "rescale_betas_zero_snr": False,
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "timestep_spacing": "leading",
}


def ddim_plan(config: Mapping[str, JsonValue], schedule: NoiseSchedule, asked: AskedSteps) -> SamplingPlan:
    """One row a step, eq. 12: x' = √ᾱ'·x₀ + √(1 - ᾱ' - σ²)·ε + σ·noise, with σ from eq. 16 times `eta`.

    ᾱ' is that of the timestep T // n below, on every spacing; below zero it is 1 (`set_alpha_to_one`) or ᾱ₀.
    Only x₀ is clamped, not the ε with it. RequestError for an `eta` that asks for more noise than there is.
    """
    refuse_own_grid(asked, "timesteps", "sigmas")
    stride = len(schedule) // asked.num_inference_steps
    timesteps = integer_timesteps(config, schedule, asked.num_inference_steps)[asked.first :]
    alpha_bar = schedule.alphas_cumprod[timesteps]
    alpha_bar_next = alphas_cumprod_or_final(config, schedule, timesteps - stride)
    alpha, sigma = np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)
    variance = asked.eta**2 * (1 - alpha_bar_next) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_next)
    direction = 1 - alpha_bar_next - variance
    if np.any(direction < 0):
        raise RequestError(f"eta is {asked.eta:g}: more noise than the steps can hold", hint="give an eta from 0 to 1")
    x0_sample, x0_output = denoised_coefficients(schedule.prediction_type, alpha, sigma)
    noise_sample, noise_output = noise_coefficients(schedule.prediction_type, alpha, sigma)
    transitions = np.empty((len(timesteps), 1, 3))
    transitions[:, 0, 0] = np.sqrt(alpha_bar_next) * x0_sample + np.sqrt(direction) * noise_sample
    transitions[:, 0, 1] = np.sqrt(alpha_bar_next) * x0_output + np.sqrt(direction) * noise_output
    transitions[:, 0, 2] = np.sqrt(variance)
    return SamplingPlan(
        timesteps=timesteps.astype(np.float64),
        input_scales=np.ones(len(timesteps)),
        transitions=transitions,
        initial_scale=1.0,
        noised=noised_at(schedule, timesteps),
        draws=np.full(len(timesteps), asked.eta > 0),  # the last one too, though its share may be none
        clamp=asked_clamp(config, estimates=(x0_sample, x0_output), weights=np.sqrt(alpha_bar_next)[:, None]),
    )


def integer_timesteps(
    config: Mapping[str, JsonValue], schedule: NoiseSchedule, num_inference_steps: int
) -> npt.NDArray[np.int64]:
    """The steps' timesteps as table indices: int64 [n], descending. RequestError where one leaves the table."""
    offset = read_integer(config, "steps_offset", minimum=0, maximum=len(schedule))
    timesteps = spaced_timesteps(
        read_spacing(config),
        num_train_timesteps=len(schedule),
        num_inference_steps=num_inference_steps,
        steps_offset=offset,
    ).round()
    if timesteps[0] >= len(schedule):
        raise RequestError(
            f"{num_inference_steps} steps with steps_offset={offset} start at timestep {timesteps[0]:.0f},"
            f" but the model knows 0 to {len(schedule) - 1}",
            hint=f"ask for fewer steps than {num_inference_steps}",
        )
    return timesteps.astype(np.int64)


def alphas_cumprod_or_final(
    config: Mapping[str, JsonValue], schedule: NoiseSchedule, timesteps: npt.NDArray[np.int64]
) -> Floats:
    """ᾱ at `timesteps`, and past the last one 1 or ᾱ₀, as `set_alpha_to_one` says: float64 [len(timesteps)]."""
    final = 1.0 if read_flag(config, "set_alpha_to_one") else schedule.alphas_cumprod[0]
    return np.where(timesteps >= 0, schedule.alphas_cumprod[np.maximum(timesteps, 0)], final)


def noised_at(schedule: NoiseSchedule, timesteps: npt.NDArray[np.int64]) -> Floats:
    """How an image enters at timesteps: √ᾱ of its latents and √(1 - ᾱ) of noise, float64 [rows, 2]."""
    alpha_bar = schedule.alphas_cumprod[timesteps]
    return np.stack([np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)], axis=1)
