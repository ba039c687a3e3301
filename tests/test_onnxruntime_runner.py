"""ONNX Runtime's providers on a GPU: refused for real where there is none, and played by the CPU from there on."""

import importlib
import shutil
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import onnxruntime
import pytest

from sdrt.bundle import Bundle
from sdrt.cli import run_command
from sdrt.errors import BackendError, RequestError
from sdrt.pipeline import Pipeline
from sdrt.runners import open_runner
from sdrt.runners.onnxruntime import OnnxRuntimeRunner
from sdrt.runners.onnxruntime_session import open_bound_session, open_cpu_session
from sdrt.runners.providers import PROVIDERS

CPU = "CPUExecutionProvider"
RTX = PROVIDERS["tensorrt-rtx"]
ON_A_GPU = ("cuda", "tensorrt", "tensorrt-rtx")
built_for_cpu = pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="this ONNX Runtime is built for GPUs"
)


@pytest.fixture
def bundle(onnx_bundle, tmp_path):
    """One of its own for each test: what is compiled for a GPU is kept in it."""
    shutil.copytree(onnx_bundle.path, tmp_path / "b.sdrt")
    return Bundle.open(tmp_path / "b.sdrt")


# Where there is no GPU


@built_for_cpu
@pytest.mark.parametrize("name", ON_A_GPU)
def test_a_provider_that_is_not_installed_is_named_with_what_is_and_what_to_install(bundle, name):
    provider = PROVIDERS[name]
    with pytest.raises(BackendError) as missing:
        open_runner(bundle, threads=1, provider=name)
    assert f"{provider.chain[0]} was asked for" in missing.value.message
    assert CPU in missing.value.message
    assert provider.install in missing.value.hint


def test_another_backend_has_no_providers(tiny_bundle):
    with pytest.raises(RequestError, match="the bundle's backend is openvino"):
        open_runner(Bundle.open(tiny_bundle), provider="cpu")


def test_an_unknown_provider_is_refused_before_the_backend_is_looked_for(bundle, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RequestError, match="no execution provider 'gpu'"):
        Pipeline.open(bundle.path, provider="gpu")


def test_the_cpu_by_name_is_the_cpu_by_default(bundle):
    with (
        Pipeline.open(bundle.path, threads=1) as default,
        Pipeline.open(bundle.path, threads=1, provider="cpu") as named,
    ):
        np.testing.assert_array_equal(drawn(default), drawn(named))


# The commands


@built_for_cpu
@pytest.mark.parametrize("command", ["run", "verify"])
def test_commands_fail_with_one_error_and_draw_nothing(bundle, tmp_path, capsys, command):
    arguments = ["a red circle", "--steps", "1", "--out", str(tmp_path / "x.png")] if command == "run" else []
    assert run_command([command, str(bundle.path), *arguments, "--provider", "cuda"]) == 1
    said = capsys.readouterr()
    assert said.err.startswith("error: CUDAExecutionProvider was asked for")
    assert 'onnxruntime-gpu[cuda,cudnn]"' in said.err
    assert said.out == ""
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("command", ["run", "verify", "bench"])
def test_a_provider_for_another_backend_is_a_bad_argument(tiny_bundle, tmp_path, capsys, command):
    arguments = {"run": ["x", "--out", str(tmp_path / "x.png")], "verify": [], "bench": ["--out", str(tmp_path / "r")]}
    assert run_command([command, str(tiny_bundle), *arguments[command], "--provider", "cpu"]) == 2
    assert "the bundle's backend is openvino" in capsys.readouterr().err


def test_a_provider_for_the_suite_that_builds_its_own_bundle_is_a_bad_argument(tmp_path, capsys):
    assert run_command(["bench", "--suite", "sd15", "--out", str(tmp_path / "r"), "--provider", "cuda"]) == 2
    assert "--suite sd15" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["run", "verify", "bench"])
def test_an_unknown_provider_is_a_bad_argument(bundle, tmp_path, capsys, command):
    arguments = {"run": ["x", "--out", str(tmp_path / "x.png")], "verify": [], "bench": ["--out", str(tmp_path / "r")]}
    assert run_command([command, str(bundle.path), *arguments[command], "--provider", "gpu"]) == 2
    assert "tensorrt-rtx" in capsys.readouterr().err


def test_the_cpu_is_a_provider_of_the_commands(bundle, tmp_path):
    arguments = ["a red circle", "--steps", "1", "--out", str(tmp_path / "x.png"), "--provider", "cpu"]
    assert run_command(["run", str(bundle.path), *arguments]) == 0
    assert run_command(["verify", str(bundle.path), "--provider", "cpu"]) == 0


def test_doctor_tells_which_providers_are_installed(capsys):
    run_command(["doctor"])
    assert " with the providers cpu" in capsys.readouterr().out


# As far as the CPU's own provider goes, nothing played


@pytest.mark.parametrize("by_device", [True, False])
def test_a_bound_session_is_opened_by_device_as_plugins_are_and_by_name(bundle, by_device):
    devices = [device for device in onnxruntime.get_ep_devices() if device.ep_name == CPU] if by_device else []
    assert bool(devices) is by_device
    path = bundle.file(bundle.component("vae_decoder").files[0])
    bound = open_bound_session(
        path, "vae_decoder", PROVIDERS["cpu"], devices, threads=1, graphs=False, kernels=bundle.path / "kernels"
    )
    fed = {"latent_sample": np.linspace(-2, 2, 4 * 64, dtype=np.float32).reshape(1, 4, 8, 8)}
    plain = open_cpu_session(path, threads=1).run(["sample"], fed)
    for _ in range(3):
        np.testing.assert_array_equal(bound.run(["sample"], fed), plain)


# Played by the CPU


class Played:
    """An ONNX Runtime with NVIDIA's providers. What its sessions were asked is noted; the CPU does the work.

    refuses_graphs, falls_back, gives_nothing: what can go wrong on opening. supports: which plugins find a GPU.
    """

    def __init__(self):
        self.opened, self.graphs, self.registered, self.devices = [], [], [], []
        self.refuses_graphs = self.falls_back = self.gives_nothing = False
        self.loads, self.supports = True, True


@pytest.fixture
def played(monkeypatch):
    play = Played()
    real_session, real_value = onnxruntime.InferenceSession, onnxruntime.OrtValue.ortvalue_from_shape_and_type
    bind_output = onnxruntime.IOBinding.bind_output

    class Options(onnxruntime.SessionOptions):
        chosen = None

        def add_provider_for_devices(self, devices, options):
            self.chosen = [(device.ep_name, options) for device in devices] + [(CPU, {})]

    class Session(real_session):
        def __init__(self, path, options, providers=None, enable_fallback=1):
            named = [(each, {}) if isinstance(each, str) else each for each in providers or ()]
            self.asked = options.chosen or named
            play.opened.append((path.parent.name, self.asked, enable_fallback))
            if play.refuses_graphs and "enable_cuda_graph" in self.asked[0][1]:
                raise RuntimeError("This session cannot use the graph capture feature as requested by the user")
            super().__init__(path, options, providers=[CPU])

        def get_providers(self):
            return [CPU] if play.falls_back else [name for name, _ in self.asked]

        def get_provider_graph_assignment_info(self):
            assert self.get_session_options().get_session_config_entry("session.record_ep_graph_assignment_info") == "1"
            name = CPU if play.gives_nothing else self.asked[0][0]
            return [SimpleNamespace(ep_name=name, get_nodes=lambda: [1, 2])]

        def run_with_iobinding(self, iobinding, run_options=None):
            play.graphs.append(None if run_options is None else run_options.get_run_config_entry("gpu_graph_id"))
            super().run_with_iobinding(iobinding, run_options)

    def value(shape, dtype, device):
        assert device == "cuda"
        return real_value(shape, dtype, "cpu")

    def bind(self, name, device_type="cpu", device_id=0):
        assert (device_type, device_id) == ("cuda", 0)
        bind_output(self, name, "cpu", 0)

    def register(name, library):
        if not play.loads:
            raise RuntimeError("libcuda.so.1: cannot open shared object file")
        play.registered.append((name, library))
        if play.supports:
            play.devices.extend([SimpleNamespace(ep_name=name), SimpleNamespace(ep_name=name)])  # two GPUs

    built_in = ["TensorrtExecutionProvider", "CUDAExecutionProvider", CPU]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: built_in)
    monkeypatch.setattr(onnxruntime, "get_ep_devices", lambda: [SimpleNamespace(ep_name=CPU), *play.devices])
    monkeypatch.setattr(onnxruntime, "register_execution_provider_library", register)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: print("Failed to load libcudnn.so.9"))
    monkeypatch.setattr(onnxruntime, "SessionOptions", Options)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(onnxruntime.OrtValue, "ortvalue_from_shape_and_type", value)
    monkeypatch.setattr(onnxruntime.IOBinding, "bind_output", bind)
    plugin = ModuleType(RTX.plugin)
    plugin.get_library_path = lambda: "/somewhere/plugin.so"
    monkeypatch.setitem(sys.modules, RTX.plugin, plugin)
    return play


def drawn(pipeline):
    result = pipeline.generate("a red circle", seed=7, num_inference_steps=3, height=64, width=64)
    return np.asarray(result.images[0])


@pytest.mark.parametrize("name", ON_A_GPU)
def test_bound_to_fixed_buffers_the_same_image_is_drawn(bundle, played, name):
    with Pipeline.open(bundle.path, threads=1) as plain:
        wanted = drawn(plain)
    with Pipeline.open(bundle.path, threads=1, provider=name) as pipeline:
        np.testing.assert_array_equal(drawn(pipeline), wanted)
        np.testing.assert_array_equal(drawn(pipeline), wanted)


def test_the_step_alone_is_captured_from_its_second_run_on(bundle, played):
    with Pipeline.open(bundle.path, threads=1, provider="cuda") as pipeline:
        drawn(pipeline)
    first, *others = [graph for graph in played.graphs if graph is not None]
    assert (first, set(others)) == ("-1", {"1"})
    assert played.graphs.count(None) == 3  # two prompts and one picture
    assert [name for name, asked, _ in played.opened if "enable_cuda_graph" in asked[0][1]] == ["step"]


@pytest.mark.parametrize("name", ON_A_GPU)
def test_onnxruntime_s_own_fallback_is_off(bundle, played, name):
    with open_runner(bundle, threads=1, provider=name):
        assert [fallback for _, _, fallback in played.opened] == [0, 0, 0]


def test_what_onnxruntime_prints_does_not_reach_stdout(bundle, played, capsys):
    with open_runner(bundle, threads=1, provider="cuda"):
        said = capsys.readouterr()
    assert said.out == ""
    assert "libcudnn" in said.err


@pytest.mark.parametrize("name", ON_A_GPU)
def test_a_fallback_to_the_cpu_is_an_error_that_names_both(bundle, played, name):
    played.falls_back = True
    with pytest.raises(BackendError, match=f"runs on {CPU}, not on {PROVIDERS[name].chain[0]}") as fallen_back:
        open_runner(bundle, threads=1, provider=name)
    assert "sdrt doctor" in fallen_back.value.hint


def test_a_provider_that_is_given_nothing_is_an_error(bundle, played):
    played.gives_nothing = True
    with pytest.raises(BackendError, match="no node of text_encoder to CUDAExecutionProvider"):
        open_runner(bundle, threads=1, provider="cuda")


def test_a_step_that_cannot_be_captured_runs_without_graphs_and_says_so(bundle, played):
    played.refuses_graphs = True
    with (
        pytest.warns(UserWarning, match="step runs without CUDA graphs: .*cannot use the graph capture"),
        Pipeline.open(bundle.path, threads=1, provider="cuda") as pipeline,
    ):
        drawn(pipeline)
    assert set(played.graphs) == {None}


def test_the_plugin_is_registered_once_and_its_first_device_used(bundle, played):
    for _ in range(2):
        with open_runner(bundle, threads=1, provider="tensorrt-rtx"):
            pass
    assert played.registered == [(RTX.chain[0], "/somewhere/plugin.so")]
    assert {asked[0][0] for _, asked, _ in played.opened} == {RTX.chain[0]}


def test_a_plugin_that_does_not_load_is_told_with_its_reason(bundle, played):
    played.loads = False
    with pytest.raises(BackendError, match=r"cannot load NvTensorRTRTX.*libcuda\.so\.1") as broken:
        open_runner(bundle, threads=1, provider="tensorrt-rtx")
    assert "driver" in broken.value.hint


def test_a_plugin_that_finds_no_gpu_is_told(bundle, played):
    played.supports = False
    with pytest.raises(BackendError, match="finds no GPU here that it supports"):
        open_runner(bundle, threads=1, provider="tensorrt-rtx")


def test_an_old_onnxruntime_is_told_before_anything_is_opened(bundle, played, monkeypatch):
    monkeypatch.setattr(onnxruntime, "InferenceSession", object)
    with pytest.raises(BackendError, match="too old for the provider cuda"):
        open_runner(bundle, threads=1, provider="cuda")


def test_what_was_compiled_is_kept_beside_the_engines_if_anything_is(bundle, played):
    OnnxRuntimeRunner(bundle, threads=1, provider=PROVIDERS["cuda"]).close()
    assert not (bundle.path / "kernels").exists()
    OnnxRuntimeRunner(bundle, threads=1, provider=RTX).close()
    assert played.opened[-1][1][0][1]["nv_runtime_cache_path"] == str(bundle.path / "kernels")
    assert Bundle.open(bundle.path) == bundle


def test_where_the_bundle_cannot_be_written_nothing_is_kept(bundle, played):
    (bundle.path / "kernels").write_text("in the way")
    with open_runner(bundle, threads=1, provider="tensorrt"):
        assert not [key for _, asked, _ in played.opened for key in asked[0][1] if "cache" in key]


def test_a_closed_runner_says_so_on_a_gpu_too(bundle, played):
    runner = open_runner(bundle, threads=1, provider="cuda")
    runner.close()
    with pytest.raises(BackendError, match="closed"):
        runner.run("step", {})
