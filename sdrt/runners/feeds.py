"""Checking what a caller feeds an engine against what the engine declares, before a backend sees it."""

from collections.abc import Mapping

import numpy as np

from sdrt.bundle import Bundle, ComponentRecord, TensorSpec
from sdrt.errors import BackendError, BundleError
from sdrt.runners.base import Array


def asked_component(bundle: Bundle, name: str) -> ComponentRecord:
    """What the bundle says of a component that `run` was asked for. Raises BackendError when it has none."""
    try:
        return bundle.component(name)
    except BundleError as error:
        raise BackendError(error.message, hint=error.hint) from error


def checked_feeds(component: ComponentRecord, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """The feeds, contiguous and in the declared dtypes.

    Raises BackendError for a missing or unknown tensor, a wrong rank, a wrong fixed dimension, or a dynamic
    dimension that two tensors have in different sizes: backends would broadcast some of those silently.
    """
    declared = {spec.name for spec in component.inputs}
    if declared != feeds.keys():
        missing, unknown = sorted(declared - feeds.keys()), sorted(feeds.keys() - declared)
        raise BackendError(
            f"{component.name} was fed the wrong tensors: missing {missing}, unknown {unknown}",
            hint="the bundle and this sdrt do not fit together; rebuild it with: sdrt build",
        )
    checked = {spec.name: _checked(component.name, spec, feeds[spec.name]) for spec in component.inputs}
    _check_agreement(component, checked)
    return checked


def _check_agreement(component: ComponentRecord, feeds: Mapping[str, Array]) -> None:
    sizes: dict[str, tuple[int, str]] = {}
    for spec in component.inputs:
        for dimension, size in zip(spec.shape, feeds[spec.name].shape, strict=True):
            if isinstance(dimension, int):
                continue
            known, owner = sizes.setdefault(dimension, (size, spec.name))
            if known != size:
                raise BackendError(
                    f"{component.name} was fed {owner} with {known} {dimension} and {spec.name} with {size}",
                    hint="this is a fault of the caller, not of the bundle",
                )


def _checked(component: str, spec: TensorSpec, array: Array) -> Array:
    pairs = zip(spec.shape, array.shape, strict=False)
    fits = len(spec.shape) == array.ndim and all(isinstance(want, str) or want == have for want, have in pairs)
    if not fits:
        raise BackendError(
            f"{component} takes {spec.name} as {list(spec.shape)}, not as {list(array.shape)}",
            hint="ask for a size that the bundle accepts: sdrt inspect",
        )
    return np.asarray(array, dtype=np.dtype(spec.dtype), order="C")
