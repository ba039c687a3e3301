"""Every plan against the diffusers class of its name, run step by step on the same random model outputs."""

import inspect
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch

from sdrt.errors import RequestError
from sdrt.plan import build_plan, ddim, dpm_multistep, euler, pndm
from sdrt.schedule import SCHEDULE_FIELDS
from tests.oracle.plan_reference import (
    MANY,
    SD_1_5,
    SD_2_1,
    SD_TURBO,
    SDXL,
    SPACINGS,
    STABLE_DIFFUSION,
    STEPS,
    TIMESTEP_TOLERANCE,
    TOLERANCE_FLOAT32,
    assert_agrees,
    check,
    check_family,
    make_scheduler,
    run_reference,
)

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.mark.parametrize("steps", [*STEPS, MANY])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_ddim(spacing: str, prediction_type: str, steps: int):
    fields = {"timestep_spacing": spacing, "prediction_type": prediction_type}
    check("DDIMScheduler", {**STABLE_DIFFUSION, **fields}, steps)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize(
    "class_name", ["DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"]
)
def test_timesteps_of_many_step_counts(class_name: str, spacing: str):
    config = {**STABLE_DIFFUSION, "timestep_spacing": spacing}
    scheduler = make_scheduler(class_name, config)
    for steps in (*range(1, 101), *range(103, 999, 17)):
        scheduler.set_timesteps(steps)
        theirs = scheduler.timesteps.numpy().astype(np.float64)
        ours = build_plan(scheduler_class=class_name, scheduler_config=config, num_inference_steps=steps).timesteps
        if spacing == "trailing" and theirs.min() == -1:
            # Rounding gives the reference one timestep too many, below the table; PNDM's grid would start there.
            np.testing.assert_array_equal(np.unique(ours), np.unique(theirs)[1:])
            continue
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("alpha_to_one", [True, False])
@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_ddim_with_noise(spacing: str, eta: float, alpha_to_one: bool):
    config = {**STABLE_DIFFUSION, "timestep_spacing": spacing, "set_alpha_to_one": alpha_to_one}
    check("DDIMScheduler", config, 13, eta)


@pytest.mark.parametrize("steps", [*STEPS, MANY])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_pndm(spacing: str, prediction_type: str, steps: int):
    fields = {"timestep_spacing": spacing, "prediction_type": prediction_type}
    check("PNDMScheduler", {**STABLE_DIFFUSION, **fields}, steps)


@pytest.mark.parametrize("steps", [*STEPS, MANY])
@pytest.mark.parametrize("karras", [False, True])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_euler(spacing: str, prediction_type: str, karras: bool, steps: int):
    fields = {"timestep_spacing": spacing, "prediction_type": prediction_type, "use_karras_sigmas": karras}
    check("EulerDiscreteScheduler", {**STABLE_DIFFUSION, **fields}, steps)


@pytest.mark.parametrize("steps", [*STEPS, 14, 15, MANY])
@pytest.mark.parametrize("karras", [False, True])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_dpm_multistep(spacing: str, prediction_type: str, karras: bool, steps: int):
    fields = {"timestep_spacing": spacing, "prediction_type": prediction_type, "use_karras_sigmas": karras}
    check("DPMSolverMultistepScheduler", {**STABLE_DIFFUSION, **fields}, steps)


@pytest.mark.parametrize("steps", [1, 2, 3, 14, 15, 20])
@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
@pytest.mark.parametrize(
    "fields",
    [
        {"solver_order": 1},
        {"final_sigmas_type": "sigma_min"},
        {"final_sigmas_type": "sigma_min", "lower_order_final": False},
        {"final_sigmas_type": "sigma_min", "lower_order_final": False, "euler_at_final": True},
        {"lower_order_final": False},
        {"use_karras_sigmas": True, "sigma_min": 0.05, "sigma_max": 10.0},
        {"use_karras_sigmas": True, "beta_schedule": "squaredcos_cap_v2"},
        {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1},
        {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1, "timestep_spacing": "leading"},
        {"lambda_min_clipped": float("-inf")},
        {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"},
    ],
    ids=lambda fields: ",".join(f"{name}={value}" for name, value in fields.items()),
)
def test_dpm_multistep_options(fields: dict[str, object], solver_type: str, steps: int):
    check("DPMSolverMultistepScheduler", {**STABLE_DIFFUSION, "solver_type": solver_type, **fields}, steps)


@pytest.mark.parametrize("steps", [1, 5, 20])
@pytest.mark.parametrize(
    "fields",
    [
        {"final_sigmas_type": "sigma_min"},
        {"use_karras_sigmas": True, "sigma_min": 0.05, "sigma_max": 10.0},
        {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min", "timestep_spacing": "leading"},
        {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"},
        {"timestep_type": "continuous"},
        {"use_exponential_sigmas": True},
        {"use_beta_sigmas": True, "timestep_spacing": "leading"},
    ],
    ids=lambda fields: ",".join(f"{name}={value}" for name, value in fields.items()),
)
def test_euler_options(fields: dict[str, object], steps: int):
    check("EulerDiscreteScheduler", {**STABLE_DIFFUSION, **fields}, steps)


@pytest.mark.parametrize("class_name", ["DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler"])
@pytest.mark.parametrize(
    "fields",
    [
        {"beta_schedule": "linear"},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"trained_betas": np.geomspace(1e-4, 2e-2, 1000).tolist()},
        {"num_train_timesteps": 777},
        {"steps_offset": 0},
        {"steps_offset": 3},
    ],
    ids=lambda fields: next(iter(fields)) + "=" + str(next(iter(fields.values())))[:17],
)
def test_noise_schedules(fields: dict[str, object], class_name: str):
    check(class_name, {**STABLE_DIFFUSION, **fields}, 10)


def test_ddim_on_a_schedule_rescaled_to_zero_terminal_snr():
    fields = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
    check("DDIMScheduler", {**STABLE_DIFFUSION, **fields}, 10)


@pytest.mark.parametrize("steps", [1, 4, 20])
@pytest.mark.parametrize("checkpoint", [SD_1_5, SD_2_1, SDXL, SD_TURBO], ids=["SD1.5", "SD2.1", "SDXL", "SD-Turbo"])
@pytest.mark.parametrize(
    ("name", "class_name", "overrides"),
    [
        ("ddim", "DDIMScheduler", {}),
        ("pndm", "PNDMScheduler", {}),
        ("euler", "EulerDiscreteScheduler", {}),
        ("euler_karras", "EulerDiscreteScheduler", {"use_karras_sigmas": True}),
        ("dpmpp_2m", "DPMSolverMultistepScheduler", {}),
        ("dpmpp_2m_karras", "DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    ],
)
def test_a_name_takes_over_what_from_config_takes_over(
    name: str, class_name: str, overrides: dict[str, object], checkpoint: dict[str, object], steps: int
):
    reference = run_reference(make_scheduler(class_name, checkpoint, **overrides), steps)
    own = str(checkpoint["_class_name"])
    plan = build_plan(scheduler_class=own, scheduler_config=checkpoint, num_inference_steps=steps, scheduler=name)
    timestep_tolerance = TIMESTEP_TOLERANCE if name == "euler_karras" else 0.0
    assert_agrees(plan, reference, timestep_tolerance=timestep_tolerance)


@pytest.mark.parametrize(
    ("origin", "fields"),
    [
        ("DEISMultistepScheduler", {"final_sigmas_type": "sigma_min"}),  # algorithm_type deis, solver_type logrho
        ("UniPCMultistepScheduler", {}),  # solver_type bh2
        ("DDIMScheduler", {}),  # spaced "leading" by default: carries over from a file, not from a live object
        ("LMSDiscreteScheduler", {}),
        ("HeunDiscreteScheduler", {}),
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True, "sigma_min": 0.1, "sigma_max": 9.0}),
    ],
)
@pytest.mark.parametrize("in_memory", [False, True])
def test_a_config_written_by_another_scheduler_carries_over(origin: str, fields: dict[str, object], in_memory: bool):
    config = make_scheduler(origin, {**STABLE_DIFFUSION, **fields}).config
    given = {name: value for name, value in config.items() if in_memory or not name.startswith("_")}
    class_name = "DPMSolverMultistepScheduler"
    reference = run_reference(make_scheduler(class_name, given), 8)
    plan = build_plan(scheduler_class=origin, scheduler_config=given, num_inference_steps=8, scheduler=class_name)
    assert_agrees(plan, reference)


@pytest.mark.parametrize("name", ["ddim", "pndm", "euler", "euler_karras", "dpmpp_2m", "dpmpp_2m_karras"])
def test_float32_steps_stay_within_the_promised_tolerance(name: str):
    class_name = {"d": "DDIMScheduler", "p": "PNDMScheduler", "e": "EulerDiscreteScheduler"}[name[0]]
    class_name = "DPMSolverMultistepScheduler" if name.startswith("dpm") else class_name
    scheduler = make_scheduler(class_name, SD_1_5, **({"use_karras_sigmas": True} if "karras" in name else {}))
    reference = run_reference(scheduler, 50, dtype=torch.float32)
    plan = build_plan(scheduler_class="PNDMScheduler", scheduler_config=SD_1_5, num_inference_steps=50, scheduler=name)
    timestep_tolerance = TIMESTEP_TOLERANCE if name == "euler_karras" else 0.0
    assert_agrees(plan, reference, TOLERANCE_FLOAT32, timestep_tolerance)


@pytest.mark.parametrize(("spacing", "steps"), [("leading", 999), ("leading", 1000), ("linspace", 1000)])
def test_dpm_steps_that_would_not_be_finite_are_refused(spacing: str, steps: int):
    config = {**STABLE_DIFFUSION, "timestep_spacing": spacing}
    reference = run_reference(make_scheduler("DPMSolverMultistepScheduler", config), steps)
    assert not np.isfinite(reference.states[-1]).all()
    with pytest.raises(RequestError, match=f"no finite {steps} steps"):
        build_plan(scheduler_class="DPMSolverMultistepScheduler", scheduler_config=config, num_inference_steps=steps)


@pytest.mark.parametrize(
    ("class_name", "fields"),
    [
        ("DDIMScheduler", ddim.FIELDS),
        ("PNDMScheduler", pndm.FIELDS),
        ("EulerDiscreteScheduler", euler.FIELDS),
        ("DPMSolverMultistepScheduler", dpm_multistep.FIELDS),
    ],
)
def test_every_field_of_the_reference_is_known_with_its_default(class_name: str, fields: dict[str, object]):
    parameters = dict(inspect.signature(getattr(diffusers, class_name).__init__).parameters)
    theirs = {name: value.default for name, value in parameters.items() if name != "self"}
    ours = {**SCHEDULE_FIELDS, **fields}
    differences = {name for name in theirs if name not in ours or ours[name] != theirs[name]}
    # Clipping is off unless asked for; no bound on lambda is written as null.
    assert differences <= {"clip_sample", "lambda_min_clipped"}


def test_the_oracle_notices_a_wrong_coefficient():
    reference = run_reference(make_scheduler("PNDMScheduler", SD_1_5), 10)
    plan = build_plan(scheduler_class="PNDMScheduler", scheduler_config=SD_1_5, num_inference_steps=10)
    transitions = plan.transitions.copy()
    transitions[4, 0, 2] *= 1 + 1e-4
    wrong = replace(plan, transitions=transitions)
    with pytest.raises(AssertionError, match="row 4"):
        assert_agrees(wrong, reference)


@pytest.mark.parametrize("steps", [5, 20])
@pytest.mark.parametrize("first", [1, 3])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize(
    ("family", "plan", "class_name"),
    [
        (ddim, ddim.ddim_plan, "DDIMScheduler"),
        (euler, euler.euler_plan, "EulerDiscreteScheduler"),
        (dpm_multistep, dpm_multistep.dpm_multistep_plan, "DPMSolverMultistepScheduler"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_plan_that_begins_later_remembers_nothing_of_before(family, plan, class_name, spacing, first, steps):
    config = {**STABLE_DIFFUSION, "timestep_spacing": spacing}
    whole = check_family(plan, family.FIELDS, class_name, config, steps)
    later = check_family(plan, family.FIELDS, class_name, config, steps, first=first)
    assert len(later) == len(whole) - first
