"""Engines for OpenVINO: the IR of each component, its dynamic dimensions bounded by the profile, its precision kept."""

import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sdrt.bundle import BackendName, Precision, ShapeProfile
from sdrt.engines.base import ComponentSource
from sdrt.engines.step_graph import PREFIX, TIMESTEP
from sdrt.errors import BackendError, BuildError
from sdrt.runners.base import STEP, TEXT_ENCODER, VAE_DECODER, VAE_ENCODER

if TYPE_CHECKING:
    import openvino as ov

MODEL_NAME = "model.xml"
WEIGHTS_NAME = "model.bin"
# The CPU plugin keeps a node that carries this in float32, also when the inference precision is bf16.
_KEEP_FLOAT32 = {"name": "DisablePrecisionConversion", "version": "0", "value": "dynamic:f16"}
_NOT_COMPUTED = ("Parameter", "Const", "Result")
_PERIODIC = ("Sin", "Cos")

Bounds = tuple[int, int]


class OpenVinoBuilder:
    """Builds for the CPU plugin."""

    name: BackendName = "openvino"
    device = "cpu"

    @property
    def version(self) -> str:
        """OpenVINO's version, without its build's name."""
        return str(_openvino().__version__).partition("-")[0]

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """bf16 first where the CPU computes in it, else float32 only."""
        from sdrt.runners.cpu import native_precision

        return ("bf16", "fp32") if native_precision() == "bf16" else ("fp32",)

    def features(self, precision: Precision) -> tuple[str, ...]:
        """float32 engines run anywhere; bf16 ones need the instructions."""
        return ("avx512_bf16",) if precision == "bf16" else ()

    def build(self, source: ComponentSource, precision: Precision, folder: Path) -> Sequence[str]:
        """Write model.xml and model.bin; see `EngineBuilder.build`."""
        openvino = _openvino()
        try:
            model = openvino.Core().read_model(source.onnx_path)
            _bound_shapes(model, source)
            kept = _float32_nodes(model, source.name) if precision == "bf16" else set()
            openvino.save_model(model, folder / MODEL_NAME, compress_to_fp16=False)
        except RuntimeError as error:
            raise BuildError(
                f"OpenVINO cannot build {source.name}: {_first_line(error)}",
                hint="try --backend onnxruntime, or export the checkpoint again",
            ) from error
        if kept:
            _keep_float32(folder / MODEL_NAME, kept)
        return (MODEL_NAME, WEIGHTS_NAME)


def dimension_bounds(source: ComponentSource) -> Mapping[str, tuple[Bounds, ...]]:
    """For each input of the component, the smallest and largest size of each dynamic dimension, in order.

    Dimensions that the graph fixes itself are not listed. Only the step is narrowed to exact sizes: the VAE also
    sees tiles, which are smaller than any image.
    """
    profile = source.profile
    requests, lanes = (1, profile.max_batch), (1, source.max_lanes)
    length = (1, profile.text_length)
    sides = _latent_sides(profile, source.vae_downsample)
    any_latent = tuple((1, high) for _, high in sides)
    any_pixels = tuple((1, high * source.vae_downsample) for _, high in sides)
    if source.name == TEXT_ENCODER:
        return {"input_ids": (requests, length)}
    if source.name == VAE_DECODER:
        return {"latent_sample": (requests, *any_latent)}
    if source.name == VAE_ENCODER:
        return {"sample": (requests, *any_pixels)}
    return {
        "state": (requests, *sides),
        "input_scale": (requests,),
        "lane_request": (lanes,),
        "timestep": (lanes,),
        "prompt_embeds": (lanes, length),
        "guidance": (requests, lanes),
        "transition": (requests,),
        "noise": (requests, *sides),
    }


def _latent_sides(profile: ShapeProfile, vae_downsample: int) -> tuple[Bounds, Bounds]:
    heights, widths = (
        (profile.minimum[side] // vae_downsample, profile.maximum[side] // vae_downsample) for side in (0, 1)
    )
    return heights, widths


def _bound_shapes(model: "ov.Model", source: ComponentSource) -> None:
    openvino = _openvino()
    bounds = dimension_bounds(source)
    shapes = {}
    for port in model.inputs:
        name = port.get_any_name()
        if name not in bounds:
            raise BuildError(f"{source.name} has an unknown input {name}", hint=f"expected: {', '.join(bounds)}")
        left = list(bounds[name])
        shape = port.get_partial_shape()
        if sum(dimension.is_dynamic for dimension in shape) != len(left):
            raise BuildError(
                f"the input {name} of {source.name} has the shape {shape}, which is not dynamic as it must be",
                hint="export the checkpoint with dynamic batch, height, width and sequence length",
            )
        shapes[port] = openvino.PartialShape(
            [openvino.Dimension(*left.pop(0)) if dimension.is_dynamic else dimension for dimension in shape]
        )
    model.reshape(shapes)


def _float32_nodes(model: "ov.Model", component: str) -> set[str]:
    """Names of the nodes that would lose what matters in bf16.

    - the whole text encoder: it runs once for a prompt, and its error would enter every step;
    - the step graph around the UNet: latents and coefficients are float32;
    - the timestep up to its sinusoids: in bf16, 981 becomes 980, and phases of hundreds of radians become noise.
    """
    if component == TEXT_ENCODER:
        return {node.get_friendly_name() for node in model.get_ordered_ops()}
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
        users = {target.get_node().get_friendly_name() for value in node.outputs() for target in value.get_target_inputs()}
        if name in reached and (node.get_type_name() in _PERIODIC or users & wanted):
            wanted.add(name)
    for node in model.get_ordered_ops():
        if node.get_friendly_name() in wanted and node.get_type_name() == "Unsqueeze":
            _unsqueeze_by_reshape(node)
    return wanted
