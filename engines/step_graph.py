"""The step graph: one denoising step of many requests, composed in ONNX around an untouched UNet."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from sdrt.errors import BuildError

COMPOSER_VERSION = 1  # part of every cache key: raise it with any change to the composed graph
PREFIX = "sdrt."
SAMPLE, TIMESTEP, PROMPT_EMBEDS = "sample", "timestep", "encoder_hidden_states"
STEP_INPUTS = (
    "state",
    "input_scale",
    "lane_request",
    "timestep",
    "prompt_embeds",
    "guidance",
    "transition",
    "noise",
)
_OUTPUT = f"{PREFIX}out_sample"
_UNET_INPUTS = (SAMPLE, TIMESTEP, PROMPT_EMBEDS)
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)
_INTEGERS = (TensorProto.INT64, TensorProto.INT32)
_FIRST_OPSET = 13  # from here on Unsqueeze and ReduceSum take their axes as inputs
_REEXPORT = "export the checkpoint with sdrt, or a text-to-image UNet in the layout of Hugging Face Optimum"

Dimension = int | str


@dataclass(frozen=True, slots=True, kw_only=True)
class UnetBorder:
    """What the step graph has to know of the UNet: its element types, and the sizes fixed in it."""

    sample_type: int
    timestep_type: int
    prompt_embeds_type: int
    output: str
    output_type: int
    channels: Dimension
    prompt_embeds_dim: Dimension


@dataclass(slots=True)
class _Composer:
    """Collects the nodes and constants that are put around the UNet, under names of their own."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, TensorProto] = field(default_factory=dict)

    def add(self, operator: str, inputs: Sequence[str], output: str, **attributes: int) -> str:
        """Append a node; returns the name of its only output."""
        name = f"{PREFIX}{output.removeprefix(PREFIX)}.{operator}"
        node = helper.make_node(operator, inputs, [output], name=name)
        node.attribute.extend(helper.make_attribute(key, value) for key, value in attributes.items())
        self.nodes.append(node)
        return output

    def constant(self, name: str, value: npt.NDArray[np.generic]) -> str:
        """A small constant of the composition."""
        full = f"{PREFIX}constant.{name}"
        self.constants[full] = numpy_helper.from_array(value, full)
        return full

    def unsqueeze(self, tensor: str, output: str, *axes: int) -> str:
        """`tensor` with dimensions of size 1 at `axes`."""
        name = "axes_" + "_".join(str(axis) for axis in axes)
        return self.add("Unsqueeze", [tensor, self.constant(name, np.array(axes, np.int64))], output)

    def sum(self, tensor: str, output: str, axis: int) -> str:
        """`tensor` summed over `axis`, which disappears."""
        return self.add(
            "ReduceSum", [tensor, self.constant(f"axes_{axis}", np.array([axis], np.int64))], output, keepdims=0
        )

    def cast(self, tensor: str, element_type: int, output: str) -> str:
        """Float32 `tensor` in another element type; integers are rounded to the nearest."""
        if element_type == TensorProto.FLOAT:
            return tensor
        if element_type in _INTEGERS:
            tensor = self.add("Round", [tensor], f"{output}.rounded")
        return self.add("Cast", [tensor], output, to=element_type)


def compose_step_graph(unet: onnx.ModelProto, slots: int) -> onnx.ModelProto:
    """One denoising step for R requests as M lanes, around `unet`.

    inputs: state float32 [R, n, C, h, w], input_scale float32 [R], lane_request int64 [M], timestep float32 [M],
    prompt_embeds float32 [M, L, d], guidance float32 [R, M], transition float32 [R, n, n + 2],
    noise float32 [R, C, h, w]; output: next_state float32 [R, n, C, h, w], with n = `slots`.

    `unet` has the inputs sample [M, C, h, w], timestep [M] (of any number type) and encoder_hidden_states [M, L, d].
    Its weights need not be loaded, keep their names, and it is not changed itself.
    BuildError: missing or extra inputs, a shape or an element type that cannot be served.
    """
    border = read_unet_border(unet)
    before, after = _Composer(), _Composer()
    feeds = _feed_lanes(before, border)
    model_output = _guide(after, border)
    _transition(after, model_output)

    model = onnx.ModelProto()
    model.CopyFrom(unet)
    graph = model.graph
    _rename(graph, _renames(graph, feeds))
    inner = [onnx.NodeProto.FromString(node.SerializeToString()) for node in graph.node]
    del graph.node[:], graph.input[:], graph.output[:]
    graph.node.extend([*before.nodes, *inner, *after.nodes])
    graph.initializer.extend((before.constants | after.constants).values())
    graph.input.extend(_inputs(border, slots))
    graph.output.append(
        _tensor("next_state", TensorProto.FLOAT, ("requests", slots, border.channels, "height", "width"))
    )
    graph.name = "step"
    _forget_origin(model)
    return model


def read_unet_border(unet: onnx.ModelProto) -> UnetBorder:
    """The UNet's inputs and output, checked. BuildError says what does not fit, with names and shapes."""
    weights = {initializer.name for initializer in unet.graph.initializer}
    inputs = {value.name: value.type.tensor_type for value in unet.graph.input if value.name not in weights}
    _check_names(inputs, [value.name for value in unet.graph.output])
    _check_opset(unet)
    shapes = {name: _shape(inputs[name]) for name in _UNET_INPUTS}
    for name, rank in ((SAMPLE, 4), (PROMPT_EMBEDS, 3)):
        if len(shapes[name]) != rank:
            raise BuildError(f"the UNet's {name} has the shape {shapes[name]}, not {rank} dimensions", hint=_REEXPORT)
    if len(shapes[TIMESTEP]) != 1 or isinstance(shapes[TIMESTEP][0], int):
        raise BuildError(
            f"the UNet's timestep has the shape {shapes[TIMESTEP]}, so one evaluation has one timestep for all lanes",
            hint="export it with a timestep of one dynamic dimension: one value for each sample",
        )
    _check_type(SAMPLE, inputs[SAMPLE].elem_type, _FLOATS)
    _check_type(PROMPT_EMBEDS, inputs[PROMPT_EMBEDS].elem_type, _FLOATS)
    _check_type(TIMESTEP, inputs[TIMESTEP].elem_type, (*_FLOATS, TensorProto.DOUBLE, *_INTEGERS))
    output = unet.graph.output[0]
    _check_type(output.name, output.type.tensor_type.elem_type, _FLOATS)
    return UnetBorder(
        sample_type=inputs[SAMPLE].elem_type,
        timestep_type=inputs[TIMESTEP].elem_type,
        prompt_embeds_type=inputs[PROMPT_EMBEDS].elem_type,
        output=output.name,
        output_type=output.type.tensor_type.elem_type,
        channels=_fixed(shapes[SAMPLE][1], "channels"),
        prompt_embeds_dim=_fixed(shapes[PROMPT_EMBEDS][2], "features"),
    )


def _check_names(inputs: Mapping[str, onnx.TypeProto.Tensor], outputs: Sequence[str]) -> None:
    missing = [name for name in _UNET_INPUTS if name not in inputs]
    extra = sorted(set(inputs) - set(_UNET_INPUTS))
    if missing or extra:
        facts = [f"lacks {', '.join(missing)}"] * bool(missing) + [f"also wants {', '.join(extra)}"] * bool(extra)
        raise BuildError(
            f"the UNet {' and '.join(facts)}",
            hint=f"a text-to-image UNet has exactly the inputs {', '.join(_UNET_INPUTS)}",
        )
    if len(outputs) != 1:
        raise BuildError(f"the UNet has {len(outputs)} outputs: {', '.join(outputs)}", hint=_REEXPORT)


def _check_opset(unet: onnx.ModelProto) -> None:
    opset = next((entry.version for entry in unet.opset_import if entry.domain in ("", "ai.onnx")), 0)
    if opset < _FIRST_OPSET:
        raise BuildError(f"the UNet is of ONNX opset {opset}", hint=f"export it with opset {_FIRST_OPSET} or later")


def _check_type(name: str, element_type: int, allowed: Sequence[int]) -> None:
    if element_type not in allowed:
        raise BuildError(f"the UNet's {name} is of type {TensorProto.DataType.Name(element_type)}", hint=_REEXPORT)


def _feed_lanes(composer: _Composer, border: UnetBorder) -> dict[str, str]:
    """Nodes before the UNet; returns which tensor stands in for each of its inputs, and for its output."""
    first_slot = composer.constant("first_slot", np.array(0, np.int64))
    latents = composer.add("Gather", ["state", first_slot], f"{PREFIX}latents", axis=1)
    column = composer.constant("column", np.array([-1, 1, 1, 1], np.int64))
    scale = composer.add("Reshape", ["input_scale", column], f"{PREFIX}input_scale")
    scaled = composer.add("Mul", [latents, scale], f"{PREFIX}scaled")
    lanes = composer.add("Gather", [scaled, "lane_request"], f"{PREFIX}lanes", axis=0)
    return {
        SAMPLE: composer.cast(lanes, border.sample_type, f"{PREFIX}sample"),
        TIMESTEP: composer.cast("timestep", border.timestep_type, f"{PREFIX}timestep"),
        PROMPT_EMBEDS: composer.cast("prompt_embeds", border.prompt_embeds_type, f"{PREFIX}prompt_embeds"),
        border.output: _OUTPUT,
    }


def _guide(composer: _Composer, border: UnetBorder) -> str:
    """model_output [R, C, h, w] = guidance · lanes, element by element.

    Not a MatMul: a backend may run that in low precision. And where the weight is 0 the product is replaced by 0,
    because 0 · NaN is NaN: what happens in a lane must not reach another request.
    """
    output = _OUTPUT
    if border.output_type != TensorProto.FLOAT:
        output = composer.add("Cast", [output], f"{PREFIX}out_sample.float", to=TensorProto.FLOAT)
    lanes = composer.unsqueeze(output, f"{PREFIX}lane_outputs", 0)
    weights = composer.unsqueeze("guidance", f"{PREFIX}guidance", 2, 3, 4)
    zero = composer.constant("zero", np.array(0, np.float32))
    unused = composer.add("Equal", [weights, zero], f"{PREFIX}unused")
    weighted = composer.add("Mul", [weights, lanes], f"{PREFIX}weighted")
    chosen = composer.add("Where", [unused, zero, weighted], f"{PREFIX}chosen")
    return composer.sum(chosen, f"{PREFIX}model_output", 1)


def _transition(composer: _Composer, model_output: str) -> None:
    """next_state [R, n, C, h, w] = transition · [state; model_output; noise], element by element."""
    output = composer.unsqueeze(model_output, f"{PREFIX}output_slot", 1)
    noise = composer.unsqueeze("noise", f"{PREFIX}noise_slot", 1)
    stack = composer.add("Concat", ["state", output, noise], f"{PREFIX}stack", axis=1)
    columns = composer.unsqueeze(stack, f"{PREFIX}columns", 1)
    weights = composer.unsqueeze("transition", f"{PREFIX}transition", 3, 4, 5)
    terms = composer.add("Mul", [weights, columns], f"{PREFIX}terms")
    composer.sum(terms, "next_state", 2)


def _inputs(border: UnetBorder, slots: int) -> list[onnx.ValueInfoProto]:
    latents = (border.channels, "height", "width")
    return [
        _tensor("state", TensorProto.FLOAT, ("requests", slots, *latents)),
        _tensor("input_scale", TensorProto.FLOAT, ("requests",)),
        _tensor("lane_request", TensorProto.INT64, ("lanes",)),
        _tensor("timestep", TensorProto.FLOAT, ("lanes",)),
        _tensor("prompt_embeds", TensorProto.FLOAT, ("lanes", "length", border.prompt_embeds_dim)),
        _tensor("guidance", TensorProto.FLOAT, ("requests", "lanes")),
        _tensor("transition", TensorProto.FLOAT, ("requests", slots, slots + 2)),
        _tensor("noise", TensorProto.FLOAT, ("requests", *latents)),
    ]


def _tensor(name: str, element_type: int, shape: Sequence[Dimension]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, element_type, shape)


def _shape(tensor: onnx.TypeProto.Tensor) -> tuple[Dimension, ...]:
    return tuple(
        int(dimension.dim_value) if dimension.HasField("dim_value") else str(dimension.dim_param)
        for dimension in tensor.shape.dim
    )


def _fixed(dimension: Dimension, name: str) -> Dimension:
    return dimension if isinstance(dimension, int) else name


def _renames(graph: onnx.GraphProto, feeds: Mapping[str, str]) -> dict[str, str]:
    """`feeds`, and new names for what the UNet happens to call like a tensor of the step graph."""
    taken = {*STEP_INPUTS, "next_state"}
    weights = {initializer.name for initializer in graph.initializer}
    clashes = sorted(name for name in weights if name in taken or name.startswith(PREFIX))
    if clashes:
        raise BuildError(f"the UNet has weights named {', '.join(clashes)}", hint="export it with other weight names")
    inner = {name for node in _all_nodes(graph) for name in node.output} - set(feeds)
    return dict(feeds) | {name: f"{PREFIX}unet.{name}" for name in inner if name in taken or name.startswith(PREFIX)}


def _all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """The nodes of a graph and of every graph inside it."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _all_nodes(inner)


def _forget_origin(model: onnx.ModelProto) -> None:
    """Drop the exporter's notes: stack traces, with paths of the machine that exported."""
    graph = model.graph
    for described in (model, graph, *graph.node, *graph.value_info, *graph.initializer):
        del described.metadata_props[:]


def _rename(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    for node in _all_nodes(graph):
        for tensors in (node.input, node.output):
            tensors[:] = [names.get(name, name) for name in tensors]
    for value in graph.value_info:
        value.name = names.get(value.name, value.name)
