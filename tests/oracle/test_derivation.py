"""Plans that `derive` finds by probing, against the objects that were probed."""

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sdrt.errors import RequestError
from sdrt.plan.derivation import derive
from tests.oracle.plan_reference import STABLE_DIFFUSION, assert_agrees, make_scheduler, run_reference

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
]

# The object computes its coefficients in float32, the reference here in float64.
TOLERANCE = 1e-5
OBJECTS = [
    ("DDIMScheduler", {}, 1),
    ("DDIMScheduler", {"prediction_type": "v_prediction"}, 1),
    ("DDPMScheduler", {}, 1),
    ("PNDMScheduler", {}, 4),
    ("PNDMScheduler", {"skip_prk_steps": False}, 6),
    ("EulerDiscreteScheduler", {}, 1),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, 1),
    ("EulerAncestralDiscreteScheduler", {}, 1),
    ("HeunDiscreteScheduler", {}, 2),
    ("LMSDiscreteScheduler", {}, 4),
    ("UniPCMultistepScheduler", {}, 3),
    ("UniPCMultistepScheduler", {"solver_order": 3}, 4),
    ("DPMSolverMultistepScheduler", {"solver_order": 2}, 2),
    ("DPMSolverMultistepScheduler", {"solver_order": 3}, 3),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, 2),
    ("DEISMultistepScheduler", {}, 2),
    ("DEISMultistepScheduler", {"solver_order": 3}, 3),
    ("LCMScheduler", {}, 1),
    ("TCDScheduler", {}, 1),
]


def made(class_name: str, fields: dict[str, object], steps: int):
    scheduler = make_scheduler(class_name, {**STABLE_DIFFUSION, **fields})
    scheduler.set_timesteps(steps)
    return scheduler


@pytest.mark.parametrize("steps", [5, 20])
@pytest.mark.parametrize(("class_name", "fields", "slots"), OBJECTS, ids=str)
def test_a_derived_plan_is_the_object(class_name: str, fields: dict[str, object], slots: int, steps: int):
    plan = derive(made(class_name, fields, steps))
    assert plan.slots <= slots
    assert_agrees(plan, run_reference(made(class_name, fields, steps), steps), TOLERANCE)


def test_what_a_step_is_told_is_part_of_the_plan():
    plan = derive(made("DDIMScheduler", {}, 6), eta=0.5)
    assert_agrees(plan, run_reference(made("DDIMScheduler", {}, 6), 6, eta=0.5), TOLERANCE)
    assert all(plan.draws_noise(row) for row in range(6))


def test_the_object_is_left_as_it_is():
    scheduler = made("LMSDiscreteScheduler", {}, 5)
    derive(scheduler)
    assert scheduler.derivatives == []
    assert scheduler.step_index is None


def test_a_plan_begins_where_the_object_is_told_to():
    scheduler = made("DPMSolverMultistepScheduler", {}, 8)
    scheduler.set_begin_index(3)
    plan = derive(scheduler)
    assert_agrees(plan, run_reference(made("DPMSolverMultistepScheduler", {}, 8), 8, first=3), TOLERANCE)
    assert plan.noised[0, 0] ** 2 + plan.noised[0, 1] ** 2 == pytest.approx(1)


@pytest.mark.parametrize("field", ["thresholding", "clip_sample"])
def test_an_object_that_clips_is_refused_with_how_far_from_linear_it_is(field: str):
    with pytest.raises(RequestError, match=r"not linear: .* differ by 0\.\d+ of the largest value"):
        derive(made("DDIMScheduler", {field: True}, 5))


class Remembering:
    """Averages the `depth` last outputs, in numpy."""

    def __init__(self, depth: int) -> None:
        self.timesteps = np.arange(20.0, 0, -1)
        self.depth = depth
        self.outputs: list[np.ndarray] = []

    def step(self, model_output, timestep, sample):
        self.outputs = [*self.outputs, model_output][-self.depth :]
        weighted = sum(output / (2 + age) ** 1.5 for age, output in enumerate(self.outputs))
        return SimpleNamespace(prev_sample=0.9 * sample - weighted / timestep)


def test_an_object_without_torch_has_a_plan():
    plan = derive(Remembering(4))
    assert plan.slots == 4
    assert plan.initial_scale == 1
    assert np.isnan(plan.noised).all()


def test_an_object_that_remembers_too_much_is_refused_with_how_much():
    with pytest.raises(RequestError, match="needs 8 state slots, but a plan has 6"):
        derive(Remembering(8))


class Drawing(Remembering):
    def __init__(self, times: int) -> None:
        super().__init__(1)
        self.timesteps = torch.arange(5, 0, -1)
        self.times = times

    def step(self, model_output, timestep, sample):
        noise = sum(torch.randn(sample.shape) for _ in range(self.times))
        return SimpleNamespace(prev_sample=0.9 * sample - 0.1 * model_output + 0.2 * noise)


def test_noise_drawn_twice_in_a_step_is_refused():
    np.testing.assert_allclose(derive(Drawing(1)).transitions[:, 0], [[0.9, -0.1, 0.2]] * 5, atol=1e-12)
    with pytest.raises(RequestError, match="draws noise 2 times"):
        derive(Drawing(2))


class Mixing(Remembering):
    def step(self, model_output, timestep, sample):
        return SimpleNamespace(prev_sample=np.roll(sample, 1, axis=-1) - 0.1 * model_output)


def test_an_object_that_mixes_elements_is_refused():
    with pytest.raises(RequestError, match="is linear, but its plan is off by"):
        derive(Mixing(1))


def test_an_object_without_timesteps_or_of_another_shape_is_refused():
    with pytest.raises(RequestError, match="no timesteps or no step"):
        derive(make_scheduler("PNDMScheduler", STABLE_DIFFUSION))
    with pytest.raises(RequestError, match="unexpected keyword argument"):
        derive(Remembering(1), gamma=1.0)


def test_deriving_does_not_load_torch_for_an_object_that_does_not_use_it():
    code = "import sys, sdrt, sdrt.plan.derivation; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_step_without_a_sample_is_refused():
    class Bare:
        timesteps = np.array([9.0, 1.0])

        def step(self, output, timestep, sample):
            return (sample - output,)

    with pytest.raises(RequestError, match="tuple, which has no prev_sample"):
        derive(Bare())
