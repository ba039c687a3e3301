"""Engines for OpenVINO: the IR of each component, with float32 kept where bf16 would lose the image."""

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from sdrt.bundle import BackendName, JsonValue, Precision
from sdrt.engines.base import ComponentSource
from sdrt.engines.openvino_ir import MODEL_NAME, WEIGHTS_NAME, divide_weights, keep_float32
from sdrt.engines.openvino_norms import sum_in_rows
from sdrt.engines.step_graph import PREFIX, TIMESTEP
from sdrt.errors import BackendError, BuildError, OutputError
from sdrt.progress import Progress, silent
from sdrt.runners.base import (
    CONTROL_EMBEDDING,
    DEPTH_ESTIMATOR,
    IN_FLOAT32,
    IN_PIXELS,
    STEP,
    TEXT_ENCODER,
    TINY_VAE_DECODER,
    VAE_DECODER,
    VAE_ENCODER,
)
from sdrt.runners.precisions import precisions_of
from sdrt.step_border import ALL_STEP_INPUTS, fixed_sizes

if TYPE_CHECKING:
    import openvino as ov

_PERIODIC = ("Sin", "Cos")


class OpenVinoBuilder:
    """Builds for the CPU plugin."""

    name: BackendName = "openvino"
    device = "cpu"
    runs_here = True

    @property
    def version(self) -> str:
        """OpenVINO's version, without its build's name."""
        return str(_openvino().__version__).partition("-")[0]

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """bf16 first where the CPU computes in it, else float32 only."""
        return precisions_of("openvino")

    def features(self, precision: Precision) -> tuple[str, ...]:
        """float32 engines run anywhere; bf16 ones need one of the instruction sets that compute in it."""
        from sdrt.runners.cpu import BF16_FEATURES, cpu_features

        if precision != "bf16":
            return ()
        return tuple(sorted(cpu_features().intersection(BF16_FEATURES), reverse=True))[:1]

    def settings(self, source: ComponentSource) -> dict[str, JsonValue]:
        """The sizes that are fixed in the engines; see `EngineBuilder.settings`."""
        return {name: list(sizes) for name, sizes in _dimensions(source).items()}

    def build(
        self, source: ComponentSource, precision: Precision, folder: Path, *, progress: Progress = silent
    ) -> Sequence[str]:
        """Write model.xml and its weights; see `EngineBuilder.build`."""
        openvino = _openvino()
        try:
            model = openvino.Core().read_model(source.onnx_path)
            _fix_dimensions(model, source)
            if precision == "fp32" and source.name in IN_PIXELS:
                sum_in_rows(model)
            kept = _float32_nodes(model, source.name) if precision == "bf16" else set()
        except RuntimeError as error:
            raise BuildError(
                f"OpenVINO cannot build {source.name}: {_first_line(error)}",
                hint="try --backend onnxruntime, or export the checkpoint again",
            ) from error
        # bf16 keeps 8 of float16's 11 bits; what is computed in float32 keeps its weights whole.
        compress = precision == "bf16" and source.name not in IN_FLOAT32
        exact = _float32_constants(model, kept) if compress else {}
        try:
            openvino.save_model(model, folder / MODEL_NAME, compress_to_fp16=compress)
        except RuntimeError as error:  # a stream that failed; it does not say why
            raise OutputError(
                f"OpenVINO cannot write {source.name} to {folder}: {_first_line(error)}",
                hint="free some space on its disk, or name an output on another one",
            ) from error
        if kept:
            keep_float32(folder, kept, exact)
        weights = divide_weights(folder) if source.name == STEP and source.controls else (WEIGHTS_NAME,)
        return (MODEL_NAME, *weights)


def _fix_dimensions(model: "ov.Model", source: ComponentSource) -> None:
    """Fill in the sizes that the model always has; batch, lanes, height, width and length stay dynamic.

    The profile does not enter, so another profile needs no other engine.
    """
    openvino = _openvino()
    expected = _dimensions(source)
    shapes = {}
    for port in model.inputs:
        name, shape = port.get_any_name(), port.get_partial_shape()
        if name not in expected:
            raise BuildError(f"{source.name} has an unknown input {name}", hint=f"it may have: {', '.join(expected)}")
        wanted = openvino.PartialShape([-1 if size is None else size for size in expected[name]])
        if not (shape.compatible(wanted) and _is_dynamic_where(shape, expected[name])):
            raise BuildError(
                f"the input {name} of {source.name} has the shape {shape}, where {wanted} is needed",
                hint="export the checkpoint with dynamic batch, height, width and sequence length",
            )
        shapes[port] = wanted
    model.reshape(shapes)


def _is_dynamic_where(shape: "ov.PartialShape", expected: Sequence[int | None]) -> bool:
    return all(own.is_dynamic for own, size in zip(shape, expected, strict=True) if size is None)


def _dimensions(source: ComponentSource) -> Mapping[str, tuple[int | None, ...]]:
    """The shape of every input that the component may have, with None for what varies."""
    channels = source.latent_channels
    by_component: Mapping[str, Mapping[str, tuple[int | None, ...]]] = {
        TEXT_ENCODER: {"input_ids": (None, None)},
        VAE_DECODER: {"latent_sample": (None, channels, None, None)},
        TINY_VAE_DECODER: {"latent_sample": (None, channels, None, None)},
        VAE_ENCODER: {"sample": (None, 3, None, None)},
        STEP: _step_dimensions(source),
        CONTROL_EMBEDDING: {"controlnet_cond": (None, source.controls, 3, None, None)},
        DEPTH_ESTIMATOR: {"pixel_values": (1, 3, *_depth_sides(source))},
    }
    return by_component[source.name]


def _depth_sides(source: ComponentSource) -> tuple[int | None, int | None]:
    """Of what the depth estimator is given: fixed, unless it takes any size."""
    estimation = source.depth_estimation
    return (None, None) if estimation is None or estimation.takes is None else estimation.takes


def _step_dimensions(source: ComponentSource) -> dict[str, tuple[int | None, ...]]:
    sizes = fixed_sizes(
        slots=source.state_slots,
        channels=source.latent_channels,
        features=source.prompt_embeds_dim,
        conditioning_channels=source.conditioning_channels,
        controls=source.controls,
        control_features=source.control_features,
    )
    fixed = {name: size for name, size in sizes.items() if isinstance(size, int)}
    return {name: tuple(map(fixed.get, entry.dimensions)) for name, entry in ALL_STEP_INPUTS.items()}


def _float32_nodes(model: "ov.Model", component: str) -> set[str]:
    """Names of the nodes that would lose what matters in bf16.

    - the step graph around the UNet: latents and coefficients are float32;
    - the timestep up to its sinusoids: in bf16, 981 becomes 980, and phases of hundreds of radians become noise.
    """
    if component != STEP:
        return set()
    own = {name for node in model.get_ordered_ops() if (name := node.get_friendly_name()).startswith(PREFIX)}
    return own | _timestep_nodes(model)


def _timestep_nodes(model: "ov.Model") -> set[str]:
    """The nodes between the timestep and its sinusoids, whose Unsqueeze nodes are replaced by Reshape."""
    reached: set[str] = set()
    wanted: set[str] = set()
    for node in model.get_ordered_ops():
        sources = [value.get_node() for value in node.input_values()]
        names = {source.get_friendly_name() for source in sources}
        is_timestep = node.get_type_name() == "Parameter" and TIMESTEP in node.output(0).get_names()
        if is_timestep or names & reached:
            reached.add(node.get_friendly_name())
    for node in reversed(model.get_ordered_ops()):
        name = node.get_friendly_name()
        users = {
            target.get_node().get_friendly_name() for value in node.outputs() for target in value.get_target_inputs()
        }
        if name in reached and (node.get_type_name() in _PERIODIC or users & wanted):
            wanted.add(name)
    for node in model.get_ordered_ops():
        if node.get_friendly_name() in wanted and node.get_type_name() == "Unsqueeze":
            _unsqueeze_by_reshape(node)
    return wanted


def _float32_constants(model: "ov.Model", kept: set[str]) -> dict[str, npt.NDArray[np.float32]]:
    """The float32 constants that the kept nodes read, by name: halves would undo what they are kept for."""
    constants = {}
    for node in model.get_ordered_ops():
        if node.get_friendly_name() not in kept:
            continue
        for value in node.input_values():
            source = value.get_node()
            if source.get_type_name() == "Constant" and source.get_element_type().get_type_name() == "f32":
                constants[source.get_friendly_name()] = np.array(source.data, np.float32)
    return constants


def _unsqueeze_by_reshape(node: "ov.Node") -> None:
    """Replace [M] → [M, 1] by an equal Reshape: the CPU plugin does the same later, but loses the node's attributes."""
    from openvino import opset13

    shape, output = node.input(0).get_partial_shape(), node.output(0).get_partial_shape()
    if len(shape) != 1:
        return
    pattern = [1, -1] if output[0].is_static and output[0].get_length() == 1 and shape[0].is_dynamic else [-1, 1]
    reshape = opset13.reshape(node.input_value(0), opset13.constant(pattern, dtype="int64"), False)
    reshape.set_friendly_name(node.get_friendly_name())
    node.output(0).replace(reshape.output(0))


def _openvino() -> ModuleType:
    try:
        return importlib.import_module("openvino")
    except ImportError as error:
        raise BackendError("OpenVINO is not installed", hint="install it with: pip install openvino") from error


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
