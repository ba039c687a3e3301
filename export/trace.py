"""Tracing one module to ONNX, with dynamic shapes and the weights in a file of their own."""

import logging
import warnings
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import nn

from sdrt.errors import ExportError

OPSET = 20
WRAPPER_PREFIX = "wrapped."


def trace_to_onnx(
    module: nn.Module, inputs: dict[str, torch.Tensor], dynamic: dict[str, Any], output: str, path: Path
) -> None:
    """Write `path` and `path`.data. Initializers keep the checkpoint's parameter names.

    Raises ExportError when PyTorch cannot trace the module.
    """
    with torch.no_grad(), warnings.catch_warnings(), _quiet_logging():
        warnings.simplefilter("ignore")
        try:
            program = torch.onnx.export(
                module,
                kwargs=inputs,
                dynamo=True,
                dynamic_shapes=dynamic,
                input_names=list(inputs),
                output_names=[output],
                opset_version=OPSET,
                external_data=True,
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            first = str(error).strip().splitlines()[0]
            hint = "this model's code cannot be traced with this version of PyTorch"
            raise ExportError(f"tracing {path.parent.name} failed: {first}", hint=hint) from error
    if program is None:
        raise ExportError(f"tracing {path.parent.name} gave no program", hint="report this with SDRT_DEBUG=1")
    for name, value in list(program.model.graph.initializers.items()):
        if name.startswith(WRAPPER_PREFIX):
            value.name = name.removeprefix(WRAPPER_PREFIX)
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces, with the paths of this machine
    program.save(path, include_initializers=True, external_data=True)
    # By path: a model over 2 GiB cannot be checked in memory (onnx issues 4394 and 6556).
    onnx.checker.check_model(path)


class _quiet_logging:  # noqa: N801  (used as a block)
    """The exporter logs its progress at warning level; errors still arrive as exceptions."""

    def __enter__(self) -> None:
        logging.disable(logging.WARNING)

    def __exit__(self, *_: object) -> None:
        logging.disable(logging.NOTSET)
