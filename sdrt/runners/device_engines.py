"""A bundle's engines on one GPU: their border memory, contexts, the arena that all share, and their captured graphs.

One stream runs everything one after the other, so all contexts share one arena for their activations. Border tensors
have fixed addresses, which captured graphs rely on.
"""

import contextlib
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from sdrt.bundle import Bundle
from sdrt.errors import BackendError
from sdrt.runners.base import Array
from sdrt.runners.cuda import CudaDriver, Engine, EngineContext, Pinned, Shapes
from sdrt.runners.device_pool import Pool

_SMALLEST_ARENA = 256  # bytes: an engine that needs none still wants an address

# call: feeds in, results out. step: everything is on the device already and stays there.
Work = Literal["call", "step"]
Key = tuple[str, tuple[tuple[str, tuple[int, ...]], ...]]


@dataclass(slots=True, kw_only=True)
class Counters:
    """What happened since the runner was opened, for reports and metrics."""

    captures: int = 0
    replays: int = 0
    plain_launches: int = 0
    failed_captures: int = 0
    evictions: int = 0


class Tenant(Protocol):
    """Somebody whose data lies in a component's border memory between two calls."""

    def move_out(self) -> None:
        """Save the data: another is about to use the memory."""
        ...


@dataclass(slots=True, kw_only=True)
class Border:
    """An engine and the memory of its border tensors, large enough for every profile and never moved."""

    engine: Engine
    device: dict[str, int] = field(default_factory=dict)
    pinned: dict[str, Pinned] = field(default_factory=dict)
    dtypes: dict[str, np.dtype[np.generic]] = field(default_factory=dict)
    tenant: Tenant | None = None

    def staged(self, name: str, shape: tuple[int, ...]) -> Array:
        """The pinned memory of a tensor, as an array of this shape."""
        return typed(self.pinned[name], self.dtypes[name], shape)

    def bytes_of(self, name: str, shape: tuple[int, ...]) -> int:
        """The size of a border tensor of this shape."""
        return byte_count(shape, self.dtypes[name])


@dataclass(slots=True, kw_only=True)
class Prepared:
    """An engine ready for one set of shapes. plain: the work whose capture failed, so it is not tried again."""

    context: EngineContext
    inputs: dict[str, tuple[int, ...]]
    outputs: dict[str, tuple[int, ...]]
    graphs: dict[Work, int] = field(default_factory=dict)
    plain: set[Work] = field(default_factory=set)


@dataclass(slots=True, kw_only=True)
class _Block:
    """A piece of device memory that grows. address 0: none yet."""

    address: int = 0
    size: int = 0


class DeviceEngines:
    """Not thread-safe.

    most_graphs: how many sets of shapes are kept ready, over all components. capture: whether to make graphs at all.
    """

    def __init__(self, bundle: Bundle, driver: CudaDriver, *, most_graphs: int, capture: bool) -> None:
        self.driver = driver
        self.stream = driver.create_stream()
        self.counters = Counters()
        self.device_pool = Pool(driver.allocate, driver.free)
        self.pinned_pool = Pool(driver.allocate_pinned, driver.free_pinned)
        self._bundle = bundle
        self._most_graphs = most_graphs
        self._capture = capture
        self._arena = _Block()
        self._borders: dict[str, Border] = {}
        self._prepared: OrderedDict[Key, Prepared] = OrderedDict()

    def border(self, component: str) -> Border:
        """The component's engine, loaded on first use, and its border's memory."""
        if component not in self._borders:
            record = self._bundle.component(component)
            engine = self.driver.open_engine(self._bundle.file(record.files[0]))
            border = Border(engine=engine, dtypes={tensor.name: tensor.dtype for tensor in engine.tensors})
            try:
                for name, size in _largest_bytes(engine).items():
                    border.device[name] = self.driver.allocate(size)
                    border.pinned[name] = self.driver.allocate_pinned(size)
            except BaseException:  # the next to ask shall find no half-made one
                self._unload(border)
                raise
            self._borders[component] = border
        return self._borders[component]

    @contextlib.contextmanager
    def staging(self, size: int) -> Iterator[Pinned]:
        """Pinned memory for work that has ended when the block is left."""
        lease = self.pinned_pool.take(size)
        try:
            yield lease.block
        finally:
            self.pinned_pool.give(lease)

    def claim(self, border: Border, tenant: Tenant | None) -> None:
        """From now on the border's memory is the tenant's, or that of a call which leaves nothing in it."""
        if border.tenant is not None and border.tenant is not tenant:
            border.tenant.move_out()
        border.tenant = tenant

    def prepare(self, component: str, shapes: Shapes) -> Prepared:
        """A context for these shapes: the one used before, or a new one in place of the least recently used.

        Raises BackendError, before the device is touched, for shapes outside every profile.
        """
        key = (component, tuple(sorted(shapes.items())))
        if key in self._prepared:
            self._prepared.move_to_end(key)
            return self._prepared[key]
        border = self.border(component)
        profile = border.engine.profile_for(shapes)
        if profile is None:
            asked = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
            raise BackendError(
                f"{component} was built for other shapes than {asked}",
                hint="ask for what the bundle accepts: sdrt inspect",
            )
        while len(self._prepared) >= self._most_graphs:
            self._drop_oldest()
            self.counters.evictions += 1
        context = border.engine.create_context(profile, shapes)
        try:
            self._share_arena(max(context.memory_bytes(), _SMALLEST_ARENA))
            context.set_memory(self._arena.address, self._arena.size)
            for name, address in border.device.items():
                context.set_address(name, address)
        except BaseException:
            context.close()
            raise
        prepared = Prepared(context=context, inputs=dict(shapes), outputs=context.output_shapes())
        self._prepared[key] = prepared
        return prepared

    def launch(self, prepared: Prepared, work: Work, queue: Callable[[], None]) -> None:
        """Queue the work: as its graph where there is one, plainly otherwise."""
        if work in prepared.graphs:
            self.driver.launch(prepared.graphs[work], self.stream)
            self.counters.replays += 1
        else:
            queue()
            self.counters.plain_launches += 1

    def capture(self, prepared: Prepared, work: Work, queue: Callable[[], None]) -> None:
        """Record the work for the next time, after it ran once: what a context does only the first time is not allowed
        in a capture. Where capturing fails, plain launches go on serving, with a warning."""
        if work in prepared.graphs or work in prepared.plain:
            return
        self.driver.synchronize(self.stream)
        self.driver.keep()  # what the first launch compiled
        if not self._capture:
            prepared.plain.add(work)
            return
        try:
            prepared.graphs[work] = self._captured(queue)
            self.counters.captures += 1
        except BackendError as error:
            prepared.plain.add(work)
            self.counters.failed_captures += 1
            warnings.warn(f"no CUDA graph, so launches are slower: {error.message}", stacklevel=2)

    def _captured(self, queue: Callable[[], None]) -> int:
        self.driver.begin_capture(self.stream)
        try:
            queue()
        except BaseException:
            with contextlib.suppress(BackendError):  # that is already known
                self.driver.destroy_graph(self.driver.end_capture(self.stream))
            raise
        return self.driver.end_capture(self.stream)

    def refit(self, component: str, weights: Mapping[str, Array]) -> None:
        """Replace weights of a component; what was prepared for it is prepared again when it is needed."""
        border = self.border(component)
        for key in [key for key in self._prepared if key[0] == component]:
            self._drop(key)
        border.engine.refit(weights)

    def close(self) -> None:
        """Release everything, the driver too, whatever of it fails; raises the first failure then."""
        with contextlib.ExitStack() as releases:  # run in reverse
            releases.callback(self.driver.close)
            releases.callback(self.driver.destroy_stream, self.stream)
            releases.callback(self.device_pool.clear)
            releases.callback(self.pinned_pool.clear)
            if self._arena.address:
                releases.callback(self.driver.free, self._arena.address)
            for border in self._borders.values():
                releases.callback(self._unload, border)
            for key in self._prepared:
                releases.callback(self._drop, key)
            releases.callback(self.driver.keep)
            releases.callback(self.driver.synchronize, self.stream)
        self._borders.clear()

    def _unload(self, border: Border) -> None:
        for address in border.device.values():
            self.driver.free(address)
        for memory in border.pinned.values():
            self.driver.free_pinned(memory)
        border.engine.close()

    def _share_arena(self, needed: int) -> None:
        """Make the arena large enough. A larger one lies elsewhere, so graphs captured with the old one are dropped."""
        arena = self._arena
        if needed <= arena.size:
            return
        self.driver.synchronize(self.stream)
        for prepared in self._prepared.values():
            self._drop_graphs(prepared)
        if arena.address:
            self.driver.free(arena.address)
            arena.address, arena.size = 0, 0
        try:
            arena.address, arena.size = self.driver.allocate(needed), needed
        except BackendError:
            while self._prepared:  # their memory is gone
                self._drop_oldest()
            raise
        for prepared in self._prepared.values():
            prepared.context.set_memory(arena.address, arena.size)

    def _drop_oldest(self) -> None:
        self._drop(next(iter(self._prepared)))

    def _drop(self, key: Key) -> None:
        prepared = self._prepared.pop(key)
        self.driver.synchronize(self.stream)
        self._drop_graphs(prepared)
        prepared.context.close()

    def _drop_graphs(self, prepared: Prepared) -> None:
        for graph in prepared.graphs.values():
            self.driver.destroy_graph(graph)
        prepared.graphs.clear()


def typed(memory: Pinned, dtype: np.dtype[np.generic], shape: tuple[int, ...]) -> Array:
    """The beginning of `memory` as an array."""
    array: Array = memory.bytes[: byte_count(shape, dtype)].view(dtype).reshape(shape)
    return array


def byte_count(shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> int:
    """The size of an array."""
    return int(np.prod(shape, dtype=np.int64)) * dtype.itemsize


def _largest_bytes(engine: Engine) -> dict[str, int]:
    """The most memory that each border tensor needs under any profile."""
    sizes = {tensor.name: 0 for tensor in engine.tensors}
    for profile, inputs in enumerate(engine.largest_shapes()):
        context = engine.create_context(profile, inputs)
        shapes = {**inputs, **context.output_shapes()}
        context.close()
        for tensor in engine.tensors:
            sizes[tensor.name] = max(sizes[tensor.name], byte_count(shapes[tensor.name], tensor.dtype))
    return sizes
