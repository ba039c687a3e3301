"""What Polygraphy is used for: it is imported for one of the two TensorRTs, and folds a graph that a parser refuses."""

import importlib
import os
from pathlib import Path
from typing import Any

import onnx

from sdrt.engines.onnx_files import load_whole
from sdrt.errors import BackendError, BuildError
from sdrt.runners.nvidia import INSTALL, LibraryName

_CHOICE = "POLYGRAPHY_USE_TENSORRT_RTX"
_LARGEST_RESULT_BYTES = (
    2**24
)  # of a node that is folded: an expanded constant may be far larger than what it is made of


def load_polygraphy(module: str, library: LibraryName) -> Any:  # noqa: ANN401  (its modules are untyped)
    """A module of Polygraphy's, which chooses its TensorRT when it is first imported. BackendError: not installed."""
    os.environ[_CHOICE] = "1" if library == "tensorrt_rtx" else "0"
    try:
        return importlib.import_module(f"polygraphy.{module}")
    except ImportError as error:
        raise BackendError(f"Polygraphy is not installed: {error}", hint=f"install it with: {INSTALL}") from error


def fold_graph(source: Path, target: Path, library: LibraryName) -> None:
    """Write the model at `source` to `target` with everything computed that depends on no input.

    Weights that are folded lose their names, so such a graph is not for engines to refit. target: in a folder of its
    own, for its weights. BackendError: Polygraphy is not installed. BuildError: it cannot fold the graph.
    """
    folding = load_polygraphy("backend.onnx", library)
    logger = load_polygraphy("logger", library).G_LOGGER
    logger.severity = logger.ERROR
    try:
        folded = folding.fold_constants(
            load_whole(source),
            error_ok=False,
            size_threshold=_LARGEST_RESULT_BYTES,
            allow_onnxruntime_shape_inference=False,
        )
    except Exception as error:  # of ONNX Runtime, of onnx or its own: what they have in common is that it failed
        raise BuildError(f"{source.name} cannot be folded: {error}", hint="export the checkpoint again") from error
    onnx.save(folded, target, save_as_external_data=True, location=f"{target.name}.data")
