"""ControlNets beside a checkpoint: recognising them, and refusing those that do not fit its UNet."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdrt.errors import CheckpointError

CONTROLNET_CLASS = "ControlNetModel"
# Options that change what goes in or comes out, with the value that leaves it as the first ControlNets have it.
_DEFAULTS = {
    "class_embed_type": None,
    "addition_embed_type": None,
    "encoder_hid_dim": None,
    "num_class_embeds": None,
    "conditioning_channels": 3,
    "global_pool_conditions": False,
}
_EMBEDDING_WIDTHS = (16, 32, 96, 256)
_SHARED = ("block_out_channels", "cross_attention_dim", "layers_per_block")
_HINT = "take a ControlNet that was trained for this kind of checkpoint (its config.json shows it)"


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlNet:
    """A checked ControlNet folder. variant: the infix of its weights' names, where it holds only that."""

    path: Path
    name: str
    config: Mapping[str, Any]
    weights: tuple[Path, ...]
    variant: str | None

    @property
    def features(self) -> int:
        """The channels of what it makes of its picture."""
        return int(self.config["block_out_channels"][0])


def check_controlnet(control: ControlNet, unet: Mapping[str, Any], latent_channels: int, vae_downsample: int) -> None:
    """Raises CheckpointError where it does not fit the checkpoint's UNet and VAE."""
    kind = control.config.get("_class_name")
    if kind != CONTROLNET_CLASS:
        raise CheckpointError(f"{control.path} is a {kind}, not a {CONTROLNET_CLASS}", hint=_HINT)
    for option, plain in _DEFAULTS.items():
        if control.config.get(option, plain) != plain:
            raise CheckpointError(
                f"{control.path} has {option} = {control.config[option]!r}, which sdrt does not export", hint=_HINT
            )
    order = control.config.get("controlnet_conditioning_channel_order", "rgb")
    if order not in ("rgb", "bgr"):
        raise CheckpointError(f"{control.path} has controlnet_conditioning_channel_order = {order!r}", hint=_HINT)
    if control.config.get("in_channels", 4) != latent_channels:
        raise CheckpointError(
            f"{control.path} takes {control.config.get('in_channels')} channels, the latents have {latent_channels}",
            hint=_HINT,
        )
    for option in _SHARED:
        if control.config.get(option) != unet.get(option):
            raise CheckpointError(
                f"{control.path} has {option} = {control.config.get(option)}, the UNet {unet.get(option)}", hint=_HINT
            )
    widths = control.config.get("conditioning_embedding_out_channels", _EMBEDDING_WIDTHS)
    if (factor := 2 ** (len(widths) - 1)) != vae_downsample:
        raise CheckpointError(
            f"{control.path} brings its picture down by {factor} (conditioning_embedding_out_channels = {widths}), "
            f"the VAE by {vae_downsample}",
            hint=_HINT,
        )
