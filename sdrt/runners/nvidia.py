"""NVIDIA's libraries on this machine: which TensorRT is installed, and whether a GPU and its driver are there."""

import importlib
import importlib.util
import re
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal, TypeAlias

from sdrt.bundle import BackendRecord
from sdrt.errors import BackendError, BundleError

LibraryName: TypeAlias = Literal["tensorrt", "tensorrt_rtx"]
LIBRARIES: tuple[LibraryName, ...] = ("tensorrt", "tensorrt_rtx")
OLDEST = (8, 0)  # compute capability of the oldest GPUs that engines run on unless they are built for another
ARCHITECTURE = re.compile(r"sm[0-9]{2,3}")
INSTALL = 'pip install "sdrt[tensorrt]"'


@dataclass(frozen=True, slots=True, kw_only=True)
class Library:
    """TensorRT, or TensorRT-RTX, which has the same interface and builds without a GPU."""

    name: LibraryName
    version: str
    module: ModuleType


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A GPU. compute_capability: (8, 9) for Ada Lovelace. memory_bytes: all of it."""

    name: str
    compute_capability: tuple[int, int]
    memory_bytes: int

    @property
    def architecture(self) -> str:
        """As compilers name it: "sm89"."""
        return "sm{}{}".format(*self.compute_capability)


def load_library(wanted: LibraryName | None = None) -> Library:
    """The library to build and run with: `wanted`, or TensorRT where it is installed beside a GPU, else TensorRT-RTX.

    BackendError: not installed, or it cannot be loaded.
    """
    for name in (wanted,) if wanted is not None else _preferred():
        if importlib.util.find_spec(name) is None:
            continue
        try:
            module = importlib.import_module(name)
        except (ImportError, OSError) as error:
            raise BackendError(
                f"{name} is installed but cannot be loaded: {error}", hint=f"install it again: {INSTALL}"
            ) from error
        return Library(name=name, version=str(module.__version__), module=module)
    raise BackendError(f"{wanted or 'TensorRT'} is not installed", hint=f"install it with: {INSTALL}")


def architectures(library: Library) -> tuple[str, ...]:
    """Those that engines can be built for by name: "sm89". Empty for a library that knows only the GPU it runs on."""
    known = getattr(library.module, "ComputeCapability", None)
    names = () if known is None else known.__members__
    return tuple(sorted(name.lower() for name in names if ARCHITECTURE.fullmatch(name.lower())))


def find_device() -> Device | None:
    """The current GPU, or None where there is none or no driver. BackendError: cuda-python is not installed."""
    runtime = load_cuda_runtime()
    error, count = runtime.cudaGetDeviceCount()
    if error != runtime.cudaError_t.cudaSuccess or not count:
        return None
    properties = _checked(runtime, runtime.cudaGetDeviceProperties(0))
    name = properties.name.decode() if isinstance(properties.name, bytes) else str(properties.name)
    return Device(
        name=name.rstrip("\0"),
        compute_capability=(int(properties.major), int(properties.minor)),
        memory_bytes=int(properties.totalGlobalMem),
    )


def has_device() -> bool:
    """Whether a GPU can be used: with a driver, and cuda-python installed."""
    try:
        return find_device() is not None
    except BackendError:
        return False


def require_device() -> Device:
    """The current GPU. BackendError says what is missing: cuda-python, the driver, a newer driver, or the GPU."""
    runtime = load_cuda_runtime()
    error, count = runtime.cudaGetDeviceCount()
    codes = runtime.cudaError_t
    if error == codes.cudaErrorInsufficientDriver:
        found, driver = runtime.cudaDriverGetVersion()
        has = found == codes.cudaSuccess and driver
        what = f"the NVIDIA driver is for CUDA {_version(driver)}" if has else "there is no NVIDIA driver"
        needed = _checked(runtime, runtime.cudaRuntimeGetVersion()) // 1000
        raise BackendError(
            f"{what}; TensorRT engines need one for CUDA {needed} or later",
            hint="install NVIDIA's driver and look at nvidia-smi, or build the bundle with --backend openvino",
        )
    if error != codes.cudaSuccess or not count:
        raise BackendError(
            f"there is no NVIDIA GPU that this process can use ({_name(error)})",
            hint="check nvidia-smi and CUDA_VISIBLE_DEVICES, or build the bundle with --backend openvino",
        )
    device = find_device()
    if device is None:
        raise BackendError("the NVIDIA GPU went away", hint="check nvidia-smi")
    return device


def library_of(backend: BackendRecord) -> LibraryName:
    """The library that a TensorRT bundle was built with. Raises BundleError."""
    for name in LIBRARIES:
        if name in backend.features:
            return name
    raise BundleError(
        f"the bundle does not say which library it was built with, only {', '.join(backend.features) or 'nothing'}",
        hint="rebuild it with: sdrt build … --backend tensorrt",
    )


def check_version(backend: BackendRecord, installed: str) -> None:
    """Engines are of one version of their library. Raises BundleError."""
    if _release(installed) != _release(backend.version):
        name = library_of(backend)
        raise BundleError(
            f"the bundle was built with {name} {backend.version}; {installed} is installed",
            hint=f"rebuild it with: sdrt build, or install {name} {backend.version}",
        )


def check_device(backend: BackendRecord, device: Device) -> None:
    """Whether engines run on a GPU, as far as can be told before they are loaded. Raises BackendError."""
    built_for = [name for name in (backend.device, *backend.features) if ARCHITECTURE.fullmatch(name)]
    if built_for and device.architecture not in built_for:
        raise BackendError(
            f"the bundle was built for {', '.join(built_for)}; {device.name} is {device.architecture}",
            hint="rebuild it on this machine, or with TensorRT-RTX for every recent GPU",
        )
    if device.compute_capability < OLDEST and not built_for:
        raise BackendError(
            f"{device.name} has compute capability {'.'.join(map(str, device.compute_capability))}; engines of "
            f"{library_of(backend)} need {'.'.join(map(str, OLDEST))} or later",
            hint=f"rebuild it for this GPU: sdrt build … --target {device.architecture}",
        )


def load_cuda_runtime() -> Any:  # noqa: ANN401  (a module of generated functions)
    """cuda-python's bindings of the CUDA runtime. BackendError: not installed."""
    return _load_bindings("runtime")


def load_cuda_driver() -> Any:  # noqa: ANN401
    """cuda-python's bindings of the CUDA driver. BackendError: not installed."""
    return _load_bindings("driver")


def _load_bindings(name: str) -> Any:  # noqa: ANN401
    try:
        return importlib.import_module(f"cuda.bindings.{name}")
    except ImportError as error:
        raise BackendError(f"cuda-python is not installed: {error}", hint=f"install it with: {INSTALL}") from error


def _preferred() -> tuple[LibraryName, ...]:
    return LIBRARIES if find_device() is not None else tuple(reversed(LIBRARIES))


def _checked(runtime: Any, result: tuple[Any, ...]) -> Any:  # noqa: ANN401
    error, value = result[0], result[1] if len(result) > 1 else None
    if error != runtime.cudaError_t.cudaSuccess:
        raise BackendError(f"CUDA failed: {_name(error)}", hint="look at nvidia-smi, and run: sdrt doctor")
    return value


def _name(error: Any) -> str:  # noqa: ANN401  (an enumeration of the module)
    return str(getattr(error, "name", error))


def _release(version: str) -> tuple[str, ...]:
    return tuple(version.split(".")[:3])


def _version(number: int) -> str:
    """13020 is CUDA 13.2."""
    return f"{number // 1000}.{number % 1000 // 10}"
