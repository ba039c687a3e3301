"""How near each place of a picture is: what a checkpoint's depth estimator is given, and what it says.

The reference is transformers' DPTImageProcessor as it works with Pillow, and DPTForDepthEstimation (Ranftl et al. 2021,
arXiv:2103.13413), as diffusers' depth-to-image pipeline calls them.
"""

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from PIL import Image

from sdrt.bundle import DepthEstimation, JsonValue
from sdrt.errors import BundleError, CheckpointError, ParityError, RequestError
from sdrt.runners.base import DEPTH_ESTIMATOR, FloatArray, Runner

PROCESSOR_FILE = "feature_extractor/preprocessor_config.json"
_PROCESSORS = tuple(
    f"DPT{kind}" for kind in ("ImageProcessor", "FeatureExtractor", "ImageProcessorFast", "ImageProcessorPil")
)
_HONOURED = frozenset(
    {"do_resize", "size", "resample", "keep_aspect_ratio", "ensure_multiple_of", "do_rescale", "rescale_factor"}
    | {"do_normalize", "image_mean", "image_std", "do_pad", "size_divisor", "default_to_square"}
)
# What the reference does not read for a picture that is RGB already.
_WITHOUT_EFFECT = frozenset(
    {"image_processor_type", "feature_extractor_type", "processor_class", "_processor_class", "do_convert_rgb"}
    | {"do_reduce_labels", "crop_size", "data_format", "input_data_format", "return_tensors", "device"}
    | {"disable_grouping"}
)
_HINT = 'to do without it, set depth_estimator to [null, null] in model_index.json: requests then bring a "depth_map"'
_HALF = 0.5  # of each channel's range: the mean and deviation of a processor that names none


def read_depth_estimation(
    processor: Mapping[str, JsonValue], estimator: Mapping[str, JsonValue], where: str
) -> DepthEstimation:
    """What a preprocessor_config.json and a depth estimator's config.json ask for; `where` is named in errors.

    Raises CheckpointError for a field that would change the depth and is not honoured here, and for a processor that
    makes what the estimator does not take.
    """
    _check_fields(processor, where)
    side = _size(processor, where)
    estimation = DepthEstimation(
        height=side[0],
        width=side[1],
        keep_aspect_ratio=_flag(processor, "keep_aspect_ratio", where, default=False),
        multiple_of=_whole(processor, "ensure_multiple_of", where, default=1),
        resample=_filter(processor, where),
        scale=_number(processor, "rescale_factor", where, 1 / 255) if _on(processor, "do_rescale", where) else 1.0,
        mean=_channels(processor, "image_mean", where) if _on(processor, "do_normalize", where) else (0.0, 0.0, 0.0),
        std=_channels(processor, "image_std", where) if _on(processor, "do_normalize", where) else (1.0, 1.0, 1.0),
        pad_to=_padding(processor, where),
        takes=None,
    )
    if 0 in estimation.std:
        raise _refused("image_std", processor.get("image_std"), where)
    return _with_what_it_takes(estimation, estimator, where)


def input_size(estimation: DepthEstimation, height: int, width: int) -> tuple[int, int]:
    """(height, width) of what the estimator is given of an image of this size."""
    down, across = _resized(estimation, height, width)
    return _padded(estimation, down), _padded(estimation, across)


def input_bounds(
    estimation: DepthEstimation, minimum: tuple[int, int], maximum: tuple[int, int]
) -> tuple[tuple[int, int], tuple[int, int]]:
    """The least and the most that the estimator is given of images between these sizes; all (height, width)."""
    (low, narrow), (high, wide) = minimum, maximum
    down, across = estimation.height, estimation.width
    # One side is met; the other is as much longer or shorter as the image is.
    least = (min(down, across * low / wide), min(across, down * narrow / high))
    most = (max(down, across * high / narrow), max(across, down * wide / low))
    lower, upper = ([_padded(estimation, _rounded(estimation, side)) for side in sides] for sides in (least, most))
    return (max(lower[0], 1), max(lower[1], 1)), (upper[0], upper[1])


def check_estimable(estimation: DepthEstimation, height: int, width: int) -> None:
    """RequestError for an image of a size of which the estimator cannot tell the depth."""
    given = input_size(estimation, height, width)
    fits = min(given) > 0 if estimation.takes is None else given == estimation.takes
    if not fits:
        only = "" if estimation.takes is None else f", and takes only {estimation.takes[1]}x{estimation.takes[0]}"
        raise RequestError(
            f"the depth estimator would be given {given[1]}x{given[0]} pixels of an image of {width}x{height}{only}",
            hint="give an image of another shape, such as a square, or a depth_map",
        )


def to_pixel_values(estimation: DepthEstimation, image: Image.Image) -> FloatArray:
    """An RGB image as the estimator takes it: float32 [1, 3, h, w]."""
    height, width = _resized(estimation, image.height, image.width)
    resized = image.resize((width, height), Image.Resampling(estimation.resample))
    scaled = (np.asarray(resized).astype(np.float64) * estimation.scale).astype(np.float32)
    normal = (scaled - np.array(estimation.mean, np.float32)) / np.array(estimation.std, np.float32)
    whole = input_size(estimation, image.height, image.width)
    missing = [most - side for most, side in zip(whole, normal.shape[:2], strict=True)]
    edges = [(count // 2, count - count // 2) for count in missing]
    padded: FloatArray = np.pad(normal, (*edges, (0, 0)))
    return np.ascontiguousarray(padded.transpose(2, 0, 1)[None])


def estimate_depth(runner: Runner, image: Image.Image, estimation: DepthEstimation) -> FloatArray:
    """How near each place of an RGB image is, larger being nearer: float32 [H, W], of the estimator's own size.

    Raises ParityError where that is not finite, BundleError where it is no map.
    """
    depth = runner.run(DEPTH_ESTIMATOR, {"pixel_values": to_pixel_values(estimation, image)})["predicted_depth"]
    if depth.ndim != 3 or len(depth) != 1 or depth.size == 0:
        raise BundleError(
            f"{DEPTH_ESTIMATOR} made an array of shape {depth.shape}, not one map", hint="rebuild it with: sdrt build"
        )
    if not np.isfinite(depth).all():
        raise ParityError(
            f"{np.count_nonzero(~np.isfinite(depth))} of {depth.size} values of the depth are NaN or infinite",
            hint="build the bundle again with --precision fp32, or give a depth_map",
        )
    near: FloatArray = depth[0]
    return near


def _resized(estimation: DepthEstimation, height: int, width: int) -> tuple[int, int]:
    """As DPT's get_resize_output_image_size has it, with its arithmetic."""
    down, across = estimation.height / height, estimation.width / width
    if estimation.keep_aspect_ratio:  # scaled as little as possible
        down = across = across if abs(1 - across) < abs(1 - down) else down
    return _rounded(estimation, down * height), _rounded(estimation, across * width)


def _rounded(estimation: DepthEstimation, side: float) -> int:
    return round(side / estimation.multiple_of) * estimation.multiple_of


def _padded(estimation: DepthEstimation, side: int) -> int:
    return side if estimation.pad_to is None else math.ceil(side / estimation.pad_to) * estimation.pad_to


def _with_what_it_takes(estimation: DepthEstimation, estimator: Mapping[str, JsonValue], where: str) -> DepthEstimation:
    """`estimation` with the size that the estimator is for: DPT-hybrid has one, a plain ViT's readout is square."""
    own = input_size(estimation, estimation.height, estimation.width)
    if min(own) < 1:
        raise _refused("size", [*own], where)
    hybrid = estimator.get("is_hybrid") is True
    any_size = not hybrid and (estimator.get("backbone_config") is not None or estimator.get("backbone") is not None)
    if any_size:
        return replace(estimation, takes=None if estimation.keep_aspect_ratio else own)
    image_size = estimator.get("image_size", 384)
    only = [*image_size] if isinstance(image_size, list) else [image_size, image_size]
    if (hybrid and [*own] != only) or own[0] != own[1]:
        wanted = "x".join(map(str, reversed(only))) if hybrid else "squares"
        raise CheckpointError(
            f"{where}: size makes {own[1]}x{own[0]}, but the depth estimator takes {wanted} alone", hint=_HINT
        )
    return replace(estimation, takes=own)


def _check_fields(processor: Mapping[str, JsonValue], where: str) -> None:
    kind = processor.get("image_processor_type", processor.get("feature_extractor_type", _PROCESSORS[0]))
    if kind not in _PROCESSORS:
        raise _refused("image_processor_type", kind, where)
    for name, value in processor.items():
        if name not in _HONOURED | _WITHOUT_EFFECT and value not in (None, False):
            raise _refused(name, value, where)
    for name in ("do_resize", "default_to_square"):
        if not _flag(processor, name, where, default=True):
            raise _refused(name, processor[name], where)


def _size(processor: Mapping[str, JsonValue], where: str) -> tuple[int, int]:
    size = processor.get("size", 384)
    sides = size if isinstance(size, dict) else {"height": size, "width": size}
    if sides.keys() != {"height", "width"}:
        raise _refused("size", size, where)
    return _whole(sides, "height", f"{where}: size"), _whole(sides, "width", f"{where}: size")


def _filter(processor: Mapping[str, JsonValue], where: str) -> int:
    value = processor.get("resample")
    number = int(Image.Resampling.BICUBIC) if value is None else value
    if isinstance(number, bool) or not isinstance(number, int) or number not in [*Image.Resampling]:
        raise _refused("resample", value, where)
    return number


def _padding(processor: Mapping[str, JsonValue], where: str) -> int | None:
    asked = _flag(processor, "do_pad", where, default=False) and processor.get("size_divisor") is not None
    return _whole(processor, "size_divisor", where) if asked else None


def _on(processor: Mapping[str, JsonValue], name: str, where: str) -> bool:
    return _flag(processor, name, where, default=True)


def _flag(processor: Mapping[str, JsonValue], name: str, where: str, *, default: bool) -> bool:
    value = processor.get(name)
    if not isinstance(value, bool | None):
        raise _refused(name, value, where)
    return default if value is None else value


def _whole(values: Mapping[str, JsonValue], name: str, where: str, default: int | None = None) -> int:
    value = default if values.get(name) is None else values[name]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise _refused(name, value, where)
    return value


def _number(values: Mapping[str, JsonValue], name: str, where: str, default: float) -> float:
    value = default if values.get(name) is None else values[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _refused(name, value, where)
    return float(value)


def _channels(processor: Mapping[str, JsonValue], name: str, where: str) -> tuple[float, float, float]:
    """A number for each of red, green and blue; one for all of them counts three times."""
    value = processor.get(name)
    listed = value if isinstance(value, list) else [_HALF if value is None else value] * 3
    if len(listed) != 3:
        raise _refused(name, value, where)
    red, green, blue = (_number({name: each}, name, where, _HALF) for each in listed)
    return red, green, blue


def _refused(name: str, value: object, where: str) -> CheckpointError:
    return CheckpointError(f"{where}: {name} is {value!r}, which sdrt does not do", hint=_HINT)
