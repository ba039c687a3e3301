"""What has to be traced: each component as a module with tensors in and one tensor out, and its example inputs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.export import Dim

from sdrt.bundle import DepthEstimation
from sdrt.errors import ExportError
from sdrt.export.checkpoint import COMPONENT_CLASSES, CONTROLNET, TINY_VAE, Checkpoint
from sdrt.export.controlnet import CONTROLNET_CLASS
from sdrt.export.loading import load_network
from sdrt.export.tiny_vae import TINY_VAE_CLASS

MAX_BATCH = 63  # torch.export specialises a traced batch at 64
MAX_LATENT_SIDE = 1024
_LEAST_DEPTH_SIDE = 28  # pixels: two of the largest patches in use
_MORE_THAN_ANY_SIDE_HAS = 20  # doublings


class TextEncoder(nn.Module):
    """input_ids int64 [B, L] → last_hidden_state float32 [B, L, d], after the final layer norm."""

    def __init__(self, text_encoder: nn.Module) -> None:
        super().__init__()
        self.wrapped = text_encoder

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The hidden states that condition the UNet."""
        hidden: torch.Tensor = self.wrapped(input_ids=input_ids).last_hidden_state
        return hidden


class UNet(nn.Module):
    """sample [B, C + K, h, w], timestep float32 [B], encoder_hidden_states [B, L, d] → out_sample [B, C, h, w].

    class_labels int64 [B], for a UNet that has classes. h and w are any: each upsampling goes to the size of what it is
    joined with, as diffusers does where they are no multiples of the UNet's grid.
    """

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.wrapped = unet
        # diffusers names the sizes where one is no multiple of 2 to this power: always, then.
        self.wrapped.num_upsamplers = _MORE_THAN_ANY_SIDE_HAS

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        class_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The model's prediction; `timestep` may have fractions."""
        out: torch.Tensor = self.wrapped(
            sample, timestep, encoder_hidden_states, class_labels=class_labels, return_dict=False
        )[0]
        return out


class ControlledUNet(nn.Module):
    """`UNet` with the residuals of ControlNets inside (Zhang et al. 2023, arXiv:2302.05543).

    control [B, k, c, h, w]: what `ControlEmbedding` makes of each one's picture; control_scales [B, k]. The residuals
    are scaled and added up in their order, as diffusers' MultiControlNetModel does.
    """

    def __init__(self, unet: nn.Module, controlnets: Sequence[nn.Module], latent_channels: int) -> None:
        super().__init__()
        self.wrapped = unet
        self.wrapped.num_upsamplers = _MORE_THAN_ANY_SIDE_HAS
        self.controlnets = nn.ModuleList(controlnets)
        self.latent_channels = latent_channels
        for network in controlnets:
            network.controlnet_cond_embedding = nn.Identity()
            network.register_to_config(controlnet_conditioning_channel_order="rgb")  # the embedding has turned it

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        control: torch.Tensor,
        control_scales: torch.Tensor,
    ) -> torch.Tensor:
        """The model's prediction. A ControlNet sees the latents alone, also beside an inpainting UNet."""
        residuals: list[torch.Tensor] = []
        for index, network in enumerate(self.controlnets):
            down, middle = network(
                sample[:, : self.latent_channels],
                timestep,
                encoder_hidden_states,
                controlnet_cond=control[:, index],
                conditioning_scale=control_scales[:, index, None, None, None],
                return_dict=False,
            )
            own = [*down, middle]
            residuals = [one + other for one, other in zip(residuals, own, strict=True)] if residuals else own
        out: torch.Tensor = self.wrapped(
            sample,
            timestep,
            encoder_hidden_states,
            down_block_additional_residuals=residuals[:-1],
            mid_block_additional_residual=residuals[-1],
            return_dict=False,
        )[0]
        return out


class ControlEmbedding(nn.Module):
    """controlnet_cond [B, k, 3, H, W] in [0, 1], a picture for each ControlNet → control [B, k, c, h, w]."""

    def __init__(self, controlnets: Sequence[nn.Module]) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(network.controlnet_cond_embedding for network in controlnets)
        self.reversed = [network.config.controlnet_conditioning_channel_order == "bgr" for network in controlnets]

    def forward(self, controlnet_cond: torch.Tensor) -> torch.Tensor:
        """What the ControlNets see at every step."""
        pictures = [controlnet_cond[:, index] for index in range(len(self.reversed))]
        turned = [picture.flip(1) if turn else picture for picture, turn in zip(pictures, self.reversed, strict=True)]
        return torch.stack([embed(picture) for embed, picture in zip(self.embeddings, turned, strict=True)], dim=1)


class VaeDecoder(nn.Module):
    """latent_sample [B, C, h, w], already divided by the scaling factor → sample [B, 3, H, W]."""

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.wrapped = vae

    def forward(self, latent_sample: torch.Tensor) -> torch.Tensor:
        """Pixels in about [-1, 1]."""
        out: torch.Tensor = self.wrapped.decode(latent_sample, return_dict=False)[0]
        return out


class VaeEncoder(nn.Module):
    """sample [B, 3, H, W] in [-1, 1] → latent_parameters [B, 2C, h, w], mean and log-variance."""

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.wrapped = vae

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        """The parameters of the latents' distribution, not yet scaled."""
        out: torch.Tensor = self.wrapped.encode(sample, return_dict=False)[0].parameters
        return out


class DepthEstimator(nn.Module):
    """pixel_values [1, 3, H, W], as the checkpoint's image processor makes it → predicted_depth [1, H', W']."""

    def __init__(self, depth_estimator: nn.Module) -> None:
        super().__init__()
        self.wrapped = depth_estimator

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """How near each place is: larger is nearer."""
        depth: torch.Tensor = self.wrapped(pixel_values=pixel_values).predicted_depth
        return depth


@dataclass(frozen=True, slots=True, kw_only=True)
class ComponentSpec:
    """How one component is loaded, traced and checked.

    examples: (batch, latent side or token count) → inputs by name, seeded. dynamic: input → axis → Dim.
    traced_with and checked_with are (batch, height, width) in units of `examples`.
    """

    name: str
    source: str  # the checkpoint's folder
    output: str
    build: Callable[[Checkpoint], nn.Module]
    examples: Callable[[Checkpoint, tuple[int, int, int]], dict[str, torch.Tensor]]
    dynamic: Callable[[Checkpoint], dict[str, Any]]
    traced_with: tuple[int, int, int]
    checked_with: tuple[tuple[int, int, int], ...]


def load_text_encoder(checkpoint: Checkpoint, **options: object) -> nn.Module:
    """The checkpoint's text encoder in float32, as transformers makes it. Raises CheckpointError."""
    from transformers import CLIPTextModel

    folder, variant = checkpoint.path / "text_encoder", checkpoint.variant["text_encoder"]
    return load_network(CLIPTextModel, folder, variant=variant, dtype=torch.float32, **options)


def _text_encoder_to_trace(checkpoint: Checkpoint) -> nn.Module:
    return TextEncoder(load_text_encoder(checkpoint, attn_implementation="eager"))


def load_depth_estimator(checkpoint: Checkpoint) -> nn.Module:
    """The checkpoint's depth estimator in float32, as transformers makes it. Raises ExportError."""
    from transformers import DPTForDepthEstimation

    try:
        model: nn.Module = DPTForDepthEstimation.from_pretrained(
            checkpoint.path / "depth_estimator",
            dtype=torch.float32,
            variant=checkpoint.variant["depth_estimator"],
            use_safetensors=True,
            local_files_only=True,
            attn_implementation="eager",
        )
    except (ValueError, RuntimeError, ImportError) as error:
        first = str(error).strip().splitlines()[0]
        hint = "to do without it, set depth_estimator to [null, null] in model_index.json"
        raise ExportError(f"transformers cannot load the depth estimator: {first}", hint=hint) from error
    return model.eval()


def load_depth_pair(checkpoint: Checkpoint) -> tuple[nn.Module, object]:
    """The checkpoint's depth estimator and its image processor, as transformers makes them. Raises ExportError."""
    # By this name: the processor that needs torchvision resizes a little differently.
    from transformers import DPTImageProcessorPil

    return load_depth_estimator(checkpoint), DPTImageProcessorPil.from_pretrained(
        checkpoint.path / "feature_extractor", local_files_only=True
    )


def _depth_estimator_to_trace(checkpoint: Checkpoint) -> nn.Module:
    """With the weights of BiT's convolutions standardised once, and not at every call, which engines do not build."""
    from transformers.models.bit.modeling_bit import WeightStandardizedConv2d

    model = load_depth_estimator(checkpoint)
    for layer in model.modules():
        if isinstance(layer, WeightStandardizedConv2d):
            _standardise(layer)
    return DepthEstimator(model)


def _standardise(layer: Any) -> None:  # noqa: ANN401  (a class that transformers does not export)
    flat = layer.weight.detach().reshape(layer.out_channels, -1).double()
    normal = (flat - flat.mean(1, keepdim=True)) / torch.sqrt(flat.var(1, keepdim=True, unbiased=False) + layer.eps)
    layer.weight = nn.Parameter(normal.reshape(layer.weight.shape).float(), requires_grad=False)

    def forward(hidden_state: torch.Tensor) -> torch.Tensor:
        padded = hidden_state if layer.pad is None else layer.pad(hidden_state)
        result: torch.Tensor = nn.functional.conv2d(
            padded, layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups
        )
        return result

    layer.forward = forward


def load_component(checkpoint: Checkpoint, folder: str) -> nn.Module:
    """The checkpoint's UNet or VAE, or the tiny VAE beside it, in float32, as diffusers makes it.

    Raises CheckpointError.
    """
    import diffusers

    kind = getattr(diffusers, {**COMPONENT_CLASSES, TINY_VAE: TINY_VAE_CLASS}[folder])
    return load_network(kind, checkpoint.folder(folder), variant=checkpoint.variant[folder], torch_dtype=torch.float32)


def load_controlnets(checkpoint: Checkpoint) -> list[nn.Module]:
    """The checkpoint's ControlNets in float32, as diffusers makes them. Raises CheckpointError."""
    import diffusers

    kind = getattr(diffusers, CONTROLNET_CLASS)
    return [
        load_network(kind, control.path, variant=control.variant, torch_dtype=torch.float32)
        for control in checkpoint.controlnets
    ]


def _load_unet(checkpoint: Checkpoint) -> nn.Module:
    unet = load_component(checkpoint, "unet")
    if not checkpoint.controlnets:
        return UNet(unet)
    return ControlledUNet(unet, load_controlnets(checkpoint), int(checkpoint.configs["vae"]["latent_channels"]))


def _generator() -> torch.Generator:
    return torch.Generator("cpu").manual_seed(0)


def _text_examples(checkpoint: Checkpoint, shape: tuple[int, int, int]) -> dict[str, torch.Tensor]:
    batch, length, _ = shape
    limit = int(checkpoint.configs["text_encoder"]["vocab_size"])
    return {"input_ids": torch.randint(0, limit, (batch, length), generator=_generator())}


def _unet_examples(checkpoint: Checkpoint, shape: tuple[int, int, int]) -> dict[str, torch.Tensor]:
    batch, height, width = shape
    config, generator = checkpoint.configs["unet"], _generator()
    grid = checkpoint.unet_grid
    odd = batch - 1  # more than one at a time are off the grid
    size = (batch, config["in_channels"], height * grid + odd, width * grid + odd)
    inputs = {
        "sample": torch.randn(size, generator=generator),
        # Fractions, as Karras sigmas have them, and one lane's timestep differs from the next one's.
        "timestep": torch.linspace(981.37, 1.5, batch),
        "encoder_hidden_states": torch.randn(
            (batch, 77 + 2 * (width - height), config["cross_attention_dim"]), generator=generator
        ),
    }
    if (classes := checkpoint.num_class_embeds) is not None:
        inputs["class_labels"] = torch.randint(0, classes, (batch,), generator=generator)
    if (count := len(checkpoint.controlnets)) > 0:
        features = checkpoint.controlnets[0].features
        inputs["control"] = torch.randn((batch, count, features, *size[2:]), generator=generator)
        inputs["control_scales"] = torch.rand((batch, count), generator=generator) + 0.5
    return inputs


def _latent_examples(checkpoint: Checkpoint, shape: tuple[int, int, int]) -> dict[str, torch.Tensor]:
    batch, height, width = shape
    channels = int(checkpoint.configs["vae"]["latent_channels"])
    return {"latent_sample": torch.randn((batch, channels, 8 * height, 8 * width), generator=_generator())}


def _image_examples(checkpoint: Checkpoint, shape: tuple[int, int, int]) -> dict[str, torch.Tensor]:
    batch, height, width = shape
    factor = 8 * checkpoint.vae_downsample
    return {"sample": torch.rand((batch, 3, height * factor, width * factor), generator=_generator()) * 2 - 1}


def _depth_examples(checkpoint: Checkpoint, shape: tuple[int, int, int]) -> dict[str, torch.Tensor]:
    """Soft shapes, as pictures have, in thirds of the processor's size; other ones where the size is fixed."""
    estimation = _estimation(checkpoint)
    _, rows, columns = shape
    size = estimation.takes
    if size is None:
        multiple, least = _depth_grid(estimation)
        thirds = (estimation.height * rows // 3, estimation.width * columns // 3)
        size = (max(thirds[0] // multiple, least) * multiple, max(thirds[1] // multiple, least) * multiple)
    generator = torch.Generator("cpu").manual_seed(rows)
    coarse = torch.rand((1, 3, 2 + rows, 2 + columns), generator=generator) * 2 - 1
    return {"pixel_values": nn.functional.interpolate(coarse, size=size, mode="bilinear")}


def _depth_dynamic(checkpoint: Checkpoint) -> dict[str, Any]:
    estimation = _estimation(checkpoint)
    if estimation.takes is not None:
        return {"pixel_values": None}
    multiple, least = _depth_grid(estimation)
    most = 8 * MAX_LATENT_SIDE // multiple
    rows, columns = (Dim(name, min=least, max=most) for name in ("rows", "columns"))
    return {"pixel_values": {2: multiple * rows, 3: multiple * columns}}


def _depth_grid(estimation: DepthEstimation) -> tuple[int, int]:
    """What both sides of a depth estimator's input are a multiple of, and the least multiple."""
    multiple = estimation.multiple_of if estimation.pad_to is None else estimation.pad_to
    return multiple, max(-(-_LEAST_DEPTH_SIDE // multiple), 2)


def _estimation(checkpoint: Checkpoint) -> DepthEstimation:
    if checkpoint.depth_estimation is None:
        raise ExportError(f"{checkpoint.path} has no depth estimator", hint="export its other components alone")
    return checkpoint.depth_estimation


def _control_examples(checkpoint: Checkpoint, shape: tuple[int, int, int]) -> dict[str, torch.Tensor]:
    batch, height, width = shape
    factor = 4 * checkpoint.vae_downsample
    size = (batch, len(checkpoint.controlnets), 3, height * factor, width * factor)
    return {"controlnet_cond": torch.rand(size, generator=_generator())}


def _text_dynamic(checkpoint: Checkpoint) -> dict[str, Any]:
    limit = int(checkpoint.configs["text_encoder"].get("max_position_embeddings", 77))
    return {"input_ids": {0: Dim("batch", min=1, max=MAX_BATCH), 1: Dim("sequence", min=2, max=limit)}}


def _unet_dynamic(checkpoint: Checkpoint) -> dict[str, Any]:
    batch = Dim("batch", min=1, max=MAX_BATCH)
    # Where the coarsest level had a single pixel, torch.export would take it for a size that never changes.
    least = checkpoint.unet_grid + 1
    height, width = (Dim(name, min=least, max=MAX_LATENT_SIDE) for name in ("height", "width"))
    dynamic: dict[str, Any] = {
        "sample": {0: batch, 2: height, 3: width},
        "timestep": {0: batch},
        "encoder_hidden_states": {0: batch, 1: Dim("sequence", min=2, max=4096)},
    }
    if checkpoint.num_class_embeds is not None:
        dynamic["class_labels"] = {0: batch}
    if checkpoint.controlnets:
        dynamic |= {"control": {0: batch, 3: height, 4: width}, "control_scales": {0: batch}}
    return dynamic


def _latent_dynamic(checkpoint: Checkpoint) -> dict[str, Any]:
    sides = {axis: Dim(name, min=2, max=MAX_LATENT_SIDE) for axis, name in ((2, "height"), (3, "width"))}
    return {"latent_sample": {0: Dim("batch", min=1, max=MAX_BATCH), **sides}}


def _image_dynamic(checkpoint: Checkpoint) -> dict[str, Any]:
    factor = checkpoint.vae_downsample
    rows, columns = (Dim(name, min=2, max=MAX_LATENT_SIDE) for name in ("rows", "columns"))
    return {"sample": {0: Dim("batch", min=1, max=MAX_BATCH), 2: factor * rows, 3: factor * columns}}


def _control_dynamic(checkpoint: Checkpoint) -> dict[str, Any]:
    factor = checkpoint.vae_downsample
    rows, columns = (Dim(name, min=2, max=MAX_LATENT_SIDE) for name in ("rows", "columns"))
    return {"controlnet_cond": {0: Dim("batch", min=1, max=MAX_BATCH), 3: factor * rows, 4: factor * columns}}


COMPONENTS: Mapping[str, ComponentSpec] = {
    spec.name: spec
    for spec in (
        ComponentSpec(
            name="text_encoder",
            source="text_encoder",
            output="last_hidden_state",
            build=_text_encoder_to_trace,
            examples=_text_examples,
            dynamic=_text_dynamic,
            traced_with=(2, 77, 0),
            checked_with=((1, 77, 0), (3, 9, 0)),
        ),
        ComponentSpec(
            name="unet",
            source="unet",
            output="out_sample",
            build=_load_unet,
            examples=_unet_examples,
            dynamic=_unet_dynamic,
            traced_with=(2, 2, 3),
            checked_with=((1, 2, 3), (3, 2, 1)),
        ),
        ComponentSpec(
            name="vae_decoder",
            source="vae",
            output="sample",
            build=lambda checkpoint: VaeDecoder(load_component(checkpoint, "vae")),
            examples=_latent_examples,
            dynamic=_latent_dynamic,
            traced_with=(2, 2, 3),
            checked_with=((1, 1, 2), (3, 2, 1)),
        ),
        ComponentSpec(
            name="vae_encoder",
            source="vae",
            output="latent_parameters",
            build=lambda checkpoint: VaeEncoder(load_component(checkpoint, "vae")),
            examples=_image_examples,
            dynamic=_image_dynamic,
            traced_with=(2, 2, 3),
            checked_with=((1, 1, 2), (3, 2, 1)),
        ),
        ComponentSpec(
            name="control_embedding",
            source=CONTROLNET,
            output="control",
            build=lambda checkpoint: ControlEmbedding(load_controlnets(checkpoint)),
            examples=_control_examples,
            dynamic=_control_dynamic,
            traced_with=(2, 2, 3),
            checked_with=((1, 1, 2), (3, 2, 1)),
        ),
        ComponentSpec(
            name="depth_estimator",
            source="depth_estimator",
            output="predicted_depth",
            build=_depth_estimator_to_trace,
            examples=_depth_examples,
            dynamic=_depth_dynamic,
            traced_with=(1, 2, 3),
            checked_with=((1, 3, 2),),
        ),
        ComponentSpec(
            name="tiny_vae_decoder",
            source=TINY_VAE,
            output="sample",
            build=lambda checkpoint: VaeDecoder(load_component(checkpoint, TINY_VAE)),
            examples=_latent_examples,
            dynamic=_latent_dynamic,
            traced_with=(2, 2, 3),
            checked_with=((1, 1, 2), (3, 2, 1)),
        ),
    )
}
