from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sdrt.errors import RequestError
from sdrt.plan import MAX_STATE_SLOTS, SCHEDULERS, build_plan
from sdrt.plan.catalog import NAMES, base_names, find_scheduler
from sdrt.schedule import NoiseSchedule

SD = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}
TWO_ROWS = ("heun", "dpm2", "dpmpp_sde", "flow_heun")  # a step has, but for the last
STOCHASTIC = (
    "ddpm",
    "euler_a",
    "dpm2_a",
    "dpmpp_2m_sde",
    "dpmpp_3m_sde",
    "dpmpp_sde",
    "sa_solver",
    "lcm",
    "tcd",
    "edm_dpmpp_2m_sde",
)
SPACINGS = ("leading", "trailing", "linspace")


OWN = {"betas": "PNDMScheduler", "edm": "EDMEulerScheduler", "flow": "FlowMatchEulerDiscreteScheduler"}
# What a Stable Diffusion checkpoint's config can be sampled with.
ITS_SCHEDULERS = tuple(name for name, named in NAMES.items() if named.family.schedule == "betas")
ITS_BASES = tuple(name for name in base_names() if name in ITS_SCHEDULERS)


def plan_of(name: str | None, steps: int, *, own: str | None = None, eta: float = 0.0, **fields: object):
    own = OWN[NAMES[name].family.schedule if name in NAMES else "betas"] if own is None else own
    return build_plan(
        scheduler_class=own, scheduler_config={**SD, **fields}, num_inference_steps=steps, scheduler=name, eta=eta
    )


def run(plan, state: np.ndarray, outputs: np.ndarray) -> np.ndarray:
    """The state after all rows; state: [slots], outputs: [rows]; no noise."""
    for row in range(len(plan)):
        state = plan.transitions[row] @ np.concatenate([state, [outputs[row], 0.0]])
    return state


def rows_of(name: str, steps: int) -> int:
    """How often a scheduler evaluates the network."""
    if name.startswith(TWO_ROWS):
        return 2 * steps - 1
    return steps + (name == "pndm" and steps > 1)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 50])
def test_a_plan_has_as_many_rows_as_evaluations(name: str, steps: int):
    plan = plan_of(name, steps)
    assert len(plan) == rows_of(name, steps)
    assert plan.transitions.shape == (len(plan), plan.slots, plan.slots + 2)
    assert plan.slots <= MAX_STATE_SLOTS


@pytest.mark.parametrize("name", base_names())
@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_step_count_gives_a_finite_plan_or_a_request_error(name: str, spacing: str):
    refused = []
    for steps in (*range(1, 20), 33, 50, 51, 77, 250, 333, 500, 998, 999, 1000):
        try:
            plan = plan_of(name, steps, timestep_spacing=spacing)
        except RequestError:
            refused.append(steps)
            continue
        assert len(plan) == rows_of(name, steps)
        assert np.isfinite(plan.transitions).all()
    # Whole timesteps run out where almost all are asked for; distilled models were taught only so many.
    assert all(steps >= (51 if name in ("lcm", "tcd") else 998) for steps in refused)


def test_pndm_evaluates_its_second_timestep_twice():
    assert plan_of("pndm", 4).timesteps.tolist() == [751, 501, 501, 251, 1]


def test_pndm_makes_its_first_step_again_from_the_first_latents():
    plan = plan_of("pndm", 10)
    state = np.zeros(plan.slots)
    state[0] = 1.0
    after_first = plan.transitions[0] @ np.concatenate([state, [0.3, 0.0]])
    disturbed = after_first.copy()
    disturbed[0] += 100.0  # what the predictor made of the latents must not matter
    first, second = (plan.transitions[1] @ np.concatenate([s, [0.4, 0.0]]) for s in (after_first, disturbed))
    assert first[0] == second[0]


def test_dpm_multistep_has_a_grid_of_its_own():
    assert plan_of("dpmpp_2m", 3, timestep_spacing="leading").timesteps.tolist() == [751, 501, 251]
    assert plan_of("dpmpp_2m", 3, timestep_spacing="linspace").timesteps.tolist() == [999, 666, 333]


def test_euler_keeps_fractions_of_timesteps():
    timesteps = plan_of("euler", 3, timestep_spacing="linspace").timesteps
    assert timesteps.tolist() == [999, 499.5, 0]


@pytest.mark.parametrize(("spacing", "first"), [("linspace", 999), ("trailing", 999), ("leading", 901)])
def test_euler_starts_at_the_scale_of_its_spacing(spacing: str, first: int):
    plan = plan_of("euler", 10, timestep_spacing=spacing)
    sigma = NoiseSchedule.from_config(SD).sigmas[first]
    expected = np.sqrt(sigma**2 + 1) if spacing == "leading" else sigma
    assert plan.initial_scale == pytest.approx(expected, rel=1e-6)
    assert plan.input_scales[0] == pytest.approx(1 / np.sqrt(sigma**2 + 1), rel=1e-6)


@pytest.mark.parametrize("name", ["ddim", "pndm", "dpmpp_2m"])
def test_other_families_start_at_unit_scale(name: str):
    plan = plan_of(name, 10)
    assert plan.initial_scale == 1
    assert np.all(plan.input_scales == 1)


def test_noise_is_drawn_with_eta_and_by_those_that_are_stochastic():
    plan = plan_of("ddim", 5, eta=1.0)
    assert [plan.draws_noise(row) for row in range(5)] == [True] * 5
    drawing = [name for name in base_names() if any(plan_of(name, 5).draws_noise(row) for row in range(5))]
    assert {*drawing, "tcd"} == set(STOCHASTIC)  # which does with eta


@pytest.mark.parametrize("name", ["pndm", "euler", "dpmpp_2m"])
def test_eta_is_refused_where_it_would_do_nothing(name: str):
    with pytest.raises(RequestError, match=r"eta is 0\.5"):
        plan_of(name, 5, eta=0.5)


@pytest.mark.parametrize("eta", [-0.1, float("nan"), float("inf"), 50.0])
def test_an_impossible_eta_is_refused(eta: float):
    with pytest.raises(RequestError, match="eta"):
        plan_of("ddim", 5, eta=eta)


@pytest.mark.parametrize("steps", [0, -1, 1001, 10**9, True, 2.0])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_an_impossible_step_count_is_refused(name: str, steps: object):
    with pytest.raises(RequestError, match=f"num_inference_steps is {steps}"):
        plan_of(name, steps)


@pytest.mark.parametrize("name", [None, "pndm", "PNDMScheduler"])
def test_the_own_scheduler_may_be_left_out_or_named(name: str | None):
    np.testing.assert_array_equal(plan_of(name, 5).transitions, plan_of("pndm", 5).transitions)


@pytest.mark.parametrize(
    ("wanted", "near"),
    [
        ("dimm", "ddim"),
        ("dpmpp_2m_karas", "dpmpp_2m_karras"),
        ("euler_anc", "euler_a"),
        ("PNDMSheduler", "PNDMScheduler"),
    ],
)
def test_an_unknown_scheduler_gets_a_suggestion(wanted: str, near: str):
    with pytest.raises(RequestError, match=wanted) as raised:
        plan_of(wanted, 5)
    assert f"did you mean {near}?" in raised.value.hint


@pytest.mark.parametrize(
    ("own", "alike"),
    [("IPNDMScheduler", ""), ("EDMEulerScheduler", "edm_dpmpp_2m"), ("FlowMatchHeunDiscreteScheduler", "flow_euler")],
)
def test_a_scheduler_is_for_checkpoints_of_its_own_kind_of_noise(own: str, alike: str):
    assert len(plan_of(None, 5, own=own)) >= 5
    with pytest.raises(RequestError, match="noise is of another kind") as raised:
        plan_of("euler", 5, own=own)
    assert alike in raised.value.hint
    with pytest.raises(RequestError, match="noise is of another kind"):
        plan_of(own, 5, own="DDIMScheduler")


@pytest.mark.parametrize(
    ("spelt", "name"),
    [
        ("DPM++ 2M Karras", "dpmpp_2m_karras"),
        ("Euler a", "euler_a"),
        ("euler_ancestral", "euler_a"),
        ("PLMS", "pndm"),
        ("dpm_2_ancestral_beta", "dpm2_a_beta"),
        ("dpmsolver++", "dpmpp_2m"),
        ("UniPC", "unipc"),
    ],
)
def test_other_spellings_of_a_name_are_understood(spelt: str, name: str):
    assert find_scheduler(spelt) is NAMES[name]


def test_a_name_means_its_own_sampler_whatever_the_checkpoint_was_saved_with():
    saved = {"algorithm_type": "sde-dpmsolver++", "solver_order": 3, "use_karras_sigmas": True, "solver_type": "heun"}
    assert plan_of("dpmpp_2m", 8, **saved) is not plan_of("dpmpp_2m", 8)
    for name in ("dpmpp_2m", "dpmpp_2s", "dpmpp_3m_sde", "euler", "euler_exponential", "sa_solver"):
        np.testing.assert_array_equal(plan_of(name, 8, **saved).transitions, plan_of(name, 8).transitions)
    own = build_plan(scheduler_class="DPMSolverMultistepScheduler", scheduler_config={**SD, **saved})
    assert own.slots == 3
    assert own.draws_noise(0)


def test_a_variance_that_is_not_said_is_the_small_one():
    np.testing.assert_array_equal(plan_of("ddpm", 5, variance_type=None).transitions, plan_of("ddpm", 5).transitions)


def test_one_step_between_own_bounds_is_at_the_largest():
    plan = plan_of("unipc_karras", 1, sigma_max=9.0)
    assert plan.noised[0, 1] / plan.noised[0, 0] == pytest.approx(9.0, rel=1e-6)


def test_fields_that_are_there_by_default_are_for_their_own_class_alone():
    config = {**SD, "steps_offset": 1, "_use_default_values": ["steps_offset"]}
    own, other = (
        build_plan(scheduler_class="DDIMScheduler", scheduler_config=config, num_inference_steps=5, scheduler=name)
        for name in (None, "pndm")
    )
    assert own.timesteps[-1] == 1
    assert other.timesteps[-1] == 0


@pytest.mark.parametrize(
    "change",
    [
        {"input_scales": np.ones(2)},
        {"transitions": np.zeros((5, 2, 3))},
        {"timesteps": np.zeros(0), "input_scales": np.zeros(0), "transitions": np.zeros((0, 1, 3))},
        {"draws": np.ones(4, bool)},
    ],
    ids=["scales", "transitions", "no rows", "draws"],
)
def test_a_plan_whose_arrays_do_not_fit_is_refused(change: dict[str, np.ndarray]):
    with pytest.raises(RequestError, match="a plan of"):
        replace(plan_of("euler", 5), **change)


@pytest.mark.parametrize("own", ["RePaintScheduler", ""])
@pytest.mark.parametrize("name", [None, "euler"])
def test_a_checkpoint_of_an_unknown_kind_is_refused(own: str, name: str | None):
    with pytest.raises(RequestError, match="no kind that sdrt knows"):
        plan_of(name, 5, own=own)


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"timesteps": (999, 500), "sigmas": (5.0, 1.0)}, "timesteps and sigmas are both given"),
        ({"timesteps": (999, 500), "num_inference_steps": 3}, "num_inference_steps is 3, but timesteps has 2 steps"),
        ({"sigmas": (5.0, 1.0, 0.0), "num_inference_steps": 3}, "num_inference_steps is 3, but sigmas has 2 steps"),
        ({"timesteps": (500, 999)}, "timesteps has 500 before 999"),
        ({"timesteps": (500, 500)}, "timesteps has 500 before 500"),
        ({"timesteps": (1000, 500)}, "timesteps goes from 1000 to 500"),
        ({"timesteps": (float("nan"),)}, "timesteps is"),
        ({"timesteps": ()}, "timesteps has no values"),
        ({"sigmas": (1.0, 5.0)}, "sigmas has 1 before 5"),
        ({"sigmas": (5.0,)}, "sigmas has no step"),
        ({"num_inference_steps": 5, "first": 5}, "first is 5 of 5 steps"),
        ({"num_inference_steps": 5, "first": -1}, "first is -1 of 5 steps"),
    ],
)
def test_a_grid_that_cannot_be_is_refused_with_its_values(asked: dict[str, object], reason: str):
    with pytest.raises(RequestError, match=reason):
        build_plan(scheduler_class="EulerDiscreteScheduler", scheduler_config=SD, **asked)


def test_own_timesteps_are_the_grid_and_count_the_steps():
    plan = build_plan(scheduler_class="DDPMScheduler", scheduler_config=SD, timesteps=(900, 300, 40))
    assert plan.timesteps.tolist() == [900, 300, 40]


def test_steps_that_are_left_out_are_the_first():
    whole, cut = (build_plan(scheduler_class="DDIMScheduler", scheduler_config=SD, first=first) for first in (0, 20))
    np.testing.assert_array_equal(cut.timesteps, whole.timesteps[20:])


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("ddim", "clip_sample", "yes"),
        ("ddim", "prediction_type", "flow_prediction"),
        ("ddim", "timestep_spacing", "cosine"),
        ("ddim", "steps_offset", -1),
        ("ddim", "steps_offset", 0.5),
        ("ddim", "steps_offset", 1000),
        ("ddim", "set_alpha_to_one", "no"),
        ("pndm", "prediction_type", "sample"),
        ("euler", "final_sigmas_type", "half"),
        ("euler_karras", "sigma_min", -1.0),
        ("euler_karras", "sigma_max", "large"),
        ("DPMSolverMultistepScheduler", "solver_type", "bogacki"),
        ("unipc", "lower_order_final", False),
        ("lms", "rescale_betas_zero_snr", True),
        ("dpmpp_2m", "use_flow_sigmas", True),
        ("dpmpp_2m", "use_dynamic_shifting", True),
        ("dpmpp_2m", "variance_type", "learned_range"),
        ("dpmpp_2m", "lambda_min_clipped", 1e9),
        ("dpmpp_2m", "lambda_min_clipped", 10**400),
        ("dpmpp_2m", "lambda_min_clipped", "none"),
        ("euler", "a_field_of_tomorrow", 1),
    ],
)
def test_a_field_that_cannot_be_honoured_is_named_with_its_value(name: str, field: str, value: object):
    with pytest.raises(RequestError, match=field) as raised:
        plan_of(name, 5, **{field: value})
    assert str(value)[:70] in raised.value.message
    assert raised.value.hint


@pytest.mark.parametrize("field", ["_class_name", "_anything", "rho", "predict_x0", "clip_sample_range"])
def test_fields_without_meaning_for_the_scheduler_change_nothing(field: str):
    np.testing.assert_array_equal(plan_of("euler", 5, **{field: 3.5}).transitions, plan_of("euler", 5).transitions)


def test_an_absent_clip_sample_does_not_clip():
    without = {name: value for name, value in SD.items() if name != "clip_sample"}
    plan = build_plan(scheduler_class="DDIMScheduler", scheduler_config=without, num_inference_steps=5)
    np.testing.assert_array_equal(plan.transitions, plan_of("ddim", 5).transitions)
    assert plan.clamp is None
    assert plan_of("ddim", 5, clip_sample=True).clamp.limit == 1


@pytest.mark.parametrize(
    ("field", "value"), [("dynamic_thresholding_ratio", 1.5), ("sample_max_value", 0.5), ("thresholding", "yes")]
)
def test_a_threshold_that_cannot_be_is_refused(field: str, value: object):
    with pytest.raises(RequestError, match=field):
        plan_of("dpmpp_2m", 5, **{"thresholding": True, field: value})


def test_a_scheduler_that_clips_only_is_refused_where_the_checkpoint_thresholds():
    assert plan_of("heun", 5, clip_sample=True).clamp is not None
    assert plan_of("heun", 5, thresholding=True).clamp is None  # it has no such field
    with pytest.raises(RequestError, match="thresholding"):
        plan_of("heun", 5, clip_sample=True, thresholding=True)


def test_a_division_by_zero_signal_is_refused():
    fields = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    with pytest.raises(RequestError, match="no finite 5 steps"):
        plan_of("ddim", 5, **fields)
    assert len(plan_of("ddim", 5, prediction_type="v_prediction", **fields)) == 5


def test_equal_arguments_give_the_same_object_and_others_do_not():
    assert plan_of("ddim", 6) is plan_of("ddim", 6)
    assert plan_of("ddim", 6) is not plan_of("ddim", 7)
    assert plan_of("ddim", 6) is not plan_of("ddim", 6, eta=0.1)
    assert plan_of("ddim", 6) is not plan_of("ddim", 6, steps_offset=0)
    assert plan_of("ddim", 6) is not plan_of("euler", 6)


def test_a_plan_cannot_be_written_to():
    with pytest.raises(ValueError, match="read-only"):
        plan_of("ddim", 6).transitions[0, 0, 0] = 1


def test_a_padded_transition_steps_like_the_plan_s_own():
    plan = plan_of("dpmpp_2m", 5)
    wide = plan.padded_transitions(slice(2, 3), MAX_STATE_SLOTS)[0]
    state = np.array([0.3, -0.7, 0.0, 0.0, 0.0, 0.0])
    own = plan.transitions[2] @ [0.3, -0.7, 1.1, 0.2]
    np.testing.assert_allclose((wide @ np.concatenate([state, [1.1, 0.2, 5.0]]))[:2], own, rtol=1e-6)


@st.composite
def requests(draw: st.DrawFn, names: tuple[str, ...]):
    """(name, the options that `build_plan` takes): any that its scheduler has."""
    name = draw(st.sampled_from(names))
    family = NAMES[name].family
    fields: dict[str, object] = {**SD, "set_alpha_to_one": True, "steps_offset": draw(st.integers(0, 3))}
    if family.schedule == "betas":
        fields["timestep_spacing"] = draw(st.sampled_from(SPACINGS))
        fields["beta_schedule"] = draw(st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2"]))
        fields["prediction_type"] = draw(st.sampled_from(family.predictions))
        if "rescale_betas_zero_snr" in family.fields and fields["prediction_type"] == "v_prediction":
            fields["rescale_betas_zero_snr"] = draw(st.booleans())
    options: dict[str, object] = {}
    plain = not any(name.endswith(spacing) for spacing in family.spacings)
    grids = [grid for grid in family.takes if grid != "eta" and plain]
    grid = draw(st.sampled_from([None, *grids]))
    if grid is None:
        steps = draw(st.integers(1, 150))
        options["num_inference_steps"] = steps
    elif grid == "timesteps":
        whole = draw(st.sets(st.integers(1, 999), min_size=1, max_size=40))
        options["timesteps"], steps = tuple(float(value) for value in sorted(whole, reverse=True)), len(whole)
    else:
        most = 1.0 if family.schedule == "flow" else 80.0
        levels = draw(st.sets(st.floats(1 / 64, most, width=32), min_size=1, max_size=40))
        ends = [] if family.schedule == "flow" else [0.0]
        options["sigmas"], steps = (*sorted(levels, reverse=True), *ends), len(levels)
    if "eta" in family.takes:
        options["eta"] = draw(st.floats(0, 1))
    options["first"] = draw(st.integers(0, steps - 1))
    return name, fields, options


# Why a plan of these options may be refused: nothing else is.
REFUSED = ("has no finite", "original_inference_steps")


def plan_for(name: str, fields: dict[str, object], options: dict[str, object]):
    """The plan of `requests`; one that is refused, because it would not be finite, is not looked at."""
    own = OWN[NAMES[name].family.schedule]
    try:
        return build_plan(scheduler_class=own, scheduler_config=fields, scheduler=name, **options)
    except RequestError as refusal:
        if not any(reason in refusal.message for reason in REFUSED):
            raise
        assume(False)


@given(asked=requests(SCHEDULERS))
@settings(max_examples=400, deadline=None)
def test_any_request_s_plan_is_finite_and_its_timesteps_descend(asked):
    name, fields, options = asked
    plan = plan_for(name, fields, options)
    for numbers in (plan.timesteps, plan.input_scales, plan.transitions, plan.initial_scale, plan.noised):
        assert np.isfinite(numbers).all()
    # From sigma 20,291 on, ancestral KDPM2's midpoints are what float32 leaves of a difference, in the reference too.
    assume(not (name.startswith("dpm2_a") and fields.get("beta_schedule") == "squaredcos_cap_v2"))
    # Of KDPM2's steps and their midpoints one is rounded to whole timesteps and the other is not, as the reference's.
    assert np.all(np.diff(plan.timesteps) <= (1 if name.startswith("dpm2") else 1e-4))


# These end on their smallest sigma, and not on the image.
END_ON_NOISE = ("deis", "sa_solver", "tcd")
# What they remember of steps that were left out is missing in the reference too, whose coefficients count with it.
REMEMBER = ("lms", "pndm")


@given(
    asked=requests(tuple(name for name in ITS_SCHEDULERS if not name.startswith(END_ON_NOISE))),
    x0=st.floats(-3, 3),
    noise=st.floats(-3, 3),
    seed=st.integers(0, 9),
)
@settings(max_examples=400, deadline=None)
def test_a_network_that_knows_the_image_lands_on_it_whatever_noise_is_drawn(asked, x0: float, noise: float, seed: int):
    name, fields, options = asked
    assume(options["first"] == 0 or not name.startswith(REMEMBER))
    plan = plan_for(name, fields, options)
    assume(name != "pndm" or fields["prediction_type"] == "epsilon")  # it averages velocities of several levels
    if name in ("ddim", "pndm"):
        # They step down by T // n whatever the grid: they land where the grid does so too, and ends below that.
        gaps, stride = np.diff(np.unique(plan.timesteps)), 1000 // int(options["num_inference_steps"])
        assume(plan.timesteps[-1] < stride and np.all(gaps == stride))
    draws = np.random.default_rng(seed).standard_normal(len(plan))
    state = np.zeros(plan.slots)
    state[0] = plan.noised[0] @ [x0, noise]
    for row, (signal, level) in enumerate(plan.noised):
        seen = state[0]
        noise = (seen - signal * x0) / level
        velocity = (signal * noise - level * x0) / np.hypot(signal, level)
        output = {"epsilon": noise, "sample": x0, "v_prediction": velocity}[str(fields["prediction_type"])]
        state = plan.transitions[row] @ np.concatenate([state, [output, draws[row]]])
    skipped = 0.25 / ((10 * plan.timesteps[-1]) ** 2 + 0.25) if name == "lcm" else 0.0  # Luo et al. 2023, σ_data 0.5
    assert state[0] == pytest.approx(np.sqrt(1 - skipped) * x0 + skipped * seen, abs=1e-4)


@given(steps=st.integers(1, 200), eta=st.floats(0, 1), spacing=st.sampled_from(SPACINGS))
@settings(max_examples=100, deadline=None)
def test_ddim_noise_keeps_the_variance_of_every_level(steps: int, eta: float, spacing: str):
    plan = plan_of("ddim", steps, eta=eta, timestep_spacing=spacing)
    levels = NoiseSchedule.from_config(SD).alphas_cumprod
    timesteps = plan.timesteps.astype(int)
    following = np.maximum(timesteps - 1000 // steps, 0)
    # With x₀ = 0, x = σ·ε and the output is ε: the next x must have the next level's variance.
    on_noise = plan.transitions[:, 0, 0] * np.sqrt(1 - levels[timesteps]) + plan.transitions[:, 0, 1]
    variance = on_noise**2 + plan.transitions[:, 0, 2] ** 2
    np.testing.assert_allclose(variance, 1 - levels[following], rtol=1e-9, atol=1e-12)
