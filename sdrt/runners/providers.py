"""ONNX Runtime's execution providers: which are known, with which options, and whether a session got what was asked.

Nothing here imports ONNX Runtime: what it reported is passed in.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal, TypeAlias

from sdrt.bundle import BackendRecord
from sdrt.errors import BackendError, RequestError
from sdrt.runners.base import STEP

ProviderName: TypeAlias = Literal["cpu", "cuda", "tensorrt", "tensorrt-rtx"]
NO_GRAPH = -1  # the id of runs that ONNX Runtime neither captures nor replays
CPU_PROVIDER = "CPUExecutionProvider"
_SEE_DOCTOR = "look at nvidia-smi and sdrt doctor"


@dataclass(frozen=True, slots=True, kw_only=True)
class Provider:
    """An execution provider. chain: as sessions list it, followed by those that compute the nodes it does not take.

    graph_entries: the run options that name a CUDA graph; none for the CPU, and none for TensorRT's provider, which
    replays its one graph whatever the shapes are. plugin: the module that brings a provider which is not built in.
    compiles: it makes kernels for the GPU at hand, which are worth keeping.
    """

    name: ProviderName
    chain: tuple[str, ...]
    install: str
    graph_entries: tuple[str, ...] = ()
    plugin: str | None = None
    compiles: bool = False

    @property
    def device(self) -> str:
        """Where its tensors lie, as ONNX Runtime names it."""
        return "cpu" if self.name == "cpu" else "cuda"


PROVIDERS: Mapping[str, Provider] = MappingProxyType(
    {
        provider.name: provider
        for provider in (
            Provider(name="cpu", chain=(CPU_PROVIDER,), install='pip install "sdrt[onnxruntime]"'),
            Provider(
                name="cuda",
                chain=("CUDAExecutionProvider", CPU_PROVIDER),
                install='pip uninstall onnxruntime, then pip install "onnxruntime-gpu[cuda,cudnn]"',
                graph_entries=("gpu_graph_id",),
            ),
            Provider(
                name="tensorrt",
                chain=("TensorrtExecutionProvider", "CUDAExecutionProvider", CPU_PROVIDER),
                install='pip uninstall onnxruntime, then pip install "onnxruntime-gpu[cuda,cudnn]" "tensorrt-cu13<11"',
                compiles=True,
            ),
            Provider(
                name="tensorrt-rtx",
                chain=("NvTensorRTRTXExecutionProvider", CPU_PROVIDER),
                install="pip install onnxruntime-ep-nv-tensorrt-rtx",
                # ONNX Runtime's name, and the plugin's own.
                graph_entries=("gpu_graph_id", "cuda_graph_annotation_id"),
                plugin="onnxruntime_ep_nv_tensorrt_rtx",
                compiles=True,
            ),
        )
    }
)


def choose_provider(name: str | None, backend: BackendRecord) -> Provider:
    """The provider of that name; none means the CPU.

    RequestError: there is no such provider, or the bundle's backend has none to choose from.
    """
    if name is None:
        return PROVIDERS["cpu"]
    if name not in PROVIDERS:
        raise RequestError(f"there is no execution provider {name!r}", hint=f"choose one of: {', '.join(PROVIDERS)}")
    if backend.name != "onnxruntime":
        raise RequestError(
            f"the execution provider {name} was asked for, but the bundle's backend is {backend.name}",
            hint="leave the provider out, or rebuild the bundle: sdrt build … --backend onnxruntime",
        )
    return PROVIDERS[name]


def captures(provider: Provider, component: str) -> bool:
    """Whether a component is replayed as CUDA graphs: the step alone is launched often enough for that to count."""
    return bool(provider.graph_entries) and component == STEP


def provider_options(provider: Provider, *, graphs: bool, kernels: Path | None) -> dict[str, dict[str, str]]:
    """The options of each provider of the chain.

    graphs: capture CUDA graphs. kernels: a folder for what is compiled on this GPU, or None to keep none of it.
    """
    options: dict[str, dict[str, str]] = {name: {} for name in provider.chain}
    if "CUDAExecutionProvider" in options:
        # TF32 keeps ten bits, fewer than float32 bundles promise and float32 islands need.
        options["CUDAExecutionProvider"] = {"use_tf32": "0"}
    if provider.name == "tensorrt":
        # Without trt_fp16_enable the types in the graph are obeyed.
        options[provider.chain[0]] = _kept(kernels, "trt_engine_cache", "trt_timing_cache")
    if provider.name == "tensorrt-rtx" and kernels is not None:
        options[provider.chain[0]] = {"nv_runtime_cache_path": str(kernels)}
    if graphs:
        options[provider.chain[0]]["enable_cuda_graph"] = "1"
    return options


def run_entries(provider: Provider, graph: int) -> dict[str, str]:
    """The run options for the CUDA graph of that id, or for none: `NO_GRAPH`."""
    return dict.fromkeys(provider.graph_entries, str(graph))


def check_available(provider: Provider, available: Sequence[str]) -> None:
    """Raise BackendError unless the installed ONNX Runtime has the provider built in."""
    wanted = provider.chain[0]
    if wanted not in available:
        raise BackendError(
            f"{wanted} was asked for; the installed ONNX Runtime has {_listed(available)}",
            hint=f"{provider.install}; or leave the provider out",
        )


def check_providers(provider: Provider, actual: Sequence[str]) -> None:
    """Raise BackendError when ONNX Runtime opened a session on other execution providers than those asked for."""
    if tuple(actual) != provider.chain:
        raise BackendError(
            f"ONNX Runtime runs on {_listed(actual)}, not on {_listed(provider.chain)} as asked",
            hint=f"{_SEE_DOCTOR}; install what is missing: {provider.install}",
        )


def check_assignment(provider: Provider, component: str, nodes: Mapping[str, int]) -> None:
    """Raise BackendError when a session has the provider but gave it nothing to do.

    nodes: how many of the component's nodes each provider computes.
    """
    wanted = provider.chain[0]
    if nodes.get(wanted, 0) == 0:
        shares = ", ".join(f"{count} to {name}" for name, count in nodes.items())
        raise BackendError(
            f"ONNX Runtime gave no node of {component} to {wanted} as asked, but {shares or 'none to any other'}",
            hint=f"this GPU may be none that the provider supports: {_SEE_DOCTOR}",
        )


def _kept(kernels: Path | None, *caches: str) -> dict[str, str]:
    if kernels is None:
        return {}
    return {f"{cache}_{part}": value for cache in caches for part, value in (("enable", "1"), ("path", str(kernels)))}


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"
