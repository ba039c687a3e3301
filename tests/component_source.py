"""The source that a bundle's component was built of, as far as its shapes go."""

from sdrt.engines.base import ComponentSource


def source_of(bundle, name):
    model, profile = bundle.manifest.model, bundle.manifest.profile
    return ComponentSource(
        name=name,
        onnx_path=bundle.file(bundle.component(name).files[0]),
        profile=profile,
        max_lanes=2 * profile.max_batch,
        state_slots=bundle.manifest.state_slots,
        latent_channels=model.latent_channels,
        prompt_embeds_dim=model.prompt_embeds_dim,
        vae_downsample=model.vae_downsample,
        default_height=model.default_height,
        default_width=model.default_width,
    )
