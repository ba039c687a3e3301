"""Opening ONNX Runtime sessions: its plugins are registered, its fallbacks switched off, its promises checked."""

import contextlib
import importlib
import importlib.util
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdrt.errors import BackendError
from sdrt.runners.bound_session import BoundSession, DeviceMemory
from sdrt.runners.nvidia import load_library
from sdrt.runners.providers import (
    PROVIDERS,
    Provider,
    check_assignment,
    check_available,
    check_providers,
    provider_options,
    run_entries,
)

_RECORD_ASSIGNMENT = "session.record_ep_graph_assignment_info"
_VERIFY, _SEE_DOCTOR = "check the bundle with: sdrt verify", "look at nvidia-smi and sdrt doctor"
_NO_FALLBACK = 0  # ONNX Runtime's own way on is to print to stdout and open the session on the CPU


def provider_devices(provider: Provider) -> Sequence[Any]:
    """Make a provider ready, and return the devices of one that is a plugin; of those built in there are none.

    BackendError: it is not installed, its library cannot be loaded, or it finds no GPU that it supports.
    """
    import onnxruntime

    if provider.name == "cpu":
        return ()
    if not hasattr(onnxruntime.InferenceSession, "release_captured_graph"):
        raise BackendError(
            f"ONNX Runtime {onnxruntime.__version__} is too old for the provider {provider.name}",
            hint=f"it takes 1.31 or later: {provider.install}",
        )
    if provider.plugin is None:
        _preload_libraries(provider)
        check_available(provider, onnxruntime.get_available_providers())
        return ()
    wanted = provider.chain[0]
    if not (devices := _devices_of(wanted)) and wanted not in onnxruntime.get_available_providers():
        _register(provider, provider.plugin)
        if not (devices := _devices_of(wanted)):
            raise BackendError(f"{wanted} finds no GPU here that it supports", hint=_SEE_DOCTOR)
    return devices


def open_cpu_session(path: Path, *, threads: int) -> Any:  # noqa: ANN401  (ONNX Runtime's classes are untyped)
    """An engine on the CPU. Raises BackendError."""
    cpu = PROVIDERS["cpu"]
    session = _open(path, _session_options(threads), _VERIFY, providers=list(cpu.chain))
    check_providers(cpu, session.get_providers())
    return session


def open_bound_session(
    path: Path,
    component: str,
    provider: Provider,
    devices: Sequence[Any],
    *,
    threads: int,
    graphs: bool,
    kernels: Path,
) -> BoundSession:
    """An engine on a provider, with fixed buffers there.

    devices: see `provider_devices`. graphs: capture CUDA graphs. kernels: where to keep what is compiled on this GPU,
    if it can be written. BackendError: it cannot be opened, or ONNX Runtime computes it elsewhere than asked.
    """
    import onnxruntime

    options = _session_options(threads)
    options.add_session_config_entry(_RECORD_ASSIGNMENT, "1")
    wanted = provider_options(provider, graphs=graphs, kernels=_writable(kernels) if provider.compiles else None)
    if devices:
        options.add_provider_for_devices(list(devices[:1]), wanted[provider.chain[0]])
        session = _open(path, options, _SEE_DOCTOR)
    else:
        session = _open(path, options, _SEE_DOCTOR, providers=list(wanted.items()))
    check_providers(provider, session.get_providers())
    nodes: Counter[str] = Counter()
    for part in session.get_provider_graph_assignment_info():
        nodes[part.ep_name] += len(part.get_nodes())
    check_assignment(provider, component, nodes)

    def run_options(graph: int) -> Any:  # noqa: ANN401
        made = onnxruntime.RunOptions()
        for key, value in run_entries(provider, graph).items():
            made.add_run_config_entry(key, value)
        return made

    memory = DeviceMemory(
        device=provider.device,
        make_value=onnxruntime.OrtValue.ortvalue_from_shape_and_type,
        make_run_options=run_options if graphs else None,
    )
    return BoundSession(session, memory)


def _session_options(threads: int) -> Any:  # noqa: ANN401
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return options


def _open(path: Path, options: Any, hint: str, providers: list[Any] | None = None) -> Any:  # noqa: ANN401
    import onnxruntime

    try:
        return onnxruntime.InferenceSession(path, options, providers=providers, enable_fallback=_NO_FALLBACK)
    except Exception as error:  # ONNX Runtime raises one class per status code, with no common base
        raise BackendError(f"ONNX Runtime cannot open {path}: {error}", hint=hint) from error


def _preload_libraries(provider: Provider) -> None:
    """Load NVIDIA's libraries where pip put them, which is nowhere that the system's loader looks."""
    import onnxruntime

    with contextlib.redirect_stdout(sys.stderr):  # it prints what it does not find
        onnxruntime.preload_dlls()
    if provider.name == "tensorrt" and importlib.util.find_spec("tensorrt") is not None:
        load_library("tensorrt")


def _devices_of(wanted: str) -> list[Any]:
    import onnxruntime

    return [device for device in onnxruntime.get_ep_devices() if device.ep_name == wanted]


def _register(provider: Provider, plugin: str) -> None:
    import onnxruntime

    wanted = provider.chain[0]
    try:
        library = importlib.import_module(plugin).get_library_path()
    except (ImportError, OSError) as error:
        available = ", ".join(onnxruntime.get_available_providers())
        raise BackendError(
            f"{wanted} was asked for; the installed ONNX Runtime has {available}, and its plugin cannot be loaded: "
            f"{error}",
            hint=f"{provider.install}; or leave the provider out",
        ) from error
    try:
        onnxruntime.register_execution_provider_library(wanted, library)
    except Exception as error:  # as above
        raise BackendError(
            f"ONNX Runtime cannot load {wanted}: {error}",
            hint=f"install NVIDIA's driver, and {_SEE_DOCTOR}",
        ) from error


def _writable(folder: Path) -> Path | None:
    """The folder, made if need be; None where it cannot be written: kernels are then compiled anew each time."""
    try:
        folder.mkdir(exist_ok=True)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) else None
