"""What engines are made of: the inspector's report read, and engines inspected on the simulated GPU."""

import json

import pytest

from sdrt import runners
from sdrt.cli import inspect as inspect_command
from sdrt.cli import run_command
from sdrt.errors import BackendError, RequestError
from sdrt.runners.engine_layers import LayerKind, inspect_engines, read_layers
from tests.simulated_cuda import SimulatedCuda


def layer(kind, *outputs, key="Format/Datatype"):
    return {"Name": f"a {kind}", "LayerType": kind, "Outputs": [{"Name": "y", key: text} for text in outputs]}


def test_kinds_are_counted_by_operator_and_type():
    report = {
        "Layers": [
            layer("gemm", "Row major linear FP16 format"),
            layer("gemm", "Half"),
            layer("gemm", "Row major linear FP32"),
            layer("kgen", "Channel major BF16 format", "Float", "Float"),
            layer("Reformat", "N/A due to dynamic shapes"),
            layer("Shape", "Int64", key="Datatype"),
        ],
        "Bindings": ["x"],
    }
    found = read_layers(json.dumps(report))
    assert found.names == ("a gemm", "a gemm", "a gemm", "a kgen", "a Reformat", "a Shape")
    assert found.kinds == (
        LayerKind(operator="gemm", outputs=("float16",), count=2),
        LayerKind(operator="Reformat", outputs=(), count=1),
        LayerKind(operator="Shape", outputs=("int64",), count=1),
        LayerKind(operator="gemm", outputs=("float32",), count=1),
        LayerKind(operator="kgen", outputs=("bfloat16", "float32"), count=1),
    )


def test_an_engine_built_without_details_has_names_alone():
    found = read_layers(json.dumps({"Layers": ["first", "second"]}))
    assert (found.names, found.kinds) == (("first", "second"), ())


@pytest.mark.parametrize("report", ["", "no JSON", "[]", "{}", '{"Layers": null}'])
def test_what_is_no_report_is_an_error(report):
    with pytest.raises(BackendError, match="reports no layers"):
        read_layers(report)


def test_every_component_is_inspected_and_the_device_left_clean(onnx_bundle, onnx_profiles):
    cuda = SimulatedCuda(onnx_profiles)
    found = inspect_engines(onnx_bundle, cuda)
    assert list(found) == [component.name for component in onnx_bundle.manifest.components]
    assert all(engine.kinds and len(engine.names) > 10 for engine in found.values())
    assert not cuda.engines


def test_an_engine_that_cannot_be_read_leaves_the_device_clean(onnx_bundle, onnx_profiles, monkeypatch):
    cuda = SimulatedCuda(onnx_profiles)
    monkeypatch.setattr("tests.simulated_cuda.SimulatedEngine.layer_report", lambda engine: "null")
    with pytest.raises(BackendError, match="reports no layers"):
        inspect_engines(onnx_bundle, cuda)
    assert not cuda.engines


def test_engines_of_another_backend_have_none(onnx_bundle):
    with pytest.raises(RequestError, match="onnxruntime engines"):
        runners.read_engine_layers(onnx_bundle)


def test_the_command_shows_a_table(onnx_bundle, onnx_profiles, monkeypatch, capsys):
    found = inspect_engines(onnx_bundle, SimulatedCuda(onnx_profiles))
    monkeypatch.setattr(runners, "read_engine_layers", lambda bundle: found)
    shown = run(capsys, str(onnx_bundle.path), "--layers")
    assert "Layers of the engines" in shown
    assert any(line.split()[:3] == ["step", "Conv", "float16"] for line in shown.splitlines())
    described = json.loads(run(capsys, str(onnx_bundle.path), "--layers", "--json"))
    assert described["layers"]["step"]["kinds"][0]["count"] > 1
    assert "layers" not in json.loads(run(capsys, str(onnx_bundle.path), "--json"))


def test_a_model_has_no_engines():
    with pytest.raises(RequestError, match="which has no engines"):
        inspect_command.inspect("shapes", layers=True)


def run(capsys, *arguments):
    assert run_command(["inspect", *arguments]) == 0
    return capsys.readouterr().out
