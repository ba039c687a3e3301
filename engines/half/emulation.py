"""A mixed graph for the CPU: the same nodes in float32, each float16 result rounded to float16 and back.

ONNX Runtime's CPU kernels compute float16 nodes in float32 and leave out the rounding between two of them, so a graph
that overflows on a GPU passes there (300 · 300 · 300⁻² gives 1, not infinity). Casts that the graph itself holds are
honoured. What comes out is what a device computes that accumulates in float32 and stores every result as float16.
"""

from pathlib import Path

import onnx
from onnx import TensorProto, helper

from sdrt.engines.onnx_files import load_graph

_EXACT, _ROUNDED = ".exact", ".rounded"
_WHOLE = ".whole"


def emulate_half(half: Path, target: Path) -> None:
    """Write to `target`, in the folder of the mixed graph `half`, a graph that shows on the CPU what halves do."""
    model = load_graph(half)
    graph = model.graph
    types = _element_types(model)
    halves = {name for name, kind in types.items() if kind == TensorProto.FLOAT16}
    nodes = [
        helper.make_node("Cast", [weight.name], [f"{weight.name}{_WHOLE}"], to=TensorProto.FLOAT)
        for weight in graph.initializer
        if weight.name in halves
    ]
    weights = {weight.name for weight in graph.initializer}
    for node in graph.node:
        node.input[:] = [f"{name}{_WHOLE}" if name in halves and name in weights else name for name in node.input]
        if node.op_type == "Cast":
            _to_float(node, "to")
        if node.op_type == "ConstantOfShape":
            _widen_value(node)
        made = [name for name in node.output if name in halves]
        node.output[:] = [f"{name}{_EXACT}" if name in made else name for name in node.output]
        nodes.append(node)
        for name in made:
            nodes.append(helper.make_node("Cast", [f"{name}{_EXACT}"], [f"{name}{_ROUNDED}"], to=TensorProto.FLOAT16))
            nodes.append(helper.make_node("Cast", [f"{name}{_ROUNDED}"], [name], to=TensorProto.FLOAT))
    copied = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:], graph.value_info[:]
    graph.node.extend(copied)
    onnx.save(model, target)


def _to_float(node: onnx.NodeProto, name: str) -> None:
    for attribute in node.attribute:
        if attribute.name == name and attribute.i == TensorProto.FLOAT16:
            attribute.i = TensorProto.FLOAT


def _widen_value(node: onnx.NodeProto) -> None:
    for attribute in node.attribute:
        if attribute.name == "value" and attribute.t.data_type == TensorProto.FLOAT16:
            value = onnx.numpy_helper.to_array(attribute.t).astype("float32")
            attribute.t.CopyFrom(onnx.numpy_helper.from_array(value, attribute.t.name))


def _element_types(model: onnx.ModelProto) -> dict[str, int]:
    inferred = onnx.shape_inference.infer_shapes(model).graph
    values = (*inferred.value_info, *inferred.input, *inferred.output)
    return {value.name: value.type.tensor_type.elem_type for value in values} | {
        weight.name: weight.data_type for weight in model.graph.initializer
    }
