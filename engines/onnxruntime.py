"""Engines for ONNX Runtime: the ONNX files, in float32 or as mixed FP16 graphs, made complete and exact."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from sdrt.bundle import BackendName, JsonValue, Precision
from sdrt.engines.base import ComponentSource
from sdrt.engines.onnx_files import MODEL_NAME, external_files, lend_file, load_graph, place_file, write_divided
from sdrt.engines.onnx_norms import sum_in_rows
from sdrt.errors import BackendError
from sdrt.files import write_atomically
from sdrt.progress import Progress, silent
from sdrt.runners.base import IN_PIXELS, STEP
from sdrt.runners.precisions import precisions_of


@dataclass(frozen=True, kw_only=True)
class OnnxRuntimeBuilder:
    """Builds for every execution provider. The CPU's is the one they are checked on, where FP16 is no faster.

    lend: link the files instead of copying them, for engines that live no longer than the ONNX folder.
    """

    lend: bool = False
    name: ClassVar[BackendName] = "onnxruntime"
    device: ClassVar[str] = "cpu"
    runs_here: ClassVar[bool] = True
    precisions: ClassVar[tuple[Precision, ...]] = precisions_of("onnxruntime")

    @property
    def version(self) -> str:
        """ONNX Runtime's version."""
        try:
            import onnxruntime
        except ImportError as error:
            raise BackendError(
                "ONNX Runtime is not installed", hint="install it with: pip install 'sdrt[onnxruntime]'"
            ) from error
        return str(onnxruntime.__version__)

    def features(self, precision: Precision) -> tuple[str, ...]:
        """Engines run on any CPU."""
        return ()

    def settings(self, source: ComponentSource) -> dict[str, JsonValue]:
        """Only the step graph is made here, for a number of state slots; see `EngineBuilder.settings`."""
        return {"state_slots": source.state_slots} if source.name == STEP else {}

    def build(
        self, source: ComponentSource, precision: Precision, folder: Path, *, progress: Progress = silent
    ) -> Sequence[str]:
        """Write model.onnx, a VAE's group norms in rows, and its weights as real files; see `EngineBuilder.build`."""
        names = self._place(source, folder)
        if source.name in IN_PIXELS and sum_in_rows(model := load_graph(folder / MODEL_NAME)):
            # In the place of the file, which may be a link to the ONNX folder's own.
            write_atomically(folder / MODEL_NAME, model.SerializeToString(), overwrite=True, durable=False)
        return names

    def _place(self, source: ComponentSource, folder: Path) -> Sequence[str]:
        if source.name == STEP and source.controls and not self.lend:
            return write_divided(source.onnx_path, folder)
        place = lend_file if self.lend else place_file
        place(source.onnx_path, folder / MODEL_NAME)
        names = [MODEL_NAME]
        for weights in external_files(load_graph(source.onnx_path), source.onnx_path):
            relative = weights.relative_to(source.onnx_path.parent)
            (folder / relative).parent.mkdir(parents=True, exist_ok=True)
            place(weights, folder / relative)
            names.append(relative.as_posix())
        return tuple(names)
