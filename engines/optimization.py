"""Optimization profiles: which shapes a TensorRT engine accepts, and for which of them it is tuned."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from sdrt.bundle import ShapeProfile, TensorSpec
from sdrt.controls import LARGEST_FACTOR
from sdrt.depth import input_bounds, input_size
from sdrt.engines.base import ComponentSource
from sdrt.errors import BuildError
from sdrt.runners.base import (
    CONTROL_EMBEDDING,
    DEPTH_ESTIMATOR,
    IN_PIXELS,
    STEP,
    TEXT_ENCODER,
    TINY_VAE_DECODER,
    VAE_DECODER,
    VAE_DECODER_FLOAT32,
    VAE_ENCODER,
)
from sdrt.step_border import ALL_STEP_INPUTS
from sdrt.vae import largest_tile

HOT_SIZES = 4  # sizes of a list that get a profile of their own; each costs building time and engine size
# What each dimension of each input is; exporters name them as they like.
_DIMENSIONS: Mapping[str, Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        TEXT_ENCODER: {"input_ids": ("batch", "length")},
        VAE_DECODER: {"latent_sample": ("batch", "channels", "height", "width")},
        VAE_DECODER_FLOAT32: {"latent_sample": ("batch", "channels", "height", "width")},
        TINY_VAE_DECODER: {"latent_sample": ("batch", "channels", "height", "width")},
        VAE_ENCODER: {"sample": ("batch", "channels", "height", "width")},
        CONTROL_EMBEDDING: {"controlnet_cond": ("batch", "controls", "channels", "height", "width")},
        DEPTH_ESTIMATOR: {"pixel_values": ("batch", "channels", "height", "width")},
        STEP: {name: entry.dimensions for name, entry in ALL_STEP_INPUTS.items()},
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """Sizes of one dimension: what is accepted, and what the kernels are chosen for."""

    minimum: int
    optimum: int
    maximum: int


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizationProfile:
    """The shapes of every input of an engine that one profile covers: name → [minimum, optimum, maximum]."""

    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]


def optimization_profiles(source: ComponentSource, inputs: Sequence[TensorSpec]) -> tuple[OptimizationProfile, ...]:
    """The profiles of a component, those for hot shapes first: a runner takes the first that covers what it is fed.

    - text encoder: one prompt at a time, of the model's length;
    - step: a bundle for a list of sizes has a profile for each of the first `HOT_SIZES`; one for a range has one for
      the model's own size; the last profile covers everything;
    - VAE: one image, or one tile of it, at a time;
    - control embedding: the pictures of one image, up to the largest that is drawn in windows;
    - depth estimator: one image, of all the sizes that the bundle's images are brought to before it.

    A bundle for one size and one image at a time has static profiles alone: with and without guidance.
    BuildError: an input is not known, or has another number of dimensions.
    """
    return tuple(OptimizationProfile(shapes=_shapes(source, inputs, ranges)) for ranges in _ranges(source))


def _ranges(source: ComponentSource) -> list[dict[str, Range]]:
    profile = source.profile
    length = {"length": _fixed(profile.text_length)}
    if source.name == TEXT_ENCODER:
        return [length | {"batch": _fixed(1)}]
    if source.name in IN_PIXELS:
        return [_vae_ranges(source)]
    if source.name == CONTROL_EMBEDDING:
        height, width = (LARGEST_FACTOR * side for side in profile.maximum)  # the whole of an image in windows
        return [{"batch": _fixed(1)} | _sides(source, profile.minimum, (height, width), pixels=True)]
    if source.name == DEPTH_ESTIMATOR:
        return [_depth_ranges(source)]
    if source.name != STEP:
        raise BuildError(f"{source.name} is no component that TensorRT builds", hint="update sdrt")
    general = length | _sides(source, profile.minimum, profile.maximum)
    general |= {
        "requests": Range(minimum=1, optimum=profile.max_batch, maximum=profile.max_batch),  # batches are padded to it
        "lanes": Range(minimum=1, optimum=source.max_lanes // profile.max_batch, maximum=source.max_lanes),
    }
    hot = [general | _sides(source, size, size) for size in _hot_sizes(profile, source)]
    if profile.max_batch == 1:
        hot = [
            each | {"requests": _fixed(1), "lanes": _fixed(lanes)} for each in hot for lanes in (source.max_lanes, 1)
        ]
    covered = bool(profile.sizes) and len(profile.sizes) <= HOT_SIZES
    return hot if covered else [*hot, general]


def _hot_sizes(profile: ShapeProfile, source: ComponentSource) -> list[tuple[int, int]]:
    if profile.sizes:
        return list(profile.sizes[:HOT_SIZES])
    own = (source.default_height, source.default_width)
    return [own] if profile.accepts(*own) and profile.minimum != profile.maximum else []


def _sides(
    source: ComponentSource, smallest: tuple[int, int], largest: tuple[int, int], *, pixels: bool = False
) -> dict[str, Range]:
    """Height and width in latents, or in pixels; tuned for the model's own size where that lies inside."""
    own = (source.default_height, source.default_width)
    side = 1 if pixels else source.vae_downsample
    return {
        name: Range(minimum=low // side, optimum=min(max(preferred, low), high) // side, maximum=high // side)
        for name, low, preferred, high in zip(("height", "width"), smallest, own, largest, strict=True)
    }


def _vae_ranges(source: ComponentSource) -> dict[str, Range]:
    """From one latent pixel to the largest tile; the encoder's sides are in pixels."""
    profile, factor = source.profile, source.vae_downsample
    fine = factor if source.name == VAE_ENCODER else 1
    ranges = {"batch": _fixed(1)}
    own = (source.default_height, source.default_width)
    tile = largest_tile(own, profile.maximum, factor)
    for name, preferred, most in zip(("height", "width"), own, tile, strict=True):
        ranges[name] = Range(minimum=fine, optimum=min(preferred // factor, most) * fine, maximum=most * fine)
    return ranges


def _depth_ranges(source: ComponentSource) -> dict[str, Range]:
    """All that the bundle's images may become; tuned for one of the model's own size."""
    estimation, profile = source.depth_estimation, source.profile
    ranges = {"batch": _fixed(1)}
    if estimation is None or estimation.takes is not None:
        return ranges  # the graph itself says how large its input is
    least, most = input_bounds(estimation, profile.minimum, profile.maximum)
    own = input_size(estimation, source.default_height, source.default_width)
    for name, low, preferred, high in zip(("height", "width"), least, own, most, strict=True):
        ranges[name] = Range(minimum=low, optimum=min(max(preferred, low), high), maximum=high)
    return ranges


def _shapes(
    source: ComponentSource, inputs: Sequence[TensorSpec], ranges: Mapping[str, Range]
) -> dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
    known = _DIMENSIONS[source.name]
    if unknown := [spec for spec in inputs if len(known.get(spec.name, ())) != len(spec.shape)]:
        raise BuildError(
            f"{source.name} has the input {unknown[0].name} of shape {list(unknown[0].shape)}",
            hint=f"export the checkpoint again with sdrt; the inputs known are: {', '.join(known)}",
        )
    shapes = {}
    for spec in inputs:
        sides = [
            _fixed(size) if isinstance(size, int) else ranges[name]
            for size, name in zip(spec.shape, known[spec.name], strict=True)
        ]
        shapes[spec.name] = (
            tuple(side.minimum for side in sides),
            tuple(side.optimum for side in sides),
            tuple(side.maximum for side in sides),
        )
    return shapes


def _fixed(size: int) -> Range:
    return Range(minimum=size, optimum=size, maximum=size)
