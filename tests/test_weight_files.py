"""Dividing an engine's weights: each ControlNet's in a file that is the same in every bundle that has it."""

import shutil

import numpy as np
import onnx
import pytest

from sdrt.bundle import ComponentRecord
from sdrt.cache import Store
from sdrt.engines.build import component_source
from sdrt.engines.components import build_component, make_component
from sdrt.engines.onnx_files import load_graph, load_whole, weight_array
from sdrt.engines.onnx_folder import read_onnx_folder
from sdrt.engines.onnxruntime import OnnxRuntimeBuilder
from sdrt.engines.openvino import OpenVinoBuilder
from sdrt.engines.profile import parse_profile
from sdrt.engines.weight_files import WeightFile, weight_files, write_weights

KINDS = [
    (OpenVinoBuilder(), "fp32"),
    (OpenVinoBuilder(), "bf16"),
    (OnnxRuntimeBuilder(), "fp32"),
]
IDS = ["openvino-fp32", "openvino-bf16", "onnxruntime-fp32"]


def step_of(onnx_folder):
    folder = read_onnx_folder(onnx_folder)
    profile = parse_profile("64x64", "1", default=(64, 64), multiple_of=8, text_length=folder.model.text_length)
    return component_source("step", folder, profile)


def paths(record: ComponentRecord, staged):
    return [staged / file.path for file in record.files]


@pytest.fixture(scope="module")
def other_export(steered_export, made_once):
    """The same two ControlNets beside a UNet of other weights."""

    def change(target):
        shutil.copytree(steered_export, target)
        path = target / "unet" / "model.onnx"
        graph = load_graph(path).graph
        for tensor in graph.initializer:
            if tensor.name == "conv_out.weight":
                entries = {entry.key: entry.value for entry in tensor.external_data}
                array = weight_array(tensor, path) + np.float32(0.01)
                with (path.parent / entries["location"]).open("r+b") as file:
                    file.seek(int(entries["offset"]))
                    file.write(array.tobytes())

    return made_once("steered-other", change)


def test_the_networks_own_come_first_and_a_controlnets_in_the_order_of_their_names():
    names = ["b", "controlnets.1.z", "controlnets.0.y", "a", "controlnets.1.c.weight", "controlnets.x", "controlnets"]
    own, first, second = weight_files(names)
    assert own == WeightFile(controlnet=None, weights=(0, 3, 5, 6))
    assert first == WeightFile(controlnet=0, weights=(2,))
    assert second == WeightFile(controlnet=1, weights=(4, 1))
    assert [part.suffix for part in (own, first, second)] == ["", ".controlnet-0", ".controlnet-1"]


def test_weights_lie_one_after_the_other_at_multiples_of_64_bytes(tmp_path):
    arrays = [np.arange(3, dtype=np.int8), np.float32(1.5).reshape(()), np.arange(6, dtype=np.float16).reshape(2, 3).T]
    offsets = write_weights(tmp_path / "w", arrays)
    assert offsets == [0, 64, 128]
    content = (tmp_path / "w").read_bytes()
    for offset, array in zip(offsets, arrays, strict=True):
        assert content[offset : offset + array.nbytes] == array.tobytes()


@pytest.mark.parametrize(("builder", "precision"), KINDS, ids=IDS)
def test_bundles_of_other_networks_share_the_files_of_their_controlnets(
    builder, precision, steered_export, other_export, tmp_path
):
    store = Store(tmp_path / "cache")
    files = []
    for name, export in (("one", steered_export), ("other", other_export)):
        staged = tmp_path / name
        made = make_component(builder, step_of(export), precision, staged, store)
        files.append(paths(made.record, staged))
        assert len(files[-1]) == 4
    own, *controlnets = zip(*(each[1:] for each in files), strict=True)
    assert own[0].read_bytes() != own[1].read_bytes()
    for one, other in controlnets:
        assert one.name == other.name
        assert one.stat().st_size > 10_000
        assert one.samefile(other)
    first, second = (one for one, _ in controlnets)
    assert not first.samefile(second)


@pytest.mark.parametrize(("builder", "precision"), KINDS[:2], ids=IDS[:2])
def test_the_divided_ir_holds_what_openvino_wrote(builder, precision, steered_export, tmp_path, monkeypatch):
    """Each constant of the joined files is that of the undivided IR, and nothing else is in them."""
    import openvino

    from sdrt.engines import openvino as module
    from sdrt.runners.openvino import read_ir

    source = step_of(steered_export)
    divided = paths(build_component(builder, source, precision, tmp_path / "divided"), tmp_path / "divided")
    monkeypatch.setattr(module, "divide_weights", lambda folder: ("model.bin",))
    whole = paths(build_component(builder, source, precision, tmp_path / "whole"), tmp_path / "whole")
    read, _weights = read_ir(openvino.Core(), divided)
    expected, _ = read_ir(openvino.Core(), whole)

    def constants(model):
        nodes = [node for node in model.get_ordered_ops() if node.get_type_name() == "Constant"]
        values = [(node.get_friendly_name(), np.array(node.data).tobytes()) for node in nodes]
        named = {name: value for name, value in values if not name.startswith(("Constant_", "ShapeOf_"))}
        return named, sorted(value for _, value in values)  # those names are counted on from build to build

    named, values = constants(read)
    assert (named, values) == constants(expected)
    assert sum(file.stat().st_size for file in divided[1:]) < sum(map(len, values)) + 64 * len(values)


def test_the_divided_onnx_holds_the_weights_of_the_undivided(steered_export, tmp_path):
    source = step_of(steered_export)
    files = paths(build_component(OnnxRuntimeBuilder(), source, "fp32", tmp_path), tmp_path)
    assert [file.name.removeprefix("model.onnx") for file in files[1:]] == [
        ".data",
        ".controlnet-0.data",
        ".controlnet-1.data",
    ]
    found = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in load_whole(files[0]).graph.initializer}
    for tensor in load_whole(source.onnx_path).graph.initializer:
        np.testing.assert_array_equal(found[tensor.name], onnx.numpy_helper.to_array(tensor), err_msg=tensor.name)


@pytest.mark.parametrize("builder", [OpenVinoBuilder(), OnnxRuntimeBuilder()], ids=["openvino", "onnxruntime"])
def test_a_network_without_controlnets_stays_in_one_file(builder, tiny_export, tmp_path):
    record = build_component(builder, step_of(tiny_export), "fp32", tmp_path)
    assert len(record.files) == 2
