"""The machine that figures come from, in the words a reader needs to judge them."""

import hashlib
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path

from sdrt._version import VERSION
from sdrt.bundle import JsonValue
from sdrt.runners.cpu import available_cores, cpu_features, cpu_name

_PACKAGES = ("torch", "diffusers", "transformers", "openvino", "onnxruntime", "onnx", "numpy")


def describe_machine() -> dict[str, JsonValue]:
    """CPU, cores, memory, system, how busy it was, and the versions of everything that computes."""
    features: list[JsonValue] = [*sorted(cpu_features())]
    packages: dict[str, JsonValue] = {name: found for name in _PACKAGES if (found := _version(name)) is not None}
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": cpu_name(),
        "cpu_features": features,
        "cores": available_cores(),
        "memory_gib": round(memory_bytes / 2**30, 1),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "sdrt": VERSION,
        "commit": source_commit(),
        "source": source_digest(),
        "packages": packages,
    }


def source_commit() -> str | None:
    """The git commit that this source is at, with "+changes" when files differ from it; None outside a checkout."""
    folder = Path(__file__).resolve().parent
    commit = _git(folder, "rev-parse", "--short=12", "HEAD")
    if commit is None:
        return None
    return f"{commit}+changes" if _git(folder, "status", "--porcelain", "--untracked-files=no") else commit


_STAGES = ("export", "engines", "benchmarks", "models")  # folders of `sdrt` where it is installed, beside it in a clone


def source_digest(packages: Sequence[str] = ("sdrt", "sdrt.export", "sdrt.engines", "sdrt.benchmarks")) -> str:
    """What tells the code that builds, draws and measures from any other, committed or not: 12 hex digits."""
    digest = hashlib.sha256()
    for folder in (Path(str(files(package))) for package in packages):
        for path in sorted(folder.rglob("*.py")):
            if path.relative_to(folder).parts[0] in _STAGES:
                continue
            digest.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
