"""The mixed graph: an ONNX model whose floats are float16, but for the nodes that were chosen to keep float32."""

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from sdrt.engines.onnx_files import place_external, weight_array
from sdrt.engines.weight_files import append_weight
from sdrt.errors import BuildError

WEIGHTS_SUFFIX = ".data"
LARGEST = float(np.finfo(np.float16).max)
SENTINEL = 1e30  # constants beyond this stand for infinity: they mask, and are cut to the largest half
_EXTERNAL_BYTES = 1024  # smaller weights stay in the graph itself
_HALF_TYPE = "tensor(float16)"
_FLEXIBLE = ("Cast",)  # takes either type, and gives what its `to` says
_TYPE_NAMES = {TensorProto.FLOAT: "float32", TensorProto.FLOAT16: "float16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class FloatGraph:
    """What the conversion has to know of a float32 model.

    floats: the names of its float32 tensors. producers: the node that makes each tensor. consumers: who reads it.
    """

    model: onnx.ModelProto
    floats: frozenset[str]
    producers: Mapping[str, onnx.NodeProto]
    consumers: Mapping[str, tuple[onnx.NodeProto, ...]]
    weights: Mapping[str, TensorProto]


def read_float_graph(model: onnx.ModelProto) -> FloatGraph:
    """Infer which tensors are float32. `model` is copied; its constants become weights, its nodes get names.

    BuildError: the model branches or loops, or the types of its tensors cannot be inferred.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    for index, node in enumerate(graph.node):
        if any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
            raise BuildError(
                f"{node.name or node.op_type} holds a graph of its own, which cannot be made float16",
                hint="export the checkpoint again with sdrt, or build with --precision fp32",
            )
        node.name = node.name or f"{node.op_type}_{index}"
    _lift_constants(graph)
    types = _element_types(copy)
    unknown = sorted({name for node in graph.node for name in node.output if name and name not in types})
    if unknown:
        raise BuildError(f"the type of {unknown[0]} cannot be inferred", hint="export the checkpoint again")
    consumers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in graph.node:
        for name in dict.fromkeys(node.input):
            consumers[name].append(node)
    return FloatGraph(
        model=copy,
        floats=frozenset(name for name, kind in types.items() if kind == TensorProto.FLOAT),
        producers={name: node for node in graph.node for name in node.output if name},
        consumers={name: tuple(nodes) for name, nodes in consumers.items()},
        weights={weight.name: weight for weight in graph.initializer},
    )


def write_half(graph: FloatGraph, kept: Collection[str], source: Path, target: Path) -> None:
    """Write the mixed graph to `target`, its weights beside it, one at a time.

    kept: names of the nodes that stay in float32. source: the file whose folder holds the model's external weights.
    Inputs and outputs keep their types, weights their names. A weight that float32 nodes read stays float32.
    """
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    halves = half_tensors(graph, kept)
    _retype(model, graph, kept, halves)
    weights = Path(f"{target}{WEIGHTS_SUFFIX}")
    with weights.open("wb") as file:
        for weight in model.graph.initializer:
            _store(weight, source, file, weights.name, half=weight.name in halves)
    onnx.save(model, target)


def half_tensors(graph: FloatGraph, kept: Collection[str]) -> frozenset[str]:
    """The tensors that are float16 when all nodes but `kept` are: results of such nodes, and what only they read."""
    made = {
        name
        for node in graph.model.graph.node
        for index, name in enumerate(node.output)
        if name in graph.floats and is_half(node, index, kept, output=True)
    }
    read = {
        name
        for name in graph.weights
        if name in graph.floats
        and graph.consumers.get(name)
        and all(
            is_half(node, index, kept, output=False)
            for node in graph.consumers[name]
            for index, own in enumerate(node.input)
            if own == name
        )
    }
    return frozenset(made | read)


def is_half(node: onnx.NodeProto, index: int, kept: Collection[str], *, output: bool) -> bool:
    """Whether the node, unless `kept`, takes its input (or gives its output) number `index` as float16."""
    return node.name not in kept and node.op_type not in _FLEXIBLE and _allows_half(node, index, output=output)


def _allows_half(node: onnx.NodeProto, index: int, *, output: bool) -> bool:
    """What ONNX says: the scales of Resize, for one, are float32 whatever is resized."""
    if not onnx.defs.has(node.op_type, node.domain):
        raise BuildError(
            f"{node.name} is a {node.domain}.{node.op_type}, which is not standard ONNX", hint="export it without"
        )
    schema = onnx.defs.get_schema(node.op_type, domain=node.domain)
    parameters = schema.outputs if output else schema.inputs
    return _HALF_TYPE in parameters[min(index, len(parameters) - 1)].types


def _lift_constants(graph: onnx.GraphProto) -> None:
    """Constant nodes become weights, so that there is one kind of constant."""
    rest = []
    for node in graph.node:
        value = next((item.t for item in node.attribute if item.name == "value" and item.HasField("t")), None)
        if node.op_type != "Constant" or value is None:
            rest.append(node)
            continue
        weight = graph.initializer.add()
        weight.CopyFrom(value)
        weight.name = node.output[0]
    if len(rest) != len(graph.node):
        nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in rest]
        del graph.node[:]
        graph.node.extend(nodes)


def _element_types(model: onnx.ModelProto) -> dict[str, int]:
    inferred = onnx.shape_inference.infer_shapes(model).graph
    values = (*inferred.value_info, *inferred.input, *inferred.output)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    return types | {weight.name: weight.data_type for weight in model.graph.initializer}


def _retype(model: onnx.ModelProto, graph: FloatGraph, kept: Collection[str], halves: frozenset[str]) -> None:
    """Insert a Cast wherever a node takes another float type than the tensor has; at the outputs, back to float32."""
    nodes: list[onnx.NodeProto] = []
    casts: dict[tuple[str, int], str] = {}
    outputs = {value.name for value in model.graph.output} & halves
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name not in graph.floats or node.op_type in _FLEXIBLE:
                continue
            wanted = TensorProto.FLOAT16 if is_half(node, index, kept, output=False) else TensorProto.FLOAT
            stored = TensorProto.FLOAT16 if name in halves else TensorProto.FLOAT
            if wanted == stored:
                continue
            if (name, wanted) not in casts:
                casts[name, wanted] = f"{name}.{_TYPE_NAMES[wanted]}"
                read = _inner(name) if name in outputs else name
                nodes.append(_cast(read, casts[name, wanted], wanted))
            node.input[index] = casts[name, wanted]
        node.input[:] = [_inner(name) if name in outputs else name for name in node.input]
        node.output[:] = [_inner(name) if name in outputs else name for name in node.output]
        _retype_attributes(node, kept)
        nodes.append(node)
    nodes.extend(_cast(_inner(name), name, TensorProto.FLOAT) for name in sorted(outputs))
    copied = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:], model.graph.value_info[:]  # the types in it are those of before
    model.graph.node.extend(copied)


def _retype_attributes(node: onnx.NodeProto, kept: Collection[str]) -> None:
    """The value of ConstantOfShape gives its output the type."""
    if node.op_type != "ConstantOfShape" or not is_half(node, 0, kept, output=True):
        return
    for attribute in node.attribute:
        if attribute.name == "value" and attribute.t.data_type == TensorProto.FLOAT:
            value = to_half(numpy_helper.to_array(attribute.t).astype(np.float32))
            attribute.t.CopyFrom(numpy_helper.from_array(value, attribute.t.name))


def _inner(name: str) -> str:
    return f"{name}.half"


def _cast(source: str, target: str, element_type: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [target], name=f"{target}.Cast", to=element_type)


def to_half(array: npt.NDArray[np.float32]) -> npt.NDArray[np.float16]:
    """Rounded to float16; a constant that stands for infinity becomes the largest half, not infinity."""
    masked = np.where(np.isfinite(array) & (np.abs(array) >= SENTINEL), np.copysign(LARGEST, array), array)
    with np.errstate(over="ignore"):  # what does not fit becomes infinity; calibration keeps such nodes in float32
        return masked.astype(np.float16)


def _store(weight: TensorProto, source: Path, file: IO[bytes], location: str, *, half: bool) -> None:
    """Convert the weight if it becomes `half`; a large one goes to `file`."""
    array = weight_array(weight, source)
    if half:
        array = to_half(array.astype(np.float32, copy=False))
    if array.nbytes < _EXTERNAL_BYTES:
        weight.CopyFrom(numpy_helper.from_array(np.asarray(array), weight.name))
        return
    offset = append_weight(file, array)
    element_type = TensorProto.FLOAT16 if half else weight.data_type
    weight.CopyFrom(TensorProto(name=weight.name, dims=weight.dims, data_type=element_type))
    place_external(weight, location, offset, array.nbytes)
