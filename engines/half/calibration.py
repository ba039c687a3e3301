"""Which nodes keep float32 as measured: the graph run on the CPU, each node watched for what halves would do to it."""

import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from sdrt.bundle import MeasuredIsland
from sdrt.engines.half.graph import LARGEST, SENTINEL, FloatGraph, is_half, to_half
from sdrt.engines.onnx_files import external_files, lend_file
from sdrt.engines.onnx_session import run_onnx
from sdrt.errors import BuildError
from sdrt.runners.base import Array

HEADROOM = 4.0  # other prompts, seeds and adapters reach further than what calibration meets
LARGEST_KEPT_HALF = LARGEST / HEADROOM
WORST_ROUNDING = 2.0**-6  # of a node's largest value: 32 times what one rounding to float16 costs

_PREFIX = "watched."
_INFINITE = float(np.finfo(np.float32).max)
_REORDER = ("Concat", "Flatten", "Pad", "Reshape", "Split", "Squeeze", "Transpose", "Unsqueeze")
_SELECT = ("Expand", "Gather", "Identity", "Slice", "Tile")
_MOVES = frozenset((*_REORDER, *_SELECT))  # values pass through unchanged: rounding them costs what it costs anywhere


def calibrate(
    graph: FloatGraph,
    kept: Collection[str],
    source: Path,
    feeds: Sequence[Mapping[str, Array]],
    work: Path,
    *,
    threads: int | None = None,
) -> list[MeasuredIsland]:
    """Run the float32 model on `feeds` and find the nodes beside `kept` that would overflow or lose precision.

    source: the model's file; work: an existing folder on a file system with room for nothing but the graph.
    BuildError: the model gives NaN or infinity in float32 already.
    """
    watch = _Watch(graph=graph, kept=frozenset(kept))
    watch.add_all()
    with tempfile.TemporaryDirectory(dir=work, prefix=".watch.") as folder:
        path = Path(folder) / source.name
        for file in external_files(graph.model, source):
            target = path.parent / file.relative_to(source.parent)
            target.parent.mkdir(parents=True, exist_ok=True)
            lend_file(file, target)
        onnx.save(watch.model(), path)
        results = [value.name for value in graph.model.graph.output]
        names = [*results, *watch.magnitudes, *watch.errors]
        # Unoptimised: what is fused cannot be watched, and folded constants would be a second copy of the weights.
        runs = run_onnx(path, feeds, names=names, threads=threads, optimised=False)
    if wild := [name for name in results for run in runs if not np.isfinite(run[name]).all()]:
        raise BuildError(
            f"{wild[0]} is not finite even in float32", hint="the checkpoint is damaged, or its config does not fit it"
        )
    worst = {name: float(np.max([run[name] for run in runs])) for name in (*watch.magnitudes, *watch.errors)}
    return list(_findings(watch, worst))


@dataclass(slots=True, kw_only=True)
class _Watch:
    """The float32 graph with a scalar output for each thing watched.

    magnitudes: output → the tensor whose largest magnitude it is. errors: output → the node whose error it is.
    """

    graph: FloatGraph
    kept: frozenset[str]
    magnitudes: dict[str, str] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, TensorProto] = field(default_factory=dict)
    rounded: dict[str, str] = field(default_factory=dict)

    def add_all(self) -> None:
        """Watch every tensor and every computing node that would be float16."""
        for node in self.graph.model.graph.node:
            for name in half_border(self.graph, node, self.kept):
                self._watch_magnitude(name)
            self.nodes.append(node)
            if node.op_type not in _MOVES and any(
                name in self.graph.floats and is_half(node, index, self.kept, output=True)
                for index, name in enumerate(node.output)
            ):
                self._watch_error(node)
        for output, name in self.magnitudes.items():
            self._largest(name, output, among=name)

    def model(self) -> onnx.ModelProto:
        """The graph to run, its outputs those that are watched."""
        model = onnx.ModelProto()
        model.CopyFrom(self.graph.model)
        del model.graph.node[:], model.graph.value_info[:]
        model.graph.node.extend(self.nodes)
        model.graph.initializer.extend(self.constants.values())
        for name in (*self.magnitudes, *self.errors):
            model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, []))
        return model

    def _watch_magnitude(self, tensor: str) -> None:
        self.magnitudes[f"{_PREFIX}{tensor}.largest"] = tensor

    def _watch_error(self, node: onnx.NodeProto) -> None:
        """The node once more on rounded inputs, and how far its first result is from the exact one."""
        name = f"{_PREFIX}{node.name}"
        copy = onnx.NodeProto.FromString(node.SerializeToString())
        copy.name = name
        copy.input[:] = [
            self._rounded(tensor)
            if tensor in self.graph.floats and is_half(node, index, self.kept, output=False)
            else tensor
            for index, tensor in enumerate(node.input)
        ]
        copy.output[:] = [f"{name}.output{index}" if tensor else "" for index, tensor in enumerate(node.output)]
        exact, near = node.output[0], copy.output[0]
        self.nodes.append(copy)
        self._add("Sub", [near, exact], f"{name}.difference")
        self._largest(f"{name}.difference", f"{name}.off", among=exact)
        self._largest(exact, f"{name}.of", among=exact)
        self._add("Max", [f"{name}.of", self._constant("tiny", np.float32(1e-30))], f"{name}.scale")
        self._add("Div", [f"{name}.off", f"{name}.scale"], f"{name}.error")
        self.errors[f"{name}.error"] = node.name

    def _rounded(self, tensor: str) -> str:
        if tensor not in self.rounded:
            name = f"{_PREFIX}{tensor}.rounded"
            weight = self.graph.weights.get(tensor)
            if weight is not None and weight.data_location != TensorProto.EXTERNAL:
                value = to_half(numpy_helper.to_array(weight).astype(np.float32)).astype(np.float32)
                self.constants[name] = numpy_helper.from_array(value, name)
            else:
                self._add("Cast", [tensor], f"{name}.half", to=TensorProto.FLOAT16)
                self._add("Cast", [f"{name}.half"], name, to=TensorProto.FLOAT)
            self.rounded[tensor] = name
        return self.rounded[tensor]

    def _largest(self, tensor: str, output: str, *, among: str) -> None:
        """The largest magnitude in `tensor`, at the places where `among` does not stand for infinity."""
        self._add("Abs", [tensor], f"{output}.magnitude")
        self._add("Abs", [among], f"{output}.among")
        self._add("Less", [f"{output}.among", self._constant("sentinel", np.float32(SENTINEL))], f"{output}.counts")
        zero = self._constant("zero", np.float32(0))
        self._add("Where", [f"{output}.counts", f"{output}.magnitude", zero], f"{output}.counted")
        self._add("ReduceMax", [f"{output}.counted"], output, keepdims=0)

    def _constant(self, name: str, value: np.float32) -> str:
        full = f"{_PREFIX}constant.{name}"
        self.constants[full] = numpy_helper.from_array(np.asarray(value), full)
        return full

    def _add(self, operator: str, inputs: Sequence[str], output: str, **attributes: int) -> None:
        node = helper.make_node(operator, inputs, [output], name=output)
        node.attribute.extend(helper.make_attribute(key, value) for key, value in attributes.items())
        self.nodes.append(node)


def half_border(graph: FloatGraph, node: onnx.NodeProto, kept: Collection[str]) -> Iterator[str]:
    """The tensors that the node would read or give as float16; constants that stand for infinity aside."""
    for index, name in enumerate(node.input):
        if name in graph.floats and name not in graph.weights and is_half(node, index, kept, output=False):
            yield name
    for index, name in enumerate(node.output):
        if name in graph.floats and is_half(node, index, kept, output=True):
            yield name


def _findings(watch: _Watch, worst: Mapping[str, float]) -> Iterator[MeasuredIsland]:
    graph = watch.graph
    largest = {tensor: worst[output] for output, tensor in watch.magnitudes.items()}
    errors = {node: worst[output] for output, node in watch.errors.items()}
    for node in graph.model.graph.node:
        value = max((largest[name] for name in half_border(graph, node, watch.kept)), default=0.0)
        if value > LARGEST_KEPT_HALF:
            yield MeasuredIsland(node=node.name, operator=node.op_type, reason="overflow", value=value)
        elif not (error := errors.get(node.name, 0.0)) <= WORST_ROUNDING:
            # Not finite: a weight of the node, or a sum within it. JSON has no infinity.
            reason: Literal["overflow", "precision"] = "precision" if np.isfinite(error) else "overflow"
            error = float(np.nan_to_num(error, nan=_INFINITE, posinf=_INFINITE))
            yield MeasuredIsland(node=node.name, operator=node.op_type, reason=reason, value=error)
