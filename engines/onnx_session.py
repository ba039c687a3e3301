"""Running an ONNX file as it is, in ONNX Runtime on the CPU: for references, calibration and checks."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from sdrt.errors import BackendError, BuildError
from sdrt.runners.base import Array


def run_onnx(
    path: Path,
    feeds: Sequence[Mapping[str, Array]],
    *,
    names: Sequence[str] | None = None,
    threads: int | None = None,
    optimised: bool = True,
    in_file_order: bool = False,
) -> list[dict[str, Array]]:
    """Evaluate the file once for each of `feeds`, which are cast to the types that it declares; extra ones are ignored.

    names: the outputs wanted, or None for all. optimised: let ONNX Runtime fuse nodes and fold constants.
    in_file_order: evaluate nodes as the file lists them, so that its writer decides for how long each result is held.
    BackendError: ONNX Runtime is not installed. BuildError: it cannot open or run the file.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendError(
            "a build that measures its engines needs ONNX Runtime, which is not installed",
            hint="install it with: pip install 'sdrt[onnxruntime]'",
        ) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 0 if threads is None else threads
    options.log_severity_level = 3
    if not optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if in_file_order:
        options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED  # of equal priority: by their index
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        types = {node.name: _numpy_type(node.type) for node in session.get_inputs()}
        wanted = [node.name for node in session.get_outputs()] if names is None else list(names)
        runs = [
            session.run(wanted, {name: np.asarray(feed[name]).astype(dtype) for name, dtype in types.items()})
            for feed in feeds
        ]
    except Exception as error:  # ONNX Runtime raises one class per status code, with no common base
        raise BuildError(f"ONNX Runtime cannot run {path}: {error}", hint="export the checkpoint again") from error
    return [dict(zip(wanted, run, strict=True)) for run in runs]


def _numpy_type(declared: str) -> np.dtype[np.generic]:
    """The dtype of "tensor(float)" and its like."""
    name = declared.removeprefix("tensor(").removesuffix(")")
    return np.dtype({"float": "float32", "double": "float64"}.get(name, name))
