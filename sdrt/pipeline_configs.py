"""What diffusers' pipelines make of a checkpoint's configs, beyond what these say."""

import re
from collections.abc import Mapping
from typing import Any

from sdrt.bundle import ModelTask
from sdrt.errors import CheckpointError
from sdrt.plan.catalog import FAMILIES

Config = Mapping[str, Any]

# What the pipelines of these checkpoints set in old scheduler configs; the others leave them as they are.
_SET_ANEW: Mapping[ModelTask, Config] = {
    "text-to-image": {"steps_offset": 1, "clip_sample": False},
    "inpainting": {"steps_offset": 1, "skip_prk_steps": True},
}
_USUAL_SAMPLE = 64  # latent pixels a side
_OLD_SAMPLES: tuple[ModelTask, ...] = ("text-to-image", "inpainting", "depth-to-image")  # whose pipelines set it anew
_VAE_SCALING_FACTOR = 0.18215  # older configs of Stable Diffusion 1.x do not state it
_UPSCALING_FACTOR = 0.08333


def scheduler_config_of(task: ModelTask, scheduler_class: str, config: Config, *, steered: bool) -> dict[str, Any]:
    """A scheduler's config as the task's pipeline sets it: some override fields of old checkpoints.

    steered: by ControlNets, whose pipelines override nothing. A field that the config lacks is overridden too where the
    class has it, but not handed on to other classes.
    """
    forced: Config = {} if steered else _SET_ANEW.get(task, {})
    set_anew = {**config, **{name: value for name, value in forced.items() if name in config}}
    family = FAMILIES.get(scheduler_class)
    if (
        "steps_offset" not in forced
        or "steps_offset" in config
        or family is None
        or "steps_offset" not in family.fields
    ):
        return set_anew
    defaults = config.get("_use_default_values")
    named = [*defaults] if isinstance(defaults, list) else []
    return {**set_anew, "steps_offset": forced["steps_offset"], "_use_default_values": [*named, "steps_offset"]}


def vae_scaling_factor(task: ModelTask, vae: Config) -> float:
    """That of the VAE's config; the upscalers' pipeline has one of its own, whatever the config says.

    Raises CheckpointError for what is no number.
    """
    if task == "upscaling":
        return _UPSCALING_FACTOR
    factor = vae.get("scaling_factor", _VAE_SCALING_FACTOR)
    if isinstance(factor, bool) or not isinstance(factor, int | float):
        raise CheckpointError(f"the VAE's scaling_factor is {factor!r}, not a number", hint="correct its config.json")
    return float(factor)


def latent_sides(task: ModelTask, unet: Config) -> tuple[int, int]:
    """(height, width) in latent pixels that a UNet was trained for, by its config. Raises CheckpointError.

    Configs from before diffusers 0.9 told half of it, which most pipelines set right.
    """
    sample = unet.get("sample_size")
    sample = _USUAL_SAMPLE if sample is None else sample
    if isinstance(sample, int) and task in _OLD_SAMPLES and _is_old(unet):
        sample = max(sample, _USUAL_SAMPLE)
    sides = [sample, sample] if isinstance(sample, int) else sample
    if not isinstance(sides, list) or len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
        raise CheckpointError(
            f"the UNet's sample_size is {sample!r}", hint="give latent pixels in its config.json: one side, or two"
        )
    return sides[0], sides[1]


def _is_old(config: Config) -> bool:
    match = re.match(r"(\d+)\.(\d+)", str(config.get("_diffusers_version", "")))
    return match is not None and (int(match[1]), int(match[2])) < (0, 9)
