import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdrt.errors import RequestError
from sdrt.plan import MAX_STATE_SLOTS, SamplingPlan, ddim, ddpm, lcm, pndm, tcd
from sdrt.plan.asked import AskedSteps
from sdrt.schedule import SCHEDULE_FIELDS, NoiseSchedule

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
FAMILIES = {
    "ddim": (ddim.ddim_plan, ddim.FIELDS),
    "ddpm": (ddpm.ddpm_plan, ddpm.FIELDS),
    "lcm": (lcm.lcm_plan, lcm.FIELDS),
    "pndm": (pndm.pndm_plan, pndm.FIELDS),
    "tcd": (tcd.tcd_plan, tcd.FIELDS),
}


def plan_of(
    name: str,
    steps: int,
    *,
    eta: float = 0.0,
    first: int = 0,
    timesteps: tuple[float, ...] | None = None,
    sigmas: tuple[float, ...] | None = None,
    **fields: object,
) -> SamplingPlan:
    plan, known = FAMILIES[name]
    config = {**SCHEDULE_FIELDS, **known, **SD, **fields}
    asked = AskedSteps(num_inference_steps=steps, eta=eta, first=first, timesteps=timesteps, sigmas=sigmas)
    return plan(config, NoiseSchedule.from_config(config), asked)


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("ddpm", "variance_type", "learned"),
        ("ddpm", "variance_type", "learned_range"),
        ("ddpm", "variance_type", "fixed_large_log"),
        ("ddpm", "variance_type", "medium"),
        ("ddpm", "timestep_spacing", "cosine"),
        ("ddpm", "steps_offset", -1),
        ("lcm", "original_inference_steps", 0),
        ("lcm", "original_inference_steps", 1001),
        ("lcm", "original_inference_steps", 4),
        ("lcm", "timestep_scaling", "ten"),
        ("tcd", "original_inference_steps", 4),
        ("pndm", "prediction_type", "sample"),
        ("pndm", "skip_prk_steps", "no"),
    ],
)
def test_a_field_that_cannot_be_honoured_is_named_with_its_value(name: str, field: str, value: object):
    with pytest.raises(RequestError, match=field) as raised:
        plan_of(name, 5, **{field: value})
    assert str(value) in raised.value.message
    assert raised.value.hint


@pytest.mark.parametrize("name", ["ddpm", "lcm", "tcd"])
@pytest.mark.parametrize(
    "timesteps", [(), (5, 5), (1, 2), (1000, 1), (5, -1), (500.5, 1), (float("nan"),), (float("inf"), 1)], ids=str
)
def test_impossible_timesteps_of_one_s_own_are_refused(name: str, timesteps: tuple[float, ...]):
    with pytest.raises(RequestError, match="timesteps"):
        plan_of(name, len(timesteps), timesteps=timesteps)


@pytest.mark.parametrize("name", ["ddim", "pndm"])
def test_timesteps_of_one_s_own_are_refused_where_the_reference_takes_none(name: str):
    with pytest.raises(RequestError, match="takes no timesteps"):
        plan_of(name, 2, timesteps=(500, 1))


@pytest.mark.parametrize("name", FAMILIES)
def test_sigmas_of_one_s_own_are_refused(name: str):
    with pytest.raises(RequestError, match="takes no sigmas"):
        plan_of(name, 1, sigmas=(1.0, 0.0))


@pytest.mark.parametrize("name", ["ddpm", "lcm", "pndm"])
def test_eta_is_refused_where_it_would_do_nothing(name: str):
    with pytest.raises(RequestError, match=r"eta is 0\.5"):
        plan_of(name, 5, eta=0.5)


@pytest.mark.parametrize("eta", [-0.1, 1.1, float("nan")])
def test_an_impossible_gamma_is_refused(eta: float):
    with pytest.raises(RequestError, match="eta"):
        plan_of("tcd", 5, eta=eta)


def test_runge_kutta_steps_are_the_default_and_fill_every_slot():
    assert plan_of("pndm", 10).slots == MAX_STATE_SLOTS
    assert len(plan_of("pndm", 10)) == 19
    np.testing.assert_array_equal(plan_of("pndm", 10).transitions, plan_of("pndm", 10, skip_prk_steps=None).transitions)


def test_a_runge_kutta_step_goes_from_its_own_latents():
    plan = plan_of("pndm", 10)
    state, disturbed = np.zeros(6), np.zeros(6)
    for row in range(8):
        if row % 4 > 0:  # what the stages before made of the latents must not matter
            disturbed[0] += 100
        inputs = [0.1 * row + 0.2, 0.0]
        state, disturbed = (plan.transitions[row] @ np.concatenate([each, inputs]) for each in (state, disturbed))
    assert state[0] == disturbed[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_fifty_steps_are_made_within_five_milliseconds(name: str):
    def seconds() -> float:
        began = time.perf_counter()
        plan(config, schedule, asked)
        return time.perf_counter() - began

    plan, known = FAMILIES[name]
    config = {**SCHEDULE_FIELDS, **known, **SD}
    schedule, asked = NoiseSchedule.from_config(config), AskedSteps(num_inference_steps=50)
    assert min(seconds() for _ in range(10)) < 5e-3


@given(
    name=st.sampled_from(["ddim", "lcm", "tcd"]),
    steps=st.sampled_from([4, 5, 8, 10, 20, 25, 40, 50]),
    x0=st.floats(-3, 3),
    noise=st.floats(-3, 3),
    first=st.integers(0, 3),
)
@settings(max_examples=200, deadline=None)
def test_a_model_that_knows_the_image_lands_on_it(name: str, steps: int, x0: float, noise: float, first: int):
    plan = plan_of(name, steps, first=first, prediction_type="sample", set_alpha_to_one=True)
    state = np.array([plan.noised[0, 0] * x0 + plan.noised[0, 1] * noise])
    for transition in plan.transitions:
        state = transition @ np.concatenate([state, [x0, 0.0]])
    level = NoiseSchedule.from_config({**SCHEDULE_FIELDS, **SD}).alphas_cumprod[0]
    landed = np.sqrt(level) * x0 + np.sqrt(1 - level) * noise if name == "tcd" else x0  # TCD ends at timestep 0
    # The boundary scalings of LCM's last step: c_skip at 19 · 10 is 7e-6 of x, c_out 1 - 3.5e-6.
    assert state[0] == pytest.approx(landed, abs=1e-4 if name == "lcm" else 1e-9)


@pytest.mark.parametrize("first", [0, 3])
def test_runge_kutta_steps_with_a_model_that_knows_the_noise_land_on_the_image(first: int):
    x0, noise = 0.7, -1.3
    plan = plan_of("pndm", 20, set_alpha_to_one=True)
    state = np.zeros(6)
    state[0] = plan.noised[0, 0] * x0 + plan.noised[0, 1] * noise
    for transition in plan.transitions:
        state = transition @ np.concatenate([state, [noise, 0.0]])
    assert state[0] == pytest.approx(x0, abs=1e-9)


@given(
    steps=st.integers(1, 200),
    variance_type=st.sampled_from(["fixed_small", "fixed_large"]),
    spacing=st.sampled_from(["leading", "trailing", "linspace"]),
)
@settings(max_examples=100, deadline=None)
def test_ddpm_keeps_the_mean_of_every_level(steps: int, variance_type: str, spacing: str):
    plan = plan_of("ddpm", steps, variance_type=variance_type, timestep_spacing=spacing, prediction_type="sample")
    levels = NoiseSchedule.from_config({**SCHEDULE_FIELDS, **SD}).alphas_cumprod[plan.timesteps.astype(int)]
    following = np.append(levels[1:], 1.0)
    # On x = √ᾱ·x₀ the posterior's mean is √ᾱ'·x₀.
    means = plan.transitions[:, 0, 0] * np.sqrt(levels) + plan.transitions[:, 0, 1]
    np.testing.assert_allclose(means, np.sqrt(following), rtol=1e-9)
