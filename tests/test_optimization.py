"""Optimization profiles: which shapes engines accept and are tuned for, from what the user asked for."""

from dataclasses import replace

import pytest

from sdrt.bundle import TensorSpec
from sdrt.engines.optimization import HOT_SIZES, optimization_profiles
from sdrt.engines.profile import parse_profile
from sdrt.errors import BuildError
from tests.component_source import source_of_onnx

STATE = TensorSpec(name="state", dtype="float32", shape=("requests", 6, 4, "height", "width"))
GUIDANCE = TensorSpec(name="guidance", dtype="float32", shape=("requests", "lanes"))
EMBEDS = TensorSpec(name="prompt_embeds", dtype="float32", shape=("lanes", "length", 128))
LATENT = TensorSpec(name="latent_sample", dtype="float32", shape=("batch", 4, "height", "width"))
PIXELS = TensorSpec(name="sample", dtype="float32", shape=("batch", 3, "8*rows", "8*columns"))
PICTURES = TensorSpec(name="controlnet_cond", dtype="float32", shape=("batch", 2, 3, "8*rows", "8*columns"))
CONTROL = TensorSpec(name="control", dtype="float32", shape=("requests", 2, 320, "height", "width"))
CONTROL_SCALES = TensorSpec(name="control_scales", dtype="float32", shape=("requests", 2))
IDS = TensorSpec(name="input_ids", dtype="int64", shape=("batch", "sequence"))


def profiles(component, *specs, sizes=None, batch="1..4"):
    profile = parse_profile(sizes, batch, default=(512, 512), multiple_of=64, text_length=77)
    source = replace(
        source_of_onnx(None),
        name=component,
        profile=profile,
        max_lanes=2 * profile.max_batch,
        default_height=512,
        default_width=512,
    )
    return [each.shapes for each in optimization_profiles(source, specs)]


def test_a_range_has_a_profile_for_the_models_own_size_and_one_for_everything():
    hot, general = profiles("step", STATE, GUIDANCE, EMBEDS, sizes="256..768")
    assert hot["state"] == ((1, 6, 4, 64, 64), (4, 6, 4, 64, 64), (4, 6, 4, 64, 64))
    assert general["state"] == ((1, 6, 4, 32, 32), (4, 6, 4, 64, 64), (4, 6, 4, 96, 96))
    assert general["guidance"] == ((1, 1), (4, 2), (4, 8))
    assert general["prompt_embeds"] == ((1, 77, 128), (2, 77, 128), (8, 77, 128))


def test_each_size_of_a_list_has_its_own():
    first, second = profiles("step", STATE, sizes="512x512,512x768")
    assert first["state"] == ((1, 6, 4, 64, 64), (4, 6, 4, 64, 64), (4, 6, 4, 64, 64))
    assert second["state"] == ((1, 6, 4, 96, 64), (4, 6, 4, 96, 64), (4, 6, 4, 96, 64))


def test_a_long_list_ends_in_one_for_all_the_rest():
    sizes = ",".join(f"512x{64 * count}" for count in range(4, 11))
    found = profiles("step", STATE, sizes=sizes)
    assert len(found) == HOT_SIZES + 1
    assert found[-1]["state"] == ((1, 6, 4, 32, 64), (4, 6, 4, 64, 64), (4, 6, 4, 80, 64))


def test_one_size_and_one_image_at_a_time_are_static_with_and_without_guidance():
    guided, unguided = profiles("step", STATE, GUIDANCE, sizes="512x512", batch="1")
    assert guided == {"state": ((1, 6, 4, 64, 64),) * 3, "guidance": ((1, 2),) * 3}
    assert unguided == {"state": ((1, 6, 4, 64, 64),) * 3, "guidance": ((1, 1),) * 3}


def test_the_vae_takes_one_tile_of_any_size_up_to_the_models_own():
    (found,) = profiles("vae_decoder", LATENT, sizes="512..1024")
    assert found["latent_sample"] == ((1, 4, 1, 1), (1, 4, 64, 64), (1, 4, 64, 64))
    (found,) = profiles("vae_encoder", PIXELS, sizes="256x256")
    assert found["sample"] == ((1, 3, 8, 8), (1, 3, 256, 256), (1, 3, 256, 256))


def test_a_step_with_controlnets_takes_what_steers_each_request():
    hot, general = profiles("step", STATE, CONTROL, CONTROL_SCALES, sizes="256..768")
    assert hot["control"] == ((1, 2, 320, 64, 64), (4, 2, 320, 64, 64), (4, 2, 320, 64, 64))
    assert general["control"] == ((1, 2, 320, 32, 32), (4, 2, 320, 64, 64), (4, 2, 320, 96, 96))
    assert general["control_scales"] == ((1, 2), (4, 2), (4, 2))


def test_the_control_embedding_takes_the_pictures_of_one_image_up_to_the_largest_in_windows():
    (found,) = profiles("control_embedding", PICTURES, sizes="256..768")
    assert found["controlnet_cond"] == ((1, 2, 3, 256, 256), (1, 2, 3, 512, 512), (1, 2, 3, 3072, 3072))
    (found,) = profiles("control_embedding", PICTURES, sizes="512x512", batch="1")
    assert found["controlnet_cond"] == ((1, 2, 3, 512, 512), (1, 2, 3, 512, 512), (1, 2, 3, 2048, 2048))


def test_the_text_encoder_takes_one_prompt_of_the_models_length():
    (found,) = profiles("text_encoder", IDS)
    assert found == {"input_ids": ((1, 77), (1, 77), (1, 77))}


def test_a_range_that_excludes_the_models_own_size_is_tuned_for_its_nearest():
    (found,) = profiles("step", STATE, sizes="576..768")
    assert found["state"] == ((1, 6, 4, 72, 72), (4, 6, 4, 72, 72), (4, 6, 4, 96, 96))


def test_an_input_that_is_not_known_is_refused():
    with pytest.raises(BuildError, match="step has the input added_cond of shape"):
        profiles("step", TensorSpec(name="added_cond", dtype="float32", shape=("lanes", 6)))
