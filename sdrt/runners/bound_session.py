"""An ONNX Runtime session with fixed device buffers: one binding for each set of shapes, replayed as a CUDA graph."""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy.typing as npt

from sdrt.runners.base import Array
from sdrt.runners.providers import NO_GRAPH

MOST_SHAPES = 16  # each holds its buffers and a graph


class Value(Protocol):
    """A tensor on a device: `onnxruntime.OrtValue`."""

    def update_inplace(self, data: Array) -> None:
        """Copy into the buffer, whose address stays."""
        ...


class Binding(Protocol):
    """What a run reads and writes: `onnxruntime.IOBinding`."""

    def bind_ortvalue_input(self, name: str, ortvalue: Value) -> None:
        """Read an input from a buffer."""
        ...

    def bind_output(self, name: str, device_type: str = "cpu", device_id: int = 0) -> None:
        """Let the session make the buffer of an output."""
        ...

    def bind_ortvalue_output(self, name: str, ortvalue: Value) -> None:
        """Write an output into a buffer."""
        ...

    def get_outputs(self) -> Sequence[Value]:
        """The outputs of the last run, where they lie."""
        ...

    def copy_outputs_to_cpu(self) -> Sequence[Array]:
        """The outputs of the last run, as new arrays."""
        ...

    def synchronize_inputs(self) -> None:
        """Wait for copies of inputs."""
        ...

    def synchronize_outputs(self) -> None:
        """Wait for copies of outputs."""
        ...


class Session(Protocol):
    """The part of `onnxruntime.InferenceSession` that is used here."""

    def io_binding(self) -> Binding:
        """A new, empty binding."""
        ...

    def run_with_iobinding(self, iobinding: Binding, run_options: object = None) -> None:
        """Run once."""
        ...

    def release_captured_graph(self, graph_annotation_id: int = 0) -> None:
        """Forget a CUDA graph."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceMemory:
    """Where a session's tensors lie, and how ONNX Runtime's objects are made.

    device: "cuda" or "cpu". make_value(shape, dtype, device): an empty tensor. make_run_options(graph): the options of
    a run that captures or replays the graph of that id; None for sessions without graphs.
    """

    device: str
    make_value: Callable[[tuple[int, ...], npt.DTypeLike, str], Value]
    make_run_options: Callable[[int], object] | None = None


@dataclass(slots=True, kw_only=True)
class _Bound:
    """The buffers of one set of shapes. ran: whether the outputs have theirs too. graph: an id of its own."""

    binding: Binding
    inputs: Mapping[str, Value]
    graph: int
    ran: bool = False


class BoundSession:
    """Runs one session; has `run` in common with `onnxruntime.InferenceSession`. Not thread-safe."""

    def __init__(self, session: Session, memory: DeviceMemory, *, most_shapes: int = MOST_SHAPES) -> None:
        self._session = session
        self._memory = memory
        self._most_shapes = most_shapes
        self._bound: OrderedDict[tuple[tuple[str, tuple[int, ...]], ...], _Bound] = OrderedDict()
        self._graphs = 0

    def run(self, names: Sequence[str], feeds: Mapping[str, Array]) -> list[Array]:
        """The outputs of those names, as new arrays. Shapes that were run before use their buffers again.

        Which sizes the outputs have is not known before the first run: there the session makes their buffers, and
        nothing is captured. From the second on every address is fixed. Raises what ONNX Runtime raises; the buffers
        of these shapes are made anew then.
        """
        key = tuple((name, array.shape) for name, array in feeds.items())
        bound = self._bound.pop(key, None)  # and back at the end: the last is the one used last
        if bound is None:
            self._make_room()
            bound = self._bind(names, feeds)
        for name, array in feeds.items():
            bound.inputs[name].update_inplace(array)
        bound.binding.synchronize_inputs()
        self._session.run_with_iobinding(bound.binding, self._run_options(bound))
        bound.binding.synchronize_outputs()
        outputs = list(bound.binding.copy_outputs_to_cpu())
        if not bound.ran:
            for name, value in zip(names, bound.binding.get_outputs(), strict=True):
                bound.binding.bind_ortvalue_output(name, value)
            bound.ran = True
        self._bound[key] = bound
        return outputs

    def _run_options(self, bound: _Bound) -> object:
        make = self._memory.make_run_options
        return None if make is None else make(bound.graph if bound.ran else NO_GRAPH)

    def _bind(self, names: Sequence[str], feeds: Mapping[str, Array]) -> _Bound:
        self._graphs += 1  # ids are never used again: a graph knows its buffers by their addresses
        memory, binding = self._memory, self._session.io_binding()
        inputs = {name: memory.make_value(array.shape, array.dtype, memory.device) for name, array in feeds.items()}
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        for name in names:
            binding.bind_output(name, memory.device, 0)
        return _Bound(binding=binding, inputs=inputs, graph=self._graphs)

    def _make_room(self) -> None:
        while len(self._bound) >= self._most_shapes:
            _, oldest = self._bound.popitem(last=False)
            if self._memory.make_run_options is not None:
                self._session.release_captured_graph(oldest.graph)
