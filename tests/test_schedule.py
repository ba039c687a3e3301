import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdrt.errors import RequestError
from sdrt.schedule import (
    NoiseSchedule,
    denoised_coefficients,
    karras_sigmas,
    noise_coefficients,
    spaced_timesteps,
)

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


def spaced(spacing: str, steps: int, offset: int = 0, train: int = 1000) -> list[float]:
    timesteps = spaced_timesteps(spacing, num_train_timesteps=train, num_inference_steps=steps, steps_offset=offset)
    return timesteps.tolist()


def test_the_spacings_of_three_steps():
    assert spaced("leading", 3, 1) == [667, 334, 1]
    assert spaced("trailing", 3) == [999, 666, 332]
    assert spaced("linspace", 3) == [999, 499.5, 0]


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_every_step_count_gives_as_many_descending_timesteps(spacing: str):
    for steps in range(1, 1001):
        timesteps = spaced(spacing, steps)
        assert len(timesteps) == steps
        assert all(np.diff(timesteps) < 0)
        assert 0 <= timesteps[-1] <= timesteps[0] <= 999


def test_sigmas_of_stable_diffusion():
    schedule = NoiseSchedule.from_config(SD)
    assert len(schedule) == 1000
    assert schedule.sigmas[0] == pytest.approx(0.0292, abs=1e-4)
    assert schedule.sigmas[-1] == pytest.approx(14.6146, abs=1e-4)


def test_fields_that_are_absent_take_the_usual_defaults():
    schedule = NoiseSchedule.from_config({})
    assert schedule.prediction_type == "epsilon"
    assert schedule.alphas_cumprod[0] == pytest.approx(1 - 0.0001, rel=1e-6)


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "exp", "laplace"])
def test_noise_grows_with_the_timestep(beta_schedule: str):
    schedule = NoiseSchedule.from_config({**SD, "beta_schedule": beta_schedule})
    assert np.all(np.diff(schedule.sigmas) > 0)


def test_a_rescaled_schedule_ends_in_pure_noise_with_a_finite_sigma():
    schedule = NoiseSchedule.from_config({**SD, "rescale_betas_zero_snr": True})
    assert schedule.alphas_cumprod[-1] == 0
    assert schedule.sigmas[-1] == pytest.approx(4096, rel=1e-6)
    assert schedule.alphas_cumprod[0] == pytest.approx(NoiseSchedule.from_config(SD).alphas_cumprod[0], rel=1e-6)


def test_trained_betas_replace_the_formula():
    betas = [0.1, 0.2, 0.5]
    schedule = NoiseSchedule.from_config({"trained_betas": betas, "num_train_timesteps": 3})
    np.testing.assert_allclose(schedule.alphas_cumprod, [0.9, 0.72, 0.36], rtol=1e-6)


def test_a_schedule_without_noise_cannot_be_rescaled():
    betas = {"trained_betas": [0.0] * 1000, "rescale_betas_zero_snr": True}
    with pytest.raises(RequestError, match="outside 0 to 1"):
        NoiseSchedule.from_config({**SD, **betas})


def test_tables_cannot_be_written_to():
    schedule = NoiseSchedule.from_config(SD)
    with pytest.raises(ValueError, match="read-only"):
        schedule.sigmas[0] = 1


@given(st.lists(st.floats(0.03, 14), min_size=1, max_size=20))
@settings(max_examples=50, deadline=None)
def test_a_sigma_s_timestep_has_that_sigma(sigmas: list[float]):
    schedule = NoiseSchedule.from_config(SD)
    wanted = np.array(sigmas)
    timesteps = schedule.timesteps_at(wanted)
    # Straight in log sigma on the way there, in sigma on the way back: at the smallest, up to 1.5e-2 lie between them.
    np.testing.assert_allclose(schedule.sigmas_at(timesteps), wanted, rtol=1.6e-2)
    assert np.all((timesteps >= 0) & (timesteps <= 999))


def test_whole_timesteps_survive_the_way_to_sigmas_and_back():
    schedule = NoiseSchedule.from_config(SD)
    timesteps = np.arange(1000, dtype=np.float64)
    np.testing.assert_allclose(schedule.timesteps_at(schedule.sigmas_at(timesteps)), timesteps, atol=1e-3)


def test_sigmas_outside_the_table_take_its_ends():
    schedule = NoiseSchedule.from_config(SD)
    assert schedule.timesteps_at(np.array([1e9, 1e-9, 0.0])).tolist() == [999, 0, 0]


def test_karras_sigmas_keep_their_bounds_and_shape():
    sigmas = karras_sigmas(0.03, 14.6, 10)
    assert (sigmas[0], sigmas[-1]) == (pytest.approx(14.6), pytest.approx(0.03))
    np.testing.assert_allclose(np.diff(sigmas ** (1 / 7)), np.diff(sigmas ** (1 / 7))[0])


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@given(level=st.floats(0.01, 0.99), x0=st.floats(-3, 3), noise=st.floats(-3, 3))
@settings(max_examples=50, deadline=None)
def test_prediction_types_give_back_image_and_noise(prediction_type: str, level: float, x0: float, noise: float):
    alpha, sigma = np.sqrt(np.array([level])), np.sqrt(np.array([1 - level]))
    x = alpha * x0 + sigma * noise
    output = {"epsilon": noise, "sample": x0, "v_prediction": alpha * noise - sigma * x0}[prediction_type]
    a, b = denoised_coefficients(prediction_type, alpha, sigma)
    c, d = noise_coefficients(prediction_type, alpha, sigma)
    assert (a * x + b * output)[0] == pytest.approx(x0, abs=1e-12)
    assert (c * x + d * output)[0] == pytest.approx(noise, abs=1e-12)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("beta_schedule", "wavy"),
        ("beta_schedule", None),
        ("beta_start", "0.1"),
        ("beta_start", float("nan")),
        ("beta_start", True),
        ("beta_start", -0.1),
        ("beta_end", None),
        ("beta_end", 10**400),
        ("num_train_timesteps", 0),
        ("num_train_timesteps", 1),
        ("num_train_timesteps", 10**12),
        ("num_train_timesteps", 1000.0),
        ("num_train_timesteps", True),
        ("prediction_type", "flow_prediction"),
        ("prediction_type", 3),
        ("rescale_betas_zero_snr", "yes"),
        ("trained_betas", [0.1, 0.2]),
        ("trained_betas", "0.1"),
        ("trained_betas", [None] * 1000),
        ("trained_betas", [True] * 1000),
        ("trained_betas", [10**400] * 1000),
        ("trained_betas", [float("nan")] * 1000),
        ("trained_betas", [-0.5] * 1000),
    ],
)
def test_a_bad_field_is_named_with_its_value(field: str, value: object):
    with pytest.raises(RequestError, match=field) as raised:
        NoiseSchedule.from_config({**SD, field: value})
    assert len(raised.value.message) < 200
    assert raised.value.hint


@pytest.mark.parametrize(
    "fields", [{"beta_end": 2.0}, {"beta_end": 1e300}, {"beta_start": -0.1, "beta_schedule": "linear"}]
)
def test_betas_that_are_no_probabilities_are_refused(fields: dict[str, object]):
    with pytest.raises(RequestError, match="outside 0 to 1"):
        NoiseSchedule.from_config({**SD, **fields})


FORMULA_FIELDS = ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps", "trained_betas")
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)


@given(st.fixed_dictionaries({}, optional=dict.fromkeys(FORMULA_FIELDS, json_values)))
@settings(max_examples=200, deadline=None)
def test_any_json_gives_a_schedule_or_a_request_error(fields: dict[str, object]):
    config = json.loads(json.dumps(fields))
    try:
        schedule = NoiseSchedule.from_config(config)
    except RequestError:
        return
    assert np.all((schedule.alphas_cumprod >= 0) & (schedule.alphas_cumprod <= 1))
