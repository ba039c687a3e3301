"""Checking what a caller feeds an engine against what the engine declares, before a backend sees it."""

from collections.abc import Mapping

import numpy as np

from sdrt.bundle import ComponentRecord, TensorSpec
from sdrt.errors import BackendError
from sdrt.runners.base import Array


def checked_feeds(component: ComponentRecord, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """The feeds, contiguous and in the declared dtypes.

    Raises BackendError for a missing or unknown tensor, a wrong rank or a wrong fixed dimension.
    """
    declared = {spec.name for spec in component.inputs}
    if declared != feeds.keys():
        missing, unknown = sorted(declared - feeds.keys()), sorted(feeds.keys() - declared)
        raise BackendError(
            f"{component.name} was fed the wrong tensors: missing {missing}, unknown {unknown}",
            hint="the bundle and this sdrt do not fit together; rebuild it with: sdrt build",
        )
    return {spec.name: _checked(component.name, spec, feeds[spec.name]) for spec in component.inputs}


def _checked(component: str, spec: TensorSpec, array: Array) -> Array:
    pairs = zip(spec.shape, array.shape, strict=False)
    fits = len(spec.shape) == array.ndim and all(isinstance(want, str) or want == have for want, have in pairs)
    if not fits:
        raise BackendError(
            f"{component} takes {spec.name} as {list(spec.shape)}, not as {list(array.shape)}",
            hint="ask for a size that the bundle accepts: sdrt inspect",
        )
    return np.ascontiguousarray(array, dtype=np.dtype(spec.dtype))
