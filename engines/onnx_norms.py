"""Group norms of an ONNX graph whose sums stay exact in ONNX Runtime: added up row by row, then row to row.

Its kernel for the CPU adds up a whole group in a few running sums in float32, with errors like those of OpenVINO's: see
`openvino_norms`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from sdrt.engines.onnx_files import default_opset

_AXES_ARE_AN_INPUT = 18  # of reductions, from this opset on
_FLAT = 2  # dimensions of [N, C], which has no rows


def sum_in_rows(model: onnx.ModelProto) -> int:
    """Write every group norm as reductions of each row of an image, and of those of a group. Returns how many.

    As exporters write one up to opset 20, it is x [N, C, …, W] → [N, groups, values] → InstanceNormalization with
    scales of one and biases of zero; what follows applies the own ones. Others are left as they are, and so are those
    of FP16 graphs, where a Cast lies between.
    """
    graph = model.graph
    opset = default_opset(model)
    makers = {name: node for node in graph.node for name in node.output}
    constants = _constants(graph)
    shapes = {value.name: value.type.tensor_type for value in (*graph.input, *graph.value_info)}
    flat = {name for name, kind in shapes.items() if kind.HasField("shape") and len(kind.shape.dim) <= _FLAT}
    nodes: list[onnx.NodeProto] = []
    count = 0
    for node in graph.node:
        grouped = makers.get(node.input[0]) if node.op_type == "InstanceNormalization" else None
        if grouped is None or grouped.input[0] in flat or not _is_group_norm(node, grouped, constants):
            nodes.append(node)
            continue
        nodes += _in_rows(node, image=grouped.input[0], pattern=grouped.input[1], opset=opset)
        count += 1
    if count:
        del graph.node[:]
        graph.node.extend(nodes)
    return count


def _constants(graph: onnx.GraphProto) -> Mapping[str, onnx.TensorProto]:
    """What is in the graph itself, by name: shapes, and the ones and zeros of norms. Large ones lie in files."""
    of_nodes = {
        node.output[0]: entry.t
        for node in graph.node
        if node.op_type == "Constant"
        for entry in node.attribute
        if entry.name == "value"
    }
    constants = of_nodes | {tensor.name: tensor for tensor in graph.initializer}
    return {name: entry for name, entry in constants.items() if entry.data_location == onnx.TensorProto.DEFAULT}


def _is_group_norm(node: onnx.NodeProto, grouped: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto]) -> bool:
    if grouped.op_type != "Reshape" or not {grouped.input[1], *node.input[1:]} <= constants.keys():
        return False
    scale, bias = (numpy_helper.to_array(constants[name]) for name in node.input[1:])
    if scale.dtype != np.float32 or (scale != 1).any() or bias.any():
        return False
    match numpy_helper.to_array(constants[grouped.input[1]]).tolist():
        case [0, groups, -1]:
            return bool(groups > 0)
    return False


def _in_rows(node: onnx.NodeProto, *, image: str, pattern: str, opset: int) -> Sequence[onnx.NodeProto]:
    """The nodes that give what `node` gives. image: of it, with its width last; pattern: the shape of its groups."""
    grouped, (result,) = node.input[0], node.output
    epsilon = next((entry.f for entry in node.attribute if entry.name == "epsilon"), 1e-5)
    nodes: list[onnx.NodeProto] = []

    def add(operator: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:  # noqa: ANN401
        own = f"{result}/in_rows/{name}"
        output = result if name == "normalised" else own
        nodes.append(helper.make_node(operator, inputs, [output], name=own, **attributes))
        return output

    def constant(name: str, value: npt.NDArray[np.generic]) -> str:
        return add("Constant", [], name, value=numpy_helper.from_array(value))

    def mean(value: str, axis: int, name: str) -> str:
        if opset >= _AXES_ARE_AN_INPUT:
            return add("ReduceMean", [value, constant(f"axes of {name}", np.array([axis], np.int64))], name, keepdims=1)
        return add("ReduceMean", [value], name, axes=[axis], keepdims=1)

    def mean_in_rows(value: str, name: str) -> str:
        return mean(add("Reshape", [mean(value, -1, f"{name}s of rows"), pattern], f"{name}s of groups"), 2, name)

    centred = add("Sub", [grouped, mean_in_rows(image, "mean")], "centred")
    rows = add("Reshape", [centred, add("Shape", [image], "shape")], "rows")
    variance = mean_in_rows(add("Mul", [rows, rows], "squares"), "variance")
    with_epsilon = add("Add", [variance, constant("epsilon", np.array(epsilon, np.float32))], "with epsilon")
    add("Div", [centred, add("Sqrt", [with_epsilon], "deviation")], "normalised")
    return nodes
