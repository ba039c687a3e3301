"""The TensorRT runner: opens the .engine files of a bundle on an NVIDIA GPU, and replays them as CUDA graphs.

No PyTorch: memory, streams and graphs through `CudaDriver`. All contexts share one arena for their activations, since
one stream runs them one after the other; border tensors have fixed addresses, which captured graphs rely on.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import numpy as np

from sdrt.bundle import Bundle
from sdrt.errors import BackendError
from sdrt.runners.base import STEP, TEXT_ENCODER, VAE_DECODER, Array, FloatArray
from sdrt.runners.cuda import CudaDriver, Engine, EngineContext, Pinned, Shapes
from sdrt.runners.feeds import asked_component, checked_feeds

MOST_GRAPHS = 16  # captured at a time; each shape of each component has its own
_OPENED_AT_ONCE = (TEXT_ENCODER, STEP, VAE_DECODER)

Key = tuple[str, tuple[tuple[str, tuple[int, ...]], ...]]


@dataclass(slots=True, kw_only=True)
class Counters:
    """What happened since the runner was opened, for reports and metrics."""

    captures: int = 0
    replays: int = 0
    plain_launches: int = 0
    failed_captures: int = 0
    evictions: int = 0


@dataclass(slots=True, kw_only=True)
class _Border:
    """An engine and the memory of its border tensors, large enough for every profile and never moved."""

    engine: Engine
    device: dict[str, int]
    pinned: dict[str, Pinned]


@dataclass(slots=True, kw_only=True)
class _Prepared:
    """An engine ready for one set of shapes. graph: None until captured; plain: capturing failed, so it never is."""

    context: EngineContext
    input_bytes: dict[str, int]
    outputs: dict[str, tuple[int, ...]]
    graph: int | None = None
    plain: bool = False


@dataclass(slots=True, kw_only=True)
class _Arena:
    """The one piece of activation memory. address 0: none yet."""

    address: int = 0
    size: int = 0


@dataclass(slots=True, kw_only=True)
class _State:
    """Everything on the device."""

    stream: int
    arena: _Arena = field(default_factory=_Arena)
    borders: dict[str, _Border] = field(default_factory=dict)
    prepared: OrderedDict[Key, _Prepared] = field(default_factory=OrderedDict)


class TensorRtRunner:
    """Runs a bundle's engines through TensorRT. Calls from several threads are served one after the other."""

    def __init__(self, bundle: Bundle, driver: CudaDriver, *, most_graphs: int = MOST_GRAPHS) -> None:
        self._bundle = bundle
        self._driver = driver
        self._most_graphs = most_graphs
        self._lock = threading.Lock()
        self._closed = False
        self.counters = Counters()
        self._state = _State(stream=driver.create_stream())
        try:
            for name in _OPENED_AT_ONCE:
                self._border(name)
        except BaseException:  # nobody else can release the device
            self.close()
            raise

    def run(self, component: str, feeds: Mapping[str, Array]) -> dict[str, FloatArray]:
        """See `Runner.run`. Raises BackendError, before the device is touched, for shapes outside every profile."""
        with self._lock:
            if self._closed:
                raise BackendError(f"{component} was asked of a runner that is closed", hint="open the bundle again")
            ready = checked_feeds(asked_component(self._bundle, component), feeds)
            border = self._border(component)
            prepared = self._prepare(component, border, {name: array.shape for name, array in ready.items()})
            for name, array in ready.items():
                np.copyto(_typed(border.pinned[name], array.dtype, array.shape), array)
            self._evaluate(border, prepared)
            self._driver.synchronize(self._state.stream)
            return {name: self._result(border, name, shape) for name, shape in prepared.outputs.items()}

    def close(self) -> None:
        """See `Runner.close`."""
        if self._closed:
            return
        self._closed = True
        state, driver = self._state, self._driver
        while state.prepared:
            self._drop_oldest()
        for border in state.borders.values():
            for address in border.device.values():
                driver.free(address)
            for memory in border.pinned.values():
                driver.free_pinned(memory)
            border.engine.close()
        state.borders.clear()
        if state.arena.address:
            driver.free(state.arena.address)
        driver.destroy_stream(state.stream)
        driver.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _border(self, component: str) -> _Border:
        """The component's engine, loaded on first use, and its border's memory."""
        borders = self._state.borders
        if component not in borders:
            record = self._bundle.component(component)
            engine = self._driver.open_engine(self._bundle.file(record.files[0]))
            border = _Border(engine=engine, device={}, pinned={})
            borders[component] = border
            for name, size in _largest_bytes(engine).items():
                border.device[name] = self._driver.allocate(size)
                border.pinned[name] = self._driver.allocate_pinned(size)
        return borders[component]

    def _prepare(self, component: str, border: _Border, shapes: Shapes) -> _Prepared:
        """A context for these shapes: the one used before, or a new one in place of the least recently used."""
        key = (component, tuple(sorted(shapes.items())))
        known = self._state.prepared
        if key in known:
            known.move_to_end(key)
            return known[key]
        profile = border.engine.profile_for(shapes)
        if profile is None:
            asked = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
            raise BackendError(
                f"{component} was built for other shapes than {asked}",
                hint="ask for what the bundle accepts: sdrt inspect",
            )
        while len(known) >= self._most_graphs:
            self._drop_oldest()
            self.counters.evictions += 1
        context = border.engine.create_context(profile, shapes)
        try:
            self._share_arena(context.memory_bytes())
            context.set_memory(self._state.arena.address, self._state.arena.size)
            for name, address in border.device.items():
                context.set_address(name, address)
        except BaseException:
            context.close()
            raise
        tensors = {tensor.name: tensor for tensor in border.engine.tensors}
        known[key] = _Prepared(
            context=context,
            input_bytes={name: _bytes(shape, tensors[name].dtype) for name, shape in shapes.items()},
            outputs=context.output_shapes(),
        )
        return known[key]

    def _share_arena(self, needed: int) -> None:
        """Make the arena large enough. A larger one lies elsewhere, so graphs captured with the old one are dropped."""
        arena = self._state.arena
        if needed <= arena.size:
            return
        self._driver.synchronize(self._state.stream)
        for prepared in self._state.prepared.values():
            if prepared.graph is not None:
                self._driver.destroy_graph(prepared.graph)
                prepared.graph = None
        if arena.address:
            self._driver.free(arena.address)
            arena.address, arena.size = 0, 0
        try:
            arena.address, arena.size = self._driver.allocate(needed), needed
        except BackendError:
            while self._state.prepared:  # their memory is gone
                self._drop_oldest()
            raise
        for prepared in self._state.prepared.values():
            prepared.context.set_memory(arena.address, arena.size)

    def _evaluate(self, border: _Border, prepared: _Prepared) -> None:
        """Queue uploads, the engine and downloads: from the second time on as one graph."""
        stream = self._state.stream

        def queue() -> None:
            for name, size in prepared.input_bytes.items():
                self._driver.upload(border.device[name], border.pinned[name].address, size, stream)
            prepared.context.enqueue(stream)
            for name, shape in prepared.outputs.items():
                size = _bytes(shape, _dtype(border.engine, name))
                self._driver.download(border.pinned[name].address, border.device[name], size, stream)

        if prepared.graph is not None:
            self._driver.launch(prepared.graph, stream)
            self.counters.replays += 1
            return
        queue()  # also before a capture: what a context does only the first time is not allowed in one
        self.counters.plain_launches += 1
        if not prepared.plain:
            self._driver.synchronize(stream)
            self._capture(prepared, queue)

    def _capture(self, prepared: _Prepared, queue: Callable[[], None]) -> None:
        """Record the work for the next time. Where that fails, plain launches go on serving."""
        stream = self._state.stream
        try:
            self._driver.begin_capture(stream)
            try:
                queue()
            finally:
                graph = self._driver.end_capture(stream)
            prepared.graph = graph
            self.counters.captures += 1
        except BackendError:
            prepared.plain = True
            self.counters.failed_captures += 1

    def _drop_oldest(self) -> None:
        _, prepared = self._state.prepared.popitem(last=False)
        self._driver.synchronize(self._state.stream)
        if prepared.graph is not None:
            self._driver.destroy_graph(prepared.graph)
        prepared.context.close()

    def _result(self, border: _Border, name: str, shape: tuple[int, ...]) -> FloatArray:
        return np.array(_typed(border.pinned[name], _dtype(border.engine, name), shape), np.float32)


def _typed(memory: Pinned, dtype: np.dtype[np.generic], shape: tuple[int, ...]) -> Array:
    """The beginning of `memory` as an array."""
    array: Array = memory.bytes[: _bytes(shape, dtype)].view(dtype).reshape(shape)
    return array


def _dtype(engine: Engine, name: str) -> np.dtype[np.generic]:
    return next(tensor.dtype for tensor in engine.tensors if tensor.name == name)


def _bytes(shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> int:
    return int(np.prod(shape, dtype=np.int64)) * dtype.itemsize


def _largest_bytes(engine: Engine) -> dict[str, int]:
    """The most memory that each border tensor needs under any profile."""
    sizes = {tensor.name: 0 for tensor in engine.tensors}
    for profile, inputs in enumerate(engine.largest_shapes()):
        context = engine.create_context(profile, inputs)
        shapes = {**inputs, **context.output_shapes()}
        context.close()
        for tensor in engine.tensors:
            sizes[tensor.name] = max(sizes[tensor.name], _bytes(shapes[tensor.name], tensor.dtype))
    return sizes
