"""Memory that a build takes, estimated before it begins: a clear refusal instead of a process that the system kills."""

from pathlib import Path

from sdrt.errors import BuildError
from sdrt.runners.cpu import MEMINFO, memory_bytes

# Measured at SD1.5's size. TensorRT-RTX: 6.1 GB for a UNet of 1.72 GB in float16. Calibration and emulation in ONNX
# Runtime: 12.0 GB for the same UNet of 3.44 GB in float32.
PER_WEIGHT = 3.5
BESIDE = 2**29  # bytes, for the libraries themselves and small graphs


def check_memory(work: str, weight_bytes: int, *, meminfo: Path = MEMINFO) -> None:
    """Refuse work on so many bytes of weights that this machine has no memory for. BuildError, with both figures.

    work: what is to be done, in words.
    """
    needed = int(weight_bytes * PER_WEIGHT) + BESIDE
    _, available = memory_bytes(meminfo)
    if available is not None and available < needed:
        raise BuildError(
            f"{work} takes about {needed / 2**30:.1f} GiB of memory; {available / 2**30:.1f} are free",
            hint="close other programs, or build on a larger machine: the bundle can be copied",
        )
