"""`CudaDriver` on a real GPU: CUDA's runtime through cuda-python, engines through TensorRT or TensorRT-RTX."""

import ctypes
import hashlib
import mmap
import sys
import warnings
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from sdrt.errors import BackendError, OutputError
from sdrt.files import write_atomically
from sdrt.philox import PhiloxDraw
from sdrt.runners.cuda import Array, EngineContext, EngineTensor, Pinned, Shapes
from sdrt.runners.nvidia import (
    Device,
    Library,
    LibraryName,
    architectures,
    load_cuda_driver,
    load_cuda_runtime,
    load_library,
    require_device,
)

_THREADS = 256  # of one block
_ERRORS = 16  # remembered of TensorRT
_VERIFY = "check the bundle with: sdrt verify"


class CudaPython:
    """The current GPU. kernels: the folder that keeps kernels which TensorRT-RTX compiled here, made when needed.

    BackendError: the library is not installed, or there is no driver or GPU.
    """

    def __init__(self, library: LibraryName, kernels: Path) -> None:
        self.device: Device = require_device()
        self._library = load_library(library)
        self._cuda = load_cuda_runtime()
        self._cuda_driver = load_cuda_driver()
        self._normal_kernel: Any = None
        self._kernels = kernels
        self._logger = remembering_logger(self._library.module)
        self._runtime = self._library.module.Runtime(self._logger)
        self._caches: dict[Path, Any] = {}
        self._kept: dict[Path, bytes] = {}  # the digest of what each file holds
        self._setup = self.create_stream()

    def allocate(self, size: int) -> int:
        """See `CudaDriver`."""
        return int(self._call("cudaMalloc", size))

    def free(self, address: int) -> None:
        """See `CudaDriver`."""
        self._call("cudaFree", address)

    def allocate_pinned(self, size: int) -> Pinned:
        """See `CudaDriver`."""
        address = int(self._call("cudaMallocHost", size))
        content = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
        return Pinned(address=address, bytes=content)

    def free_pinned(self, memory: Pinned) -> None:
        """See `CudaDriver`."""
        self._call("cudaFreeHost", memory.address)

    def create_stream(self) -> int:
        """See `CudaDriver`."""
        return int(self._call("cudaStreamCreateWithFlags", self._cuda.cudaStreamNonBlocking))

    def destroy_stream(self, stream: int) -> None:
        """See `CudaDriver`."""
        self._call("cudaStreamDestroy", stream)

    def upload(self, target: int, source: int, size: int, stream: int) -> None:
        """See `CudaDriver`."""
        self._copy(target, source, size, self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice, stream)

    def download(self, target: int, source: int, size: int, stream: int) -> None:
        """See `CudaDriver`."""
        self._copy(target, source, size, self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost, stream)

    def copy(self, target: int, source: int, size: int, stream: int) -> None:
        """See `CudaDriver`."""
        self._copy(target, source, size, self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice, stream)

    def synchronize(self, stream: int) -> None:
        """See `CudaDriver`."""
        self._call("cudaStreamSynchronize", stream)

    def begin_capture(self, stream: int) -> None:
        """See `CudaDriver`. Other threads may use CUDA meanwhile."""
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", stream, mode)

    def end_capture(self, stream: int) -> int:
        """See `CudaDriver`."""
        graph = self._call("cudaStreamEndCapture", stream)
        try:
            launchable = int(self._call("cudaGraphInstantiate", graph, 0))
        finally:
            self._call("cudaGraphDestroy", graph)
        self._call("cudaGraphUpload", launchable, stream)  # or the first launch waits for it
        return launchable

    def launch(self, graph: int, stream: int) -> None:
        """See `CudaDriver`."""
        self._call("cudaGraphLaunch", graph, stream)

    def destroy_graph(self, graph: int) -> None:
        """See `CudaDriver`."""
        self._call("cudaGraphExecDestroy", graph)

    def record_event(self, stream: int) -> int:
        """See `CudaDriver`."""
        # A thread that waits for it sleeps, where it would keep a core busy by default.
        event = int(self._call("cudaEventCreateWithFlags", self._cuda.cudaEventBlockingSync))
        self._call("cudaEventRecord", event, stream)
        return event

    def elapsed_seconds(self, start: int, end: int) -> float:
        """See `CudaDriver`."""
        return float(self._call("cudaEventElapsedTime", start, end)) / 1000

    def wait(self, event: int) -> None:
        """See `CudaDriver`."""
        self._call("cudaEventSynchronize", event)

    def fill_normal(self, target: int, draw: PhiloxDraw, stream: int) -> None:
        """See `CudaDriver`."""
        if self._normal_kernel is None:
            self._normal_kernel = self._load_kernel("philox_normal")
        arguments = (target, draw.count, draw.seed & 0xFFFFFFFF, draw.seed >> 32, draw.offset)
        kinds = (ctypes.c_void_p, *[ctypes.c_uint32] * 4)
        blocks = -(-draw.count // _THREADS)
        self._launch_kernel(self._normal_kernel, blocks, stream, (arguments, kinds))

    def destroy_event(self, event: int) -> None:
        """See `CudaDriver`."""
        self._call("cudaEventDestroy", event)

    def open_engine(self, path: Path) -> "TensorRtEngine":
        """See `CudaDriver`."""
        self._logger.forget()
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            engine = self._runtime.deserialize_cuda_engine(content)
        if engine is None:
            raise BackendError(
                f"{self._library.name} {self._library.version} cannot load {path} on {self.device.name} "
                f"({self.device.architecture}): {self._logger.reason()}",
                hint=self._advice(),
            )
        cache = self._kernel_cache(path)
        return TensorRtEngine(
            engine=engine, library=self._library, logger=self._logger, setup=self._setup, driver=self, kernels=cache
        )

    def keep(self) -> None:
        """See `CudaDriver`: the kernels that TensorRT-RTX compiled."""
        for path, cache in self._caches.items():
            self._keep_kernels(path, cache)

    def close(self) -> None:
        """See `CudaDriver`."""
        self._caches.clear()
        self.destroy_stream(self._setup)

    def _advice(self) -> str:
        if self._library.name == "tensorrt_rtx" and self.device.architecture not in architectures(self._library):
            return (
                f"TensorRT-RTX may not know {self.device.architecture}: rebuild it on this machine, with TensorRT "
                "installed, or with --backend onnxruntime for sdrt run --provider cuda"
            )
        return "rebuild the bundle on this machine with: sdrt build … --backend tensorrt"

    def _kernel_cache(self, path: Path) -> Path | None:
        """Where the kernels compiled for this engine, GPU and version are kept; TensorRT has none to keep."""
        if self._library.name != "tensorrt_rtx":
            return None
        name = f"{path.parent.name}-{self.device.architecture}-{self._library.version}.cache"
        return self._kernels / name

    def open_kernels(self, config: Any, path: Path) -> None:  # noqa: ANN401  (TensorRT's classes)
        """Give a runtime config the kernels that were compiled before. Unreadable ones are compiled again."""
        if path not in self._caches:
            cache = config.create_runtime_cache()
            if path.is_file():
                content = path.read_bytes()
                self._kept[path] = hashlib.sha256(content).digest()
                if not cache.deserialize(content):
                    warnings.warn(f"{path} is not readable; kernels are compiled again", stacklevel=2)
            self._caches[path] = cache
        config.set_runtime_cache(self._caches[path])

    def _keep_kernels(self, path: Path, cache: Any) -> None:  # noqa: ANN401
        serialized = cache.serialize()
        if serialized is None:
            return
        content = bytes(serialized)
        digest = hashlib.sha256(content).digest()
        if self._kept.get(path) == digest:
            return
        self._kept[path] = digest  # also if it cannot be written: once is enough to say so
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, content, overwrite=True)
        except (OSError, OutputError) as error:
            warnings.warn(f"compiled kernels are not kept, the next start compiles them again: {error}", stacklevel=2)

    def _load_kernel(self, name: str) -> Any:  # noqa: ANN401
        """A kernel of `kernels/`, compiled for this GPU by its driver."""
        program = (files("sdrt.runners") / "kernels" / f"{name}.ptx").read_bytes()
        loaded = self._driver_call("cuLibraryLoadData", program, [], [], 0, [], [], 0)
        return self._driver_call("cuLibraryGetKernel", loaded, name.encode())

    def _launch_kernel(self, kernel: Any, blocks: int, stream: int, arguments: Any) -> None:  # noqa: ANN401
        function = self._cuda_driver.CUfunction(int(kernel))  # a kernel takes its context from the stream
        self._driver_call("cuLaunchKernel", function, blocks, 1, 1, _THREADS, 1, 1, 0, stream, arguments, 0)

    def _driver_call(self, name: str, *arguments: Any) -> Any:  # noqa: ANN401
        """A function of the CUDA driver; its first result is the error. Raises BackendError."""
        error, *results = getattr(self._cuda_driver, name)(*arguments)
        if error != self._cuda_driver.CUresult.CUDA_SUCCESS:
            raise BackendError(f"{name} failed: {error.name}", hint="look at nvidia-smi, and run: sdrt doctor")
        return results[0] if results else None

    def _copy(self, target: int, source: int, size: int, kind: Any, stream: int) -> None:  # noqa: ANN401
        self._call("cudaMemcpyAsync", target, source, size, kind, stream)

    def _call(self, name: str, *arguments: Any) -> Any:  # noqa: ANN401
        """A function of the CUDA runtime; its first result is the error. Raises BackendError."""
        error, *results = getattr(self._cuda, name)(*arguments)
        if error != self._cuda.cudaError_t.cudaSuccess:
            out_of_memory = error == self._cuda.cudaError_t.cudaErrorMemoryAllocation
            raise BackendError(
                f"{name} failed: {error.name}",
                hint="ask for fewer or smaller images" if out_of_memory else "look at nvidia-smi, and run: sdrt doctor",
            )
        return results[0] if results else None


@dataclass(slots=True, kw_only=True, eq=False)
class TensorRtEngine:
    """See `Engine`. setup: the stream on which contexts are prepared."""

    engine: Any
    library: Library
    logger: Any
    setup: int
    driver: CudaPython
    kernels: Path | None
    tensors: tuple[EngineTensor, ...] = field(init=False)

    def __post_init__(self) -> None:
        trt = self.library.module
        names = [self.engine.get_tensor_name(index) for index in range(self.engine.num_io_tensors)]
        border = [
            EngineTensor(
                name=name,
                dtype=np.dtype(trt.nptype(self.engine.get_tensor_dtype(name))),
                is_input=self.engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT,
            )
            for name in names
        ]
        self.tensors = tuple(sorted(border, key=lambda tensor: not tensor.is_input))

    def profile_for(self, shapes: Shapes) -> int | None:
        """See `Engine`."""
        for profile in range(self.engine.num_optimization_profiles):
            if all(self._covers(name, profile, shape) for name, shape in shapes.items()):
                return profile
        return None

    def largest_shapes(self) -> tuple[Shapes, ...]:
        """See `Engine`."""
        inputs = [tensor.name for tensor in self.tensors if tensor.is_input]
        return tuple(
            {name: tuple(self.engine.get_tensor_profile_shape(name, profile)[2]) for name in inputs}
            for profile in range(self.engine.num_optimization_profiles)
        )

    def create_context(self, profile: int, shapes: Shapes) -> EngineContext:
        """See `Engine`."""
        trt = self.library.module
        self.logger.forget()
        config = self.engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if self.kernels is not None:
            # Kernels for just these shapes, compiled at the first launch: the runner captures the second.
            config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
            config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED
            self.driver.open_kernels(config, self.kernels)
        context = self.engine.create_execution_context(config)
        if context is None:
            raise BackendError(
                f"no context for an engine: {self.logger.reason()}", hint="free some memory of the GPU; see nvidia-smi"
            )
        ready = context.set_optimization_profile_async(profile, self.setup)
        self.driver.synchronize(self.setup)
        refused = [name for name, shape in shapes.items() if not context.set_input_shape(name, shape)]
        if not ready or refused:
            raise BackendError(f"an engine refuses the shape of {refused}: {self.logger.reason()}", hint=_VERIFY)
        outputs = tuple(tensor.name for tensor in self.tensors if not tensor.is_input)
        return TensorRtContext(context=context, config=config, outputs=outputs, logger=self.logger)

    def refit(self, weights: Mapping[str, Array]) -> None:
        """See `Engine`."""
        trt = self.library.module
        if not self.engine.refittable:
            raise BackendError(
                "the engine's weights cannot be replaced", hint="build the bundle on a machine with a GPU, with --refit"
            )
        self.logger.forget()
        refitter = trt.Refitter(self.engine, self.logger)
        kept = {name: self._as_built(refitter, name, array) for name, array in weights.items()}  # read only at the end
        unknown = [name for name, array in kept.items() if not refitter.set_named_weights(name, trt.Weights(array))]
        missing = list(refitter.get_missing_weights())
        if unknown or missing:
            what = f"does not take {unknown[:3]}" if unknown else f"also needs {missing[:3]}"
            raise BackendError(f"the engine {what}: {self.logger.reason()}", hint="give weights of the same model")
        if not refitter.refit_cuda_engine():
            raise BackendError(f"the weights were not replaced: {self.logger.reason()}", hint=_VERIFY)

    def layer_report(self) -> str:
        """See `Engine`."""
        inspector = self.engine.create_engine_inspector()
        return str(inspector.get_engine_information(self.library.module.LayerInformationFormat.JSON))

    def close(self) -> None:
        """See `Engine`."""
        self.engine = None

    def _as_built(self, refitter: Any, name: str, array: Array) -> Array:  # noqa: ANN401
        """A weight in the type of the one that it replaces: the mixed graph has halved some and not others."""
        prototype = refitter.get_weights_prototype(name)
        dtype = array.dtype if prototype.size < 0 else self.library.module.nptype(prototype.dtype)
        return np.ascontiguousarray(array, dtype)

    def _covers(self, name: str, profile: int, shape: tuple[int, ...]) -> bool:
        smallest, _, largest = self.engine.get_tensor_profile_shape(name, profile)
        return len(shape) == len(smallest) and all(
            low <= size <= high for low, size, high in zip(smallest, shape, largest, strict=True)
        )


@dataclass(slots=True, kw_only=True, eq=False)
class TensorRtContext:
    """See `EngineContext`. config: what it was made with, which it may still read."""

    context: Any
    config: Any
    outputs: tuple[str, ...]
    logger: Any

    def memory_bytes(self) -> int:
        """See `EngineContext`."""
        return int(self.context.update_device_memory_size_for_shapes())

    def output_shapes(self) -> dict[str, tuple[int, ...]]:
        """See `EngineContext`."""
        return {name: tuple(self.context.get_tensor_shape(name)) for name in self.outputs}

    def set_memory(self, address: int, size: int) -> None:
        """See `EngineContext`."""
        self.context.set_device_memory(address, size)

    def set_address(self, name: str, address: int) -> None:
        """See `EngineContext`."""
        self.logger.forget()
        if not self.context.set_tensor_address(name, address):
            raise BackendError(f"an engine refuses the address of {name}: {self.logger.reason()}", hint=_VERIFY)

    def enqueue(self, stream: int) -> None:
        """See `EngineContext`."""
        self.logger.forget()
        if not self.context.execute_async_v3(stream):
            raise BackendError(f"an engine failed: {self.logger.reason()}", hint=_VERIFY)

    def close(self) -> None:
        """See `EngineContext`."""
        self.context = self.config = None


def remembering_logger(trt: Any) -> Any:  # noqa: ANN401  (TensorRT's classes exist once its module is loaded)
    """A logger that prints warnings to standard error, and remembers errors to say why something failed."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.errors: deque[str] = deque(maxlen=_ERRORS)

        def log(self, severity: Any, message: str) -> None:  # noqa: ANN401
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)
            if severity not in (trt.ILogger.INFO, trt.ILogger.VERBOSE):
                sys.stderr.write(f"{message}\n")

        def forget(self) -> None:
            """Something new is about to be tried: what was said before is not its reason."""
            self.errors.clear()

        def reason(self) -> str:
            """The first error since then."""
            return self.errors[0] if self.errors else "TensorRT gives no reason"

    return Logger()
