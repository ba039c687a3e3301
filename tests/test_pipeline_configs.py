"""What diffusers' pipelines make of a checkpoint's configs, beyond what these say."""

import pytest

from sdrt.errors import CheckpointError
from sdrt.pipeline_configs import latent_sides, scheduler_config_of, vae_scaling_factor


@pytest.mark.parametrize("task", ["text-to-image", "inpainting", "depth-to-image"])
def test_half_of_the_size_in_old_configs_is_set_right(task):
    assert latent_sides(task, {"sample_size": 32, "_diffusers_version": "0.8.1"}) == (64, 64)
    assert latent_sides(task, {"sample_size": 32, "_diffusers_version": "0.9.0"}) == (32, 32)
    assert latent_sides(task, {"sample_size": [32, 48], "_diffusers_version": "0.8.1"}) == (32, 48)


@pytest.mark.parametrize("task", ["upscaling", "editing"])
def test_other_pipelines_leave_it(task):
    assert latent_sides(task, {"sample_size": 32, "_diffusers_version": "0.8.1"}) == (32, 32)


@pytest.mark.parametrize("sample", ["64", 0, -8, [64], [64, 0], [64, "64"], True, 64.0])
def test_a_size_that_is_none_is_refused(sample):
    with pytest.raises(CheckpointError, match="sample_size is") as raised:
        latent_sides("text-to-image", {"sample_size": sample})
    assert raised.value.hint


def test_the_upscalers_pipeline_has_a_factor_of_its_own():
    assert vae_scaling_factor("upscaling", {"scaling_factor": 0.5}) == 0.08333
    assert vae_scaling_factor("text-to-image", {"scaling_factor": 0.5}) == 0.5
    assert vae_scaling_factor("text-to-image", {}) == 0.18215
    with pytest.raises(CheckpointError, match="scaling_factor is '1'"):
        vae_scaling_factor("editing", {"scaling_factor": "1"})


def test_a_pipeline_with_controlnets_overrides_nothing():
    config = {"steps_offset": 0, "clip_sample": True}
    assert scheduler_config_of("text-to-image", "DDIMScheduler", config, steered=True) == config
    changed = scheduler_config_of("text-to-image", "DDIMScheduler", config, steered=False)
    assert changed == {"steps_offset": 1, "clip_sample": False}
    assert scheduler_config_of("editing", "DDIMScheduler", config, steered=False) == config
