"""Tracing one module to ONNX, with dynamic shapes and the weights in a file of their own."""

import logging
import warnings
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import torch
from onnx_ir.passes import Sequential, common
from onnxscript import optimizer, rewriter
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
                _capture(module, inputs, dynamic),
                kwargs=inputs,
                dynamo=True,
                dynamic_shapes=dynamic,
                input_names=list(inputs),
                output_names=[output],
                opset_version=OPSET,
                external_data=True,
                optimize=False,  # see `simplify`
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
    simplify(program.model, weights={name.removeprefix(WRAPPER_PREFIX) for name, _ in module.named_parameters()})
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces, with the paths of this machine
    program.save(path, include_initializers=True, external_data=True)
    # By path: a model over 2 GiB cannot be checked in memory (onnx issues 4394 and 6556).
    onnx.checker.check_model(path)


def _capture(
    module: nn.Module, inputs: dict[str, torch.Tensor], dynamic: dict[str, Any]
) -> torch.export.ExportedProgram | nn.Module:
    """The module as a program of tensor operations; itself where only the exporter's slower ways might succeed.

    Left to itself, the exporter captures UNets twice: with options of its own first, which fail, then through dynamo.
    """
    try:
        return torch.export.export(module, (), kwargs=inputs, dynamic_shapes=dynamic, strict=False)
    except (RuntimeError, ValueError, TypeError, torch.fx.proxy.TraceError):
        return module


def simplify(model: onnx_ir.Model, *, weights: set[str]) -> None:
    """Fold constants and fuse nodes as the exporter would, but leave every weight whole and under its own name.

    The exporter's own optimisation stores transposed copies of linear layers' weights under new names and merges
    equal weights; then nothing could find them again to add an adapter or to refit an engine.
    """

    def should_fold(node: onnx_ir.Node) -> bool | None:
        return False if any(value is not None and value.name in weights for value in node.inputs) else None

    common.InlinePass()(model)
    for _ in range(2):
        optimizer.fold_constants_ir(model, onnx_shape_inference=True, should_fold=should_fold)
        rewriter.rewrite(model)
    clean_up = Sequential(
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    )
    clean_up(model)


class _quiet_logging:  # noqa: N801  (used as a block)
    """The exporter logs its progress at warning level; errors still arrive as exceptions."""

    def __enter__(self) -> None:
        logging.disable(logging.WARNING)

    def __exit__(self, *_: object) -> None:
        logging.disable(logging.NOTSET)
