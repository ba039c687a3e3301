"""A mixed graph evaluated on a GPU for bisection: TensorRT engines with inner tensors as outputs, run by Polygraphy.

They are not the bundle's own engines: what becomes an output is not fused away.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from sdrt.bundle import BackendRecord
from sdrt.engines.bisect import Evaluate
from sdrt.engines.components import input_specs
from sdrt.engines.onnx_files import load_graph
from sdrt.engines.polygraphy import load_polygraphy
from sdrt.errors import BackendError
from sdrt.runners.base import Array
from sdrt.runners.nvidia import LibraryName, find_device, library_of


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineHost:
    """What can evaluate TensorRT engines on this machine."""

    library: LibraryName
    device: str


def find_engine_host(backend: BackendRecord) -> EngineHost | None:
    """The GPU and the library of a TensorRT bundle, if this machine has both and Polygraphy; else None."""
    if backend.name != "tensorrt" or any(find_spec(name) is None for name in ("cuda", "polygraphy")):
        return None
    library = library_of(backend)
    device = find_device()
    if device is None or find_spec(library) is None:
        return None
    return EngineHost(library=library, device=device.name)


def tensorrt_evaluator(path: Path, feeds: Sequence[Mapping[str, Array]], library: LibraryName) -> Evaluate:
    """Evaluate the mixed graph at `path` on the GPU.

    It raises BackendError where TensorRT cannot build an engine with these outputs, or the engine fails.
    """
    cast = cast_feeds(path, feeds)

    def evaluate(names: Sequence[str]) -> list[dict[str, Array]]:
        trt, comparator = load_polygraphy("backend.trt", library), load_polygraphy("comparator", library)
        try:
            engine = trt.EngineFromBytes(marked_engine(path, names, cast, library))
            ((_, runs),) = comparator.Comparator.run([trt.TrtRunner(engine)], data_loader=cast)
        except load_polygraphy("exception", library).PolygraphyException as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise BackendError(
                f"{library} cannot evaluate {path.parent.name} with {len(names)} of its tensors as outputs: {reason}",
                hint="look at nvidia-smi; on a machine without a GPU the same command uses the CPU alone",
            ) from error
        return [{name: np.asarray(run[name]) for name in names} for run in runs]

    return evaluate


def marked_engine(  # its result is a loader of Polygraphy's
    path: Path, names: Sequence[str], feeds: Sequence[Mapping[str, Array]], library: LibraryName
) -> Any:  # noqa: ANN401
    """A loader of the bytes of an engine whose outputs are `names`, for exactly the shapes of `feeds`."""
    trt = load_polygraphy("backend.trt", library)
    network = trt.NetworkFromOnnxPath(str(path), strongly_typed=True)
    profile = trt.Profile()
    for name in feeds[0]:
        shapes = [feed[name].shape for feed in feeds]
        profile.add(
            name,
            [min(sizes) for sizes in zip(*shapes, strict=True)],
            shapes[0],
            [max(sizes) for sizes in zip(*shapes, strict=True)],
        )
    config = trt.CreateConfig(profiles=[profile])
    return trt.EngineBytesFromNetwork(trt.ModifyNetworkOutputs(network, outputs=list(names)), config)


def cast_feeds(path: Path, feeds: Sequence[Mapping[str, Array]]) -> list[dict[str, Array]]:
    """The inputs of the graph at `path` in the types that it declares."""
    specs = input_specs(load_graph(path))
    return [
        {spec.name: np.ascontiguousarray(feed[spec.name], np.dtype(spec.dtype)) for spec in specs} for feed in feeds
    ]
