"""The log-SNR families against their diffusers classes, run step by step on the same random model outputs."""

import inspect
from collections.abc import Mapping
from dataclasses import replace
from itertools import product

import diffusers
import numpy as np
import pytest

from sdrt.plan import deis, dpm_multistep, dpm_singlestep, ipndm, sa_solver, unipc
from sdrt.schedule import SCHEDULE_FIELDS
from tests.oracle.plan_reference import (
    SPACINGS,
    STABLE_DIFFUSION,
    assert_agrees,
    check_family,
    make_scheduler,
    run_reference,
)

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

FAMILIES = {
    "DPMSolverMultistepScheduler": (dpm_multistep.dpm_multistep_plan, dpm_multistep.FIELDS),
    "UniPCMultistepScheduler": (unipc.unipc_plan, unipc.FIELDS),
    "DEISMultistepScheduler": (deis.deis_plan, deis.FIELDS),
    "DPMSolverSinglestepScheduler": (dpm_singlestep.dpm_singlestep_plan, dpm_singlestep.FIELDS),
    "IPNDMScheduler": (ipndm.ipndm_plan, ipndm.FIELDS),
    "SASolverScheduler": (sa_solver.sa_solver_plan, sa_solver.FIELDS),
}
STEPS = (1, 3, 14, 20)
PREDICTIONS = ("epsilon", "v_prediction", "sample")
RESPACED: list[dict[str, object]] = [
    {},
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True},
    {"use_beta_sigmas": True},
]
LU = {"use_lu_lambdas": True}
# Vendors' float32 square roots differ in the last place of some sigmas. What divides by small steps of λ (the third and
# fourth orders) or takes the noise of a step that is almost none (an SDE's last one) makes that up to 8e-6.
TOLERANCE = 1e-5
# The reference's third-order SDE grows whatever it is given, such differences too: 2e-4, and 2e-12 on its own sigmas.
TOLERANCE_UNSTABLE = 5e-4


def check(class_name: str, fields: Mapping[str, object], steps: int, *, tolerance: float = TOLERANCE, **options):
    plan, defaults = FAMILIES[class_name]
    config = {name: value for name, value in STABLE_DIFFUSION.items() if name in {**SCHEDULE_FIELDS, **defaults}}
    config |= fields
    return check_family(plan, defaults, class_name, config, steps, tolerance=tolerance, **options)


def named(fields: object) -> str:
    return ",".join(f"{value}" if isinstance(value, str) else f"{name}={value}" for name, value in fields.items())


def cells(**choices: tuple[object, ...]) -> list[dict[str, object]]:
    return [dict(zip(choices, values, strict=True)) for values in product(*choices.values())]


def rotated(sequence: tuple[str, ...], index: int) -> str:
    return sequence[index % len(sequence)]


MULTISTEP = [
    {**cell, "final_sigmas_type": final}
    for cell in cells(
        algorithm_type=("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++"),
        solver_type=("midpoint", "heun"),
        solver_order=(1, 2, 3),
        lower_order_final=(True, False),
    )
    for final in ("zero", "sigma_min")
    if str(cell["algorithm_type"]).endswith("++") or final == "sigma_min"
    if (cell["algorithm_type"], cell["solver_order"]) != ("sde-dpmsolver", 3)
]


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("fields", MULTISTEP, ids=named)
def test_dpm_multistep(fields: dict[str, object], steps: int):
    index = MULTISTEP.index(fields) + STEPS.index(steps)
    varied = {"prediction_type": rotated(PREDICTIONS, index), "timestep_spacing": rotated(SPACINGS, index // 3)}
    check("DPMSolverMultistepScheduler", {**fields, **varied}, steps)


@pytest.mark.parametrize("steps", [3, 15, 20])
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("algorithm", ["dpmsolver++", "sde-dpmsolver++"])
def test_dpm_multistep_third_order(algorithm: str, spacing: str, prediction_type: str, steps: int):
    fields = {"algorithm_type": algorithm, "timestep_spacing": spacing, "prediction_type": prediction_type}
    check("DPMSolverMultistepScheduler", {**fields, "solver_order": 3}, steps)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("beta_schedule", ["scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("respaced", [*RESPACED[1:], LU], ids=named)
@pytest.mark.parametrize("algorithm", ["dpmsolver++", "sde-dpmsolver++"])
def test_dpm_multistep_respaced(algorithm: str, respaced: dict[str, object], beta_schedule: str, steps: int):
    fields = {"algorithm_type": algorithm, "beta_schedule": beta_schedule, **respaced}
    check("DPMSolverMultistepScheduler", fields, steps)
    tolerance = TOLERANCE_UNSTABLE if algorithm == "sde-dpmsolver++" else TOLERANCE
    check("DPMSolverMultistepScheduler", {**fields, "solver_order": 3}, steps, tolerance=tolerance)


@pytest.mark.parametrize("steps", [2, 14, 20])
@pytest.mark.parametrize("algorithm", ["dpmsolver++", "sde-dpmsolver++"])
@pytest.mark.parametrize(
    "fields",
    [
        {"euler_at_final": True, "final_sigmas_type": "sigma_min"},
        {"lambda_min_clipped": -5.1, "beta_schedule": "squaredcos_cap_v2"},
        {"lambda_min_clipped": -2.0, "timestep_spacing": "leading"},
        {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"},
        {"use_karras_sigmas": True, "sigma_min": 0.1, "sigma_max": 9.0},
        {"algorithm_type": "deis", "solver_type": "logrho", "final_sigmas_type": "sigma_min"},
        {"steps_offset": 3, "timestep_spacing": "leading"},
    ],
    ids=named,
)
def test_dpm_multistep_options(fields: dict[str, object], algorithm: str, steps: int):
    check("DPMSolverMultistepScheduler", {"algorithm_type": algorithm, "solver_order": 3, **fields}, steps)


UNIPC = [
    {**cell, "final_sigmas_type": final}
    for cell in cells(
        predict_x0=(True, False), solver_type=("bh1", "bh2"), solver_order=(1, 2, 3), lower_order_final=(True, False)
    )
    for final in ("zero", "sigma_min")
    # On sigma zero the reference is finite with these only.
    if final == "sigma_min" or (cell["predict_x0"] and cell["lower_order_final"] and cell["solver_type"] == "bh2")
]


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("fields", UNIPC, ids=named)
def test_unipc(fields: dict[str, object], steps: int):
    index = UNIPC.index(fields) + STEPS.index(steps)
    varied = {"prediction_type": rotated(PREDICTIONS, index), "timestep_spacing": rotated(SPACINGS, index // 3)}
    check("UniPCMultistepScheduler", {**fields, **varied}, steps)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("respaced", RESPACED, ids=named)
def test_unipc_respaced(respaced: dict[str, object], order: int, steps: int):
    check("UniPCMultistepScheduler", {"solver_order": order, **respaced}, steps)
    check("UniPCMultistepScheduler", {"solver_order": order, "final_sigmas_type": "sigma_min", **respaced}, steps)


@pytest.mark.parametrize("steps", [2, 5, 20])
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize(
    "fields",
    [
        {"disable_corrector": [0]},
        {"disable_corrector": [1, 2, 7]},
        {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"},
        {"use_karras_sigmas": True, "sigma_min": 0.1, "sigma_max": 9.0},
        {"use_karras_sigmas": True, "sigma_min": 0.1, "final_sigmas_type": "sigma_min"},
        {"use_karras_sigmas": True, "beta_schedule": "squaredcos_cap_v2"},
        {"solver_type": "midpoint"},
    ],
    ids=named,
)
def test_unipc_options(fields: dict[str, object], order: int, steps: int):
    check("UniPCMultistepScheduler", {"solver_order": order, **fields}, steps)
    check("UniPCMultistepScheduler", {"solver_order": order, **fields}, steps, first=1)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("lowered", [True, False])
@pytest.mark.parametrize("respaced", RESPACED, ids=named)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis(order: int, respaced: dict[str, object], lowered: bool, steps: int):
    spacing = rotated(SPACINGS, order + STEPS.index(steps))
    prediction_type = rotated(PREDICTIONS, RESPACED.index(respaced) + STEPS.index(steps))
    fields = {"solver_order": order, "prediction_type": prediction_type, "timestep_spacing": spacing, **respaced}
    check("DEISMultistepScheduler", {**fields, "lower_order_final": lowered}, steps)


SINGLESTEP = [
    {**cell, "final_sigmas_type": final}
    for cell in cells(
        algorithm_type=("dpmsolver", "dpmsolver++", "sde-dpmsolver++"),
        solver_type=("midpoint", "heun"),
        solver_order=(1, 2, 3),
        lower_order_final=(True, False),
    )
    for final in ("zero", "sigma_min")
    if cell["algorithm_type"] != "dpmsolver" or final == "sigma_min"
]


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("fields", SINGLESTEP, ids=named)
def test_dpm_singlestep(fields: dict[str, object], steps: int):
    index = SINGLESTEP.index(fields) + STEPS.index(steps)
    varied = {"prediction_type": rotated(PREDICTIONS, index), **RESPACED[index // 3 % len(RESPACED)]}
    check("DPMSolverSinglestepScheduler", {**fields, **varied}, steps)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("lowered", [True, False])
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_dpm_singlestep_orders_of_every_step_count(final: str, lowered: bool, order: int):
    fields = {"solver_order": order, "lower_order_final": lowered, "final_sigmas_type": final}
    for steps in range(1, 14):
        check("DPMSolverSinglestepScheduler", fields, steps)
        check("DPMSolverSinglestepScheduler", fields, steps, first=steps // 2)


@pytest.mark.parametrize("steps", [2, 14, 20])
@pytest.mark.parametrize(
    "fields",
    [
        {"lambda_min_clipped": -5.1, "beta_schedule": "squaredcos_cap_v2"},
        {"use_karras_sigmas": True, "beta_schedule": "squaredcos_cap_v2"},
        {"use_karras_sigmas": True, "sigma_min": 0.1, "sigma_max": 9.0},
        {"algorithm_type": "deis", "solver_type": "bh2", "final_sigmas_type": "sigma_min"},
    ],
    ids=named,
)
def test_dpm_singlestep_options(fields: dict[str, object], steps: int):
    check("DPMSolverSinglestepScheduler", fields, steps)


# Its only step, where one is asked for, is exactly zero whatever the network says.
@pytest.mark.parametrize(
    ("steps", "first"), [(steps, first) for steps in STEPS[1:] for first in (0, 1, 4) if first < steps]
)
def test_ipndm(steps: int, first: int):
    check("IPNDMScheduler", {}, steps, first=first, timestep_tolerance=1e-6)


SA_ORDERS = [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 4), (3, 1), (3, 3), (3, 4), (4, 2), (4, 4)]


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("algorithm", ["data_prediction", "noise_prediction"])
@pytest.mark.parametrize(("predictor", "corrector"), SA_ORDERS)
def test_sa_solver(predictor: int, corrector: int, algorithm: str, steps: int):
    index = SA_ORDERS.index((predictor, corrector)) + STEPS.index(steps)
    fields = {
        "algorithm_type": algorithm,
        "predictor_order": predictor,
        "corrector_order": corrector,
        "prediction_type": rotated(PREDICTIONS, index),
        "timestep_spacing": rotated(SPACINGS, index // 3),
        "lower_order_final": index % 2 == 0,
    }
    check("SASolverScheduler", fields, steps)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("respaced", [*RESPACED[1:], {"lambda_min_clipped": -2.0}], ids=named)
@pytest.mark.parametrize("algorithm", ["data_prediction", "noise_prediction"])
def test_sa_solver_respaced(algorithm: str, respaced: dict[str, object], steps: int):
    check("SASolverScheduler", {"algorithm_type": algorithm, **respaced}, steps)


@pytest.mark.parametrize("steps", [5, 20])
@pytest.mark.parametrize("first", [1, 2, 4])
@pytest.mark.parametrize("respaced", RESPACED[:2], ids=named)
@pytest.mark.parametrize(
    ("class_name", "fields"),
    [
        ("DPMSolverMultistepScheduler", {"solver_order": 3}),
        ("DPMSolverMultistepScheduler", {"solver_order": 3, "algorithm_type": "sde-dpmsolver++"}),
        ("UniPCMultistepScheduler", {"solver_order": 3}),
        ("DEISMultistepScheduler", {"solver_order": 3}),
        ("DPMSolverSinglestepScheduler", {"solver_order": 3}),
        ("DPMSolverSinglestepScheduler", {"solver_order": 3, "algorithm_type": "sde-dpmsolver++"}),
        ("SASolverScheduler", {"predictor_order": 3, "corrector_order": 4}),
    ],
)
def test_a_plan_that_begins_later(
    class_name: str, fields: dict[str, object], respaced: dict[str, object], first: int, steps: int
):
    assert len(check(class_name, {**fields, **respaced}, steps, first=first)) == steps - first


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("timesteps", [[999], [999, 500], [981, 700, 640, 300, 20, 0], list(range(900, 0, -50))])
@pytest.mark.parametrize("class_name", ["DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"])
def test_timesteps_of_one_s_own(class_name: str, timesteps: list[int], order: int, final: str):
    # The reference's last step is NaN where third order meets a step of no length, from timestep 0 to its own sigma.
    fields = {"solver_order": order, "final_sigmas_type": final, "lower_order_final": True}
    check(class_name, fields, len(timesteps), grid={"timesteps": timesteps})


@pytest.mark.parametrize("class_name", FAMILIES)
def test_every_field_of_the_reference_is_known_with_its_default(class_name: str):
    parameters = dict(inspect.signature(getattr(diffusers, class_name).__init__).parameters)
    theirs = {name: value.default for name, value in parameters.items() if name != "self"}
    ours = {**SCHEDULE_FIELDS, **FAMILIES[class_name][1]}
    differences = {name for name in theirs if name not in ours or ours[name] != theirs[name]}
    assert differences <= {"lambda_min_clipped"}  # no bound is written as null


@pytest.mark.parametrize(
    ("class_name", "fields"),
    [
        ("DPMSolverMultistepScheduler", {"solver_order": 3, "algorithm_type": "sde-dpmsolver++"}),
        ("UniPCMultistepScheduler", {"solver_order": 3}),
        ("DEISMultistepScheduler", {"solver_order": 3}),
        ("DPMSolverSinglestepScheduler", {"solver_order": 3, "final_sigmas_type": "sigma_min"}),
        ("IPNDMScheduler", {}),
        ("SASolverScheduler", {"predictor_order": 3, "corrector_order": 3}),
    ],
)
def test_the_oracle_notices_every_wrong_coefficient_of_a_row(class_name: str, fields: dict[str, object]):
    options = {"timestep_tolerance": 1e-6} if class_name == "IPNDMScheduler" else {}
    plan = check(class_name, fields, 9, **options)
    config = {name: value for name, value in STABLE_DIFFUSION.items() if name in SCHEDULE_FIELDS}
    extra = {"steps_offset": 1} if "steps_offset" in FAMILIES[class_name][1] else {}
    reference = run_reference(make_scheduler(class_name, {**config, **extra, **fields}), 9)
    row = 5  # the last of a block of three
    for column in np.flatnonzero(plan.transitions[row, 0]):
        transitions = plan.transitions.copy()
        transitions[row, 0, column] += 1e-3
        with pytest.raises(AssertionError, match="row 5"):
            assert_agrees(replace(plan, transitions=transitions), reference, TOLERANCE, 1e-6)
