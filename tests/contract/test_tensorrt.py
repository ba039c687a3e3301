"""TensorRT for real, as far as a machine without a GPU goes: its extra in a venv of its own, engines, the seal."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NO_DRIVER = "there is no NVIDIA driver; TensorRT engines need one for CUDA 13 or later"


@pytest.fixture(scope="session")
def python(tensorrt_python):
    return tensorrt_python


def has_gpu():
    return (
        shutil.which("nvidia-smi") is not None and subprocess.run(["nvidia-smi"], capture_output=True).returncode == 0
    )


without_gpu = pytest.mark.skipif(has_gpu(), reason="this machine has an NVIDIA GPU")


def sdrt(python, *arguments):
    return subprocess.run([python.with_name("sdrt"), *map(str, arguments)], capture_output=True, text=True)


def built(python, onnx_folder, target, *options):
    done = sdrt(python, "build", onnx_folder, "--out", target, "--backend", "tensorrt", "--json", *options)
    assert done.returncode == 0, done.stderr
    return json.loads((target / "bundle.json").read_text())["manifest"]


@pytest.fixture(scope="session")
def shapes_onnx(tmp_path_factory):
    """The embedded model as ONNX, exported where PyTorch is."""
    target = tmp_path_factory.mktemp("exported") / "shapes"
    command = [sys.executable, "-m", "sdrt.export", ROOT / "models" / "shapes" / "checkpoint", target]
    subprocess.run([*map(str, command)], check=True, capture_output=True)
    return target


@pytest.fixture(scope="session")
def bundle(python, shapes_onnx, tmp_path_factory):
    target = tmp_path_factory.mktemp("tensorrt") / "shapes.sdrt"
    built(python, shapes_onnx, target)
    return target


def test_every_name_and_signature_of_nvidia_that_is_used_exists(python):
    done = subprocess.run(
        [python, Path(__file__).with_name("nvidia_names.py"), ROOT], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split()[0]) > 100


def test_float32_islands_are_not_computed_in_tf32(python):
    code = (
        "import tensorrt_rtx as trt\n"
        "from sdrt.engines.tensorrt_child import Order, _set_flags\n"
        "config = trt.Builder(trt.Logger()).create_builder_config()\n"
        "order = Order(component='step', library='tensorrt_rtx', onnx_path='', engine_path='', profiles=(),\n"
        "    targets=(), timing_cache_path=None, own_capture=True, refit=False, workspace_bytes=None)\n"
        "before = config.get_flag(trt.BuilderFlag.TF32)\n"
        "_set_flags(trt, config, order)\n"
        "print(before, config.get_flag(trt.BuilderFlag.TF32))\n"
    )
    done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["True", "False"], done.stderr


@without_gpu
def test_shapes_is_built_and_sealed_ahead_of_time(bundle):
    manifest = json.loads((bundle / "bundle.json").read_text())["manifest"]
    assert manifest["backend"]["name"] == "tensorrt"
    assert manifest["backend"]["features"] == ["tensorrt_rtx"]
    assert manifest["precision"] == "fp16"
    assert manifest["device_verified"] is False
    assert manifest["golden"]["parity"]["measured"] >= 50
    for component in manifest["components"]:
        assert 0 < component["parity"]["measured"] <= component["parity"]["bound"]
        if component["name"] == "vae_decoder_float32":
            assert component["islands"] is None
            assert component["parity"]["bound"] == 2e-4
        else:
            assert component["islands"]["by_rule"]["statistics"] > 0
        assert [Path(file["path"]).name for file in component["files"]] == ["model.engine"]


@pytest.mark.exhaustive  # six engines: a minute
@without_gpu
def test_a_network_with_controlnets_is_built_and_sealed_ahead_of_time(python, steered_export, tmp_path):
    manifest = built(python, steered_export, tmp_path / "a.sdrt", "--sizes", "64x64", "--batch", "1")
    assert manifest["model"]["controlnets"] == ["rgb", "bgr"]
    assert manifest["golden"]["parity"]["measured"] >= 35
    found = {component["name"]: component for component in manifest["components"]}
    for name in ("step", "control_embedding"):
        assert 0 < found[name]["parity"]["measured"] <= found[name]["parity"]["bound"] == 1e-2
        assert [Path(file["path"]).name for file in found[name]["files"]] == ["model.engine"]
    assert {"control", "control_scales"} <= {spec["name"] for spec in found["step"]["inputs"]}


@pytest.mark.exhaustive  # five or six engines each
@without_gpu
@pytest.mark.parametrize(
    ("kind", "depth", "channels", "more"),
    [
        ("StableDiffusionInpaintPipeline", None, 5, set()),
        ("StableDiffusionUpscalePipeline", None, 3, {"class_labels"}),
        ("StableDiffusionDepth2ImgPipeline", "hybrid", 1, set()),
        ("StableDiffusionInstructPix2PixPipeline", None, 4, set()),
    ],
)
def test_a_network_of_each_task_is_built_and_sealed_ahead_of_time(
    python, tiny_of, tmp_path, kind, depth, channels, more
):
    _, onnx = tiny_of(kind, depth=depth)
    manifest = built(python, onnx, tmp_path / "a.sdrt", "--sizes", "64x64", "--batch", "1")
    assert manifest["model"]["conditioning_channels"] == channels
    assert manifest["golden"]["parity"]["measured"] >= 35
    found = {component["name"]: component for component in manifest["components"]}
    inputs = {spec["name"] for spec in found["step"]["inputs"]}
    assert {"conditioning", "lane_conditioning"} | more <= inputs
    assert ("class_labels" in inputs) == bool(more)
    names = ["step", "vae_encoder", "vae_decoder", *(["depth_estimator"] if depth else [])]
    for name in names:
        assert 0 < found[name]["parity"]["measured"] <= found[name]["parity"]["bound"]
        assert [Path(file["path"]).name for file in found[name]["files"]] == ["model.engine"]
    assert ("depth_estimator" in found) == bool(depth)


@without_gpu
def test_engines_to_refit_are_refused_before_any_work_where_there_is_no_gpu(python, tmp_path):
    done = sdrt(python, "build", "shapes", "--out", tmp_path / "x.sdrt", "--backend", "tensorrt", "--refit")
    assert done.returncode == 1
    assert done.stderr.splitlines()[0] == f"error: {NO_DRIVER}"
    assert list(tmp_path.iterdir()) == []


@without_gpu
def test_a_second_build_takes_everything_from_the_cache(python, shapes_onnx, bundle, tmp_path):
    built(python, shapes_onnx, tmp_path / "again.sdrt")
    for name in ("text_encoder", "step", "vae_decoder", "vae_encoder"):
        first, second = (folder / "engines" / name / "model.engine" for folder in (bundle, tmp_path / "again.sdrt"))
        assert first.samefile(second)  # a link to the cache's


@without_gpu
@pytest.mark.parametrize("command", ["run", "verify", "inspect"])
def test_without_a_driver_the_commands_say_what_is_missing(python, bundle, tmp_path, command):
    options = {"run": ["a red circle", "--out", tmp_path / "x.png"], "verify": [], "inspect": ["--layers"]}
    arguments = options[command]
    done = sdrt(python, command, bundle, *arguments)
    assert done.returncode == 1
    assert done.stderr.splitlines()[0] == f"error: {NO_DRIVER}"
    assert done.stderr.splitlines()[1].startswith("hint: install NVIDIA's driver")
    assert not (tmp_path / "x.png").exists()


@without_gpu
def test_inspect_tells_what_was_verified_and_what_waits(python, bundle):
    shown = sdrt(python, "inspect", bundle).stdout
    assert "the engines wait for a GPU" in shown
    assert "Kept in float32" in shown


@without_gpu
def test_doctor_says_that_engines_can_be_built_but_not_run(python):
    state = json.loads(sdrt(python, "doctor", "--json").stdout)["backends"]["tensorrt"]
    assert state["works"] is False
    assert "tensorrt_rtx 1.7.1.116 builds here" in state["text"]
    assert NO_DRIVER in state["text"]


def ordered(python, folder, nodes, *, weights=(), domain=None, refit=False):
    """Build the engine of a graph x → y of these nodes; the messages that the child sent, parsed."""
    import onnx
    from onnx import TensorProto, helper

    graph = helper.make_graph(
        nodes,
        "odd",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
        weights,
    )
    opsets = [helper.make_opsetid("", 20), *([] if domain is None else [helper.make_opsetid(domain, 1)])]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), folder / "model.onnx")
    order = {
        "component": "step",
        "library": "tensorrt_rtx",
        "onnx_path": str(folder / "model.onnx"),
        "engine_path": str(folder / "model.engine"),
        "timing_cache_path": None,
        "profiles": [],
        "targets": [],
        "own_capture": True,
        "refit": refit,
        "workspace_bytes": None,
    }
    (folder / "order.json").write_text(json.dumps(order))
    command = [python, "-m", "sdrt.engines.tensorrt_child", folder / "order.json"]
    done = subprocess.run(command, capture_output=True, text=True)
    messages = {}
    for line in done.stdout.splitlines():
        messages |= json.loads(line)
    assert sorted(path.name for path in folder.iterdir() if path.name.startswith(".")) == []
    return messages


def test_a_graph_that_tensorrt_cannot_read_is_an_error_that_names_the_node(python, tmp_path):
    from onnx import helper

    odd = helper.make_node("Unknowable", ["x"], ["y"], name="the_odd_one", domain="nowhere")
    error = ordered(python, tmp_path, [odd], domain="nowhere")["error"]
    assert error["kind"] == "BuildError"
    assert "cannot read step: it refused the Unknowable the_odd_one" in error["message"]
    assert not (tmp_path / "model.engine").exists()


@pytest.mark.parametrize("refit", [False, True])
def test_a_constant_that_tensorrt_cannot_compute_is_folded_unless_names_must_be_kept(python, tmp_path, refit):
    import numpy as np
    from onnx import helper, numpy_helper

    nodes = [
        helper.make_node("Det", ["matrix"], ["two"], name="determinant"),
        helper.make_node("Mul", ["x", "two"], ["y"], name="double"),
    ]
    matrix = numpy_helper.from_array(np.diag(np.array([1, 2], np.float32)), "matrix")
    messages = ordered(python, tmp_path, nodes, weights=[matrix], refit=refit)
    if refit:
        assert "it refused the Det determinant" in messages["error"]["message"]
    else:
        assert messages["result"]["engine_bytes"] > 0
        assert messages["warning"].startswith("step was folded first: the parser refused the Det determinant")
    assert (tmp_path / "model.engine").exists() is not refit


def test_polygraphy_builds_an_engine_whose_outputs_are_inner_tensors(python, shapes_onnx, tmp_path):
    code = (
        "import sys; from pathlib import Path\n"
        "from sdrt.engines.bisect import trace_lineage\n"
        "from sdrt.engines.bisect_tensorrt import cast_feeds, marked_engine\n"
        "from sdrt.engines.half.convert import convert_to_half\n"
        "from sdrt.engines.half.graph import read_float_graph\n"
        "from sdrt.engines.onnx_files import load_graph\n"
        "from sdrt.engines.seal import read_golden\n"
        "source, golden, half = map(Path, sys.argv[1:])\n"
        "feeds = [read_golden(golden).inputs]\n"
        "convert_to_half(source, half, feeds)\n"
        "names = {name for node in load_graph(half).graph.node for name in node.output}\n"
        "order = trace_lineage(read_float_graph(load_graph(source)), names).order\n"
        "engine = marked_engine(half, order, cast_feeds(half, feeds), 'tensorrt_rtx')()\n"
        "print(len(order), engine.nbytes)\n"
    )
    arguments = [shapes_onnx / "text_encoder" / "model.onnx", shapes_onnx / "golden" / "text_encoder.npz"]
    command = [python, "-c", code, *arguments, tmp_path / "half.onnx"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tensors, engine_bytes = map(int, done.stdout.splitlines()[-1].split())
    assert tensors > 50
    assert engine_bytes > 100_000


@without_gpu
def test_a_bundle_for_another_machine_is_bisected_here(python, bundle, shapes_onnx):
    done = sdrt(python, "verify", bundle, "--bisect", shapes_onnx, "--json")
    assert done.returncode == 0, done.stderr
    components = json.loads(done.stdout)["components"]
    assert [item["component"] for item in components] == ["text_encoder", "step", "vae_decoder", "vae_encoder"]
    assert all(item["evaluated_on"] == "CPU emulation" for item in components)
    assert all(item["findings"]["losses"] == [] for item in components)
    assert all(item["findings"]["compared"] == item["findings"]["tensors"] for item in components)


def test_a_target_that_does_not_exist_is_refused_with_those_that_do(python, shapes_onnx, tmp_path):
    code = (
        "import sys; from pathlib import Path; from dataclasses import replace\n"
        "from sdrt.engines.tensorrt import TensorRtBuilder\n"
        "from tests.component_source import source_of_onnx\n"
        "from sdrt.errors import BuildError\n"
        "builder = replace(TensorRtBuilder.find(), targets=('sm1',))\n"
        "try: builder.build(source_of_onnx(Path(sys.argv[1])), 'fp16', Path(sys.argv[2]))\n"
        "except BuildError as error: print(error.message, '|', error.hint)\n"
    )
    path = shapes_onnx / "vae_decoder" / "model.onnx"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([python, "-c", code, path, tmp_path], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "tensorrt_rtx builds for no sm1 | choose among: sm120, sm121, sm75, sm80, sm86, sm89"
