"""The machine that figures come from, in the words a reader needs to judge them."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version

from sdrt._version import VERSION
from sdrt.bundle import JsonValue
from sdrt.runners.cpu import available_cores, cpu_features, cpu_name

_PACKAGES = ("torch", "diffusers", "transformers", "openvino", "onnxruntime", "onnx", "numpy")


def describe_machine() -> dict[str, JsonValue]:
    """CPU, cores, memory, system and the versions of everything that computes."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": cpu_name(),
        "cpu_features": [*sorted(cpu_features())],
        "cores": available_cores(),
        "memory_gib": round(memory_bytes / 2**30, 1),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "sdrt": VERSION,
        "packages": {name: found for name in _PACKAGES if (found := _version(name)) is not None},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
