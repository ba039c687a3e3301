"""The source that a bundle's component was built of, as far as its shapes go."""

from sdrt.engines.base import ComponentSource
from sdrt.engines.profile import parse_profile


def source_of(bundle, name):
    model, profile = bundle.manifest.model, bundle.manifest.profile
    return ComponentSource(
        name=name,
        onnx_path=bundle.file(bundle.component(name).files[0]),
        profile=profile,
        max_lanes=2 * profile.max_batch,
        state_slots=bundle.manifest.state_slots,
        latent_channels=model.latent_channels,
        conditioning_channels=model.conditioning_channels,
        prompt_embeds_dim=model.prompt_embeds_dim,
        vae_downsample=model.vae_downsample,
        default_height=model.default_height,
        default_width=model.default_width,
    )


def source_of_onnx(path):
    """A VAE decoder of the embedded model's kind."""
    profile = parse_profile("128x128", "1", default=(128, 128), multiple_of=32, text_length=77)
    return ComponentSource(
        name="vae_decoder",
        onnx_path=path,
        profile=profile,
        max_lanes=2,
        state_slots=6,
        latent_channels=4,
        conditioning_channels=0,
        prompt_embeds_dim=128,
        vae_downsample=8,
        default_height=128,
        default_width=128,
    )
