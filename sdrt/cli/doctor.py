"""`sdrt doctor`: what this machine has for building and drawing, without changing anything."""

import os
import platform
import shutil
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import typer

from sdrt._version import VERSION
from sdrt.cli.options import AsJson, model_folder
from sdrt.cli.stages import EXTRAS, NEEDS
from sdrt.cli.terminal import emit, facts, size_text, title
from sdrt.errors import CheckpointError

if TYPE_CHECKING:
    from rich.text import Text

    from sdrt.bundle import JsonValue

BACKENDS = ("openvino", "onnxruntime", "tensorrt")
INSTALLS = {"openvino": "pip install sdrt", "onnxruntime": 'pip install "sdrt[onnxruntime]"'}


def doctor(as_json: AsJson = False) -> None:
    """Tell what this machine has for building and drawing. Fails when no backend works."""
    machine, backends, packages = _machine(), {name: _backend(name) for name in BACKENDS}, _packages()
    embedded = _embedded_model()
    model = "the embedded model is installed" if embedded else "the embedded model is absent"
    works = any(state["works"] for state in backends.values())
    result: dict[str, JsonValue] = {
        "sdrt": VERSION,
        "machine": machine,
        "backends": dict(backends),
        "extras": dict(packages),
        "embedded_model": embedded,
        "healthy": works,
    }
    lines: list[Text | str] = [
        title(f"sdrt {VERSION}"),
        *facts(_machine_rows(machine)),
        "",
        title("Backends"),
        *facts([(name, str(state["text"])) for name, state in backends.items()]),
        "",
        title("Packages"),
        *facts([*((name, str(state["text"])) for name, state in packages.items()), ("shapes", model)]),
    ]
    emit(result, lines, as_json=as_json)
    if not works:
        raise typer.Exit(1)


def _machine() -> "dict[str, JsonValue]":
    from sdrt.cache import default_cache_root
    from sdrt.runners.cpu import available_cores, cpu_features, cpu_name, memory_bytes, native_precision

    cache = default_cache_root()
    total, available = memory_bytes()
    features: list[JsonValue] = [*sorted(cpu_features())]
    return {
        "python": platform.python_version(),
        "executable": sys.executable,
        "system": platform.platform(terse=True),
        "cpu": cpu_name(),
        "features": features,
        "cores": available_cores(),
        "memory_bytes": total,
        "memory_available_bytes": available,
        "precision": native_precision(),
        "cache": str(cache),
        "cache_free_bytes": shutil.disk_usage(_existing(cache)).free,
        "cache_writable": os.access(_existing(cache), os.W_OK),
    }


def _machine_rows(machine: "dict[str, JsonValue]") -> list[tuple[str, str]]:
    def amount(name: str) -> str:
        value = machine[name]
        return size_text(value) if isinstance(value, int) else "unknown"

    features = machine["features"]
    named = ", ".join(str(name) for name in features) if isinstance(features, list) and features else "none known"
    writable = "" if machine["cache_writable"] else ", not writable (set SDRT_CACHE)"
    return [
        ("python", f"{machine['python']} ({machine['executable']})"),
        ("system", str(machine["system"])),
        ("CPU", f"{machine['cpu']}, {machine['cores']} cores for this process"),
        ("features", named),
        ("precision", f"auto is {machine['precision']} here"),
        ("memory", f"{amount('memory_bytes')}, {amount('memory_available_bytes')} available"),
        ("build cache", f"{machine['cache']}, {amount('cache_free_bytes')} free{writable}"),
    ]


def _backend(name: str) -> "dict[str, JsonValue]":
    """Whether a backend is installed and loads. A broken installation fails in many ways, so all are reported."""
    if name == "tensorrt":
        return _tensorrt()
    if find_spec(name) is None:
        return {"version": None, "works": False, "text": f"not installed: {INSTALLS[name]}"}
    installed = _version(name)
    try:
        module = import_module(name)
        text = f"{installed}{_providers(module)}" if name == "onnxruntime" else str(installed)
    except Exception as error:
        return {"version": installed, "works": False, "text": f"{installed} does not load: {error}"}
    return {"version": installed, "works": True, "text": text}


def _providers(onnxruntime: ModuleType) -> str:
    """What --provider can be told, as far as packages go."""
    from sdrt.runners.providers import PROVIDERS

    built_in = onnxruntime.get_available_providers()
    installed = [
        name
        for name, provider in PROVIDERS.items()
        if provider.chain[0] in built_in or (provider.plugin is not None and find_spec(provider.plugin) is not None)
    ]
    return f" with the providers {', '.join(installed)}"


def _tensorrt() -> "dict[str, JsonValue]":
    """What of TensorRT's parts is there: the library builds alone, drawing needs a driver and a GPU too."""
    from sdrt.errors import BackendError
    from sdrt.runners.nvidia import load_library, require_device

    try:
        library = load_library()
    except BackendError as error:
        return {"version": None, "works": False, "text": f"{error.message}; {error.hint}"}
    found = f"{library.name} {library.version}"
    try:
        device = require_device()
    except BackendError as error:
        return {
            "version": library.version,
            "works": False,
            "text": f"{found} builds here; {error.message}; {error.hint}",
        }
    return {"version": library.version, "works": True, "text": f"{found} on {device.name} ({device.architecture})"}


def _packages() -> "dict[str, dict[str, JsonValue]]":
    """What each stage needs beyond the runtime, and what of it is absent."""
    found: dict[str, dict[str, JsonValue]] = {}
    for module, names in NEEDS.items():
        extra = EXTRAS[module]
        versions = {name: _version(name) if find_spec(name) is not None else None for name in names}
        absent = [name for name, installed in versions.items() if installed is None]
        present = ", ".join(f"{name} {installed}" for name, installed in versions.items() if installed is not None)
        text = f'absent: {", ".join(absent)}; pip install "sdrt[{extra}]"' if absent else present
        found[extra] = {"versions": dict(versions), "complete": not absent, "text": text}
    return found


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _embedded_model() -> bool:
    try:
        model_folder("shapes")
    except CheckpointError:
        return False
    return True


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
