"""A tiny VAE beside a checkpoint: recognising it, and refusing one that does not decode the checkpoint's latents."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdrt.errors import CheckpointError

TINY_VAE_CLASS = "AutoencoderTiny"
_HINT = f"name a diffusers folder of an {TINY_VAE_CLASS}, such as TAESD"


def check_tiny_vae_folder(path: Path) -> Path:
    """The path itself. Raises CheckpointError where it is no folder."""
    if not path.is_dir():
        raise CheckpointError(f"there is no tiny VAE at {path}", hint=_HINT)
    return path


def check_tiny_vae(path: Path, config: Mapping[str, Any], latent_channels: int, vae_downsample: int) -> None:
    """Raises CheckpointError where it is none, or of another latent space than the VAE that it lies beside."""
    if (kind := config.get("_class_name")) != TINY_VAE_CLASS:
        raise CheckpointError(f"{path} is a {kind}, not an {TINY_VAE_CLASS}", hint=_HINT)
    own = (config.get("latent_channels", 4), config.get("out_channels", 3), _downsample(path, config))
    wanted = (latent_channels, 3, vae_downsample)
    if own != wanted:
        one, other = (f"{latent} channels into {out}, {factor} times as large" for latent, out, factor in (own, wanted))
        raise CheckpointError(
            f"the tiny VAE {path} decodes {one}; the checkpoint's VAE {other}",
            hint="name one that was made for this model",
        )
    scaling = config.get("scaling_factor", 1.0)
    if isinstance(scaling, bool) or not isinstance(scaling, int | float) or not 0 < scaling < float("inf"):
        raise CheckpointError(f"the scaling_factor of {path} is {scaling!r}", hint="download its config.json again")


def _downsample(path: Path, config: Mapping[str, Any]) -> int:
    """How much larger its decoder makes latents on each side: every stage but the last one upsamples."""
    try:
        stages = len(config.get("num_decoder_blocks", (3, 3, 3, 1)))
        return int(config.get("upsampling_scaling_factor", 2) ** (stages - 1))
    except TypeError as error:
        raise CheckpointError(f"the config of {path} is damaged: {error}", hint="download it again") from error
