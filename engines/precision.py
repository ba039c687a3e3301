"""Which backend and which precision a build uses: "auto" resolved, impossible pairs refused."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from sdrt.bundle import Precision
from sdrt.engines.base import EngineBuilder
from sdrt.errors import BuildError, RequestError
from sdrt.runners.nvidia import ARCHITECTURE

PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "fp16", "int8")


def _openvino(_: tuple[str, ...], refit: bool) -> EngineBuilder:
    from sdrt.engines.openvino import OpenVinoBuilder

    return OpenVinoBuilder()


def _onnxruntime(_: tuple[str, ...], refit: bool) -> EngineBuilder:
    from sdrt.engines.onnxruntime import OnnxRuntimeBuilder

    return OnnxRuntimeBuilder()


def _tensorrt(targets: tuple[str, ...], refit: bool) -> EngineBuilder:
    from sdrt.engines.tensorrt import TensorRtBuilder

    return TensorRtBuilder.find(targets, refit=refit)


_BUILDERS: Mapping[str, Callable[[tuple[str, ...], bool], EngineBuilder]] = MappingProxyType(
    {"openvino": _openvino, "onnxruntime": _onnxruntime, "tensorrt": _tensorrt}
)
BACKENDS = tuple(_BUILDERS)


def choose_builder(backend: str, targets: tuple[str, ...] = (), *, refit: bool = False) -> EngineBuilder:
    """The builder of a backend; "auto" is OpenVINO. RequestError: no such backend, or it has no such options.

    targets: GPU architectures; refit: engines that take other weights later. Both are for TensorRT only.
    """
    name = "openvino" if backend == "auto" else backend
    if name not in _BUILDERS:
        raise RequestError(f"there is no backend {backend!r}", hint=f"choose one of: auto, {', '.join(BACKENDS)}")
    if targets and name != "tensorrt":
        raise RequestError(f"{name} builds for no GPU architecture", hint="leave --target out, or --backend tensorrt")
    if refit and name != "tensorrt":
        raise RequestError(f"{name} has no engines to refit", hint="leave --refit out, or --backend tensorrt")
    if wrong := [target for target in targets if not ARCHITECTURE.fullmatch(target)]:
        raise RequestError(f"--target {wrong[0]!r} is no GPU architecture", hint='write it as compilers do: "sm89"')
    return _BUILDERS[name](tuple(sorted(set(targets))), refit)


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
