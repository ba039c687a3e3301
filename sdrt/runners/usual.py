"""The usual shapes: those of nearly every run of a bundle for one size and one image at a time."""

from collections.abc import Mapping

from sdrt.bundle import Bundle, ComponentRecord
from sdrt.runners.base import DEPTH_ESTIMATOR, IN_PIXELS

Shapes = Mapping[str, tuple[int, ...]]


def usual_shapes(bundle: Bundle, component: ComponentRecord) -> Shapes | None:
    """The exact shape of every input in a usual run: one image, guided, at the bundle's only size.

    None for a bundle of several sizes or of batches, where no shape is usual, for a VAE that takes its size in tiles,
    for the depth estimator, whose size is its own, and for inputs whose dimensions are not those of
    `docs/architecture.md`.
    """
    profile, model = bundle.manifest.profile, bundle.manifest.model
    if len(profile.sizes) != 1 or profile.max_batch != 1 or component.name == DEPTH_ESTIMATOR:
        return None
    height, width = profile.sizes[0]
    if component.name in IN_PIXELS and max(height, width) > max(model.default_height, model.default_width):
        return None
    known = {
        "batch": 1,
        "requests": 1,
        "lanes": model.lanes_per_image,
        "height": height // model.vae_downsample,
        "width": width // model.vae_downsample,
        "length": profile.text_length,
        "sequence": profile.text_length,
        f"{model.vae_downsample}*rows": height,  # of what takes pixels: whole latents only
        f"{model.vae_downsample}*columns": width,
    }
    if any(isinstance(size, str) and size not in known for spec in component.inputs for size in spec.shape):
        return None
    return {
        spec.name: tuple(known[size] if isinstance(size, str) else size for size in spec.shape)
        for spec in component.inputs
    }
