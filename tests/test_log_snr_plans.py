import dataclasses

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sdrt.errors import RequestError
from sdrt.plan import MAX_STATE_SLOTS, deis, dpm_multistep, dpm_singlestep, ipndm, sa_solver, unipc
from sdrt.plan.asked import AskedSteps
from sdrt.plan.log_snr import exponential_steps, moments, polynomial_weights
from sdrt.schedule import SCHEDULE_FIELDS, NoiseSchedule

FAMILIES = {
    "dpm_multistep": (dpm_multistep.dpm_multistep_plan, dpm_multistep.FIELDS),
    "unipc": (unipc.unipc_plan, unipc.FIELDS),
    "deis": (deis.deis_plan, deis.FIELDS),
    "dpm_singlestep": (dpm_singlestep.dpm_singlestep_plan, dpm_singlestep.FIELDS),
    "ipndm": (ipndm.ipndm_plan, ipndm.FIELDS),
    "sa_solver": (sa_solver.sa_solver_plan, sa_solver.FIELDS),
}
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SIGMA_MIN = {"final_sigmas_type": "sigma_min"}


def plan_of(
    family: str,
    steps: int = 10,
    *,
    first: int = 0,
    eta: float = 0.0,
    timesteps: tuple[float, ...] | None = None,
    sigmas: tuple[float, ...] | None = None,
    **fields: object,
):
    plan, defaults = FAMILIES[family]
    config = {**SCHEDULE_FIELDS, **defaults, **SD, **fields}
    asked = AskedSteps(num_inference_steps=steps, first=first, eta=eta, timesteps=timesteps, sigmas=sigmas)
    return plan(config, NoiseSchedule.from_config(config), asked)


def landed(plan, x0: float, noise: float, prediction_type: str = "epsilon") -> float:
    """Where a network that knows x₀ and the noise ends, when nothing else is drawn."""
    state = np.zeros(plan.slots)
    state[0] = plan.noised[0, 0] * x0 + plan.noised[0, 1] * noise
    output = {"epsilon": noise, "sample": x0}[prediction_type]
    for row in range(len(plan)):
        state = plan.transitions[row] @ np.concatenate([state, [output, 0.0]])
    return float(state[0])


@given(
    family=st.sampled_from(["dpm_multistep", "unipc", "dpm_singlestep"]),
    steps=st.integers(1, 100),
    first=st.integers(0, 5),
    order=st.integers(1, 3),
    spacing=st.sampled_from(["leading", "trailing", "linspace"]),
    respaced=st.sampled_from([None, "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"]),
    prediction_type=st.sampled_from(["epsilon", "sample"]),
    x0=st.floats(-3, 3),
    noise=st.floats(-3, 3),
)
@settings(max_examples=200, deadline=None)
def test_an_exact_model_lands_on_the_image(family, steps, first, order, spacing, respaced, prediction_type, x0, noise):
    assume(first < steps)
    fields = {"solver_order": order, "timestep_spacing": spacing, "prediction_type": prediction_type}
    plan = plan_of(family, steps, first=first, **fields, **({respaced: True} if respaced else {}))
    assert np.isfinite(plan.transitions).all()
    assert landed(plan, x0, noise, prediction_type) == pytest.approx(x0, abs=1e-6)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("dpm_multistep", {"algorithm_type": "dpmsolver", **SIGMA_MIN}),
        ("dpm_multistep", {"algorithm_type": "dpmsolver++", **SIGMA_MIN}),
        ("unipc", {"predict_x0": False, **SIGMA_MIN}),
        ("deis", {}),
        ("dpm_singlestep", {"algorithm_type": "dpmsolver", **SIGMA_MIN}),
    ],
)
def test_a_last_sigma_above_zero_leaves_its_noise(family: str, fields: dict[str, object], order: int):
    plan = plan_of(family, 20, solver_order=order, **fields)
    sigma = NoiseSchedule.from_config(SD).sigmas[0]
    assert landed(plan, 1.5, -0.7) == pytest.approx((1.5 - 0.7 * sigma) / np.hypot(1, sigma), abs=1e-6)


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("dpm_multistep", {"algorithm_type": "sde-dpmsolver++"}),
        ("dpm_multistep", {"algorithm_type": "sde-dpmsolver", **SIGMA_MIN}),
        ("dpm_singlestep", {"algorithm_type": "sde-dpmsolver++", "solver_order": 1}),
        ("sa_solver", {"corrector_order": 1, "predictor_order": 1}),
    ],
)
def test_every_row_of_a_stochastic_plan_draws_noise(family: str, fields: dict[str, object]):
    plan = plan_of(family, 10, **fields)
    assert [plan.draws_noise(row) for row in range(10)] == [True] * 10


def test_a_first_order_sde_keeps_the_variance_of_every_level():
    plan = plan_of("dpm_multistep", 20, algorithm_type="sde-dpmsolver++", solver_order=1, prediction_type="sample")
    levels = np.append(NoiseSchedule.from_config(SD).sigmas_at(plan.timesteps), 0.0)
    variance = levels**2 / (levels**2 + 1)
    kept, added = plan.transitions[:, 0, 0], plan.transitions[:, 0, -1]
    np.testing.assert_allclose(kept**2 * variance[:-1] + added**2, variance[1:], atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 50, 200])
def test_a_plan_has_a_row_a_step_and_few_slots(family: str, steps: int):
    plan = plan_of(family, steps)
    assert len(plan) == steps
    assert plan.slots <= MAX_STATE_SLOTS
    assert np.isfinite(plan.transitions).all()
    assert np.all(np.diff(plan.timesteps) < 0)


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("dpm_multistep", {"solver_order": 3}),
        ("unipc", {"solver_order": 3}),
        ("dpm_singlestep", {"solver_order": 3}),
        ("sa_solver", {"predictor_order": 4, "corrector_order": 4}),
    ],
)
def test_the_highest_orders_fit_the_state(family: str, fields: dict[str, object]):
    assert plan_of(family, 20, **fields).slots <= 5


@pytest.mark.parametrize(
    ("family", "field", "value"),
    [
        ("dpm_multistep", "algorithm_type", "rk45"),
        ("dpm_multistep", "algorithm_type", None),
        ("dpm_multistep", "solver_order", 4),
        ("dpm_multistep", "solver_order", 0),
        ("dpm_multistep", "solver_type", "bogacki"),
        ("dpm_multistep", "use_flow_sigmas", True),
        ("dpm_multistep", "use_dynamic_shifting", True),
        ("dpm_multistep", "variance_type", "learned_range"),
        ("dpm_multistep", "lambda_min_clipped", 1e9),
        ("dpm_multistep", "final_sigmas_type", "half"),
        ("unipc", "solver_order", 4),
        ("unipc", "solver_type", "bh3"),
        ("unipc", "solver_p", {"_class_name": "DDIMScheduler"}),
        ("unipc", "shift_terminal", 0.1),
        ("unipc", "disable_corrector", 3),
        ("unipc", "disable_corrector", ["first"]),
        ("unipc", "use_flow_sigmas", True),
        ("unipc", "prediction_type", "flow_prediction"),
        ("deis", "algorithm_type", "sde-dpmsolver++"),
        ("deis", "solver_type", "rhoab"),
        ("deis", "solver_order", 4),
        ("deis", "use_flow_sigmas", True),
        ("dpm_singlestep", "algorithm_type", "sde-dpmsolver"),
        ("dpm_singlestep", "solver_order", 4),
        ("dpm_singlestep", "variance_type", "learned"),
        ("sa_solver", "tau_func", "constant"),
        ("sa_solver", "predictor_order", 5),
        ("sa_solver", "corrector_order", 0),
        ("sa_solver", "algorithm_type", "dpmsolver"),
        ("sa_solver", "variance_type", "learned"),
        ("ipndm", "trained_betas", [0.01] * 1000),
    ],
)
def test_a_field_that_cannot_be_honoured_is_named(family: str, field: str, value: object):
    with pytest.raises(RequestError, match=field) as raised:
        plan_of(family, **{field: value})
    assert raised.value.hint


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("dpm_multistep", {"algorithm_type": "dpmsolver"}),
        ("dpm_multistep", {"algorithm_type": "sde-dpmsolver"}),
        ("dpm_singlestep", {"algorithm_type": "dpmsolver"}),
        ("unipc", {"predict_x0": False}),
    ],
)
def test_an_estimate_of_the_noise_cannot_land_on_sigma_zero(family: str, fields: dict[str, object]):
    with pytest.raises(RequestError, match="final_sigmas_type='zero'"):
        plan_of(family, **fields)


def test_a_third_order_sde_of_the_noise_is_refused():
    with pytest.raises(RequestError, match="solver_order=3"):
        plan_of("dpm_multistep", algorithm_type="sde-dpmsolver", solver_order=3, **SIGMA_MIN)


@pytest.mark.parametrize("family", ["dpm_multistep", "unipc", "deis", "dpm_singlestep", "sa_solver"])
def test_two_sigma_spacings_are_refused(family: str):
    with pytest.raises(RequestError, match="use_karras_sigmas and use_beta_sigmas"):
        plan_of(family, use_karras_sigmas=True, use_beta_sigmas=True)


def test_lu_lambdas_with_another_spacing_are_refused():
    with pytest.raises(RequestError, match="use_lu_lambdas"):
        plan_of("dpm_multistep", use_lu_lambdas=True, use_karras_sigmas=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_eta_is_refused(family: str):
    with pytest.raises(RequestError, match=r"eta is 0\.5"):
        plan_of(family, eta=0.5)


@pytest.mark.parametrize("family", FAMILIES)
def test_sigmas_of_one_s_own_are_refused(family: str):
    with pytest.raises(RequestError, match="takes no sigmas"):
        plan_of(family, 2, sigmas=(10.0, 1.0, 0.0))


@pytest.mark.parametrize("family", ["unipc", "deis", "ipndm", "sa_solver"])
def test_timesteps_of_one_s_own_are_refused_by_those_that_take_none(family: str):
    with pytest.raises(RequestError, match="takes no timesteps"):
        plan_of(family, 2, timesteps=(900.0, 100.0))


@pytest.mark.parametrize("family", ["dpm_multistep", "dpm_singlestep"])
@pytest.mark.parametrize(
    ("timesteps", "match"),
    [
        ((), "no values"),
        ((100.0, 900.0), "100 before 900"),
        ((900.0, 900.0), "900 before 900"),
        ((1000.0, 3.0), "1000 to 3"),
        ((900.0, -1.0), "900 to -1"),
        ((900.5, 3.0), "timesteps has"),
        ((float("nan"), 3.0), "nan before 3"),
    ],
)
def test_bad_timesteps_of_one_s_own_are_refused(family: str, timesteps: tuple[float, ...], match: str):
    with pytest.raises(RequestError, match=match):
        plan_of(family, len(timesteps), timesteps=timesteps)


@pytest.mark.parametrize("field", ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"])
def test_timesteps_of_one_s_own_do_not_go_with_a_sigma_spacing(field: str):
    with pytest.raises(RequestError, match=field):
        plan_of("dpm_multistep", 2, timesteps=(900.0, 100.0), **{field: True})


@given(span=st.floats(1e-4, 4.0), rate=st.sampled_from([-1.0, 1.0, 2.0]))
@settings(max_examples=100, deadline=None)
def test_moments_are_the_integrals(span: float, rate: float):
    start, end = np.array([1.0]), np.array([np.exp(-span)])
    steps = exponential_steps(start, end, of_x0=rate > 0, tau=float(rate == 2))
    points, weights = np.polynomial.legendre.leggauss(40)
    u = (points + 1) * span / 2
    expected = [span / 2 * np.sum(weights * np.exp(-rate * (span - u)) * u**k) for k in range(4)]
    np.testing.assert_allclose(moments(steps, 4)[0], expected, rtol=1e-9)


def test_weights_of_equal_nodes_are_no_numbers():
    assert np.isnan(polynomial_weights(np.array([[0.0, 0.0]]), np.array([[1.0, 1.0]]))).all()


def test_a_wrong_weight_misses_the_image():
    plan = plan_of("unipc", 10, solver_order=3)
    transitions = plan.transitions.copy()
    transitions[4, 0, 2] += 1e-3
    wrong = dataclasses.replace(plan, transitions=transitions)
    assert landed(plan, 1.0, 0.5) == pytest.approx(1.0, abs=1e-6)
    assert landed(wrong, 1.0, 0.5) != pytest.approx(1.0, abs=1e-6)
