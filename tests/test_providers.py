from pathlib import Path

import pytest

from sdrt.bundle import BackendRecord
from sdrt.errors import BackendError, RequestError
from sdrt.runners.providers import (
    NO_GRAPH,
    PROVIDERS,
    captures,
    check_assignment,
    check_available,
    check_providers,
    choose_provider,
    provider_options,
    run_entries,
)

CUDA, TENSORRT, RTX = "CUDAExecutionProvider", "TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider"
CPU = "CPUExecutionProvider"
ON_A_GPU = ("cuda", "tensorrt", "tensorrt-rtx")


def backend(name):
    return BackendRecord(name=name, version="1", device="cpu", features=())


# Which one


@pytest.mark.parametrize("name", ["openvino", "onnxruntime", "tensorrt"])
def test_none_is_the_cpu_whatever_the_backend(name):
    assert choose_provider(None, backend(name)).name == "cpu"


@pytest.mark.parametrize("name", PROVIDERS)
def test_each_name_is_a_provider_of_onnxruntime(name):
    assert choose_provider(name, backend("onnxruntime")).name == name


@pytest.mark.parametrize("name", ["gpu", "", "CUDA", CUDA])
def test_an_unknown_name_is_refused_with_those_that_exist(name):
    with pytest.raises(RequestError, match=f"no execution provider '{name}'") as refusal:
        choose_provider(name, backend("onnxruntime"))
    assert refusal.value.hint == "choose one of: cpu, cuda, tensorrt, tensorrt-rtx"


@pytest.mark.parametrize("other", ["openvino", "tensorrt"])
@pytest.mark.parametrize("name", PROVIDERS)
def test_another_backend_has_no_providers_not_even_the_cpu(name, other):
    with pytest.raises(RequestError, match=f"provider {name} was asked for, but the bundle's backend is {other}"):
        choose_provider(name, backend(other))


# With which options


def test_the_cpu_has_no_options():
    assert provider_options(PROVIDERS["cpu"], graphs=False, kernels=None) == {CPU: {}}


@pytest.mark.parametrize("name", ON_A_GPU)
def test_what_a_provider_does_not_take_goes_to_the_next_in_the_chain_and_last_to_the_cpu(name):
    options = provider_options(PROVIDERS[name], graphs=True, kernels=None)
    assert tuple(options) == PROVIDERS[name].chain
    assert tuple(options)[-1] == CPU


@pytest.mark.parametrize("name", ["cuda", "tensorrt"])
def test_float32_is_not_rounded_to_tf32(name):
    assert provider_options(PROVIDERS[name], graphs=False, kernels=None)[CUDA]["use_tf32"] == "0"


def test_tensorrt_is_left_to_obey_the_types_of_the_graph():
    assert "trt_fp16_enable" not in provider_options(PROVIDERS["tensorrt"], graphs=False, kernels=None)[TENSORRT]


@pytest.mark.parametrize("name", ["cuda", "tensorrt-rtx"])
def test_graphs_are_asked_for_only_where_they_are_wanted(name):
    wanted = PROVIDERS[name].chain[0]
    assert provider_options(PROVIDERS[name], graphs=True, kernels=None)[wanted]["enable_cuda_graph"] == "1"
    assert "enable_cuda_graph" not in provider_options(PROVIDERS[name], graphs=False, kernels=None)[wanted]


def test_what_was_compiled_here_is_kept_in_the_folder_given():
    kernels = Path("a") / "kernels"
    tensorrt = provider_options(PROVIDERS["tensorrt"], graphs=False, kernels=kernels)[TENSORRT]
    assert tensorrt == {
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(kernels),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(kernels),
    }
    assert provider_options(PROVIDERS["tensorrt-rtx"], graphs=False, kernels=kernels)[RTX] == {
        "nv_runtime_cache_path": str(kernels)
    }


@pytest.mark.parametrize("name", ON_A_GPU)
def test_without_a_folder_nothing_is_kept(name):
    for options in provider_options(PROVIDERS[name], graphs=True, kernels=None).values():
        assert not [key for key in options if "cache" in key]


def test_every_value_is_text_as_onnxruntime_takes_it():
    for provider in PROVIDERS.values():
        for options in provider_options(provider, graphs=True, kernels=Path("k")).values():
            assert all(isinstance(value, str) for value in options.values())


@pytest.mark.parametrize(
    ("name", "component", "captured"),
    [
        ("cuda", "step", True),
        ("tensorrt-rtx", "step", True),
        ("cuda", "vae_decoder", False),
        ("cuda", "text_encoder", False),
        ("tensorrt", "step", False),  # it would replay one graph for all shapes
        ("cpu", "step", False),
    ],
)
def test_the_step_is_captured_where_a_session_keeps_a_graph_for_each_set_of_shapes(name, component, captured):
    assert captures(PROVIDERS[name], component) is captured


def test_a_run_names_its_graph():
    assert run_entries(PROVIDERS["cuda"], 3) == {"gpu_graph_id": "3"}
    assert run_entries(PROVIDERS["cuda"], NO_GRAPH) == {"gpu_graph_id": "-1"}
    assert run_entries(PROVIDERS["tensorrt-rtx"], 3) == {"gpu_graph_id": "3", "cuda_graph_annotation_id": "3"}
    assert run_entries(PROVIDERS["cpu"], 3) == {}


# Whether the session got it


@pytest.mark.parametrize("name", ON_A_GPU)
def test_a_provider_that_is_not_built_in_is_named_with_those_that_are_and_how_to_install_it(name):
    provider = PROVIDERS[name]
    with pytest.raises(BackendError) as missing:
        check_available(provider, ["AzureExecutionProvider", CPU])
    said = f"{provider.chain[0]} was asked for; the installed ONNX Runtime has AzureExecutionProvider, {CPU}"
    assert missing.value.message == said
    assert provider.install in missing.value.hint
    check_available(provider, list(provider.chain))


@pytest.mark.parametrize("name", PROVIDERS)
def test_a_session_on_the_whole_chain_is_what_was_asked(name):
    check_providers(PROVIDERS[name], list(PROVIDERS[name].chain))


@pytest.mark.parametrize(
    ("name", "actual"),
    [
        ("cuda", [CPU]),  # what ONNX Runtime does in silence when a library is absent
        ("tensorrt", [CUDA, CPU]),
        ("tensorrt", [TENSORRT, CPU]),
        ("tensorrt-rtx", [CPU]),
        ("cuda", [CPU, CUDA]),
        ("cuda", []),
        ("cpu", ["AzureExecutionProvider", CPU]),
    ],
)
def test_a_session_on_other_providers_is_an_error_that_names_both_and_what_to_do(name, actual):
    provider = PROVIDERS[name]
    with pytest.raises(BackendError) as fallen_back:
        check_providers(provider, actual)
    told = f"runs on {', '.join(actual) or 'none'}, not on {', '.join(provider.chain)} as asked"
    assert told in fallen_back.value.message
    assert "sdrt doctor" in fallen_back.value.hint
    assert provider.install in fallen_back.value.hint


def test_a_provider_that_computes_the_most_of_it_is_what_was_asked():
    check_assignment(PROVIDERS["cuda"], "step", {CUDA: 900, CPU: 12})


@pytest.mark.parametrize(
    ("nodes", "told"),
    [({CPU: 912}, f"but 912 to {CPU}"), ({CUDA: 0, CPU: 4}, f"4 to {CPU}"), ({}, "none to any other")],
)
def test_a_provider_that_is_there_and_given_nothing_is_an_error(nodes, told):
    with pytest.raises(BackendError, match=f"no node of step to {CUDA}") as idle:
        check_assignment(PROVIDERS["cuda"], "step", nodes)
    assert told in idle.value.message
    assert "sdrt doctor" in idle.value.hint
