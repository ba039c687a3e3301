"""What the TensorRT runner asks of a GPU, as protocols: memory, streams, graphs and engines. Nothing here needs one.

`sdrt.runners.cuda_python` fulfils them on a real device; the tests with a simulated one that enforces CUDA's rules.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from sdrt.philox import PhiloxDraw

Shapes = Mapping[str, tuple[int, ...]]
Array = npt.NDArray[np.generic]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pinned:
    """Page-locked host memory: the only kind that a copy can be queued from or to. bytes: uint8, a view of it."""

    address: int
    bytes: npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineTensor:
    """A tensor at an engine's border."""

    name: str
    dtype: np.dtype[np.generic]
    is_input: bool


class EngineContext(Protocol):
    """One engine made ready for one set of shapes. Not thread-safe."""

    def memory_bytes(self) -> int:
        """Activation memory that the shapes need."""
        ...

    def output_shapes(self) -> dict[str, tuple[int, ...]]:
        """The outputs' shapes for the inputs' shapes."""
        ...

    def set_memory(self, address: int, size: int) -> None:
        """Where activations go. Must stay valid, and unused by others, while the context's work runs."""
        ...

    def set_address(self, name: str, address: int) -> None:
        """Where a border tensor lies on the device."""
        ...

    def enqueue(self, stream: int) -> None:
        """Queue one evaluation. Raises BackendError."""
        ...

    def close(self) -> None:
        """Release it. Its queued work must have ended."""
        ...


class Engine(Protocol):
    """A loaded engine: its weights are on the device."""

    @property
    def tensors(self) -> tuple[EngineTensor, ...]:
        """The border, inputs first."""
        ...

    def profile_for(self, shapes: Shapes) -> int | None:
        """The first optimization profile that covers these input shapes, or None."""
        ...

    def largest_shapes(self) -> tuple[Shapes, ...]:
        """For each profile the largest input shapes."""
        ...

    def create_context(self, profile: int, shapes: Shapes) -> EngineContext:
        """A context with these input shapes. Raises BackendError when there is no memory for it."""
        ...

    def refit(self, weights: Mapping[str, Array]) -> None:
        """Put these weights in the place of those with the same names, while the engine has no contexts.

        Raises BackendError when the engine was not built for that, or has no such weights.
        """
        ...

    def layer_report(self) -> str:
        """What it is made of: the JSON of TensorRT's inspector."""
        ...

    def close(self) -> None:
        """Release it, after all of its contexts."""
        ...


class CudaDriver(Protocol):
    """One GPU. Streams, graphs and events are handles; addresses are device addresses unless said otherwise.

    While a stream is captured nothing may be allocated, freed or waited for. Every method raises BackendError when
    CUDA refuses.
    """

    def allocate(self, size: int) -> int:
        """Device memory."""
        ...

    def free(self, address: int) -> None:
        """Release what `allocate` gave."""
        ...

    def allocate_pinned(self, size: int) -> Pinned:
        """Page-locked host memory."""
        ...

    def free_pinned(self, memory: Pinned) -> None:
        """Release what `allocate_pinned` gave."""
        ...

    def create_stream(self) -> int:
        """A stream that does not wait for the default stream."""
        ...

    def destroy_stream(self, stream: int) -> None:
        """Release a stream whose work has ended."""
        ...

    def upload(self, target: int, source: int, size: int, stream: int) -> None:
        """Queue a copy from pinned host memory at `source`."""
        ...

    def download(self, target: int, source: int, size: int, stream: int) -> None:
        """Queue a copy to pinned host memory at `target`."""
        ...

    def copy(self, target: int, source: int, size: int, stream: int) -> None:
        """Queue a copy on the device."""
        ...

    def synchronize(self, stream: int) -> None:
        """Wait until all work of the stream has ended."""
        ...

    def begin_capture(self, stream: int) -> None:
        """From now on, work queued on the stream is recorded, not run."""
        ...

    def end_capture(self, stream: int) -> int:
        """The recorded work as a graph that can be launched. Raises BackendError when it cannot be one."""
        ...

    def launch(self, graph: int, stream: int) -> None:
        """Queue a captured graph."""
        ...

    def destroy_graph(self, graph: int) -> None:
        """Release a graph that is not running."""
        ...

    def fill_normal(self, target: int, draw: PhiloxDraw, stream: int) -> None:
        """Queue the making of a draw's numbers, float32 [draw.count]."""
        ...

    def record_event(self, stream: int) -> int:
        """An event that is reached when the stream's work so far has ended."""
        ...

    def wait(self, event: int) -> None:
        """Wait until an event is reached."""
        ...

    def elapsed_seconds(self, start: int, end: int) -> float:
        """The device's time between two events that were reached."""
        ...

    def destroy_event(self, event: int) -> None:
        """Release an event."""
        ...

    def open_engine(self, path: Path) -> Engine:
        """Load an engine. Raises BackendError when the file is none for this device and library."""
        ...

    def keep(self) -> None:
        """Write down what was learnt about this GPU, for the next start. Engines must still be open."""
        ...

    def close(self) -> None:
        """Release what the driver itself holds."""
        ...
