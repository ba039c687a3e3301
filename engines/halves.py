"""The mixed FP16 graphs of a build: made from the float32 components and their golden inputs, or found in the cache."""

import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
import onnx

from sdrt.bundle import Float32Islands, JsonValue
from sdrt.cache import Store, cache_key
from sdrt.engines.base import ComponentSource
from sdrt.engines.components import place_composed
from sdrt.engines.half.convert import CONVERTER_VERSION, HalfReport, convert_to_half
from sdrt.engines.half.emulation import emulate_half
from sdrt.engines.memory import check_memory
from sdrt.engines.onnx_files import MODEL_NAME, external_files, load_graph
from sdrt.engines.onnx_folder import FOLDER_OF, OnnxFolder
from sdrt.engines.seal import step_feeds
from sdrt.engines.step_graph import TIMESTEP, composer_key
from sdrt.errors import BuildError
from sdrt.runners.base import STEP, Array

EMULATED_NAME = "emulated.onnx"
_REPORT_NAME = "report.json"
_TIMESTEPS = (999.0, 1.0)  # beside the golden one: the ends of the schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedGraph:
    """A component as FP16 ONNX, the step graph composed into it; and what it keeps in float32."""

    source: ComponentSource
    report: HalfReport

    @property
    def islands(self) -> Float32Islands:
        """The report, as the bundle keeps it."""
        return Float32Islands(
            nodes=self.report.nodes,
            by_rule=dict(Counter(self.report.by_rule.values())),
            measured=tuple(sorted(self.report.findings, key=lambda island: -island.value)),
        )

    @property
    def emulated(self) -> ComponentSource:
        """The graph that shows on the CPU what this one computes on a device."""
        return replace(self.source, onnx_path=self.source.onnx_path.with_name(EMULATED_NAME))


def make_mixed_graph(
    source: ComponentSource,
    folder: OnnxFolder,
    inputs: Mapping[str, Array],
    work: Path,
    store: Store,
    *,
    threads: int | None,
) -> MixedGraph:
    """Put the component's mixed graph and its emulation into `work`, from the cache if they are there.

    inputs: the component's golden inputs, to calibrate with.
    BuildError: the graph cannot be converted, gives NaN or infinity in float32 already, or needs too much memory.
    """
    target = work / source.name
    target.mkdir(parents=True)
    weights = external_files(load_graph(source.onnx_path), source.onnx_path)
    feeds = calibration_feeds(source, inputs)
    upcast_attention, force_upcast = _asks_for_float32(folder, source.name)
    key = cache_key(
        stage="half",
        converter_version=CONVERTER_VERSION,
        composer=composer_key(source.thresholding) if source.name == STEP else [],
        onnx_version=onnx.__version__,
        component=source.name,
        state_slots=source.state_slots,
        upcast_attention=upcast_attention,
        force_upcast=force_upcast,
        feeds=[_hash(feed) for feed in feeds],
        files=[[file.name, store.sha256(file)] for file in (source.onnx_path, *weights)],
    )
    if not store.fetch(key, target):
        check_memory(f"the FP16 graph of {source.name}", sum(file.stat().st_size for file in weights))
        with tempfile.TemporaryDirectory(dir=work, prefix=".composed.") as composed:
            path = place_composed(source, Path(composed))
            report = convert_to_half(
                path,
                target / MODEL_NAME,
                feeds,
                upcast_attention=upcast_attention,
                force_upcast=force_upcast,
                threads=threads,
            )
        emulate_half(target / MODEL_NAME, target / EMULATED_NAME)
        (target / _REPORT_NAME).write_bytes(msgspec.json.encode(report))
        store.keep(key, target)
    report = msgspec.json.decode((target / _REPORT_NAME).read_bytes(), type=HalfReport)
    return MixedGraph(source=replace(source, onnx_path=target / MODEL_NAME, composed=True), report=report)


def calibration_feeds(source: ComponentSource, inputs: Mapping[str, Array]) -> Sequence[Mapping[str, Array]]:
    """The golden inputs; for the network, at the ends of the schedule too."""
    if source.name != STEP:
        return [inputs]
    others = [{**inputs, TIMESTEP: np.full_like(inputs[TIMESTEP], value)} for value in _TIMESTEPS]
    return [step_feeds(each, source.state_slots, source.latent_channels) for each in (inputs, *others)]


def _asks_for_float32(folder: OnnxFolder, component: str) -> tuple[bool, bool]:
    """What the component's config asks for: `upcast_attention` and `force_upcast`."""
    config = _config(folder, component)
    return config.get("upcast_attention") is True, config.get("force_upcast") is True


def _config(folder: OnnxFolder, component: str) -> dict[str, JsonValue]:
    file = folder.path / FOLDER_OF[component] / "config.json"
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise BuildError(f"{file} cannot be read: {error}", hint="export the checkpoint again") from error
    return config if isinstance(config, dict) else {}


def _hash(feed: Mapping[str, Array]) -> str:
    digest = hashlib.sha256()
    for name in sorted(feed):
        array = np.ascontiguousarray(feed[name])
        digest.update(f"{name} {array.dtype} {array.shape}\0".encode() + array.tobytes())
    return digest.hexdigest()
