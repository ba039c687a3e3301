"""Trajectory consistency sampling (Zheng et al. 2024, "Trajectory Consistency Distillation") as plan rows: one slot."""

from collections.abc import Mapping

import numpy as np

from sdrt.bundle import JsonValue
from sdrt.errors import RequestError
from sdrt.plan import lcm
from sdrt.plan.asked import AskedSteps, refuse_own_grid
from sdrt.plan.ddim import noised_at
from sdrt.plan.rows import SamplingPlan
from sdrt.schedule import NoiseSchedule, denoised_coefficients, noise_coefficients

FIELDS: Mapping[str, JsonValue] = lcm.FIELDS  # timestep_scaling among them, though nothing here depends on it


def tcd_plan(config: Mapping[str, JsonValue], schedule: NoiseSchedule, asked: AskedSteps) -> SamplingPlan:
    """One row a step, algorithm 4: down to s = ⌊(1 - γ)·t'⌋, x_s = √ᾱ_s·x₀ + √(1 - ᾱ_s)·ε, then up to t' with noise.

    x' = √(ᾱ'/ᾱ_s)·x_s + √(1 - ᾱ'/ᾱ_s)·noise; t' is the next timestep of the grid, 0 after the last, which adds no
    noise. γ is `asked.eta`: 0 is deterministic, 1 the sampling of LCM without its boundary scalings.
    The reference reads options that clip or threshold, and does neither. RequestError for a γ outside 0 to 1.
    """
    refuse_own_grid(asked, "sigmas")
    if not 0 <= asked.eta <= 1:
        raise RequestError(f"eta is {asked.eta:g}", hint="give an eta from 0 to 1")
    timesteps = lcm.consistency_timesteps(config, schedule, asked)
    following = np.append(timesteps[1:], 0)
    # float32, in which the reference takes this floor: one rounding apart can be one timestep apart.
    lower = np.floor(np.float32(1 - asked.eta) * following.astype(np.float32)).astype(np.int64)
    alpha_bar, alpha_bar_next, alpha_bar_lower = (
        schedule.alphas_cumprod[index] for index in (timesteps, following, lower)
    )
    alpha, sigma = np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)
    x0_sample, x0_output = denoised_coefficients(schedule.prediction_type, alpha, sigma)
    noise_sample, noise_output = noise_coefficients(schedule.prediction_type, alpha, sigma)
    kept = np.sqrt(alpha_bar_next / alpha_bar_lower)
    on_x0, on_noise = kept * np.sqrt(alpha_bar_lower), kept * np.sqrt(1 - alpha_bar_lower)
    transitions = np.empty((len(timesteps), 1, 3))
    transitions[:, 0, 0] = on_x0 * x0_sample + on_noise * noise_sample
    transitions[:, 0, 1] = on_x0 * x0_output + on_noise * noise_output
    transitions[:, 0, 2] = np.sqrt(1 - alpha_bar_next / alpha_bar_lower)
    last = np.arange(len(timesteps)) == len(timesteps) - 1
    return SamplingPlan(
        timesteps=timesteps.astype(np.float64),
        input_scales=np.ones(len(timesteps)),
        transitions=transitions,
        initial_scale=1.0,
        noised=noised_at(schedule, timesteps),
        draws=~last if asked.eta > 0 else np.zeros(len(timesteps), bool),
    )
