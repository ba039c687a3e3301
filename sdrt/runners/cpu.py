"""What this machine's CPU can do: features by the kernel's names, and how many cores this process may use."""

import os
import platform
from pathlib import Path
from typing import Literal

MEMINFO = Path("/proc/meminfo")
BF16_FEATURES = ("amx_bf16", "avx512_bf16")  # either makes bfloat16 faster than float32
_RELEVANT = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8")


def cpu_features(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """The relevant instruction sets of this CPU; empty where the system does not tell."""
    try:
        text = cpuinfo.read_text()
    except OSError:
        return frozenset()
    return frozenset(_field(text, "flags").split()).intersection(_RELEVANT)


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The CPU's marketing name, or its architecture where the system does not tell."""
    try:
        return _field(cpuinfo.read_text(), "model name") or platform.machine()
    except OSError:
        return platform.machine()


def native_precision() -> Literal["bf16", "fp32"]:
    """The fastest precision that this CPU computes in hardware."""
    return "bf16" if cpu_features().intersection(BF16_FEATURES) else "fp32"


def is_x86() -> bool:
    """Whether its instructions are those of Intel's and AMD's CPUs."""
    return platform.machine().lower() in ("x86_64", "amd64")


def float32_lanes() -> int:
    """How many float32 numbers this CPU multiplies in one instruction, as far as the system tells; 8 of AVX2 else."""
    return 16 if "avx512f" in cpu_features() else 8


def available_cores(topology: Path = Path("/sys/devices/system/cpu")) -> int:
    """How many physical cores this process may run on: two threads of one core share its arithmetic units.

    Where the system does not tell which are siblings, every logical CPU counts.
    """
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    return len({_core_of(cpu, topology) for cpu in os.sched_getaffinity(0)})


def _field(cpuinfo: str, name: str) -> str:
    """The first CPU's value; empty where there is none."""
    pairs = (line.partition(":") for line in cpuinfo.splitlines())
    return next((text.strip() for key, _, text in pairs if key.strip() == name), "")


def _core_of(cpu: int, topology: Path) -> str:
    try:
        return (topology / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)


def memory_bytes(meminfo: Path = MEMINFO) -> tuple[int | None, int | None]:
    """The machine's memory and how much of it is available now; None where the system does not tell."""
    try:
        lines = meminfo.read_text().splitlines()
    except OSError:
        return None, None
    values = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
    total, free = (int(values[key][0]) * 1024 if values.get(key) else None for key in ("MemTotal", "MemAvailable"))
    return total, free
