"""`python -m sdrt.engines.tensorrt_child ORDER.json`: one TensorRT engine, built in a process of its own.

TensorRT keeps memory after a build and may be killed for what it takes during one; neither reaches the stage.
"""

import contextlib
import os
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from sdrt.bundle import JsonValue
from sdrt.engines.optimization import OptimizationProfile
from sdrt.engines.polygraphy import fold_graph
from sdrt.errors import BackendError, BuildError
from sdrt.files import write_atomically
from sdrt.progress import Progress
from sdrt.runners.cuda_python import remembering_logger
from sdrt.runners.nvidia import Library, LibraryName, architectures, load_library
from sdrt.worker import serve

CURRENT = "current"  # the target for the GPU at hand, whatever it is


class Order(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What to build.

    targets: architectures such as "sm89", or `CURRENT`; none for every GPU that the library's engines run on.
    own_capture: leave all allocations to the runner, as capturing into its own CUDA graphs needs.
    workspace_bytes: the most scratch memory that a kernel may take; None for what the library thinks right.
    """

    component: str
    library: LibraryName
    onnx_path: str
    engine_path: str
    timing_cache_path: str | None
    profiles: tuple[OptimizationProfile, ...]
    targets: tuple[str, ...]
    own_capture: bool
    refit: bool
    workspace_bytes: int | None


def main(arguments: list[str] | None = None) -> NoReturn:
    """Build what the order says, report {"layers", "engine_bytes"} to the parent, and end this process."""
    (path,) = sys.argv[1:] if arguments is None else arguments
    order = msgspec.json.decode(Path(path).read_bytes(), type=Order)
    session = Session.open(order.library)
    code = serve(lambda progress: build(session, order, progress))
    # TensorRT-RTX 1.7 crashes when a network that had an error recorder is destroyed; the system frees everything.
    os._exit(code)


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """TensorRT's objects of one build, all alive until the process ends."""

    library: Library
    logger: Any
    recorder: Any
    alive: list[object]

    @classmethod
    def open(cls, name: LibraryName) -> "Session":
        """Load the library. BackendError: it is not installed."""
        library = load_library(name)
        trt = library.module
        return cls(library=library, logger=remembering_logger(trt), recorder=error_recorder(trt), alive=[])

    def reason(self) -> str:
        """Why TensorRT refused, in its own words."""
        return str(self.recorder.first() or self.logger.reason())


def build(session: Session, order: Order, progress: Progress) -> JsonValue:
    """Read, set profiles, build, write. BuildError: TensorRT refuses the graph; the message names the layer."""
    trt = session.library.module
    builder = trt.Builder(session.logger)
    builder.error_recorder = session.recorder
    network = _read_network(session, builder, order)
    config = builder.create_builder_config()
    config.progress_monitor = progress_monitor(trt, order.component, progress)
    session.alive.extend((builder, config, config.progress_monitor))
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    _set_flags(trt, config, order)
    _set_targets(session, config, order)
    for each in order.profiles:
        config.add_optimization_profile(_profile(builder, each))
    timing = _open_timing_cache(config, order)
    engine = builder.build_serialized_network(network, config)
    session.alive.extend((timing, engine))
    if engine is None:
        raise BuildError(
            f"{order.library} cannot build {order.component}: {session.reason()}",
            hint="build it with --backend onnxruntime or openvino, and report the layer",
        )
    write_atomically(Path(order.engine_path), memoryview(engine))
    if timing is not None and order.timing_cache_path is not None:
        write_atomically(Path(order.timing_cache_path), bytes(timing.serialize()), overwrite=True)
    return {"layers": int(network.num_layers), "engine_bytes": int(engine.nbytes)}


def error_recorder(trt: Any) -> Any:  # noqa: ANN401
    """TensorRT's errors as data: the first one is the cause."""

    class Recorder(trt.IErrorRecorder):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.recorded: list[tuple[Any, str]] = []

        def clear(self) -> None:
            self.recorded.clear()

        def get_error_code(self, index: int) -> Any:  # noqa: ANN401
            return self.recorded[index][0]

        def get_error_desc(self, index: int) -> str:
            return self.recorded[index][1]

        def has_overflowed(self) -> bool:
            return False

        def num_errors(self) -> int:
            return len(self.recorded)

        def report_error(self, code: Any, description: str) -> bool:  # noqa: ANN401
            self.recorded.append((code, description))
            return False  # the build may go on if it can

        def first(self) -> str | None:
            return self.recorded[0][1] if self.recorded else None

    return Recorder()


def progress_monitor(trt: Any, component: str, progress: Progress) -> Any:  # noqa: ANN401
    """Reports the outermost phase of a build, in its own steps."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.outer: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is None:
                self.outer[phase_name] = num_steps
                progress(f"{component}: {phase_name}", 0, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self.outer:
                progress(f"{component}: {phase_name}", step, self.outer[phase_name])
            return True

        def phase_finish(self, phase_name: str) -> None:
            if phase_name in self.outer:
                progress(f"{component}: {phase_name}", self.outer[phase_name], self.outer[phase_name])

    return Monitor()


def _read_network(session: Session, builder: Any, order: Order) -> Any:  # noqa: ANN401
    """The graph as the parser reads it; one that it refuses is folded first, unless weights must keep their names."""
    network, refusal = _parse(session, builder, Path(order.onnx_path))
    if refusal is None:
        return network
    if not order.refit:
        with tempfile.TemporaryDirectory(dir=Path(order.engine_path).parent, prefix=".folded.") as folder:
            folded = Path(folder) / "model.onnx"
            with contextlib.suppress(BackendError, BuildError):  # the parser's own refusal says more
                fold_graph(Path(order.onnx_path), folded, order.library)
                network, second = _parse(session, builder, folded)
                if second is None:
                    warnings.warn(f"{order.component} was folded first: the parser refused {refusal}", stacklevel=2)
                    return network
    raise BuildError(
        f"{order.library} {session.library.version} cannot read {order.component}: it refused {refusal}",
        hint="build it with --backend onnxruntime or openvino, and report the operator",
    )


def _parse(session: Session, builder: Any, path: Path) -> tuple[Any, str | None]:  # noqa: ANN401
    """A network, and what in the graph the parser refused, if anything."""
    network = builder.create_network(0)
    parser = session.library.module.OnnxParser(network, session.logger)
    session.alive.extend((network, parser))
    if parser.parse_from_file(str(path)):
        return network, None
    faults = [parser.get_error(index) for index in range(parser.num_errors)]
    where = f"the {faults[0].node_operator()} {faults[0].node_name()}" if faults else "the graph"
    return network, f"{where}: {faults[0].desc() if faults else session.reason()}"


def _set_flags(trt: Any, config: Any, order: Order) -> None:  # noqa: ANN401
    config.clear_flag(trt.BuilderFlag.TF32)  # set by default: ten bits, where float32 islands need all of theirs
    if order.own_capture:
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    if order.refit:
        config.set_flag(trt.BuilderFlag.REFIT)
    if order.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, order.workspace_bytes)


def _set_targets(session: Session, config: Any, order: Order) -> None:  # noqa: ANN401
    if not order.targets:
        return
    capabilities = session.library.module.ComputeCapability.__members__
    known = architectures(session.library)
    if unknown := [target for target in order.targets if target not in (*known, CURRENT)]:
        raise BuildError(
            f"{order.library} builds for no {', '.join(unknown)}", hint=f"choose among: {', '.join(known)}"
        )
    config.num_compute_capabilities = len(order.targets)
    for index, target in enumerate(order.targets):
        config.set_compute_capability(capabilities[target.upper()], index)


def _profile(builder: Any, shapes: OptimizationProfile) -> Any:  # noqa: ANN401
    profile = builder.create_optimization_profile()
    for name, (smallest, usual, largest) in shapes.shapes.items():
        profile.set_shape(name, smallest, usual, largest)
    return profile


def _open_timing_cache(config: Any, order: Order) -> Any:  # noqa: ANN401
    """What earlier builds measured on this device. An unreadable one is started anew by TensorRT itself."""
    if order.timing_cache_path is None:
        return None
    path = Path(order.timing_cache_path)
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    config.set_timing_cache(cache, ignore_mismatch=False)
    return cache


if __name__ == "__main__":
    main()
