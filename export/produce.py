"""Producing one exported component: load, trace, check, record. The only module of the stage that must load PyTorch."""

import gc
import shutil
from pathlib import Path

import numpy as np
import torch

from sdrt.export.check import Expected, check_component, expect
from sdrt.export.checkpoint import Checkpoint
from sdrt.export.components import COMPONENTS
from sdrt.export.trace import trace_to_onnx


def export_component(checkpoint: Checkpoint, name: str, folder: Path, *, threads: int) -> float:
    """Write <name>/model.onnx, <name>/config.json and golden/<name>.npz into `folder`.

    Returns the largest relative error against PyTorch. Raises ExportError.
    """
    torch.set_num_threads(threads)
    spec = COMPONENTS[name]
    target = folder / name
    target.mkdir()
    (folder / "golden").mkdir()
    module = spec.build(checkpoint)
    expectations = [expect(module, spec.examples(checkpoint, shape)) for shape in spec.checked_with]
    inputs = spec.examples(checkpoint, spec.traced_with)
    trace_to_onnx(module, inputs, spec.dynamic(checkpoint), spec.output, target / "model.onnx")
    golden = expect(module, inputs)
    del module
    gc.collect()
    error = check_component(target / "model.onnx", spec.output, expectations, threads=threads)
    save_golden(golden, spec.output, folder / "golden" / f"{name}.npz")
    shutil.copyfile(checkpoint.folder(spec.source) / "config.json", target / "config.json")
    return error


def save_golden(golden: Expected, output: str, path: Path) -> None:
    """Write inputs and output as "input.<name>" and "output.<name>"."""
    arrays = {f"input.{name}": array for name, array in golden.inputs.items()}
    arrays[f"output.{output}"] = golden.output
    np.savez(path, allow_pickle=False, **arrays)
