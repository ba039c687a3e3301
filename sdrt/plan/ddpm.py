"""DDPM (Ho et al. 2020, "Denoising Diffusion Probabilistic Models") as plan rows: one state slot, the latents."""

from collections.abc import Mapping

import numpy as np

from sdrt.bundle import JsonValue
from sdrt.plan.asked import AskedSteps, refuse_noise, refuse_own_grid, whole_timesteps
from sdrt.plan.clamping import CLIPPING_FIELDS, THRESHOLDING_FIELDS, asked_clamp
from sdrt.plan.ddim import integer_timesteps, noised_at
from sdrt.plan.rows import SamplingPlan
from sdrt.schedule import (
    Floats,
    NoiseSchedule,
    denoised_coefficients,
    read_choice,
    unsupported_field,
)

FIELDS: Mapping[str, JsonValue] = {
    **CLIPPING_FIELDS,
    **THRESHOLDING_FIELDS,
    "rescale_betas_zero_snr": False,
    "steps_offset": 0,
    "timestep_spacing": "leading",
    "variance_type": "fixed_small",
}

_VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range")
_SMALLEST_VARIANCE = 1e-20  # the reference takes logarithms of some, and so adds this much to the last step


def ddpm_plan(config: Mapping[str, JsonValue], schedule: NoiseSchedule, asked: AskedSteps) -> SamplingPlan:
    """One row a step, eq. 6 and 7: x' = √ᾱ'·β/(1 - ᾱ)·x₀ + √(1 - β)·(1 - ᾱ')/(1 - ᾱ)·x + σ·noise, β = 1 - ᾱ/ᾱ'.

    ᾱ' is that of the next timestep of the grid, and 1 after the last. `variance_type` says what σ² is: the smaller
    bound of section 3.2, (1 - ᾱ')/(1 - ᾱ)·β, or the larger one, β. No noise is drawn at timestep 0.
    RequestError for variances that a model predicts.
    """
    refuse_noise(asked)
    refuse_own_grid(asked, "sigmas")
    if asked.timesteps is None:
        timesteps = integer_timesteps(config, schedule, asked.num_inference_steps)
    else:
        timesteps = whole_timesteps(asked.timesteps, len(schedule))
    timesteps = timesteps[asked.first :]
    alpha_bar = schedule.alphas_cumprod[timesteps]
    alpha_bar_next = np.append(alpha_bar[1:], 1.0)
    beta = 1 - alpha_bar / alpha_bar_next
    x0_sample, x0_output = denoised_coefficients(schedule.prediction_type, np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar))
    on_x0 = np.sqrt(alpha_bar_next) * beta / (1 - alpha_bar)
    drawn = timesteps > 0
    transitions = np.empty((len(timesteps), 1, 3))
    transitions[:, 0, 0] = on_x0 * x0_sample + np.sqrt(1 - beta) * (1 - alpha_bar_next) / (1 - alpha_bar)
    transitions[:, 0, 1] = on_x0 * x0_output
    transitions[:, 0, 2] = np.where(drawn, _standard_deviation(config, beta, alpha_bar, alpha_bar_next), 0)
    return SamplingPlan(
        timesteps=timesteps.astype(np.float64),
        input_scales=np.ones(len(timesteps)),
        transitions=transitions,
        initial_scale=1.0,
        noised=noised_at(schedule, timesteps),
        draws=drawn,
        clamp=asked_clamp(config, estimates=(x0_sample, x0_output), weights=on_x0[:, None]),
    )


def _standard_deviation(
    config: Mapping[str, JsonValue], beta: Floats, alpha_bar: Floats, alpha_bar_next: Floats
) -> Floats:
    """σ of each row's noise, as `variance_type` says."""
    if config["variance_type"] is None:  # from the config of a scheduler without this choice
        config = {**config, "variance_type": FIELDS["variance_type"]}
    kind = read_choice(config, "variance_type", _VARIANCES)
    if kind == "fixed_large":
        return np.sqrt(beta)
    if kind in ("fixed_small", "fixed_small_log"):  # the second only takes its logarithm on the way
        return np.sqrt(np.maximum((1 - alpha_bar_next) / (1 - alpha_bar) * beta, _SMALLEST_VARIANCE))
    # The other two are the model's to predict, and of "fixed_large_log" the reference takes √log β, which is no number.
    raise unsupported_field("variance_type", kind)
