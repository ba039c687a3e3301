"""The plans in sigma space against the diffusers class of their name, on the same random model outputs."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import diffusers
import numpy as np
import pytest

from sdrt.plan import SamplingPlan, edm, flow_match
from sdrt.plan.asked import AskedSteps
from sdrt.plan.dpm_sde import FIELDS as DPM_SDE_FIELDS
from sdrt.plan.dpm_sde import dpm_sde_plan
from sdrt.plan.euler import FIELDS as EULER_FIELDS
from sdrt.plan.euler import euler_plan
from sdrt.plan.euler_ancestral import FIELDS as EULER_ANCESTRAL_FIELDS
from sdrt.plan.euler_ancestral import euler_ancestral_plan
from sdrt.plan.heun import FIELDS as HEUN_FIELDS
from sdrt.plan.heun import heun_plan
from sdrt.plan.kdpm2 import FIELDS as KDPM2_FIELDS
from sdrt.plan.kdpm2 import kdpm2_ancestral_plan, kdpm2_plan
from sdrt.plan.lms import FIELDS as LMS_FIELDS
from sdrt.plan.lms import lms_plan
from sdrt.schedule import SCHEDULE_FIELDS, NoiseSchedule
from tests.oracle.plan_reference import (
    SPACINGS,
    STABLE_DIFFUSION,
    TIMESTEP_TOLERANCE,
    TOLERANCE,
    Reference,
    make_scheduler,
    run_plan,
    run_reference,
)

pytestmark = [pytest.mark.exhaustive, pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")]

STEPS = (1, 3, 20)
SIGMA_SPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
BETAS = {name: STABLE_DIFFUSION[name] for name in ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps")}
# The reference holds the sigmas of midpoints, and those that it reckons from logarithms, as float32 numbers.
INPUT_SCALE_TOLERANCE = 1e-6
INPUT_SCALE_TOLERANCES = {
    "EDMDPMSolverMultistepScheduler": 3e-6,  # seventh powers in float32
    "KDPM2AncestralDiscreteScheduler": 2e-5,  # as its timesteps, below
}
TOLERANCE_PROMISED = 1e-5
# Its midpoints come of a difference of float32 squares, of which large steps leave little; vendors' roots differ.
TIMESTEP_TOLERANCE_ANCESTRAL = 0.02
TOLERANCE_LARGE_ANCESTRAL_STEPS = 1e-3


@dataclass(frozen=True, kw_only=True)
class Case:
    class_name: str
    fields: Mapping[str, object]
    plan: Callable[..., SamplingPlan]


EULER = Case(class_name="EulerDiscreteScheduler", fields=EULER_FIELDS, plan=euler_plan)
EULER_A = Case(class_name="EulerAncestralDiscreteScheduler", fields=EULER_ANCESTRAL_FIELDS, plan=euler_ancestral_plan)
HEUN = Case(class_name="HeunDiscreteScheduler", fields=HEUN_FIELDS, plan=heun_plan)
KDPM2 = Case(class_name="KDPM2DiscreteScheduler", fields=KDPM2_FIELDS, plan=kdpm2_plan)
KDPM2_A = Case(class_name="KDPM2AncestralDiscreteScheduler", fields=KDPM2_FIELDS, plan=kdpm2_ancestral_plan)
LMS = Case(class_name="LMSDiscreteScheduler", fields=LMS_FIELDS, plan=lms_plan)
DPM_SDE = Case(class_name="DPMSolverSDEScheduler", fields=DPM_SDE_FIELDS, plan=dpm_sde_plan)
CASES = (EULER, EULER_A, HEUN, KDPM2, KDPM2_A, LMS, DPM_SDE)
RESPACED = (EULER, HEUN, KDPM2, KDPM2_A, LMS, DPM_SDE)
EDM_EULER = Case(class_name="EDMEulerScheduler", fields=edm.EULER_FIELDS, plan=edm.edm_euler_plan)
EDM_DPM = Case(
    class_name="EDMDPMSolverMultistepScheduler", fields=edm.DPM_MULTISTEP_FIELDS, plan=edm.edm_dpm_multistep_plan
)
FLOW_EULER = Case(
    class_name="FlowMatchEulerDiscreteScheduler", fields=flow_match.EULER_FIELDS, plan=flow_match.flow_match_euler_plan
)
FLOW_HEUN = Case(
    class_name="FlowMatchHeunDiscreteScheduler", fields=flow_match.HEUN_FIELDS, plan=flow_match.flow_match_heun_plan
)
WITHOUT_BETAS = (EDM_EULER, EDM_DPM, FLOW_EULER, FLOW_HEUN)


def shown(value: object) -> str | None:
    if isinstance(value, Case):
        return value.class_name
    if isinstance(value, Mapping):
        return ",".join(f"{name}={str(item)[:20]}" for name, item in value.items())
    return None


def reference_of(case: Case, config: Mapping[str, object], steps: int, **options: object) -> Reference:
    return run_reference(make_scheduler(case.class_name, config), steps, **options)


def check(
    case: Case,
    config: Mapping[str, object],
    steps: int,
    *,
    first: int = 0,
    grid: Mapping[str, object] | None = None,
    mu: float | None = None,
    tolerance: float | None = None,
) -> SamplingPlan:
    """The family's function against the class, with the config's fields over the family's own defaults."""
    asked = AskedSteps(
        num_inference_steps=steps, first=first, **{name: tuple(values) for name, values in (grid or {}).items()}
    )
    theirs = {"num_inference_steps": steps, "mu": mu} if mu is not None else grid
    reference = reference_of(case, config, steps, first=first, grid=theirs)
    whole = {**SCHEDULE_FIELDS, **case.fields, **config, **({} if mu is None else {"mu": mu})}
    with np.errstate(all="ignore"):
        schedule = () if case in WITHOUT_BETAS else (NoiseSchedule.from_config(whole),)
        plan = case.plan(whole, *schedule, asked)
    timestep_tolerance = TIMESTEP_TOLERANCE_ANCESTRAL if case is KDPM2_A else TIMESTEP_TOLERANCE
    np.testing.assert_allclose(plan.timesteps, reference.timesteps, rtol=0, atol=timestep_tolerance)
    scale_tolerance = INPUT_SCALE_TOLERANCES.get(case.class_name, INPUT_SCALE_TOLERANCE)
    np.testing.assert_allclose(plan.input_scales, reference.input_scales, rtol=scale_tolerance)
    assert plan.initial_scale == pytest.approx(reference.initial_scale, rel=INPUT_SCALE_TOLERANCE)
    if reference.draws is not None:
        assert [plan.draws_noise(row) for row in range(len(plan))] == reference.draws
    if tolerance is None:
        tolerance = TOLERANCE_PROMISED if case in (EDM_DPM, LMS) else TOLERANCE
    for row, (ours, other) in enumerate(zip(run_plan(plan), reference.states, strict=True)):
        error = np.abs(ours - other).max() / np.abs(other).max()
        rounded = case is KDPM2_A and steps <= 3
        assert error <= (TOLERANCE_LARGE_ANCESTRAL_STEPS if rounded else tolerance), (
            f"row {row} of {len(plan)}: {error:.1e}"
        )
    return plan


def predictions(case: Case) -> tuple[str, ...]:
    return ("epsilon", "v_prediction", "sample") if case in (EULER, HEUN, LMS) else ("epsilon", "v_prediction")


def test_the_oracle_notices_a_wrong_coefficient():
    def wrong(*arguments: object) -> SamplingPlan:
        plan = heun_plan(*arguments)
        transitions = plan.transitions.copy()
        transitions[5, 0, 1] *= 1 + 1e-4
        return replace(plan, transitions=transitions)

    with pytest.raises(AssertionError, match="row 5"):
        check(replace(HEUN, plan=wrong), BETAS, 5)


@pytest.mark.parametrize(
    "case", [EULER, EULER_A, HEUN, KDPM2, KDPM2_A, LMS, EDM_EULER, EDM_DPM, FLOW_EULER, FLOW_HEUN], ids=shown
)
def test_every_field_of_the_reference_is_known_with_its_default(case: Case):
    parameters = inspect.signature(getattr(diffusers, case.class_name).__init__).parameters
    theirs = {name: value.default for name, value in parameters.items() if name != "self"}
    ours = {**SCHEDULE_FIELDS, **case.fields}
    assert {name for name in theirs if name not in ours or ours[name] != theirs[name]} == set()


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize(
    ("case", "prediction_type"), [(case, kind) for case in CASES for kind in predictions(case)], ids=shown
)
def test_every_spacing_and_prediction_type(case: Case, prediction_type: str, spacing: str, steps: int):
    fields = {"prediction_type": prediction_type, "timestep_spacing": spacing, "steps_offset": 1}
    check(case, {**BETAS, **fields}, steps)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("sigma_spacing", SIGMA_SPACINGS)
@pytest.mark.parametrize("case", RESPACED, ids=shown)
def test_every_sigma_spacing(case: Case, sigma_spacing: str, steps: int):
    check(case, {**BETAS, sigma_spacing: True, "timestep_spacing": "leading", "steps_offset": 1}, steps)


@pytest.mark.parametrize("steps", [1, 5, 20])
@pytest.mark.parametrize(
    "fields",
    [
        {"interpolation_type": "log_linear"},
        {"interpolation_type": "log_linear", "use_karras_sigmas": True, "final_sigmas_type": "sigma_min"},
        {"interpolation_type": "log_linear", "use_beta_sigmas": True, "sigma_min": 0.05, "sigma_max": 10.0},
        {"timestep_type": "continuous", "prediction_type": "v_prediction"},
        {"timestep_type": "continuous", "prediction_type": "v_prediction", "use_karras_sigmas": True},
        {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"},
        {"rescale_betas_zero_snr": True, "use_karras_sigmas": True},
    ],
    ids=shown,
)
def test_euler_options(fields: dict[str, object], steps: int):
    check(EULER, {**BETAS, **fields}, steps)


@pytest.mark.parametrize("steps", [1, 2, 20])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_euler_ancestral_on_a_schedule_rescaled_to_zero_terminal_snr(prediction_type: str, steps: int):
    fields = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": prediction_type}
    check(EULER_A, {**BETAS, **fields}, steps)


@pytest.mark.parametrize("case", RESPACED, ids=shown)
@pytest.mark.parametrize("sigma_spacing", SIGMA_SPACINGS)
def test_bounds_of_sigmas_that_come_from_another_schedulers_config(case: Case, sigma_spacing: str):
    check(case, {**BETAS, sigma_spacing: True, "sigma_min": 0.05, "sigma_max": 10.0}, 7)


@pytest.mark.parametrize("beta_schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("case", CASES, ids=shown)
def test_other_schedules_with_the_familys_own_defaults(case: Case, beta_schedule: str):
    check(case, {"beta_schedule": beta_schedule, "timestep_spacing": "trailing"}, 8)


@pytest.mark.parametrize("sigma_spacing", [None, "use_karras_sigmas"])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("first", [1, 2, 7])
@pytest.mark.parametrize("case", CASES, ids=shown)
def test_a_plan_that_begins_later_remembers_nothing_of_before(
    case: Case, first: int, spacing: str, sigma_spacing: str | None
):
    respaced = {sigma_spacing: True} if sigma_spacing and case in RESPACED else {}
    check(case, {**BETAS, "timestep_spacing": spacing, **respaced}, 8, first=first)


@pytest.mark.parametrize("first", [0, 2])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("case", [EULER, HEUN], ids=shown)
def test_timesteps_of_ones_own(case: Case, prediction_type: str, first: int):
    grid = {"timesteps": [999, 850, 601, 600, 123, 7]}
    check(case, {**BETAS, "prediction_type": prediction_type}, 6, first=first, grid=grid)


@pytest.mark.parametrize("first", [0, 2])
@pytest.mark.parametrize(
    "fields",
    [{}, {"use_karras_sigmas": True}, {"timestep_type": "continuous", "prediction_type": "v_prediction"}],
    ids=shown,
)
def test_sigmas_of_ones_own(fields: dict[str, object], first: int):
    grid = {"sigmas": [14.6, 9.0, 3.5, 1.1, 0.3, 0.0]}
    check(EULER, {**BETAS, **fields, "timestep_spacing": "leading"}, 5, first=first, grid=grid)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sigma_schedule", ["karras", "exponential"])
@pytest.mark.parametrize("final_sigmas_type", ["zero", "sigma_min"])
def test_edm_euler(final_sigmas_type: str, sigma_schedule: str, prediction_type: str, steps: int):
    fields = {"prediction_type": prediction_type, "sigma_schedule": sigma_schedule}
    check(EDM_EULER, {**fields, "final_sigmas_type": final_sigmas_type}, steps)


@pytest.mark.parametrize("steps", [*STEPS, 14, 15])
@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"solver_order": 1, "prediction_type": "v_prediction"},
        {"solver_order": 3},
        {"solver_order": 3, "lower_order_final": False, "sigma_schedule": "exponential"},
        {"euler_at_final": True, "final_sigmas_type": "sigma_min", "prediction_type": "v_prediction"},
        {"algorithm_type": "sde-dpmsolver++"},
        {"algorithm_type": "sde-dpmsolver++", "solver_order": 1, "sigma_schedule": "exponential"},
        {
            "algorithm_type": "deis",
            "final_sigmas_type": "sigma_min",
            "euler_at_final": True,
            "rho": 5.0,
            "sigma_data": 1.0,
            "sigma_min": 0.01,
            "sigma_max": 20.0,
        },
    ],
    ids=shown,
)
def test_edm_dpm_multistep(fields: dict[str, object], solver_type: str, steps: int):
    check(EDM_DPM, {"solver_type": solver_type, **fields}, steps)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"shift": 3.0},
        {"shift": 3.0, "shift_terminal": 0.1},
        {"shift": 3.0, "stochastic_sampling": True},
        {"shift": 3.0, "invert_sigmas": True},
        {"use_karras_sigmas": True},
        {"shift": 2.0, "use_exponential_sigmas": True},
        {"use_beta_sigmas": True},
    ],
    ids=shown,
)
def test_flow_match_euler(fields: dict[str, object], steps: int):
    if steps == 1 and "shift_terminal" in fields:
        pytest.skip("one step begins and ends on sigma 1, which cannot be stretched")
    check(FLOW_EULER, fields, steps)


@pytest.mark.parametrize("time_shift_type", ["exponential", "linear"])
def test_flow_match_euler_with_dynamic_shifting(time_shift_type: str):
    check(FLOW_EULER, {"use_dynamic_shifting": True, "time_shift_type": time_shift_type}, 8, mu=0.8)


@pytest.mark.parametrize(
    "grid", [{"sigmas": [1.0, 0.7, 0.3, 0.1]}, {"timesteps": [1000.0, 640.0, 320.0, 55.0]}], ids=shown
)
@pytest.mark.parametrize("fields", [{"shift": 3.0}, {"invert_sigmas": True}], ids=shown)
def test_flow_match_euler_on_a_grid_of_ones_own(fields: dict[str, object], grid: dict[str, object]):
    check(FLOW_EULER, fields, 4, grid=grid)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_match_heun(shift: float, steps: int):
    check(FLOW_HEUN, {"shift": shift}, steps)


@pytest.mark.parametrize("first", [1, 2, 7])
@pytest.mark.parametrize("case", WITHOUT_BETAS, ids=shown)
def test_a_plan_without_betas_that_begins_later(case: Case, first: int):
    check(case, {}, 8, first=first)
