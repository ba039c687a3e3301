"""Choosing the runner of a bundle: the one place that looks at its backend's name."""

import importlib
import importlib.util
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from sdrt.bundle import BackendName, BackendRecord, Bundle
from sdrt.errors import BackendError, BundleError, RequestError
from sdrt.runners.base import Runner
from sdrt.runners.cpu import cpu_features
from sdrt.runners.providers import Provider, choose_provider

if TYPE_CHECKING:
    from sdrt.runners.cuda import CudaDriver
    from sdrt.runners.engine_layers import EngineLayers

_INSTALL: Mapping[BackendName, str] = {
    "openvino": "pip install sdrt",
    "onnxruntime": 'pip install "sdrt[onnxruntime]"',
    "tensorrt": 'pip install "sdrt[tensorrt]"',
}


def open_runner(bundle: Bundle, *, threads: int | None = None, provider: str | None = None) -> Runner:
    """Open a bundle's engines on this machine, with all cores of this process unless `threads` says fewer.

    provider: ONNX Runtime's execution provider, one of `sdrt.runners.providers.PROVIDERS`; by default the CPU's.
    Raises BackendError when the backend or a CPU feature is absent, BundleError when the backend is another
    version than the one that the bundle was built and checked with, RequestError for less than one thread or for a
    provider that the backend has not.
    """
    if threads is not None and threads < 1:
        raise RequestError(f"threads is {threads}", hint="ask for at least one, or leave it out for all cores")
    backend = bundle.manifest.backend
    chosen = choose_provider(provider, backend)
    check_backend(backend)
    try:
        return _open(bundle, threads, chosen)
    except ImportError as error:
        raise BackendError(
            f"{backend.name} is installed but cannot be loaded: {error}",
            hint=f"install it again: {_INSTALL[backend.name]}",
        ) from error


def _open(bundle: Bundle, threads: int | None, provider: Provider) -> Runner:
    name = bundle.manifest.backend.name
    if name == "openvino":
        from sdrt.runners.openvino import OpenVinoRunner

        return OpenVinoRunner(bundle, threads=threads)
    if name == "onnxruntime":
        from sdrt.runners.onnxruntime import OnnxRuntimeRunner

        return OnnxRuntimeRunner(bundle, threads=threads, provider=provider)
    from sdrt.runners.tensorrt import TensorRtRunner

    return TensorRtRunner(bundle, _open_gpu(bundle))


def read_engine_layers(bundle: Bundle) -> "dict[str, EngineLayers]":
    """What each engine of a TensorRT bundle is made of; they have to be loaded on a GPU for that.

    Raises RequestError for bundles of other backends, BackendError and BundleError as `open_runner` does.
    """
    from sdrt.runners.engine_layers import inspect_engines

    backend = bundle.manifest.backend
    if backend.name != "tensorrt":
        raise RequestError(
            f"{bundle.path} has {backend.name} engines, whose layers are those of its graphs",
            hint="only TensorRT engines have layers of their own",
        )
    check_backend(backend)
    return inspect_engines(bundle, _open_gpu(bundle))


def _open_gpu(bundle: Bundle) -> "CudaDriver":
    from sdrt.runners.cuda_python import CudaPython
    from sdrt.runners.nvidia import library_of

    return CudaPython(library_of(bundle.manifest.backend), bundle.path / "kernels")


def check_backend(backend: BackendRecord) -> None:
    """Compare what a bundle needs with what this machine has, before any engine is touched."""
    if backend.name == "tensorrt":
        _check_tensorrt(backend)
        return
    if importlib.util.find_spec(backend.name) is None:
        raise BackendError(f"the bundle needs {backend.name}, which is not installed", hint=_INSTALL[backend.name])
    installed = _installed_version(backend.name)
    if _release(installed) != _release(backend.version):
        raise BundleError(
            f"the bundle was built with {backend.name} {backend.version}; {installed} is installed",
            hint=f"rebuild it with: sdrt build, or pip install {backend.name}=={backend.version}",
        )
    absent = sorted(set(backend.features) - cpu_features())
    if absent:
        raise BackendError(
            f"the bundle needs a CPU with {', '.join(absent)}, which this one has not",
            hint="rebuild it for this machine: sdrt build … --precision fp32",
        )


def _check_tensorrt(backend: BackendRecord) -> None:
    from sdrt.runners import nvidia

    library = nvidia.load_library(nvidia.library_of(backend))
    nvidia.check_version(backend, library.version)
    nvidia.check_device(backend, nvidia.require_device())


def _installed_version(name: BackendName) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # from a distribution of another name, such as a nightly
        return str(importlib.import_module(name).__version__)


def _release(text: str) -> tuple[str, ...]:
    return tuple(text.split("-")[0].split(".")[:2])
