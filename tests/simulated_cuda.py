"""A GPU for tests: enforces CUDA's rules, and evaluates engines with ONNX Runtime on the ONNX that they stand for.

Work is queued and runs only when somebody waits for it, so that a result read too early is not there yet. A broken rule
raises `BrokenRuleError`, which is no SdrtError: nothing in sdrt may catch it.
"""

import itertools
import json
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from sdrt.errors import BackendError
from sdrt.runners.cuda import EngineTensor, Pinned

ARENA_ALIGNMENT = 256
GARBAGE = 0xFF  # NaN as a float


class BrokenRuleError(Exception):
    """What would be undefined behaviour, or an error of CUDA, on a real device."""


@dataclass(eq=False)
class Stream:
    queue: list = field(default_factory=list)
    capturing: list | None = None


class SimulatedCuda:
    """profiles: file name's folder (the component) → optimization profiles.

    memory_limit: bytes of device memory. refuse_capture: every capture fails, as with a kernel that synchronises.
    """

    def __init__(self, profiles, *, memory_limit=2**31, refuse_capture=False):
        self.profiles = profiles
        self.memory_limit = memory_limit
        self.refuse_capture = refuse_capture
        self.blocks = {}
        self.pinned = {}
        self.streams = {}
        self.graphs = {}
        self.events = {}
        self.contexts = set()
        self.engines = set()
        self.log = []
        self.poison = None  # (component, output name): its next result is NaN
        self._handles = itertools.count(1)
        self._next_address = 2**20
        self._clock = itertools.count()

    # memory

    def allocate(self, size):
        self._forbid_while_capturing("allocate")
        if size <= 0:
            raise BrokenRuleError(f"allocate({size})")
        if self.used() + size > self.memory_limit:
            raise BackendError("CUDA failed: cudaErrorMemoryAllocation", hint="free some memory")
        address = self._next_address
        self._next_address += -(-size // ARENA_ALIGNMENT) * ARENA_ALIGNMENT + ARENA_ALIGNMENT
        self.blocks[address] = np.full(size, GARBAGE, np.uint8)
        return address

    def free(self, address):
        self._forbid_while_capturing("free")
        if self.pending():
            raise BrokenRuleError("memory is freed while work is queued that may use it")
        if self.blocks.pop(address, None) is None:
            raise BrokenRuleError(f"free of {address}, which is not allocated")

    def used(self):
        return sum(block.size for block in self.blocks.values())

    def allocate_pinned(self, size):
        self._forbid_while_capturing("allocate_pinned")
        content = np.full(size, GARBAGE, np.uint8)
        memory = Pinned(address=content.ctypes.data, bytes=content)
        self.pinned[memory.address] = memory
        return memory

    def free_pinned(self, memory):
        self._forbid_while_capturing("free_pinned")
        if self.pending():
            raise BrokenRuleError("pinned memory is freed while work is queued that may use it")
        if self.pinned.pop(memory.address, None) is None:
            raise BrokenRuleError("free of pinned memory that is not allocated")

    def view(self, address, size):
        for start, block in self.blocks.items():
            if start <= address and address + size <= start + block.size:
                return block[address - start : address - start + size]
        raise BrokenRuleError(f"{size} bytes at {address} are not allocated on the device")

    def host_view(self, address, size):
        for start, memory in self.pinned.items():
            if start <= address and address + size <= start + memory.bytes.size:
                return memory.bytes[address - start : address - start + size]
        raise BrokenRuleError(f"{size} bytes at {address} are not pinned: the copy would not be asynchronous")

    # streams

    def create_stream(self):
        self._forbid_while_capturing("create_stream")
        handle = next(self._handles)
        self.streams[handle] = Stream()
        return handle

    def destroy_stream(self, stream):
        if self._stream(stream).queue:
            raise BrokenRuleError("a stream is destroyed with work in it")
        del self.streams[stream]

    def upload(self, target, source, size, stream):
        self._queue(stream, partial(self._copy_in, target, source, size), name="upload")

    def download(self, target, source, size, stream):
        self._queue(stream, partial(self._copy_out, target, source, size), name="download")

    def copy(self, target, source, size, stream):
        self._queue(stream, partial(self._copy_on, target, source, size), name="copy")

    def synchronize(self, stream):
        self._forbid_while_capturing("synchronize")
        queue = self._stream(stream).queue
        while queue:
            queue.pop(0)()

    def pending(self):
        return any(stream.queue for stream in self.streams.values())

    # graphs

    def begin_capture(self, stream):
        if self._stream(stream).capturing is not None:
            raise BrokenRuleError("a stream is captured twice at a time")
        self._stream(stream).capturing = []

    def end_capture(self, stream):
        work = self._stream(stream).capturing
        self._stream(stream).capturing = None
        if work is None:
            raise BrokenRuleError("the stream was not captured")
        if self.refuse_capture:
            raise BackendError("CUDA failed: cudaErrorStreamCaptureInvalidated", hint="none")
        handle = next(self._handles)
        self.graphs[handle] = work
        self.log.append("capture")
        return handle

    def launch(self, graph, stream):
        if graph not in self.graphs:
            raise BrokenRuleError("a graph is launched that was destroyed")
        for work in self.graphs[graph]:
            self._queue(stream, work, name=None)
        self.log.append("launch")

    def destroy_graph(self, graph):
        if self.pending():
            raise BrokenRuleError("a graph is destroyed while work is queued")
        if self.graphs.pop(graph, None) is None:
            raise BrokenRuleError("a graph is destroyed twice")

    # events

    def record_event(self, stream):
        handle = next(self._handles)
        self.events[handle] = None
        self._queue(stream, partial(self._reach, handle), name="event")
        return handle

    def wait(self, event):
        """Runs the work of every stream up to the event."""
        self._forbid_while_capturing("wait")
        if event not in self.events:
            raise BrokenRuleError("an event is waited for that was destroyed")
        self.log.append("wait")
        for stream in self.streams.values():
            while self.events[event] is None and stream.queue:
                stream.queue.pop(0)()
        if self.events[event] is None:
            raise BrokenRuleError("an event is waited for that nobody will reach")

    def fill_normal(self, target, draw, stream):
        self._queue(stream, partial(self._fill, target, draw), name="fill_normal")

    def elapsed_seconds(self, start, end):
        times = [self.events[event] for event in (start, end)]
        if None in times:
            raise BrokenRuleError("an event is read before it was reached")
        return (times[1] - times[0]) * 1e-3

    def destroy_event(self, event):
        del self.events[event]

    # engines

    def open_engine(self, path):
        self._forbid_while_capturing("open_engine")
        engine = SimulatedEngine(self, path)
        self.engines.add(engine)
        return engine

    @staticmethod
    def session(path, weights):
        import onnx
        import onnxruntime

        model = onnx.load(path, load_external_data=False)
        for tensor in model.graph.initializer:
            if tensor.name in weights:
                tensor.CopyFrom(onnx.numpy_helper.from_array(weights[tensor.name], tensor.name))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def keep(self):
        self.log.append("keep")

    def close(self):
        kinds = ("blocks", "pinned", "streams", "graphs", "events", "contexts", "engines")
        left = {name: len(getattr(self, name)) for name in kinds if getattr(self, name)}
        if left:
            raise BrokenRuleError(f"not released: {left}")

    def _stream(self, stream):
        if stream not in self.streams:
            raise BrokenRuleError(f"stream {stream} does not exist")
        return self.streams[stream]

    def _queue(self, stream, work, *, name):
        own = self._stream(stream)
        if name is not None:
            self.log.append(name)
        (own.queue if own.capturing is None else own.capturing).append(work)

    def _forbid_while_capturing(self, what):
        if any(stream.capturing is not None for stream in self.streams.values()):
            raise BrokenRuleError(f"{what} while a stream is captured")

    def _copy_in(self, target, source, size):
        self.view(target, size)[:] = self.host_view(source, size)

    def _copy_out(self, target, source, size):
        self.host_view(target, size)[:] = self.view(source, size)

    def _copy_on(self, target, source, size):
        self.view(target, size)[:] = self.view(source, size).copy()

    def _fill(self, target, draw):
        self.view(target, 4 * draw.count)[:] = draw.values().view(np.uint8)

    def _reach(self, event):
        if event in self.events:  # destroyed ones are reached by nobody's account
            self.events[event] = next(self._clock)


@dataclass(eq=False)
class SimulatedEngine:
    cuda: SimulatedCuda
    path: object

    def __post_init__(self):
        self.component = self.path.parent.name
        self.session = self.cuda.session(self.path, {})
        self.profiles = self.cuda.profiles[self.component]
        names = {"tensor(float)": "float32", "tensor(int64)": "int64"}
        self.tensors = tuple(
            EngineTensor(name=node.name, dtype=np.dtype(names[node.type]), is_input=is_input)
            for is_input, nodes in ((True, self.session.get_inputs()), (False, self.session.get_outputs()))
            for node in nodes
        )

    def profile_for(self, shapes):
        for index, profile in enumerate(self.profiles):
            if all(self._inside(profile.shapes[name], shape) for name, shape in shapes.items()):
                return index
        return None

    @staticmethod
    def _inside(allowed, shape):
        smallest, _, largest = allowed
        return len(shape) == len(smallest) and all(
            low <= size <= high for low, size, high in zip(smallest, shape, largest, strict=True)
        )

    def largest_shapes(self):
        return tuple({name: shape[2] for name, shape in profile.shapes.items()} for profile in self.profiles)

    def create_context(self, profile, shapes):
        self.cuda._forbid_while_capturing("create_context")
        allowed = self.profiles[profile].shapes
        for name, shape in shapes.items():
            if not self._inside(allowed[name], shape):
                raise BrokenRuleError(f"{name} {shape} is outside profile {profile}")
        context = SimulatedContext(self, dict(shapes))
        self.cuda.contexts.add(context)
        return context

    def refit(self, weights):
        if any(context.engine is self for context in self.cuda.contexts):
            raise BrokenRuleError("an engine is refitted while it has contexts")
        self.cuda.log.append(f"refit {self.component}")
        self.session = self.cuda.session(self.path, weights)

    def layer_report(self):
        import onnx

        nodes = onnx.load(self.path, load_external_data=False).graph.node
        halves = [{"Format/Datatype": "Row major linear FP16 format"}]
        return json.dumps(
            {"Layers": [{"Name": node.name, "LayerType": node.op_type, "Outputs": halves} for node in nodes]}
        )

    def close(self):
        if any(context.engine is self for context in self.cuda.contexts):
            raise BrokenRuleError("an engine is released before its contexts")
        self.cuda.engines.remove(self)


@dataclass(eq=False)
class SimulatedContext:
    engine: SimulatedEngine
    shapes: dict
    memory: tuple | None = None
    addresses: dict = field(default_factory=dict)

    def memory_bytes(self):
        return 4 * sum(int(np.prod(shape)) for shape in self.shapes.values())

    def output_shapes(self):
        zeros = {
            tensor.name: np.zeros(self.shapes[tensor.name], tensor.dtype)
            for tensor in self.engine.tensors
            if tensor.is_input
        }
        outputs = [tensor.name for tensor in self.engine.tensors if not tensor.is_input]
        return dict(zip(outputs, (array.shape for array in self.engine.session.run(outputs, zeros)), strict=True))

    def set_memory(self, address, size):
        if size < self.memory_bytes():
            raise BrokenRuleError(f"{size} bytes of activation memory, where {self.memory_bytes()} are needed")
        self.memory = (address, size)

    def set_address(self, name, address):
        self.addresses[name] = address

    def enqueue(self, stream):
        if self not in self.engine.cuda.contexts:
            raise BrokenRuleError("a context is used that was released")
        if self.memory is None:
            raise BrokenRuleError("a context has no activation memory")
        if missing := [tensor.name for tensor in self.engine.tensors if tensor.name not in self.addresses]:
            raise BrokenRuleError(f"no address for {missing}")
        work = partial(self._execute, self.memory, dict(self.addresses))
        self.engine.cuda._queue(stream, work, name=f"run {self.engine.component}")

    def close(self):
        if self.engine.cuda.pending():
            raise BrokenRuleError("a context is released while work is queued")
        self.engine.cuda.contexts.remove(self)

    def _execute(self, memory, addresses):
        cuda = self.engine.cuda
        if self not in cuda.contexts:
            raise BrokenRuleError("work of a context runs that was released")
        cuda.view(*memory)[:] = GARBAGE  # activations of others do not survive
        feeds = {}
        for tensor in self.engine.tensors:
            if tensor.is_input:
                shape = self.shapes[tensor.name]
                size = int(np.prod(shape)) * tensor.dtype.itemsize
                feeds[tensor.name] = cuda.view(addresses[tensor.name], size).view(tensor.dtype).reshape(shape)
        outputs = [tensor.name for tensor in self.engine.tensors if not tensor.is_input]
        for name, array in zip(outputs, self.engine.session.run(outputs, feeds), strict=True):
            if cuda.poison == (self.engine.component, name):
                array = np.full_like(array, np.nan)
                cuda.poison = None
            content = np.ascontiguousarray(array)
            cuda.view(addresses[name], content.nbytes)[:] = content.view(np.uint8).reshape(-1)
