"""Requests are refused before any compute, with what is allowed; defaults are the model's."""

import math
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from sdrt.errors import RequestError
from sdrt.pipeline import as_request
from sdrt.plan import build_plan
from sdrt.request import Request
from sdrt.resolution import resolve_request
from sdrt.sizes import nearest_size


@pytest.fixture
def manifest(fake):
    return fake().bundle.manifest


def resolve(manifest, **fields):
    return resolve_request(Request(**{"prompt": "red circle", **fields}), manifest)


def test_defaults_are_the_models(manifest):
    resolved = resolve(manifest)
    assert (resolved.height, resolved.width) == (64, 64)
    assert resolved.scheduler == "PNDMScheduler"
    assert 0 <= resolved.seed < 2**32


def test_zero_is_a_value_and_not_an_absence(manifest):
    resolved = resolve(manifest, seed=0, guidance_scale=0)
    assert resolved.seed == 0
    assert resolved.guidance_scale == 0
    assert not resolved.guided


@pytest.mark.parametrize(("scale", "guided"), [(0.0, False), (1.0, False), (1.01, True), (-3.0, False), (7.5, True)])
def test_guidance_runs_above_one_as_in_the_reference(manifest, scale, guided):
    assert resolve(manifest, guidance_scale=scale).guided is guided


def test_an_empty_prompt_is_legal(manifest):
    assert resolve(manifest, prompt="").prompt == ""


def test_each_image_has_its_own_seed(manifest):
    assert resolve(manifest, seed=5, num_images_per_prompt=3).seeds == (5, 6, 7)


BAD = [
    {"num_inference_steps": 0},
    {"num_inference_steps": -1},
    {"num_inference_steps": 1001},
    {"num_inference_steps": 2.5},
    {"num_inference_steps": True},
    {"guidance_scale": math.nan},
    {"guidance_scale": math.inf},
    {"guidance_scale": "7"},
    {"seed": -1},
    {"seed": 2**64},
    {"seed": 2**64 - 1, "num_images_per_prompt": 2},
    {"seed": 1.0},
    {"num_images_per_prompt": 0},
    {"num_images_per_prompt": 10**6},
    {"height": 0},
    {"height": 72},
    {"width": 65},
    {"width": 1024},
    {"prompt": None},
    {"prompt": "\0"},
    {"prompt": "\ud800"},
    {"prompt": "x" * 100_001},
    {"negative_prompt": 3},
    {"scheduler": "eulr"},
    {"generator": "mps"},
    {"generator": None},
    {"generator": 0},
    {"eta": -0.5},
    {"eta": 1.5},
    {"eta": 0.5},
    {"eta": None},
    {"guidance_scale": True},
    {"guidance_scale": 1e39},
    {"guidance_scale": 10**400},
    {"seed": 10**5000},
    {"seed": -(10**5000)},
    {"num_inference_steps": 10**5000},
    {"num_inference_steps": np.float64(4)},
    {"height": "64"},
    {"seed": []},
    {"seed": [1, -1]},
    {"seed": [1, 2], "num_images_per_prompt": 3},
    {"seed": "12"},
    {"seed": b"ab"},
    {"timesteps": b"ab"},
    {"timesteps": np.ones((2, 2))},
    {"guidance_start": 0.25, "guidance_end": 0.26, "num_inference_steps": 10, "scheduler": "ddim"},
    {"guidance_rescale": -0.1},
    {"guidance_rescale": 1.1},
    {"timesteps": [1, 2]},
    {"timesteps": "999"},
    {"timesteps": []},
    {"timesteps": [999, None]},
    {"timesteps": [999.0] * 2000},
    {"sigmas": [10.0, 1.0]},
    {"timesteps": [999, 400], "num_inference_steps": 3},
    {"scheduler": 5},
    {"scheduler": ["ddim"]},
    {"scheduler": ""},
]


@pytest.mark.parametrize("fields", BAD, ids=lambda fields: "-".join(fields))
def test_bad_requests_are_refused_with_a_hint(manifest, fields):
    with pytest.raises(RequestError) as caught:
        resolve(manifest, **fields)
    assert caught.value.exit_code == 2
    assert caught.value.hint


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("num_image", "num_images_per_prompt"),
        ("steps", "num_inference_steps"),
        ("CFG_scale", "guidance_scale"),
        ("guidance_scal", "guidance_scale"),
    ],
)
def test_a_misspelt_field_gets_a_suggestion_and_where_the_others_are(name, field):
    with pytest.raises(RequestError, match=f"a request has no {name}$") as caught:
        as_request("red circle", {name: 3})
    assert caught.value.hint == f"did you mean {field} for {name}? every field: help(sdrt.Request)"


def test_a_field_that_is_like_no_other_is_answered_with_where_they_are():
    with pytest.raises(RequestError) as caught:
        as_request("red circle", {"zzz": 3})
    assert caught.value.hint == "every field: help(sdrt.Request)"


def test_a_misspelt_scheduler_gets_a_suggestion(manifest):
    with pytest.raises(RequestError) as caught:
        resolve(manifest, scheduler="eulr")
    assert "euler" in caught.value.hint


def test_a_size_outside_the_profile_names_the_nearest_one(manifest):
    with pytest.raises(RequestError) as caught:
        resolve(manifest, height=512, width=60)
    assert "64x128" in caught.value.hint


@pytest.mark.parametrize(
    ("sizes", "picture", "scaled"),
    [
        ((), (512, 384), "128x96"),
        ((), (16, 32), "32x64"),
        ((), (200, 30), "128x32"),
        (((128, 128), (96, 128), (128, 96)), (512, 384), "128x96"),
    ],
)
def test_a_picture_whose_size_is_not_made_is_to_be_scaled_in_its_shape(fake, sizes, picture, scaled):
    shown, bundles = Image.new("RGB", picture), {"sizes": sizes}
    for fields, manifest in (
        ({"image": shown}, fake(**bundles).bundle.manifest),
        ({"control_image": shown}, fake(controlnets=("edges",), **bundles).bundle.manifest),
    ):
        with pytest.raises(RequestError, match="picture's size comes to") as caught:
            resolve(manifest, **fields)
        assert caught.value.hint.endswith(f"give height and width, to which a picture is scaled, such as {scaled}")


def test_a_control_picture_narrower_than_the_grid_is_refused_like_others(fake):
    manifest = fake(controlnets=("edges",)).bundle.manifest
    with pytest.raises(RequestError, match="does not make images of 0x"):
        resolve(manifest, control_image=Image.new("RGB", (3, 64)))


@pytest.mark.parametrize("name", ["prompt_embeds", "negative_prompt_embeds"])
def test_for_embeddings_no_field_of_text_is_named(fake, name):
    with pytest.raises(RequestError) as caught:
        as_request("x", {name: np.zeros((1, 77, 8))})
    assert "did you mean" not in caught.value.hint


def test_a_list_of_sizes_accepts_those_and_no_others(fake):
    manifest = fake(sizes=((64, 96), (96, 64))).bundle.manifest
    assert resolve(manifest, height=64, width=96).width == 96
    with pytest.raises(RequestError):
        resolve(manifest, height=96, width=96)


def test_the_default_size_is_one_that_the_profile_accepts(fake):
    manifest = fake(sizes=((32, 48),)).bundle.manifest
    resolved = resolve(manifest)
    assert (resolved.height, resolved.width) == (32, 48)
    assert nearest_size(manifest.profile, 64, 64) == (32, 48)


def test_numbers_of_numpy_are_numbers_and_become_pythons_own(manifest):
    resolved = resolve(manifest, seed=np.int64(7), num_inference_steps=np.int32(4), guidance_scale=np.float16(2.5))
    values = (resolved.seed, resolved.num_inference_steps, resolved.guidance_scale)
    assert values == (7, 4, 2.5)
    assert [type(value) for value in values] == [int, int, float]


@pytest.mark.parametrize("seed", [0, 2**64 - 1])
def test_the_first_and_the_last_seed_are_legal(manifest, seed):
    assert resolve(manifest, seed=seed).seed == seed


def test_a_plan_that_needs_more_states_than_the_bundle_has_is_refused(manifest):
    narrow = replace(manifest, state_slots=1)
    assert resolve(narrow, scheduler="ddim").plan.slots == 1
    with pytest.raises(RequestError, match="room for 1"):
        resolve(narrow, scheduler="pndm")


def test_eta_is_for_the_scheduler_that_has_it(manifest):
    assert resolve(manifest, scheduler="ddim", eta=1.0).plan.draws_noise(0)


def test_a_list_of_seeds_is_an_image_for_each(manifest):
    resolved = resolve(manifest, seed=[9, 2**64 - 1, 9])
    assert resolved.seeds == (9, 2**64 - 1, 9)
    assert resolved.num_images_per_prompt == 3


def test_own_timesteps_are_as_many_steps(manifest):
    resolved = resolve(manifest, scheduler="ddpm", timesteps=[900, 500, 20])
    assert resolved.num_inference_steps == len(resolved.plan) == 3
    assert resolve(manifest, scheduler="euler", sigmas=[9.0, 2.0, 0.0]).num_inference_steps == 2


def test_a_plan_of_ones_own_is_taken_as_it_is(manifest):
    plan = resolve(manifest, scheduler="euler_a", num_inference_steps=7).plan
    resolved = resolve(manifest, scheduler=plan)
    assert resolved.plan is plan
    assert (resolved.num_inference_steps, resolved.scheduler) == (7, "a plan of one's own")


@pytest.mark.parametrize("beside", [{"num_inference_steps": 7}, {"eta": 0.5}, {"timesteps": [9, 1]}])
def test_beside_a_plan_of_ones_own_nothing_is_asked_that_it_has(manifest, beside):
    plan = resolve(manifest, scheduler="euler", num_inference_steps=7).plan
    with pytest.raises(RequestError, match=f"{next(iter(beside))} is given beside a plan"):
        resolve(manifest, scheduler=plan, **beside)


def test_a_plan_that_is_not_finite_is_refused(manifest):
    plan = resolve(manifest, scheduler="euler", num_inference_steps=7).plan
    broken = replace(plan, transitions=plan.transitions * np.nan)
    with pytest.raises(RequestError, match="not finite"):
        resolve(manifest, scheduler=broken)


def test_a_plan_that_is_clamped_as_the_step_graph_does_not_is_refused(manifest):
    clipped, thresholded = (
        build_plan(scheduler_class="DDIMScheduler", scheduler_config={field: True}, num_inference_steps=3)
        for field in ("clip_sample", "thresholding")
    )
    assert resolve(manifest, scheduler=clipped).plan is clipped
    with pytest.raises(RequestError, match=r"thresholds at 0\.995, this bundle's step graph at None"):
        resolve(manifest, scheduler=thresholded)


def test_arrays_of_numpy_are_lists(manifest):
    resolved = resolve(manifest, scheduler="ddpm", timesteps=np.array([900, 20]), seed=np.array([3, 4]))
    assert (resolved.timesteps, resolved.seeds) == ((900.0, 20.0), (3, 4))


def test_the_scheduler_is_remembered_by_its_usual_name(manifest):
    assert resolve(manifest, scheduler="DPM++ 2M Karras").scheduler == "dpmpp_2m_karras"
    assert resolve(manifest, scheduler="EulerDiscreteScheduler").scheduler == "EulerDiscreteScheduler"


def test_no_scheduler_takes_own_timesteps_in_silence(manifest):
    """A scheduler either follows the grid it is given, or says that it takes none."""
    for name in ("ddim", "lms", "dpm2", "deis"):
        with pytest.raises(RequestError, match="timesteps"):
            resolve(manifest, scheduler=name, timesteps=[900, 20])
