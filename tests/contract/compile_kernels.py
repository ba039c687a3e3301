"""Run where cuda-bindings and nvidia-cuda-nvrtc are installed (`make kernels`): compile the kernels of the runtime."""

import hashlib
import sys
from pathlib import Path

from cuda.bindings import nvrtc

KERNELS = Path(__file__).parents[2] / "sdrt" / "runners" / "kernels"
OLDEST_GPU = b"--gpu-architecture=compute_75"
# The compiler writes its own, newest version, which older drivers refuse; nothing here needs more than that of sm_75.
PTX_VERSION = "6.3"


def compile_kernel(source: Path) -> str:
    """The PTX of a kernel, under a line that names the source it was made from."""
    program = check(nvrtc.nvrtcCreateProgram(source.read_bytes(), source.name.encode(), 0, [], []))
    check(nvrtc.nvrtcCompileProgram(program, 1, [OLDEST_GPU]))
    content = b" " * check(nvrtc.nvrtcGetPTXSize(program))
    check(nvrtc.nvrtcGetPTX(program, content))
    text = content.decode().rstrip("\0 \n")
    body = text[text.index(".target") :]
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    return f"// From {source.name}, sha256 {digest}\n.version {PTX_VERSION}\n{body}\n"


def check(result):
    error, *values = result
    if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        sys.exit(f"nvrtc: {error.name}")
    return values[0] if values else None


if __name__ == "__main__":
    for source in sorted(KERNELS.glob("*.cu")):
        target = source.with_suffix(".ptx")
        target.write_text(compile_kernel(source))
        print(target)
