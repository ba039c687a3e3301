"""Which backend and which precision a build uses: "auto" resolved, impossible pairs refused."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from sdrt.bundle import Precision
from sdrt.engines.base import EngineBuilder
from sdrt.errors import BuildError, RequestError

PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "fp16", "int8")


def _openvino() -> EngineBuilder:
    from sdrt.engines.openvino import OpenVinoBuilder

    return OpenVinoBuilder()


def _onnxruntime() -> EngineBuilder:
    from sdrt.engines.onnxruntime import OnnxRuntimeBuilder

    return OnnxRuntimeBuilder()


def _tensorrt() -> EngineBuilder:
    from sdrt.engines.tensorrt import TensorRtBuilder

    return TensorRtBuilder.find()


_BUILDERS: Mapping[str, Callable[[], EngineBuilder]] = MappingProxyType(
    {"openvino": _openvino, "onnxruntime": _onnxruntime, "tensorrt": _tensorrt}
)
BACKENDS = tuple(_BUILDERS)


def choose_builder(backend: str) -> EngineBuilder:
    """The builder of a backend; "auto" is OpenVINO. RequestError: no such backend."""
    name = "openvino" if backend == "auto" else backend
    if name not in _BUILDERS:
        raise RequestError(f"there is no backend {backend!r}", hint=f"choose one of: auto, {', '.join(BACKENDS)}")
    return _BUILDERS[name]()


def choose_precision(precision: str, builder: EngineBuilder) -> Precision:
    """The precision to build; "auto" is the first that `builder` offers on this machine.

    RequestError: no such precision. BuildError: the backend cannot build it here.
    """
    if precision == "auto":
        return builder.precisions[0]
    for known in PRECISIONS:
        if known == precision:
            if known in builder.precisions:
                return known
            raise BuildError(
                f"{builder.name} cannot build {precision} for the {builder.device} of this machine",
                hint=f"choose one of: auto, {', '.join(builder.precisions)}",
            )
    raise RequestError(f"there is no precision {precision!r}", hint=f"choose one of: auto, {', '.join(PRECISIONS)}")
