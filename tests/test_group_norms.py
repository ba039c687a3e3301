"""Group norms on the CPU: sums that stay exact on flat images, of any size, in the engines of both backends."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import openvino
import pytest
from onnx import TensorProto, helper, numpy_helper

from sdrt.engines import onnx_norms, openvino_norms
from sdrt.engines.onnx_files import load_graph
from sdrt.engines.onnx_session import run_onnx
from sdrt.engines.onnxruntime import OnnxRuntimeBuilder
from sdrt.engines.openvino import OpenVinoBuilder
from tests.component_source import source_of

GROUPS, CHANNELS, EPSILON = 2, 8, 1e-6
SHAPES = [(1, CHANNELS, 512, 512), (2, CHANNELS, 24, 40), (2, CHANNELS, 24, 1), (1, CHANNELS, 600)]


def group_norm(path, *, rank=4, opset=20, scale=1.0, bias=0.0, grouped=(0, GROUPS, -1), constant_nodes=False):
    """As PyTorch's exporter writes one, of any size; constant_nodes: as its older one does."""
    constants = [
        numpy_helper.from_array(np.array(grouped, np.int64), "grouped"),
        numpy_helper.from_array(np.full(GROUPS, scale, np.float32), "scale"),
        numpy_helper.from_array(np.full(GROUPS, bias, np.float32), "bias"),
    ]
    graph = helper.make_graph(
        [
            *[helper.make_node("Constant", [], [entry.name], value=entry) for entry in constants if constant_nodes],
            helper.make_node("Reshape", ["x", "grouped"], ["a"]),
            helper.make_node("InstanceNormalization", ["a", "scale", "bias"], ["b"], epsilon=EPSILON),
            helper.make_node("Shape", ["x"], ["shape"]),
            helper.make_node("Reshape", ["b", "shape"], ["y"]),
        ],
        "norm",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", CHANNELS, *"hw"[: rank - 2]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * rank)],
        [] if constant_nodes else constants,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8), path)
    return path


def drawing(shape):
    """A flat ground with something small on it, other in each channel: what adds up worst in float32."""
    grounds = 0.7312 + np.arange(CHANNELS, dtype=np.float32).reshape(1, -1, *[1] * (len(shape) - 2))
    x = np.broadcast_to(grounds, shape).astype(np.float32)
    x[:, :, shape[2] // 3 : shape[2] // 2 + 1] = -1.37
    return x


def exact(x):
    values = x.astype(np.float64).reshape(x.shape[0], GROUPS, -1)
    centred = values - values.mean(axis=2, keepdims=True)
    return (centred / np.sqrt((centred**2).mean(axis=2, keepdims=True) + EPSILON)).reshape(x.shape)


def by_openvino(path, x):
    core = openvino.Core()
    model = core.read_model(path)
    count = openvino_norms.sum_in_rows(model)
    return count, core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})({"x": x})[0]


def by_onnx_runtime(path, x):
    model = load_graph(path)
    count = onnx_norms.sum_in_rows(model)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return count, run_onnx(path, [{"x": x}])[0]["y"]


@pytest.mark.parametrize("evaluate", [by_openvino, by_onnx_runtime])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_flat_image_is_normalised_exactly(tmp_path, shape, evaluate):
    x = drawing(shape)
    count, y = evaluate(group_norm(tmp_path / "norm.onnx", rank=len(shape)), x)
    assert count == 1
    assert np.abs(y - exact(x)).max() <= 1e-4  # 9e-4 at 512×512 when added up from end to end


@pytest.mark.parametrize("evaluate", [by_openvino, by_onnx_runtime])
def test_an_older_exporter_says_it_otherwise(tmp_path, evaluate):
    x = drawing((1, CHANNELS, 16, 16))
    count, y = evaluate(group_norm(tmp_path / "norm.onnx", opset=17, constant_nodes=True), x)
    assert count == 1
    assert np.abs(y - exact(x)).max() <= 1e-5


@pytest.mark.parametrize("evaluate", [by_openvino, by_onnx_runtime])
def test_a_norm_with_groups_laid_out_otherwise_stays_as_it_is(tmp_path, evaluate):
    x = drawing((GROUPS, CHANNELS, 16, 16))
    count, y = evaluate(group_norm(tmp_path / "norm.onnx", grouped=(-1, GROUPS, CHANNELS // GROUPS * 256)), x)
    assert count == 0
    assert np.abs(y - exact(x)).max() <= 1e-5


@pytest.mark.parametrize("own", [{"scale": 3.0}, {"bias": 1.0}])
def test_scales_and_biases_of_the_norm_itself_are_not_lost(tmp_path, own):
    x = drawing((1, CHANNELS, 16, 16))
    path = group_norm(tmp_path / "norm.onnx", **own)
    expected = exact(x) * own.get("scale", 1) + own.get("bias", 0)
    for evaluate in (by_openvino, by_onnx_runtime):
        assert np.abs(evaluate(path, x)[1] - expected).max() <= 1e-5


@pytest.mark.parametrize("evaluate", [by_openvino, by_onnx_runtime])
def test_values_without_rows_stay_as_they_are(tmp_path, evaluate):
    x = np.arange(2 * CHANNELS, dtype=np.float32).reshape(2, CHANNELS)
    count, y = evaluate(group_norm(tmp_path / "norm.onnx", rank=2), x)
    assert count == 0
    assert np.abs(y - exact(x)).max() <= 1e-5


def test_an_ir_keeps_them_when_it_is_compiled_for_one_shape(tmp_path):
    x = drawing(SHAPES[0])
    core = openvino.Core()
    model = core.read_model(group_norm(tmp_path / "norm.onnx"))
    openvino_norms.sum_in_rows(model)
    openvino.save_model(model, tmp_path / "norm.xml", compress_to_fp16=False)
    read = core.read_model(tmp_path / "norm.xml")
    read.reshape(x.shape)
    y = core.compile_model(read, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})({"x": x})[0]
    assert np.abs(y - exact(x)).max() <= 1e-4


def test_the_onnx_folder_is_not_written_to_through_a_link(tiny_export, onnx_bundle, tmp_path):
    exported = tiny_export / "vae_encoder" / "model.onnx"
    source = replace(source_of(onnx_bundle, "vae_encoder"), onnx_path=exported)
    before = exported.read_bytes()
    OnnxRuntimeBuilder(lend=True).build(source, "fp32", tmp_path)
    assert (tmp_path / "model.onnx").read_bytes() != before
    assert exported.read_bytes() == before


@pytest.mark.parametrize("component", ["vae_decoder", "vae_encoder"])
def test_every_group_norm_of_a_vae_adds_up_in_rows(tiny_export, tiny_bundle, onnx_bundle, component):
    exported = tiny_export / component / "model.onnx"
    engine = Path("engines") / component
    norms = operators(load_graph(exported)).count("InstanceNormalization")
    assert norms > 0
    assert openvino_norms.sum_in_rows(openvino.Core().read_model(exported)) == norms
    assert onnx_norms.sum_in_rows(load_graph(exported)) == norms
    assert openvino_norms.sum_in_rows(openvino.Core().read_model(tiny_bundle / engine / "model.xml")) == 0
    assert "InstanceNormalization" not in operators(load_graph(onnx_bundle.path / engine / "model.onnx"))


@pytest.mark.parametrize("component", ["vae_decoder", "vae_encoder"])
def test_in_bf16_they_stay_as_they_are(tiny_export, onnx_bundle, tmp_path, component):
    exported = tiny_export / component / "model.onnx"
    source = replace(source_of(onnx_bundle, component), onnx_path=exported)
    OpenVinoBuilder().build(source, "bf16", tmp_path)
    norms = operators(load_graph(exported)).count("InstanceNormalization")
    assert openvino_norms.sum_in_rows(openvino.Core().read_model(tmp_path / "model.xml")) == norms > 0


def operators(model):
    return [node.op_type for node in model.graph.node]
