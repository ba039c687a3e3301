"""The plans over a table of alphas against the diffusers classes: DDIM, DDPM, PNDM, LCM and TCD."""

import functools
import inspect
import itertools
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch

from sdrt.errors import RequestError
from sdrt.plan import ddim, ddpm, lcm, pndm, tcd
from sdrt.plan.asked import AskedSteps
from sdrt.schedule import SCHEDULE_FIELDS, NoiseSchedule
from tests.oracle.plan_reference import (
    SPACINGS,
    STABLE_DIFFUSION,
    TOLERANCE,
    assert_agrees,
    check_family,
    make_scheduler,
    run_reference,
)

pytestmark = [pytest.mark.exhaustive, pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")]

STEPS = (1, 3, 20)
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large")
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
OWN_TIMESTEPS = ([999, 759, 500, 259], [999], [600, 40, 3, 0], [519, 518, 1])

WITH_RUNGE_KUTTA = {**STABLE_DIFFUSION, "skip_prk_steps": False}
check_ddim = functools.partial(check_family, ddim.ddim_plan, ddim.FIELDS, "DDIMScheduler")
check_ddpm = functools.partial(check_family, ddpm.ddpm_plan, ddpm.FIELDS, "DDPMScheduler")
check_lcm = functools.partial(check_family, lcm.lcm_plan, lcm.FIELDS, "LCMScheduler")
check_pndm = functools.partial(check_family, pndm.pndm_plan, pndm.FIELDS, "PNDMScheduler")


def check_tcd(config: dict[str, object], steps: int, *, eta: float, first: int = 0, grid=None, tolerance=TOLERANCE):
    scheduler = make_scheduler("TCDScheduler", config)
    scheduler.step = functools.partial(scheduler.step, eta=eta)
    reference = run_reference(scheduler, steps, first=first, grid=grid)
    whole = {**SCHEDULE_FIELDS, **tcd.FIELDS, **config}
    own = {name: tuple(values) for name, values in (grid or {}).items()}
    asked = AskedSteps(num_inference_steps=steps, eta=eta, first=first, **own)
    plan = tcd.tcd_plan(whole, NoiseSchedule.from_config(whole), asked)
    assert_agrees(plan, reference, tolerance)
    return plan


@pytest.mark.parametrize("steps", [4, 5, 7, 20, 50])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_pndm_with_runge_kutta_steps(spacing: str, prediction_type: str, steps: int):
    fields = {"timestep_spacing": spacing, "prediction_type": prediction_type}
    plan = check_pndm({**WITH_RUNGE_KUTTA, **fields}, steps)
    assert len(plan) == steps + 9
    assert plan.slots == 6


@pytest.mark.parametrize("first", [1, 2, 3, 5, 12, 15])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("skip", [True, False], ids=["plms", "runge_kutta"])
def test_pndm_that_begins_later(skip: bool, spacing: str, first: int):
    config = {**STABLE_DIFFUSION, "skip_prk_steps": skip, "timestep_spacing": spacing}
    whole = check_pndm(config, 20)
    assert len(check_pndm(config, 20, first=first)) == len(whole) - first


@pytest.mark.parametrize("fields", [{"set_alpha_to_one": True}, {"steps_offset": 0}, {"num_train_timesteps": 777}])
def test_pndm_with_runge_kutta_steps_options(fields: dict[str, object]):
    check_pndm({**WITH_RUNGE_KUTTA, **fields}, 13)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_runge_kutta_steps_need_four_as_in_the_reference(steps: int):
    with pytest.raises(ValueError, match="broadcast"):
        make_scheduler("PNDMScheduler", WITH_RUNGE_KUTTA).set_timesteps(steps)
    whole = {**SCHEDULE_FIELDS, **pndm.FIELDS, **WITH_RUNGE_KUTTA}
    with pytest.raises(RequestError, match=f"num_inference_steps is {steps}"):
        pndm.pndm_plan(whole, NoiseSchedule.from_config(whole), AskedSteps(num_inference_steps=steps))


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("variance_type", VARIANCES)
def test_ddpm(variance_type: str, spacing: str, prediction_type: str, steps: int):
    fields = {"timestep_spacing": spacing, "prediction_type": prediction_type, "variance_type": variance_type}
    check_ddpm({**STABLE_DIFFUSION, **fields}, steps)


def test_the_reference_s_fixed_large_log_is_no_number():
    config = {**STABLE_DIFFUSION, "variance_type": "fixed_large_log"}
    assert np.isnan(run_reference(make_scheduler("DDPMScheduler", config), 5).states[0]).all()


@pytest.mark.parametrize("variance_type", VARIANCES)
@pytest.mark.parametrize("timesteps", OWN_TIMESTEPS, ids=str)
def test_ddpm_with_timesteps_of_one_s_own(timesteps: list[int], variance_type: str):
    config = {**STABLE_DIFFUSION, "variance_type": variance_type}
    plan = check_ddpm(config, len(timesteps), grid={"timesteps": timesteps})
    assert plan.timesteps.tolist() == timesteps


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize(("steps", "first"), [(5, 1), (5, 4), (20, 3)])
@pytest.mark.parametrize("check", [check_ddpm, check_lcm])
def test_a_plan_that_begins_later(check, steps: int, first: int, spacing: str):
    config = {**STABLE_DIFFUSION, "timestep_spacing": spacing}
    assert len(check(config, steps, first=first)) == steps - first


def test_timesteps_of_one_s_own_can_begin_later():
    check_ddpm(STABLE_DIFFUSION, 4, first=2, grid={"timesteps": OWN_TIMESTEPS[0]})
    check_lcm(STABLE_DIFFUSION, 4, first=2, grid={"timesteps": OWN_TIMESTEPS[0]})
    check_tcd(STABLE_DIFFUSION, 4, eta=0.3, first=2, grid={"timesteps": OWN_TIMESTEPS[0]})


@pytest.mark.parametrize("steps", [1, 5, 20])
@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
@pytest.mark.parametrize("check", [check_ddim, check_ddpm, check_lcm, functools.partial(check_tcd, eta=0.3)])
def test_on_a_schedule_rescaled_to_zero_terminal_snr(check, prediction_type: str, steps: int):
    # Rescaling takes float32 square roots, whose last places differ: 2.8e-6 where measured.
    check({**STABLE_DIFFUSION, **ZERO_SNR, "prediction_type": prediction_type}, steps, tolerance=1e-5)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_lcm(prediction_type: str, steps: int):
    check_lcm({**STABLE_DIFFUSION, "prediction_type": prediction_type}, steps)


LCM_OPTIONS = (
    {"original_inference_steps": 100},
    {"original_inference_steps": 37},
    {"original_inference_steps": 1000},
    {"num_train_timesteps": 777},
    {"timestep_scaling": 1.0},
    {"timestep_scaling": 0.0},
    {"timestep_spacing": "trailing", "steps_offset": 3, "set_alpha_to_one": True},
)


@pytest.mark.parametrize("steps", [1, 4, 7, 36])
@pytest.mark.parametrize("fields", LCM_OPTIONS, ids=str)
def test_lcm_options(fields: dict[str, object], steps: int):
    check_lcm({**STABLE_DIFFUSION, **fields}, steps)


@pytest.mark.parametrize("timesteps", OWN_TIMESTEPS, ids=str)
def test_consistency_sampling_with_timesteps_of_one_s_own(timesteps: list[int]):
    check_lcm(STABLE_DIFFUSION, len(timesteps), grid={"timesteps": timesteps})
    for eta in (0.0, 0.3, 1.0):
        check_tcd(STABLE_DIFFUSION, len(timesteps), eta=eta, grid={"timesteps": timesteps})


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("eta", [0.0, 0.3, 0.5, 1.0])
def test_tcd(eta: float, prediction_type: str, steps: int):
    check_tcd({**STABLE_DIFFUSION, "prediction_type": prediction_type}, steps, eta=eta)


@pytest.mark.parametrize("steps", [1, 4, 36])
@pytest.mark.parametrize("fields", LCM_OPTIONS, ids=str)
def test_tcd_options(fields: dict[str, object], steps: int):
    check_tcd({**STABLE_DIFFUSION, **fields}, steps, eta=0.3)


def test_tcd_s_default_eta_is_the_reference_s():
    check_family(
        lambda config, schedule, asked: tcd.tcd_plan(config, schedule, replace(asked, eta=0.3)),
        tcd.FIELDS,
        "TCDScheduler",
        STABLE_DIFFUSION,
        8,
        first=2,
    )


def test_tcd_lands_on_the_reference_s_lower_timestep_for_every_eta():
    timesteps = torch.arange(1000)
    for hundredths in range(101):
        eta = hundredths / 100
        theirs = torch.stack([torch.floor((1 - eta) * timestep) for timestep in timesteps[::7]]).long().numpy()
        ours = np.floor(np.float32(1 - eta) * timesteps[::7].numpy().astype(np.float32))
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("class_name", ["LCMScheduler", "TCDScheduler"])
def test_timesteps_of_every_step_count(class_name: str):
    whole = {**SCHEDULE_FIELDS, **lcm.FIELDS}
    for steps, distilled in itertools.product(range(1, 101), (50, 77, 100)):
        if steps > distilled:
            continue
        scheduler = make_scheduler(class_name, {"original_inference_steps": distilled})
        scheduler.set_timesteps(steps)
        config = {**whole, "original_inference_steps": distilled}
        schedule = NoiseSchedule.from_config(whole)
        ours = lcm.consistency_timesteps(config, schedule, AskedSteps(num_inference_steps=steps))
        np.testing.assert_array_equal(ours, scheduler.timesteps.numpy())


@pytest.mark.parametrize("steps", [1, 5, 20])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize(
    ("plan", "fields", "class_name"),
    [
        (ddim.ddim_plan, ddim.FIELDS, "DDIMParallelScheduler"),
        (ddpm.ddpm_plan, ddpm.FIELDS, "DDPMParallelScheduler"),
    ],
)
def test_the_parallel_classes_are_the_plain_ones(plan, fields, class_name: str, spacing: str, steps: int):
    for prediction_type in PREDICTION_TYPES:
        config = {**STABLE_DIFFUSION, "timestep_spacing": spacing, "prediction_type": prediction_type}
        check_family(plan, fields, class_name, config, steps)


@pytest.mark.parametrize("alpha_to_one", [True, False])
def test_ddim_draws_noise_for_every_row_though_the_last_adds_none(alpha_to_one: bool):
    config = {**STABLE_DIFFUSION, "set_alpha_to_one": alpha_to_one, "steps_offset": 0}
    scheduler = make_scheduler("DDIMScheduler", config)
    step = scheduler.step

    def step_that_draws(output, timestep, sample):
        return step(output, timestep, sample, eta=0.7)

    scheduler.step = step_that_draws
    whole = {**SCHEDULE_FIELDS, **ddim.FIELDS, **config}
    plan = ddim.ddim_plan(whole, NoiseSchedule.from_config(whole), AskedSteps(num_inference_steps=6, eta=0.7))
    assert_agrees(plan, run_reference(scheduler, 6))


@pytest.mark.parametrize(
    ("class_name", "fields"),
    [
        ("DDIMScheduler", ddim.FIELDS),
        ("DDIMParallelScheduler", ddim.FIELDS),
        ("DDPMScheduler", ddpm.FIELDS),
        ("DDPMParallelScheduler", ddpm.FIELDS),
        ("LCMScheduler", lcm.FIELDS),
        ("PNDMScheduler", pndm.FIELDS),
        ("TCDScheduler", tcd.FIELDS),
    ],
)
def test_every_field_of_the_reference_is_known_with_its_default(class_name: str, fields: dict[str, object]):
    parameters = dict(inspect.signature(getattr(diffusers, class_name).__init__).parameters)
    theirs = {name: value.default for name, value in parameters.items() if name != "self"}
    ours = {**SCHEDULE_FIELDS, **fields}
    assert {name for name in theirs if name not in ours or ours[name] != theirs[name]} <= {"clip_sample"}


@pytest.mark.parametrize(
    ("check", "first"), [(check_ddpm, 0), (check_lcm, 0), (functools.partial(check_tcd, eta=0.3), 1)]
)
def test_the_image_enters_as_add_noise_has_it(check, first: int):
    plan = check(STABLE_DIFFUSION, 5, first=first)
    scheduler = make_scheduler("DDPMScheduler", STABLE_DIFFUSION)
    both = torch.eye(2, dtype=torch.float64)
    for row, timestep in enumerate(plan.timesteps):
        theirs = scheduler.add_noise(both[0], both[1], torch.tensor([int(timestep)]))
        np.testing.assert_allclose(plan.noised[row], theirs.numpy(), rtol=1e-6)
