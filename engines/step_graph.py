"""The step graph: one denoising step of many requests, composed in ONNX around an untouched UNet."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from sdrt.bundle import JsonValue
from sdrt.engines.onnx_files import default_opset
from sdrt.errors import BuildError
from sdrt.plan.clamping import Thresholding
from sdrt.step_border import ALL_STEP_INPUTS, fixed_sizes, step_inputs_of

COMPOSER_VERSION = 4  # part of every cache key: raise it with any change to the composed graph
PREFIX = "sdrt."
SAMPLE, TIMESTEP, PROMPT_EMBEDS, CLASS_LABELS = "sample", "timestep", "encoder_hidden_states", "class_labels"
CONTROL, CONTROL_SCALES = "control", "control_scales"
_OUTPUT = f"{PREFIX}out_sample"
_UNET_INPUTS = (SAMPLE, TIMESTEP, PROMPT_EMBEDS)
_TOGETHER = (CONTROL, CONTROL_SCALES)
_OPTIONAL_UNET_INPUTS = (CLASS_LABELS, *_TOGETHER)
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)
_INTEGERS = (TensorProto.INT64, TensorProto.INT32)
_ELEMENT_TYPES = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}
_FIRST_OPSET = 13  # from here on Unsqueeze and ReduceSum take their axes as inputs
_AXES_ARE_INPUTS = 18  # and from here on ReduceMean
_REEXPORT = "export the checkpoint with sdrt, or a text-to-image UNet in the layout of Hugging Face Optimum"

Dimension = int | str


@dataclass(frozen=True, slots=True, kw_only=True)
class UnetBorder:
    """What the step graph has to know of the UNet: its element types, and the sizes fixed in it.

    channels: of the latents, which are those of its output; conditioning_channels: how many more its sample has.
    controls: how many ControlNets are in it; control_features: the channels of what each of them sees.
    """

    sample_type: int
    timestep_type: int
    prompt_embeds_type: int
    output: str
    output_type: int
    channels: Dimension
    conditioning_channels: int
    prompt_embeds_dim: Dimension
    class_labels_type: int | None
    controls: int
    control_features: int
    opset: int


@dataclass(slots=True, kw_only=True)
class _Composer:
    """Collects the nodes and constants that are put around the UNet, under names of their own."""

    opset: int
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, TensorProto] = field(default_factory=dict)

    def add(self, operator: str, inputs: Sequence[str], output: str, **attributes: int | Sequence[int]) -> str:
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

    def per_request(self, tensor: str, output: str) -> str:
        """One number for each request, [R] or [R, 1], as [R, 1, 1, 1]."""
        column = self.constant("column", np.array([-1, 1, 1, 1], np.int64))
        return self.add("Reshape", [tensor, column], output)

    def sum(self, tensor: str, output: str, axis: int) -> str:
        """`tensor` summed over `axis`, which disappears."""
        return self.add(
            "ReduceSum", [tensor, self.constant(f"axes_{axis}", np.array([axis], np.int64))], output, keepdims=0
        )

    def mean(self, tensor: str, output: str, *axes: int) -> str:
        """`tensor` averaged over `axes`, which stay with size 1."""
        if self.opset < _AXES_ARE_INPUTS:
            return self.add("ReduceMean", [tensor], output, axes=axes)
        name = "axes_" + "_".join(str(axis) for axis in axes)
        return self.add("ReduceMean", [tensor, self.constant(name, np.array(axes, np.int64))], output)

    def cast(self, tensor: str, element_type: int, output: str) -> str:
        """Float32 `tensor` in another element type; integers are rounded to the nearest."""
        if element_type == TensorProto.FLOAT:
            return tensor
        if element_type in _INTEGERS:
            tensor = self.add("Round", [tensor], f"{output}.rounded")
        return self.add("Cast", [tensor], output, to=element_type)


def compose_step_graph(unet: onnx.ModelProto, slots: int, thresholding: Thresholding | None = None) -> onnx.ModelProto:
    """One denoising step for R requests as M lanes, around `unet`.

    inputs: those of `sdrt.step_border`; output: next_state float32 [R, n, C, h, w], with n = `slots`.
    thresholding: what is clamped is clamped so, not at the limit that `clamp` has.

    `unet` has the inputs sample [M, C + K, h, w], timestep [M] (of any number type) and encoder_hidden_states
    [M, L, d], and may have class_labels [M], and control [M, k, c, h, w] with control_scales [M, k]; its output has C
    channels.
    Its weights need not be loaded, keep their names, and it is not changed itself.
    BuildError: missing or extra inputs, a shape or an element type that cannot be served.
    """
    border = read_unet_border(unet)
    before, after = _Composer(opset=border.opset), _Composer(opset=border.opset)
    feeds = _feed_lanes(before, border)
    model_output = _guide(after, border)
    excess = _clamp(after, model_output, thresholding)
    _blend(after, _transition(after, model_output, excess), slots)

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


def composer_key(thresholding: Thresholding | None) -> list[JsonValue]:
    """What decides how a step graph is composed, but for its UNet and its slots, for a cache key."""
    return [COMPOSER_VERSION, *([] if thresholding is None else [thresholding.ratio, thresholding.maximum])]


def read_unet_border(unet: onnx.ModelProto) -> UnetBorder:
    """The UNet's inputs and output, checked. BuildError says what does not fit, with names and shapes."""
    weights = {initializer.name for initializer in unet.graph.initializer}
    inputs = {value.name: value.type.tensor_type for value in unet.graph.input if value.name not in weights}
    _check_names(inputs, [value.name for value in unet.graph.output])
    opset = _read_opset(unet)
    shapes = {name: _shape(tensor) for name, tensor in inputs.items()}
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
    labels = inputs.get(CLASS_LABELS)
    if labels is not None:
        _check_type(CLASS_LABELS, labels.elem_type, _INTEGERS)
    controls, control_features = _controls(inputs, shapes)
    channels, conditioning_channels = _channels(shapes[SAMPLE][1], _shape(output.type.tensor_type))
    return UnetBorder(
        sample_type=inputs[SAMPLE].elem_type,
        timestep_type=inputs[TIMESTEP].elem_type,
        prompt_embeds_type=inputs[PROMPT_EMBEDS].elem_type,
        output=output.name,
        output_type=output.type.tensor_type.elem_type,
        channels=channels,
        conditioning_channels=conditioning_channels,
        prompt_embeds_dim=_fixed(shapes[PROMPT_EMBEDS][2], "features"),
        class_labels_type=None if labels is None else labels.elem_type,
        controls=controls,
        control_features=control_features,
        opset=opset,
    )


def _controls(
    inputs: Mapping[str, onnx.TypeProto.Tensor], shapes: Mapping[str, tuple[Dimension, ...]]
) -> tuple[int, int]:
    """(how many ControlNets, the channels of what each sees); (0, 0) for a UNet without."""
    if CONTROL not in inputs:
        return 0, 0
    _check_type(CONTROL, inputs[CONTROL].elem_type, (TensorProto.FLOAT,))
    _check_type(CONTROL_SCALES, inputs[CONTROL_SCALES].elem_type, (TensorProto.FLOAT,))
    shape = shapes[CONTROL]
    count, features = shape[1:3] if len(shape) == 5 else (None, None)
    if not isinstance(count, int) or not isinstance(features, int):
        raise BuildError(f"the UNet's {CONTROL} has the shape {shape}, not [M, k, c, h, w]", hint=_REEXPORT)
    return count, features


def _check_names(inputs: Mapping[str, onnx.TypeProto.Tensor], outputs: Sequence[str]) -> None:
    missing = [name for name in _UNET_INPUTS if name not in inputs]
    extra = sorted(set(inputs) - {*_UNET_INPUTS, *_OPTIONAL_UNET_INPUTS})
    missing += [name for name in _TOGETHER if name not in inputs and not inputs.keys().isdisjoint(_TOGETHER)]
    if missing or extra:
        facts = [f"lacks {', '.join(missing)}"] * bool(missing) + [f"also wants {', '.join(extra)}"] * bool(extra)
        raise BuildError(
            f"the UNet {' and '.join(facts)}",
            hint=f"a UNet has the inputs {', '.join(_UNET_INPUTS)}, and may have {', '.join(_OPTIONAL_UNET_INPUTS)}",
        )
    if len(outputs) != 1:
        raise BuildError(f"the UNet has {len(outputs)} outputs: {', '.join(outputs)}", hint=_REEXPORT)


def _read_opset(unet: onnx.ModelProto) -> int:
    opset = default_opset(unet)
    if opset < _FIRST_OPSET:
        raise BuildError(f"the UNet is of ONNX opset {opset}", hint=f"export it with opset {_FIRST_OPSET} or later")
    return opset


def _check_type(name: str, element_type: int, allowed: Sequence[int]) -> None:
    if element_type not in allowed:
        raise BuildError(f"the UNet's {name} is of type {TensorProto.DataType.Name(element_type)}", hint=_REEXPORT)


def _feed_lanes(composer: _Composer, border: UnetBorder) -> dict[str, str]:
    """Nodes before the UNet; returns which tensor stands in for each of its inputs, and for its output."""
    first_slot = composer.constant("first_slot", np.array(0, np.int64))
    latents = composer.add("Gather", ["state", first_slot], f"{PREFIX}latents", axis=1)
    scale = composer.per_request("input_scale", f"{PREFIX}input_scale")
    scaled = composer.add("Mul", [latents, scale], f"{PREFIX}scaled")
    lanes = composer.add("Gather", [scaled, "lane_request"], f"{PREFIX}lanes", axis=0)
    if border.conditioning_channels:
        lanes = composer.add("Concat", [lanes, _condition(composer)], f"{PREFIX}conditioned", axis=1)
    feeds = {
        SAMPLE: composer.cast(lanes, border.sample_type, f"{PREFIX}sample"),
        TIMESTEP: composer.cast("timestep", border.timestep_type, f"{PREFIX}timestep"),
        PROMPT_EMBEDS: composer.cast("prompt_embeds", border.prompt_embeds_type, f"{PREFIX}prompt_embeds"),
        border.output: _OUTPUT,
    }
    if border.controls:
        for name in _TOGETHER:
            feeds[name] = composer.add("Gather", [name, "lane_request"], f"{PREFIX}lane_{name}", axis=0)
    if border.class_labels_type == TensorProto.INT32:
        feeds[CLASS_LABELS] = composer.add("Cast", [CLASS_LABELS], f"{PREFIX}class_labels", to=TensorProto.INT32)
    return feeds


def _condition(composer: _Composer) -> str:
    """Each lane's share of its request's conditioning: [M, K, h, w]. Inputs of the network that no row scales."""
    own = composer.add("Gather", ["conditioning", "lane_request"], f"{PREFIX}lane_condition", axis=0)
    share = composer.per_request("lane_conditioning", f"{PREFIX}lane_share")
    return composer.add("Mul", [own, share], f"{PREFIX}condition")


def _guide(composer: _Composer, border: UnetBorder) -> str:
    """model_output [R, C, h, w] = guidance · lanes, brought nearer to the deviation of rescale_lanes · lanes.

    Lin et al. 2024 (arXiv:2305.08891), eq. 15 and 16, with guidance_rescale for φ; exactly the former where that is 0.
    """
    output = _OUTPUT
    if border.output_type != TensorProto.FLOAT:
        output = composer.add("Cast", [output], f"{PREFIX}out_sample.float", to=TensorProto.FLOAT)
    lanes = composer.unsqueeze(output, f"{PREFIX}lane_outputs", 0)
    guided, aim = (_combine(composer, lanes, weights) for weights in ("guidance", "rescale_lanes"))
    ratio = composer.add(
        "Div", [_deviation(composer, aim, "aim"), _deviation(composer, guided, "guided")], f"{PREFIX}deviations"
    )
    share = composer.per_request("guidance_rescale", f"{PREFIX}share")
    one, zero = (composer.constant(name, np.array(value, np.float32)) for name, value in (("one", 1), ("zero", 0)))
    taken = composer.add("Mul", [share, ratio], f"{PREFIX}taken")
    left = composer.add("Sub", [one, share], f"{PREFIX}left")
    factor = composer.add("Add", [taken, left], f"{PREFIX}factor")
    none = composer.add("Equal", [share, zero], f"{PREFIX}none")
    factor = composer.add("Where", [none, one, factor], f"{PREFIX}rescale")
    return composer.add("Mul", [guided, factor], f"{PREFIX}model_output")


def _combine(composer: _Composer, lanes: str, weights: str) -> str:
    """weights [R, M] · lanes [1, M, C, h, w], element by element: [R, C, h, w].

    Not a MatMul: a backend may run that in low precision. And where the weight is 0 the product is replaced by 0,
    because 0 · NaN is NaN: what happens in a lane must not reach another request.
    """
    name = f"{PREFIX}{weights}"
    wide = composer.unsqueeze(weights, name, 2, 3, 4)
    zero = composer.constant("zero", np.array(0, np.float32))
    unused = composer.add("Equal", [wide, zero], f"{name}.unused")
    weighted = composer.add("Mul", [wide, lanes], f"{name}.weighted")
    chosen = composer.add("Where", [unused, zero, weighted], f"{name}.chosen")
    return composer.sum(chosen, f"{name}.sum", 1)


def _deviation(composer: _Composer, tensor: str, name: str) -> str:
    """The standard deviation of each request's values: [R, C, h, w] to [R, 1, 1, 1]."""
    name = f"{PREFIX}{name}"
    centre = composer.mean(tensor, f"{name}.mean", 1, 2, 3)
    apart = composer.add("Sub", [tensor, centre], f"{name}.apart")
    squares = composer.add("Mul", [apart, apart], f"{name}.squares")
    return composer.add("Sqrt", [composer.mean(squares, f"{name}.variance", 1, 2, 3)], f"{name}.deviation")


def _clamp(composer: _Composer, model_output: str, thresholding: Thresholding | None) -> str:
    """By how much clamping changes x₀: [R, C, h, w], zero where nothing is beyond the limit.

    clamp [R, 3] holds (a, b, limit): x₀ = a · latents + b · model_output is clamped to ± limit.
    """
    columns = [composer.constant(f"clamp_{index}", np.array([index], np.int64)) for index in range(3)]
    on_latents, on_output, limit = (
        composer.per_request(
            composer.add("Gather", ["clamp", column], f"{PREFIX}clamp.{name}", axis=1), f"{PREFIX}clamp.{name}.wide"
        )
        for name, column in zip(("on_latents", "on_output", "limit"), columns, strict=True)
    )
    latents = composer.add("Mul", [on_latents, f"{PREFIX}latents"], f"{PREFIX}x0.latents")
    output = composer.add("Mul", [on_output, model_output], f"{PREFIX}x0.output")
    x0 = composer.add("Add", [latents, output], f"{PREFIX}x0")
    if thresholding is None:
        return composer.add("Sub", [_within(composer, x0, limit), x0], f"{PREFIX}excess")
    largest = _threshold(composer, x0, thresholding)
    scaled = composer.add("Div", [_within(composer, x0, largest), largest], f"{PREFIX}x0.thresholded")
    change = composer.add("Sub", [scaled, x0], f"{PREFIX}x0.change")
    zero = composer.constant("zero", np.array(0, np.float32))
    asked = composer.add("Greater", [limit, zero], f"{PREFIX}clamp.asked")
    return composer.add("Where", [asked, change, zero], f"{PREFIX}excess")


def _within(composer: _Composer, tensor: str, limit: str) -> str:
    low = composer.add("Neg", [limit], f"{limit}.low")
    return composer.add("Min", [composer.add("Max", [tensor, low], f"{tensor}.above"), limit], f"{tensor}.clamped")


def _threshold(composer: _Composer, x0: str, thresholding: Thresholding) -> str:
    """Each request's quantile of |x₀|, at least 1 and at most the maximum: [R, 1, 1, 1].

    Between the two values around it by their distances, as torch.quantile; they are the smallest of the largest.
    """
    flat = composer.add("Abs", [x0], f"{PREFIX}sizes.each")
    flat = composer.add("Reshape", [flat, composer.constant("rows", np.array([0, -1], np.int64))], f"{PREFIX}sizes")
    zero, one = (composer.constant(f"index_{index}", np.array([index], np.int64)) for index in (0, 1))
    count = composer.add("Gather", [composer.add("Shape", [flat], f"{PREFIX}sizes.shape"), one], f"{PREFIX}sizes.n")
    last = composer.add("Sub", [count, one], f"{PREFIX}sizes.last")
    ratio = composer.constant("ratio", np.array([thresholding.ratio], np.float32))
    as_float = composer.add("Cast", [last], f"{PREFIX}sizes.last.float", to=TensorProto.FLOAT)
    position = composer.add("Mul", [as_float, ratio], f"{PREFIX}quantile.position")
    floor = composer.add("Floor", [position], f"{PREFIX}quantile.floor")
    share = composer.add("Sub", [position, floor], f"{PREFIX}quantile.share")
    below = composer.add("Cast", [floor], f"{PREFIX}quantile.below", to=TensorProto.INT64)
    kept = composer.add("Sub", [count, below], f"{PREFIX}quantile.kept")
    largest, indices = f"{PREFIX}quantile.largest", f"{PREFIX}quantile.indices"
    composer.nodes.append(helper.make_node("TopK", [flat, kept], [largest, indices], name=f"{largest}.TopK", axis=1))
    lower_at = composer.add("Sub", [kept, one], f"{PREFIX}quantile.lower.at")
    upper_at = composer.add(
        "Max", [composer.add("Sub", [lower_at, one], f"{PREFIX}quantile.before"), zero], f"{PREFIX}quantile.upper.at"
    )
    lower, upper = (
        composer.add("Gather", [largest, at], at.removesuffix(".at"), axis=1) for at in (lower_at, upper_at)
    )
    gap = composer.add("Sub", [upper, lower], f"{PREFIX}quantile.gap")
    part = composer.add("Mul", [gap, share], f"{PREFIX}quantile.part")
    quantile = composer.add("Add", [lower, part], f"{PREFIX}quantile")
    bounds = [
        composer.constant(name, np.array(value, np.float32))
        for name, value in (("one", 1), ("most", thresholding.maximum))
    ]
    bounded = composer.add("Max", [quantile, bounds[0]], f"{PREFIX}quantile.least")
    bounded = composer.add("Min", [bounded, bounds[1]], f"{PREFIX}quantile.bounded")
    return composer.per_request(bounded, f"{PREFIX}threshold")


def _transition(composer: _Composer, model_output: str, excess: str) -> str:
    """[R, n, C, h, w] = transition · [state; model_output; noise; excess], element by element."""
    parts = [
        composer.unsqueeze(tensor, f"{PREFIX}{name}_slot", 1)
        for name, tensor in (("output", model_output), ("noise", "noise"), ("excess", excess))
    ]
    stack = composer.add("Concat", ["state", *parts], f"{PREFIX}stack", axis=1)
    columns = composer.unsqueeze(stack, f"{PREFIX}columns", 1)
    weights = composer.unsqueeze("transition", f"{PREFIX}transition", 3, 4, 5)
    terms = composer.add("Mul", [weights, columns], f"{PREFIX}terms")
    return composer.sum(terms, f"{PREFIX}moved", 2)


def _blend(composer: _Composer, moved: str, slots: int) -> None:
    """next_state: in slot 0, mask · latents + (1 - mask) · (what is known, as noisy as they are then).

    known [R, 2, C, h, w] holds latents and noise, known_weights [R, 2] how much of each there is after the row.
    """
    first_slot = composer.constant("first_slot", np.array(0, np.int64))
    latents = composer.add("Gather", [moved, first_slot], f"{PREFIX}moved.latents", axis=1)
    weights = composer.unsqueeze("known_weights", f"{PREFIX}known.weights", 2, 3, 4)
    weighted = composer.add("Mul", ["known", weights], f"{PREFIX}known.weighted")
    known = composer.sum(weighted, f"{PREFIX}known", 1)
    one = composer.constant("one", np.array(1, np.float32))
    kept = composer.add("Sub", [one, "mask"], f"{PREFIX}kept")
    parts = [
        composer.add("Mul", [latents, "mask"], f"{PREFIX}blend.drawn"),
        composer.add("Mul", [known, kept], f"{PREFIX}blend.known"),
    ]
    blended = composer.add("Add", parts, f"{PREFIX}blend")
    whole = [composer.unsqueeze(blended, f"{PREFIX}blend.slot", 1)]
    if slots > 1:
        bounds = [
            composer.constant(name, np.array([value], np.int64))
            for name, value in (("second_slot", 1), ("end_slot", slots), ("slot_axis", 1))
        ]
        whole.append(composer.add("Slice", [moved, *bounds], f"{PREFIX}moved.others"))
    composer.add("Concat", whole, "next_state", axis=1)


def _inputs(border: UnetBorder, slots: int) -> list[onnx.ValueInfoProto]:
    sizes = fixed_sizes(
        slots=slots,
        channels=border.channels,
        features=border.prompt_embeds_dim,
        conditioning_channels=border.conditioning_channels,
        controls=border.controls,
        control_features=border.control_features,
    )
    return [
        _tensor(
            entry.name, _ELEMENT_TYPES[entry.dtype], [sizes.get(dimension, dimension) for dimension in entry.dimensions]
        )
        for entry in step_inputs_of(
            conditioning_channels=border.conditioning_channels,
            class_labels=border.class_labels_type is not None,
            controls=border.controls > 0,
        )
    ]


def _tensor(name: str, element_type: int, shape: Sequence[Dimension]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, element_type, shape)


def _shape(tensor: onnx.TypeProto.Tensor) -> tuple[Dimension, ...]:
    return tuple(
        int(dimension.dim_value) if dimension.HasField("dim_value") else str(dimension.dim_param)
        for dimension in tensor.shape.dim
    )


def _channels(sample: Dimension, output: tuple[Dimension, ...]) -> tuple[Dimension, int]:
    """(the latents' channels, how many more the sample has); where the output does not say, there are no more."""
    own = output[1] if len(output) == 4 else sample
    if not isinstance(sample, int) or not isinstance(own, int):
        return _fixed(sample, "channels"), 0
    if sample < own:
        raise BuildError(f"the UNet takes {sample} channels and gives {own}", hint=_REEXPORT)
    return own, sample - own


def _fixed(dimension: Dimension, name: str) -> Dimension:
    return dimension if isinstance(dimension, int) else name


def _renames(graph: onnx.GraphProto, feeds: Mapping[str, str]) -> dict[str, str]:
    """`feeds`, and new names for what the UNet happens to call like a tensor of the step graph."""
    taken = {*ALL_STEP_INPUTS, "next_state"}
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
