"""The reference of every plan: a diffusers scheduler run step by step on random model outputs, and the comparison."""

import importlib
import inspect
import sys
import types
from collections.abc import Callable, Mapping
from typing import NamedTuple

import diffusers
import numpy as np
import pytest
import torch

from sdrt.plan import SamplingPlan, build_plan
from sdrt.plan.asked import AskedSteps
from sdrt.plan.rows import Clamp
from sdrt.plan.spacing import SPACING_FIELDS
from sdrt.schedule import SCHEDULE_FIELDS, NoiseSchedule

STEPS = (1, 2, 3, 7, 20, 50)
MANY = 0  # stands for the most steps that every family can do with the spacing
SPACINGS = ("leading", "trailing", "linspace")
# Measured against float64 steps: 1e-13 where the sigmas are equal. Vendors' float32 square roots differ in the last
# place of a few of them, which makes it 1e-6 up to 50 steps, and for a thousand 4e-6 on Intel and 1.1e-5 on AMD. The
# promise is 1e-5 up to 50 steps.
TOLERANCE = 3e-6
TOLERANCE_MANY_STEPS = 3e-5
# Measured against float32 steps, 50 of them: 8e-6, the reference's own rounding.
TOLERANCE_FLOAT32 = 1e-5
TIMESTEP_TOLERANCE = 1e-4  # two last places of float32 at 999, where timesteps are fractions that come of the sigmas
SHAPE = (1, 4, 3, 5)
BROWNIAN = "DPMSolverSDEScheduler"
GRID_AT_FIRST = (BROWNIAN, "HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler")

STABLE_DIFFUSION = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
}
# The fields of scheduler_config.json in published checkpoints.
SD_1_5 = {"_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "trained_betas": None, **STABLE_DIFFUSION}
SD_2_1 = {
    **STABLE_DIFFUSION,
    "_class_name": "DDIMScheduler",
    "prediction_type": "v_prediction",
    "trained_betas": None,
}
SDXL = {
    **STABLE_DIFFUSION,
    "_class_name": "EulerDiscreteScheduler",
    "interpolation_type": "linear",
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
}
SD_TURBO = {**SDXL, "timestep_spacing": "trailing"}


class Reference(NamedTuple):
    """What a diffusers scheduler did: its timesteps, input scales, states after each step and the first scale.

    draws: for each row whether it drew noise, or None where it was handed over.
    """

    timesteps: np.ndarray
    input_scales: np.ndarray
    states: list[np.ndarray]
    initial_scale: float
    draws: list[bool] | None = None


def draws(count: int, seed: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((2 * count + 3, *SHAPE))


class BrownianPath:
    """Stands for the noise sampler of the reference's SDE: one path over sigma, each row adding its stretch to it."""

    def __init__(self, noise: torch.Tensor):
        self.noise = noise
        self.row = 0
        self.begun = self.middle = self.value = None

    def __call__(self, sigma: torch.Tensor, sigma_next: torch.Tensor) -> torch.Tensor:
        end = float(sigma_next)
        if self.row % 2 == 0:
            self.begun = self.middle = float(sigma)
            self.value = 0
        stretch = (self.middle - end) ** 0.5 * self.noise[2 + 2 * self.row]
        self.row, self.middle, self.value = self.row + 1, end, self.value + stretch
        return self.value / (self.begun - end) ** 0.5


def scheduler_class(class_name: str) -> type:
    """A class of diffusers, that with Brownian trees without the package that makes them."""
    if class_name != BROWNIAN:
        return getattr(diffusers, class_name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torchsde", types.ModuleType("torchsde"))
        return getattr(importlib.import_module("diffusers.schedulers.scheduling_dpmsolver_sde"), class_name)


def make_scheduler(class_name: str, config: Mapping[str, object], **overrides: object):
    """Without the grid of a thousand steps that some make at first, which takes a second."""
    found = scheduler_class(class_name)
    with pytest.MonkeyPatch.context() as patch:
        if class_name in GRID_AT_FIRST:
            patch.setattr(found, "set_timesteps", lambda self, *_: setattr(self, "sigmas", torch.zeros(1)))
        return found.from_config(dict(config), **overrides)


def run_reference(
    scheduler,
    steps: int,
    *,
    eta: float | None = None,
    dtype: torch.dtype = torch.float64,
    first: int = 0,
    grid: Mapping[str, object] | None = None,
    feedback: float = 0.0,
) -> Reference:
    """Step through, in float64 where asked: tables and sigmas as they are, everything after them in `dtype`.

    first: the step to begin with, as img2img does. grid: timesteps or sigmas of one's own, in the place of `steps`.
    eta: passed to each step where it is given.
    feedback: how much of what the network sees is in its output, beside the random numbers.
    Noise that the scheduler draws itself is the row's own of `draws`, as often as it asks.
    """
    scheduler.set_timesteps(**({"num_inference_steps": steps} if grid is None else grid))
    begin = first * scheduler.order
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    if dtype is torch.float64:
        for name in ("alphas_cumprod", "final_alpha_cumprod", "sigmas"):
            if isinstance(getattr(scheduler, name, None), torch.Tensor):
                setattr(scheduler, name, getattr(scheduler, name).double())
    timesteps = scheduler.timesteps[begin:]
    noise = torch.from_numpy(draws(len(timesteps))).to(dtype)
    brownian = type(scheduler).__name__ == BROWNIAN
    if brownian:
        scheduler.noise_sampler = BrownianPath(noise)
    initial = float(getattr(scheduler, "init_noise_sigma", 1.0))  # flow matching has neither this nor an input scale
    scale = getattr(scheduler, "scale_model_input", lambda sample, timestep: sample)
    sample = noise[0] * initial
    states, scales = [], []
    drawn = [False] * len(timesteps)
    with_eta = eta is not None and eta > 0
    given = with_eta and "variance_noise" in inspect.signature(scheduler.step).parameters
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "float32", dtype)  # the schedulers' upcasts to float32 must not lose float64
        for row, timestep in enumerate(timesteps):

            def draw(shape, *arguments, row=row, **options):
                drawn[row] = True
                return noise[2 + 2 * row].reshape(shape)

            patch.setattr(sys.modules[type(scheduler).__module__], "randn_tensor", draw, raising=False)
            scales.append(float(scale(torch.ones(1, dtype=dtype), timestep)))
            options = {} if eta is None else {"eta": eta}
            options |= {"variance_noise": noise[2 + 2 * row]} if given else {}
            output = noise[1 + 2 * row] + feedback * scales[-1] * sample
            sample = scheduler.step(output, timestep, sample, **options).prev_sample
            states.append(sample.numpy().astype(np.float64))
    return Reference(
        timesteps=timesteps.numpy().astype(np.float64),
        input_scales=np.array(scales),
        states=states,
        initial_scale=initial,
        draws=None if given or brownian else drawn,
    )


def run_plan(plan, feedback: float = 0.0, dtype: type[np.floating] = np.float64) -> list[np.ndarray]:
    """The states after each row; float32 is what the step graph reckons in, coefficients and all."""
    noise = draws(len(plan)).astype(dtype)
    state = np.zeros((plan.slots, *SHAPE), dtype)
    state[0] = noise[0] * dtype(plan.initial_scale)
    scales, transitions = plan.input_scales.astype(dtype), plan.transitions.astype(dtype)
    states = []
    for row in range(len(plan)):
        output = noise[1 + 2 * row] + dtype(feedback) * scales[row] * state[0]
        operands = np.concatenate([state, output[None], noise[2 + 2 * row][None]])
        excess = 0.0 if plan.clamp is None else clamped_excess(plan.clamp, row, state[0], output)
        state = np.tensordot(transitions[row], operands, 1)
        if plan.clamp is not None:
            state = state + plan.clamp.weights[row].astype(dtype).reshape(-1, 1, 1, 1, 1) * excess
        states.append(state[0])
    return states


def clamped_excess(clamp: Clamp, row: int, latents: np.ndarray, output: np.ndarray) -> np.ndarray:
    """What clamping changes of x₀, by the definition that `Clamp` states; in the precision of `latents`."""
    estimates = clamp.estimates[row].astype(latents.dtype)
    x0 = estimates[0] * latents + estimates[1] * output
    if clamp.ratio is None:
        return np.clip(x0, -clamp.limit, clamp.limit) - x0
    limit = np.clip(np.quantile(np.abs(x0), clamp.ratio).astype(latents.dtype), 1, clamp.limit)
    return np.clip(x0, -limit, limit) / limit - x0


def assert_agrees(plan, reference: Reference, tolerance: float = TOLERANCE, timestep_tolerance: float = 0.0) -> None:
    np.testing.assert_allclose(plan.timesteps, reference.timesteps, rtol=0, atol=timestep_tolerance)
    np.testing.assert_allclose(plan.input_scales, reference.input_scales, rtol=2e-7)
    assert plan.initial_scale == pytest.approx(reference.initial_scale, rel=2e-7)
    if reference.draws is not None:
        assert [plan.draws_noise(row) for row in range(len(plan))] == reference.draws
    for row, (ours, theirs) in enumerate(zip(run_plan(plan), reference.states, strict=True)):
        error = np.abs(ours - theirs).max() / np.abs(theirs).max()
        assert error <= tolerance, f"row {row} of {len(plan)}: {error:.1e}"


def check_family(
    plan: Callable[..., SamplingPlan],
    fields: Mapping[str, object],
    class_name: str,
    config: Mapping[str, object],
    steps: int,
    *,
    first: int = 0,
    grid: Mapping[str, object] | None = None,
    tolerance: float = TOLERANCE,
    timestep_tolerance: float = 0.0,
) -> SamplingPlan:
    """A family's function against the class, with the config's fields over the family's own defaults."""
    scheduler = make_scheduler(class_name, config)
    reference = run_reference(scheduler, steps, first=first, grid=grid)
    whole = {**SCHEDULE_FIELDS, **fields, **config}
    asked = AskedSteps(
        num_inference_steps=steps, first=first, **{name: tuple(values) for name, values in (grid or {}).items()}
    )
    with np.errstate(all="ignore"):
        made = plan(whole, NoiseSchedule.from_config(whole), asked)
    assert_agrees(made, reference, tolerance, timestep_tolerance)
    return made


def check(class_name: str, config: Mapping[str, object], steps: int, eta: float = 0.0) -> None:
    if steps == MANY:
        steps = 998 if config["timestep_spacing"] == "leading" else 999
    given = {"eta": eta} if eta > 0 else {}
    reference = run_reference(make_scheduler(class_name, config), steps, **given)
    plan = build_plan(scheduler_class=class_name, scheduler_config=config, num_inference_steps=steps, eta=eta)
    fractional = class_name == "EulerDiscreteScheduler" and any(config.get(name) is True for name in SPACING_FIELDS)
    assert_agrees(
        plan,
        reference,
        TOLERANCE if steps <= 50 else TOLERANCE_MANY_STEPS,
        TIMESTEP_TOLERANCE if fractional else 0.0,
    )
