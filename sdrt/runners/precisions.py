"""Which precisions a backend's engines come in on this machine."""

from sdrt.bundle import Precision
from sdrt.runners.cpu import native_precision


def precisions_of(backend: str) -> tuple[Precision, ...]:
    """The precisions of "openvino", "onnxruntime" or "tensorrt" engines that can be built here, the usual one first.

    OpenVINO computes in bf16 where the CPU does; its float32 runs anywhere.
    """
    if backend == "tensorrt":
        return ("fp16",)
    if backend == "onnxruntime":
        return ("fp32", "fp16")
    return ("bf16", "fp32") if native_precision() == "bf16" else ("fp32",)
