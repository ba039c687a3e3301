"""Does the traced component compute what PyTorch computes? Checked at shapes it was not traced with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from sdrt.errors import ExportError
from sdrt.parity import max_relative

BOUND = 1e-4  # float32 against float32: other kernels, other orders of summation

Arrays = dict[str, npt.NDArray[np.generic]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """Inputs and the output that PyTorch computes for them."""

    inputs: Arrays
    output: npt.NDArray[np.float32]


def expect(module: nn.Module, inputs: Mapping[str, torch.Tensor]) -> Expected:
    """Run PyTorch once, in float32."""
    with torch.no_grad():
        output = module(**inputs)
    return Expected(inputs={name: tensor.numpy() for name, tensor in inputs.items()}, output=output.numpy())


def check_component(path: Path, output: str, expectations: Sequence[Expected], *, threads: int) -> float:
    """The largest relative error over the expectations. Raises ExportError above the bound."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # Repacked copies of the weights would double the memory for a single evaluation.
    options.add_session_config_entry("session.disable_prepacking", "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    worst = 0.0
    for expected in expectations:
        (actual,) = session.run([output], expected.inputs)
        error = max_relative(actual, expected.output)
        worst = max(worst, error)
        if not error <= BOUND:
            shapes = {name: list(array.shape) for name, array in expected.inputs.items()}
            raise ExportError(
                f"{path.parent.name} in ONNX differs from PyTorch by {error:.1e} (bound {BOUND:.0e}) at {shapes}",
                hint="the exporter and this model do not fit together; report it with the model's config.json",
            )
    return worst
