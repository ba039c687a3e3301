"""Latents to images and back through the VAE's engines, in overlapping tiles above a size.

One image, or one tile of one image, goes through an engine at a time: memory stays bounded whatever the
batch and the size, and an image does not depend on the others of its batch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import numpy as np
import numpy.typing as npt

from sdrt.errors import BundleError, ParityError, RequestError
from sdrt.progress import Work
from sdrt.runners.base import VAE_DECODER, VAE_ENCODER, FloatArray, Runner

DEFAULT_TILE = 64
# Tiles differ most near their edges, which the blending weighs least; a quarter of a tile hides that.
OVERLAP_FRACTION = 4
LOG_VARIANCE_RANGE = (-30.0, 20.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spare:
    """Another decoder of the bundle, in higher precision. used: called each time that it has to help."""

    component: str
    used: Callable[[], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Where a tile lies along one axis, in latent pixels: [start, start + size)."""

    start: int
    size: int

    def scaled(self, factor: int) -> slice:
        """The same stretch in an array that is `factor` times as fine."""
        return slice(self.start * factor, (self.start + self.size) * factor)


def largest_tile(usual: tuple[int, int], maximum: tuple[int, int], vae_downsample: int) -> tuple[int, int]:
    """The largest tile, (height, width) in latent pixels, of a model's VAE engines.

    usual: the model's own (height, width) in pixels, which is to be decoded in one piece. maximum: the largest of the
    bundle's: its engines take no larger tile.
    """
    tile = max(DEFAULT_TILE, -(-max(usual) // vae_downsample))
    return min(tile, maximum[0] // vae_downsample), min(tile, maximum[1] // vae_downsample)


def check_latents(latents: object, channels: int) -> None:
    """Raises RequestError for what is not float32 [B, channels, h, w]."""
    if not isinstance(latents, np.ndarray):
        raise RequestError(f"latents are {type(latents).__name__}", hint="give a numpy array")
    if latents.ndim != 4 or latents.shape[1] != channels or latents.dtype != np.float32 or 0 in latents.shape:
        raise RequestError(
            f"latents are {latents.dtype} {list(latents.shape)}", hint=f"give float32 [batch, {channels}, h, w]"
        )


def decode_latents(
    runner: Runner,
    latents: FloatArray,
    *,
    scaling_factor: float,
    vae_downsample: int,
    tile: tuple[int, int] = (DEFAULT_TILE, DEFAULT_TILE),
    component: str = VAE_DECODER,
    spare: Spare | None = None,
) -> Work[FloatArray]:
    """Images from latents, by the decoder `component`, whose scaling factor it is; at rest between two tiles.

    latents: float32 [B, C, h, w], as the sampler leaves them. Returns float32 [B, 3, H, W] in about [-1, 1],
    not clipped. Above `tile`, (height, width) in latent pixels, tiles of that size are decoded and blended.
    spare: what decodes a tile again, when the decoder's own result is not finite.
    Raises ParityError when the latents, or in the end an engine's result, are not finite.
    """
    _check_batch(latents, "the latents")
    _check_finite(latents, "the latents", "build the bundle again with --precision fp32, or ask for less guidance")

    def decode(piece: FloatArray) -> FloatArray:
        if spare is None:
            return _run_checked(runner, component, "latent_sample", "sample", piece)
        sample = runner.run(component, {"latent_sample": piece})["sample"]
        if np.isfinite(sample).all():
            return sample
        spare.used()
        return _run_checked(runner, spare.component, "latent_sample", "sample", piece)

    plan = _TilePlan.of(latents.shape[2:], tile=tile, scale_in=1, scale_out=vae_downsample)
    unscaled = latents / np.float32(scaling_factor)
    return (yield from _tiled(decode, unscaled, plan, channels=3, component=component))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Posterior:
    """What an encoder knows of images' latents: a normal distribution. mean, deviation: float32 [B, C, h, w]."""

    mean: FloatArray
    deviation: FloatArray
    scaling_factor: float

    def mode(self) -> FloatArray:
        """The scaled latents that are likeliest: float32 [B, C, h, w]."""
        return self.mean * np.float32(self.scaling_factor)

    def sample(self, noise: FloatArray) -> FloatArray:
        """Scaled latents: mean + deviation · noise, float32 [B, C, h, w], `noise` being of that shape."""
        if noise.shape != self.mean.shape:
            raise RequestError(
                f"the noise has shape {noise.shape}, the latents have {self.mean.shape}",
                hint="draw noise of the latents' shape",
            )
        sampled: FloatArray = (self.mean + self.deviation * noise) * np.float32(self.scaling_factor)
        return sampled


def encode_posterior(
    runner: Runner,
    image: FloatArray,
    *,
    scaling_factor: float,
    vae_downsample: int,
    tile: tuple[int, int] = (DEFAULT_TILE, DEFAULT_TILE),
) -> Work[Posterior]:
    """The latents' distribution of images; at rest between two tiles.

    image: float32 [B, 3, H, W] in [-1, 1].
    Raises RequestError for a size that is no multiple of `vae_downsample`, ParityError when a result is not finite.
    """
    _check_batch(image, "the image")
    height, width = image.shape[2:]
    if height % vae_downsample != 0 or width % vae_downsample != 0:
        raise RequestError(
            f"an image of {width}x{height} pixels cannot be encoded",
            hint=f"resize it so that both sides are multiples of {vae_downsample}",
        )
    _check_finite(image, "the image", "pass pixels in [-1, 1]")

    def encode(piece: FloatArray) -> FloatArray:
        return _run_checked(runner, VAE_ENCODER, "sample", "latent_parameters", piece)

    size = (height // vae_downsample, width // vae_downsample)
    plan = _TilePlan.of(size, tile=tile, scale_in=vae_downsample, scale_out=1)
    parameters = yield from _tiled(encode, image, plan, channels=None, component=VAE_ENCODER)
    mean, log_variance = np.split(parameters, 2, axis=1)
    deviation = np.exp(np.float32(0.5) * np.clip(log_variance, *LOG_VARIANCE_RANGE))
    return Posterior(mean=mean, deviation=deviation, scaling_factor=scaling_factor)


@dataclass(frozen=True, slots=True, kw_only=True)
class _TilePlan:
    """The tiles of an image and by how much input and output are finer than latent pixels."""

    size: tuple[int, int]
    rows: tuple[Span, ...]
    columns: tuple[Span, ...]
    scale_in: int
    scale_out: int

    @classmethod
    def of(cls, size: tuple[int, ...], *, tile: tuple[int, int], scale_in: int, scale_out: int) -> "_TilePlan":
        height, width = size
        if min(tile) < 2:
            raise RequestError(
                f"the VAE cannot work in tiles of {tile[1]}x{tile[0]}", hint="use a tile of 2 or more latent pixels"
            )
        rows, columns = tile_spans(height, tile[0]), tile_spans(width, tile[1])
        return cls(size=(height, width), rows=rows, columns=columns, scale_in=scale_in, scale_out=scale_out)


def tile_spans(length: int, tile: int, *, overlap: int | None = None) -> tuple[Span, ...]:
    """Tiles along one axis: all of one size, spread evenly, each overlapping the next by `overlap` or more.

    That is a quarter of a tile unless given.
    """
    if length <= tile:
        return (Span(start=0, size=length),)
    stride = tile - max(1, tile // OVERLAP_FRACTION if overlap is None else overlap)
    count = -(-(length - tile) // stride) + 1
    return tuple(Span(start=round(i * (length - tile) / (count - 1)), size=tile) for i in range(count))


def blend_weights(spans: tuple[Span, ...], scale: int) -> list[npt.NDArray[np.float32]]:
    """How much each tile counts at each of its samples: linear ramps over the overlaps, in all 1 everywhere."""
    length = max(span.start + span.size for span in spans) * scale
    total = np.zeros(length, np.float64)
    weights = []
    for span in spans:
        position = np.arange(span.size * scale) + 0.5
        # An edge of the image has no neighbour to fade into.
        from_start = np.full_like(position, np.inf) if span is spans[0] else position
        from_end = np.full_like(position, np.inf) if span is spans[-1] else position[::-1]
        weight = np.minimum(np.minimum(from_start, from_end), float(length))
        total[span.scaled(scale)] += weight
        weights.append(weight)
    return [(w / total[s.scaled(scale)]).astype(np.float32) for w, s in zip(weights, spans, strict=True)]


def _tiled(
    evaluate: Callable[[FloatArray], FloatArray],
    source: FloatArray,
    plan: _TilePlan,
    *,
    channels: int | None,
    component: str,
) -> Work[FloatArray]:
    """Evaluate every tile of every image and blend them."""
    row_weights = blend_weights(plan.rows, plan.scale_out)
    column_weights = blend_weights(plan.columns, plan.scale_out)
    rows, columns = zip(plan.rows, row_weights, strict=True), zip(plan.columns, column_weights, strict=True)
    jobs = list(product(range(source.shape[0]), list(rows), list(columns)))
    result: FloatArray = np.empty(0, np.float32)
    for done, (image, (row, row_weight), (column, column_weight)) in enumerate(jobs, start=1):
        window = (slice(image, image + 1), slice(None), row.scaled(plan.scale_in), column.scaled(plan.scale_in))
        part = evaluate(np.ascontiguousarray(source[window]))
        expected = (row.size * plan.scale_out, column.size * plan.scale_out)
        _check_shape(part, channels, expected, component)
        if result.size == 0:
            whole = (plan.size[0] * plan.scale_out, plan.size[1] * plan.scale_out)
            result = np.zeros((source.shape[0], part.shape[1], *whole), np.float32)
        into = result[image, :, row.scaled(plan.scale_out), column.scaled(plan.scale_out)]
        into += part[0] * (row_weight[:, np.newaxis] * column_weight)
        if done < len(jobs):
            yield
    return result


def _run_checked(runner: Runner, component: str, source: str, target: str, piece: FloatArray) -> FloatArray:
    result = runner.run(component, {source: piece})[target]
    _check_finite(result, f"the result of {component}", "build the bundle again with: --precision fp32")
    return result


def _check_batch(values: FloatArray, what: str) -> None:
    if values.ndim != 4 or values.size == 0:
        raise RequestError(
            f"{what} of shape {values.shape} cannot go through the VAE", hint="pass [batch, channels, height, width]"
        )


def _check_finite(values: FloatArray, what: str, hint: str) -> None:
    finite = np.isfinite(values)
    if not finite.all():
        raise ParityError(
            f"{what}: {np.count_nonzero(~finite)} of {values.size} values are NaN or infinite",
            hint=hint,
        )


def _check_shape(part: FloatArray, channels: int | None, size: tuple[int, int], component: str) -> None:
    wanted = part.shape[1] if channels is None and part.ndim == 4 else channels
    if part.shape != (1, wanted, *size):
        raise BundleError(
            f"{component} made an array of shape {part.shape} where {size[1]}x{size[0]} was due",
            hint="the bundle does not fit its own manifest: rebuild it with: sdrt build",
        )
