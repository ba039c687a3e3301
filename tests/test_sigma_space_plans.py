"""What the samplers in sigma space refuse, and what their plans are whatever the numbers: finite and exact."""

import time
from collections.abc import Callable, Mapping

import numpy as np
import pytest

from sdrt.errors import RequestError
from sdrt.plan import SamplingPlan, dpm_sde, edm, euler, euler_ancestral, flow_match, heun, kdpm2, lms
from sdrt.plan.asked import AskedSteps
from sdrt.schedule import SCHEDULE_FIELDS, NoiseSchedule

WITH_BETAS = {
    "euler": (euler.euler_plan, euler.FIELDS),
    "euler_ancestral": (euler_ancestral.euler_ancestral_plan, euler_ancestral.FIELDS),
    "heun": (heun.heun_plan, heun.FIELDS),
    "kdpm2": (kdpm2.kdpm2_plan, kdpm2.FIELDS),
    "kdpm2_ancestral": (kdpm2.kdpm2_ancestral_plan, kdpm2.FIELDS),
    "lms": (lms.lms_plan, lms.FIELDS),
    "dpm_sde": (dpm_sde.dpm_sde_plan, dpm_sde.FIELDS),
}
WITHOUT_BETAS = {
    "edm_euler": (edm.edm_euler_plan, edm.EULER_FIELDS),
    "edm_dpm_multistep": (edm.edm_dpm_multistep_plan, edm.DPM_MULTISTEP_FIELDS),
    "flow_match_euler": (flow_match.flow_match_euler_plan, flow_match.EULER_FIELDS),
    "flow_match_heun": (flow_match.flow_match_heun_plan, flow_match.HEUN_FIELDS),
}
ALL = (*WITH_BETAS, *WITHOUT_BETAS)


def make(name: str, fields: Mapping[str, object] | None = None, **asked: object) -> SamplingPlan:
    steps = AskedSteps(**{"num_inference_steps": 8, **asked})
    if name in WITHOUT_BETAS:
        plan, defaults = WITHOUT_BETAS[name]
        return plan({**defaults, **(fields or {})}, steps)
    plan, defaults = WITH_BETAS[name]
    config = {**SCHEDULE_FIELDS, **defaults, **(fields or {})}
    return plan(config, NoiseSchedule.from_config(config), steps)


def land(plan: SamplingPlan, exact_output: Callable[[float, int], float], start: float) -> float:
    """Where one number ends when the network answers exactly, from `start`; without noise."""
    state = np.zeros(plan.slots)
    state[0] = start
    for row in range(len(plan)):
        output = exact_output(float(state[0]), row)
        state = plan.transitions[row] @ np.array([*state, output, 0.0])
    return float(state[0])


@pytest.mark.parametrize("steps", [4, 5, 20])
@pytest.mark.parametrize(
    ("name", "first"),
    [
        *((name, first) for name in ("euler", "heun", "kdpm2", "edm_euler", "edm_dpm_multistep") for first in (0, 3)),
        ("lms", 0),  # begun later, the reference leaves slopes out of its sum, and lands beside it
    ],
)
def test_an_exact_network_lands_on_its_image(name: str, steps: int, first: int):
    plan = make(name, num_inference_steps=steps, first=first)
    image, noise = 0.7, -1.3
    data = edm.EULER_FIELDS["sigma_data"] if name.startswith("edm") else 1.0
    sigmas = np.sqrt(1 / plan.input_scales**2 - data**2)

    def output(x: float, row: int) -> float:
        if not name.startswith("edm"):
            return (x - image) / sigmas[row]
        variance = sigmas[row] ** 2 + data**2
        return (image - data**2 / variance * x) * np.sqrt(variance) / (sigmas[row] * data)

    assert land(plan, output, image + plan.noised[0, 1] * noise) == pytest.approx(image, rel=1e-6)


@pytest.mark.parametrize("first", [0, 3])
@pytest.mark.parametrize("name", ["flow_match_euler", "flow_match_heun"])
def test_an_exact_flow_lands_on_its_image(name: str, first: int):
    plan = make(name, {"shift": 3.0}, first=first)
    image, noise = 0.7, -1.3
    start = plan.noised[0, 0] * image + plan.noised[0, 1] * noise
    assert land(plan, lambda x, row: noise - image, start) == pytest.approx(image, rel=1e-6)


@pytest.mark.parametrize("name", ["euler_ancestral", "kdpm2_ancestral", "dpm_sde"])
def test_an_exact_network_lands_on_its_image_whatever_the_noise(name: str):
    plan = make(name, num_inference_steps=12)
    image = 0.7
    sigmas = np.sqrt(1 / plan.input_scales**2 - 1)
    generator = np.random.default_rng(3)
    state = np.zeros(plan.slots)
    state[0] = plan.initial_scale
    for row in range(len(plan)):
        output = (state[0] - image) / sigmas[row]
        state = plan.transitions[row] @ np.array([*state, output, generator.standard_normal()])
    assert state[0] == pytest.approx(image, rel=1e-6)


@pytest.mark.parametrize("name", ["euler_ancestral", "dpm_sde"])
def test_a_step_of_a_perfect_network_keeps_the_variance_of_its_sigma(name: str):
    """With ε = x / σ, the exact answer for an image that is 0, x has σ's variance before and after each step."""
    plan = make(name)
    sigmas = np.sqrt(1 / plan.input_scales**2 - 1)
    rows = 2 if name == "dpm_sde" else 1
    covariance = np.zeros((plan.slots, plan.slots))
    covariance[0, 0] = sigmas[0] ** 2
    for row in range(rows):
        closed = plan.transitions[row][:, : plan.slots].copy()
        closed[:, 0] += plan.transitions[row][:, plan.slots] / sigmas[row]
        noise = plan.transitions[row][:, -1]
        covariance = closed @ covariance @ closed.T + np.outer(noise, noise)
        if row == 0:
            assert covariance[0, 0] == pytest.approx(sigmas[1] ** 2, rel=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 3, 50, 1000])
@pytest.mark.parametrize("name", ALL)
def test_plans_are_finite_and_their_timesteps_descend(name: str, steps: int):
    plan = make(name, num_inference_steps=steps)
    assert np.isfinite(plan.transitions).all()
    assert np.isfinite(plan.input_scales).all()
    tolerance = 0.02 if name == "kdpm2_ancestral" else 1e-4  # midpoints' rounding
    assert np.all(np.diff(plan.timesteps) <= tolerance)


@pytest.mark.parametrize("name", ALL)
def test_fifty_steps_are_made_within_five_milliseconds(name: str):
    config = {**SCHEDULE_FIELDS, **{**WITH_BETAS, **WITHOUT_BETAS}[name][1]}
    schedule = () if name in WITHOUT_BETAS else (NoiseSchedule.from_config(config),)
    function = {**WITH_BETAS, **WITHOUT_BETAS}[name][0]
    times = []
    for _ in range(7):
        begun = time.perf_counter()
        function(config, *schedule, AskedSteps(num_inference_steps=50))
        times.append(time.perf_counter() - begun)
    assert min(times) <= 0.005


@pytest.mark.parametrize("name", ALL)
def test_eta_is_refused(name: str):
    with pytest.raises(RequestError, match="no such choice"):
        make(name, eta=0.5)


@pytest.mark.parametrize(
    ("name", "grid"),
    [
        *((name, "timesteps") for name in ALL if name not in ("euler", "heun", "flow_match_euler")),
        *((name, "sigmas") for name in ALL if name not in ("euler", "flow_match_euler")),
    ],
)
def test_a_grid_that_the_scheduler_does_not_take_is_refused(name: str, grid: str):
    with pytest.raises(RequestError, match=f"takes no {grid}"):
        make(name, num_inference_steps=2, **{grid: (3.0, 2.0)})


@pytest.mark.parametrize(
    ("name", "grid"),
    [
        ("euler", {"timesteps": (500.0, 600.0)}),
        ("euler", {"timesteps": (1000.0, 600.0)}),
        ("euler", {"sigmas": (1.0, 2.0, 0.0)}),
        ("euler", {"sigmas": (1.0,)}),
        ("heun", {"timesteps": ()}),
        ("flow_match_euler", {"sigmas": (1.0, 0.5, 0.0)}),
        ("flow_match_euler", {"timesteps": (100.0, 100.0)}),
    ],
)
def test_a_grid_that_does_not_descend_within_bounds_is_refused(name: str, grid: dict[str, tuple[float, ...]]):
    with pytest.raises(RequestError, match=next(iter(grid))):
        make(name, **grid)


@pytest.mark.parametrize("name", ["euler", "heun"])
@pytest.mark.parametrize("field", ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"])
def test_timesteps_of_ones_own_contradict_a_sigma_spacing(field: str, name: str):
    with pytest.raises(RequestError, match=f"contradict {field}"):
        make(name, {field: True}, timesteps=(900.0, 100.0))


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        *((name, {"prediction_type": "sample"}) for name in ("euler_ancestral", "kdpm2", "kdpm2_ancestral", "dpm_sde")),
        ("euler", {"interpolation_type": "cubic"}),
        ("euler", {"timestep_type": "other"}),
        ("euler", {"final_sigmas_type": "other"}),
        ("heun", {"beta_schedule": "wavy"}),
        ("dpm_sde", {"noise_sampler_seed": 3}),
        ("edm_euler", {"prediction_type": "sample"}),
        ("edm_euler", {"sigma_schedule": "linear"}),
        ("edm_euler", {"sigma_min": 0.0}),
        ("edm_euler", {"rho": 0.0}),
        ("edm_dpm_multistep", {"algorithm_type": "dpmsolver"}),
        ("edm_dpm_multistep", {"algorithm_type": "deis"}),
        ("edm_dpm_multistep", {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}),
        ("edm_dpm_multistep", {"solver_order": 4}),
        ("edm_dpm_multistep", {"solver_type": "other"}),
        ("flow_match_euler", {"use_dynamic_shifting": True}),
        ("flow_match_euler", {"use_dynamic_shifting": True, "mu": -1.0, "time_shift_type": "linear"}),
        ("flow_match_euler", {"shift": 0.0}),
        ("flow_match_euler", {"shift_terminal": 1.0}),
        ("flow_match_heun", {"shift": -1.0}),
        ("flow_match_heun", {"num_train_timesteps": 0}),
    ],
    ids=str,
)
def test_a_field_that_cannot_be_honoured_is_refused_by_its_name(name: str, fields: dict[str, object]):
    named = "|".join([*fields, "final_sigmas_type"])
    with pytest.raises(RequestError, match=named):
        make(name, fields)


def test_the_weights_of_order_two_are_those_of_adams_and_bashforth():
    weights = lms.lagrange_integrals(np.array([4.0, 3.0, 2.0, 1.0, 0.0]))
    np.testing.assert_allclose(weights[0], [-1, 0, 0, 0])
    np.testing.assert_allclose(weights[1], [-3 / 2, 1 / 2, 0, 0])
    np.testing.assert_allclose(weights[3], np.array([-55, 59, -37, 9]) / 24)
