"""IPNDM (Liu et al. 2022, arXiv:2202.09778, and Zhang & Chen 2023), fourth order, as plan rows.

State slots: the latents and three past noise estimates.
"""

from collections.abc import Mapping

import numpy as np

from sdrt.bundle import JsonValue
from sdrt.plan.asked import AskedSteps, refuse_noise, refuse_own_grid
from sdrt.plan.log_snr import Estimate, Update, multistep_transitions
from sdrt.plan.rows import SamplingPlan
from sdrt.schedule import Floats, NoiseSchedule, unsupported_field

FIELDS: Mapping[str, JsonValue] = {"rescale_betas_zero_snr": False}  # which does not count either

_ADAMS_BASHFORTH = np.array(
    [[1, 0, 0, 0], [3 / 2, -1 / 2, 0, 0], [23 / 12, -16 / 12, 5 / 12, 0], [55 / 24, -59 / 24, 37 / 24, -9 / 24]]
)
_SMALLEST_ALPHA = 1e-8  # stands for the first α, which is zero


def ipndm_plan(config: Mapping[str, JsonValue], schedule: NoiseSchedule, asked: AskedSteps) -> SamplingPlan:
    """One row a step: DDIM's step (PNDM's eq. 11) with the Adams-Bashforth sum of the last four noise estimates.

    It has a schedule of its own, σ = sin²(πt/2) with timesteps from 1 to 0, and a network that predicts v on it; the
    checkpoint's betas and prediction type do not count. RequestError for trained betas.
    """
    refuse_noise(asked)
    refuse_own_grid(asked, "timesteps", "sigmas")
    if config.get("trained_betas") is not None:
        raise unsupported_field("trained_betas", config["trained_betas"])
    timesteps, alpha, sigma = (values[asked.first :] for values in _grid(asked.num_inference_steps))
    rows = len(timesteps)
    kept = alpha[1:] / np.maximum(alpha[:-1], _SMALLEST_ALPHA)
    weights = (sigma[1:] - kept * sigma[:-1])[:, None] * _ADAMS_BASHFORTH[np.minimum(np.arange(rows), 3)]
    update = Update(kept=kept, weights=weights, noise=np.zeros(rows))
    estimate = Estimate(sample=sigma[:-1], output=alpha[:-1], excess=np.zeros(rows))  # never clamped
    return SamplingPlan(
        timesteps=timesteps,
        input_scales=np.ones(rows),
        transitions=multistep_transitions(estimate, update)[:, :, :-1],
        initial_scale=1.0,
        noised=np.stack([alpha[:-1], sigma[:-1]], axis=1),
    )


def _grid(steps: int) -> tuple[Floats, Floats, Floats]:
    """Timesteps [steps], α and σ [steps + 1]: float64, from float32 arithmetic, which tells where α is small."""
    time = np.append(_float32_falling(steps), np.float32(0))
    sigma = np.sin((time * np.float32(np.pi) / np.float32(2)).astype(np.float64)).astype(np.float32) ** 2
    alpha = np.sqrt(np.float32(1) - sigma**2)
    timesteps = (np.arctan2(sigma.astype(np.float64), alpha).astype(np.float32) / np.float32(np.pi) * 2)[:-1]
    return timesteps.astype(np.float64), alpha.astype(np.float64), sigma.astype(np.float64)


def _float32_falling(steps: int) -> np.typing.NDArray[np.float32]:
    """1 down to, and without, 0 in equal float32 steps, each half counted from its own end."""
    step = float(np.float32(-1) / np.float32(steps))
    index = np.arange(steps)
    return np.where(index < (steps + 1) // 2, 1 + step * index, -step * (steps - index)).astype(np.float32)
