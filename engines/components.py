"""Making one component's engine, or finding it in the cache: everything that enters it is in its key."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import onnx

from sdrt.bundle import ComponentRecord, FileRecord, JsonValue, ParityRecord, Precision, TensorSpec, record_file
from sdrt.cache import Store, cache_key
from sdrt.engines.base import ENGINES_FOLDER, ComponentSource, EngineBuilder
from sdrt.engines.onnx_files import external_files, lend_file, load_graph
from sdrt.engines.step_graph import compose_step_graph, composer_key
from sdrt.errors import BuildError
from sdrt.progress import Progress, silent
from sdrt.runners.base import STEP

_RECORD_NAME = "component.json"
_BUILDERS_VERSION = 6  # part of every key: raise it when a builder makes other engines of the same ONNX
_UNMEASURED = ParityRecord(metric="max_relative", measured=float("inf"), bound=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltComponent:
    """An engine in a staged bundle; its parity is still to be measured. `key` names everything that entered it."""

    record: ComponentRecord
    key: str


class _Kept(msgspec.Struct, forbid_unknown_fields=True):
    """What the cache remembers of an engine beside its files, so that a rebuild reads neither."""

    files: tuple[FileRecord, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def make_component(
    builder: EngineBuilder,
    source: ComponentSource,
    precision: Precision,
    staged: Path,
    store: Store,
    progress: Progress = silent,
) -> BuiltComponent:
    """Put the component's engine into the staged bundle, from the cache if it is there.

    BuildError: the graph or its weights are damaged, or the backend refuses them.
    """
    folder = staged / ENGINES_FOLDER / source.name
    folder.mkdir(parents=True)
    model = load_graph(source.onnx_path)
    weights = external_files(model, source.onnx_path)
    key = _component_key(builder, source, precision, [source.onnx_path, *weights], store)
    if not store.fetch(key, folder):
        built = build_component(builder, source, precision, staged, progress)
        for file in built.files[1:]:
            store.share(staged / file.path, file.sha256)
        kept = _Kept(files=built.files, inputs=built.inputs, outputs=built.outputs)
        (folder / _RECORD_NAME).write_bytes(msgspec.json.encode(kept))
        store.keep(key, folder)
    kept = msgspec.json.decode((folder / _RECORD_NAME).read_bytes(), type=_Kept)
    (folder / _RECORD_NAME).unlink()
    return BuiltComponent(record=_record(source.name, kept.files, kept.inputs, kept.outputs), key=key)


def _component_key(
    builder: EngineBuilder, source: ComponentSource, precision: Precision, files: Sequence[Path], store: Store
) -> str:
    hashes: list[JsonValue] = [[file.name, store.sha256(file)] for file in files]
    return cache_key(
        stage="engine",
        backend=builder.name,
        backend_version=builder.version,
        device=builder.device,
        precision=precision,
        features=list(builder.features(precision)),
        builders_version=_BUILDERS_VERSION,
        composer=[] if source.composed or source.name != STEP else composer_key(source.thresholding),
        onnx_version=onnx.__version__,
        component=source.name,
        settings=builder.settings(source),
        files=hashes,
    )


def build_component(
    builder: EngineBuilder,
    source: ComponentSource,
    precision: Precision,
    staged: Path,
    progress: Progress = silent,
) -> ComponentRecord:
    """Build the component's engine in the staged bundle; its parity is still to be measured."""
    folder = staged / ENGINES_FOLDER / source.name
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=staged, prefix=".work.") as work:
        source = replace(source, onnx_path=place_composed(source, Path(work)), composed=True)
        names = builder.build(source, precision, folder, progress=progress)
        model = load_graph(source.onnx_path)
    files = tuple(record_file(staged, folder / name) for name in names)
    return _record(source.name, files, input_specs(model), tuple(_spec(value) for value in model.graph.output))


def _record(
    name: str, files: tuple[FileRecord, ...], inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]
) -> ComponentRecord:
    return ComponentRecord(name=name, files=files, inputs=inputs, outputs=outputs, parity=_UNMEASURED)


def input_specs(model: onnx.ModelProto) -> tuple[TensorSpec, ...]:
    """What the graph is fed, its weights aside."""
    weights = {initializer.name for initializer in model.graph.initializer}
    return tuple(_spec(value) for value in model.graph.input if value.name not in weights)


def place_composed(source: ComponentSource, work: Path) -> Path:
    """The graph that the component's engine is built of: the step graph is composed in `work`, all others are ready.

    The composed graph is saved beside the weights, which are lent, not copied. BuildError: it cannot be composed.
    """
    if source.composed or source.name != STEP:
        return source.onnx_path
    model = load_graph(source.onnx_path)
    for file in external_files(model, source.onnx_path):
        target = work / file.relative_to(source.onnx_path.parent)
        target.parent.mkdir(parents=True, exist_ok=True)
        lend_file(file, target)
    path = work / source.onnx_path.name
    onnx.save(compose_step_graph(model, source.state_slots, source.thresholding), path)
    return path


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    try:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    except KeyError as error:
        raise BuildError(f"{value.name} has no element type", hint="export the checkpoint again") from error
    shape = tuple(
        int(dimension.dim_value) if dimension.HasField("dim_value") else dimension.dim_param or f"dimension_{index}"
        for index, dimension in enumerate(tensor.shape.dim)
    )
    return TensorSpec(name=value.name, dtype=dtype, shape=shape)
