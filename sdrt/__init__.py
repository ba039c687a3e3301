"""sdrt: compiled inference for Stable Diffusion, without PyTorch at run time.

import sdrt

with sdrt.open("shapes.sdrt") as pipeline:
    pipeline.generate("a large red circle on a white background", seed=7).images[0].save("circle.png")
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from sdrt._version import VERSION

if TYPE_CHECKING:
    from sdrt.batcher import Batcher, Ticket
    from sdrt.bundle import Bundle
    from sdrt.errors import BusyError, Cancelled, ClosedError, RequestError, SdrtError
    from sdrt.pipeline import Pipeline, Result, StepEvent, Timings
    from sdrt.request import Request

__version__ = VERSION

__all__ = [
    "Batcher",
    "Bundle",
    "BusyError",
    "Cancelled",
    "ClosedError",
    "Pipeline",
    "Request",
    "RequestError",
    "Result",
    "SdrtError",
    "StepEvent",
    "Ticket",
    "Timings",
    "__version__",
    "open",
]

_HOMES = {
    "Batcher": "sdrt.batcher",
    "Ticket": "sdrt.batcher",
    "Bundle": "sdrt.bundle",
    "BusyError": "sdrt.errors",
    "Cancelled": "sdrt.errors",
    "ClosedError": "sdrt.errors",
    "RequestError": "sdrt.errors",
    "SdrtError": "sdrt.errors",
    "Pipeline": "sdrt.pipeline",
    "Result": "sdrt.pipeline",
    "StepEvent": "sdrt.pipeline",
    "Timings": "sdrt.pipeline",
    "Request": "sdrt.request",
}


def open(path: "Path | str", *, threads: int | None = None, provider: str | None = None) -> "Pipeline":
    """Open a bundle for drawing. Raises BundleError, BackendError, or RequestError.

    provider: for ONNX Runtime bundles, where they run: "cpu" (the default), "cuda", "tensorrt" or "tensorrt-rtx".
    """
    from sdrt.pipeline import Pipeline

    return Pipeline.open(path, threads=threads, provider=provider)


def __getattr__(name: str) -> object:
    # Importing sdrt loads nothing; a name loads its module when it is first used.
    if name not in _HOMES:
        raise AttributeError(f"module 'sdrt' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
