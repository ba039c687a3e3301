"""Engines for TensorRT and TensorRT-RTX, built from mixed FP16 graphs; with TensorRT-RTX also where there is no GPU."""

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

import msgspec

from sdrt.bundle import BackendName, JsonValue, Precision
from sdrt.cache import default_cache_root
from sdrt.engines.base import ComponentSource
from sdrt.engines.components import input_specs
from sdrt.engines.memory import check_memory
from sdrt.engines.onnx_files import external_files, load_graph
from sdrt.engines.optimization import optimization_profiles
from sdrt.engines.tensorrt_child import CURRENT, Order
from sdrt.errors import BuildError
from sdrt.progress import Progress, silent
from sdrt.runners.nvidia import INSTALL, Device, Library, architectures, find_device, load_library
from sdrt.runners.precisions import precisions_of
from sdrt.worker import run_child

ENGINE_NAME = "model.engine"
CHILD = "sdrt.engines.tensorrt_child"
GRACE_SECONDS = 2.0  # TensorRT does not hear a signal in the middle of a phase, and the build's own end must not wait


@dataclass(frozen=True, kw_only=True)
class TensorRtBuilder:
    """Builds with `library`, for `gpu` if there is one.

    targets: architectures to build for ahead of time ("sm89"); none means every one that the library supports.
    refit: the engines take other weights later; see `TensorRtRunner.refit`.
    """

    library: Library
    gpu: Device | None
    targets: tuple[str, ...] = ()
    refit: bool = False
    workspace_bytes: int | None = None
    name: ClassVar[BackendName] = "tensorrt"
    precisions: ClassVar[tuple[Precision, ...]] = precisions_of("tensorrt")

    @classmethod
    def find(cls, targets: tuple[str, ...] = (), *, refit: bool = False) -> "TensorRtBuilder":
        """With the library and the GPU of this machine.

        BackendError: no library that can build here. BuildError: engines to refit, and no GPU.
        """
        builder = cls(library=load_library(), gpu=find_device(), targets=targets, refit=refit)
        if refit and builder.gpu is None:
            raise BuildError(
                f"{builder.library.name} builds engines to refit on a machine with a GPU only",
                hint="build it there, or without --refit",
            )
        return builder

    @property
    def version(self) -> str:
        """The library's own version."""
        return self.library.version

    @property
    def device(self) -> str:
        """The GPU's architecture for engines that are made for one GPU, else "cuda"."""
        if self.library.name == "tensorrt" and self.gpu is not None:
            return self.gpu.architecture
        return "cuda"

    @property
    def runs_here(self) -> bool:
        """Whether there is a GPU; see `EngineBuilder.runs_here`."""
        return self.gpu is not None

    def features(self, precision: Precision) -> tuple[str, ...]:
        """The library, and the architectures if the engines are for some only; see `EngineBuilder.features`."""
        own = self.gpu.architecture if self.gpu is not None else ""
        return (self.library.name, *(own if target == CURRENT else target for target in self._targets()))

    def settings(self, source: ComponentSource) -> dict[str, JsonValue]:
        """The profiles; see `EngineBuilder.settings`."""
        profiles = optimization_profiles(source, input_specs(load_graph(source.onnx_path)))
        return {
            "profiles": msgspec.to_builtins([asdict(profile) for profile in profiles]),
            "refit": self.refit,
            "targets": list(self._targets()),
            "workspace_bytes": self.workspace_bytes,
        }

    def build(
        self, source: ComponentSource, precision: Precision, folder: Path, *, progress: Progress = silent
    ) -> Sequence[str]:
        """Write model.engine; see `EngineBuilder.build`. BuildError: too little memory, before the build or in it."""
        model = load_graph(source.onnx_path)
        check_memory(
            f"building {source.name}", sum(file.stat().st_size for file in external_files(model, source.onnx_path))
        )
        order = Order(
            component=source.name,
            library=self.library.name,
            onnx_path=str(source.onnx_path),
            engine_path=str(folder / ENGINE_NAME),
            timing_cache_path=self._timing_cache(),
            profiles=optimization_profiles(source, input_specs(model)),
            targets=self._targets(),
            own_capture=self.library.name == "tensorrt_rtx",
            refit=self.refit,
            workspace_bytes=self.workspace_bytes,
        )
        with tempfile.TemporaryDirectory(prefix="sdrt-order-") as work:
            path = Path(work) / "order.json"
            path.write_bytes(msgspec.json.encode(order))
            run_child(CHILD, [str(path)], progress, hint_if_absent=INSTALL, grace_seconds=GRACE_SECONDS)
        return (ENGINE_NAME,)

    def _targets(self) -> tuple[str, ...]:
        """What was asked for; for a GPU that TensorRT-RTX's portable engines are not for, this one."""
        known = architectures(self.library)
        if self.targets or self.gpu is None or not known or self.gpu.architecture in known:
            return self.targets
        return (CURRENT,)

    def _timing_cache(self) -> str | None:
        """Measured times are of one device and one version; TensorRT-RTX measures nothing, with a GPU or without."""
        if self.gpu is None or self.library.name == "tensorrt_rtx":
            return None
        folder = default_cache_root() / "timing"
        folder.mkdir(parents=True, exist_ok=True)
        return str(folder / f"{self.library.name}-{self.library.version}-{self.gpu.architecture}.cache")
