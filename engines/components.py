"""Making one component's engine, or finding it in the cache: everything that enters it is in its key."""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import onnx

from sdrt.bundle import ComponentRecord, FileRecord, JsonValue, ParityRecord, Precision, TensorSpec, record_file
from sdrt.cache import Store, cache_key
from sdrt.engines.base import ENGINES_FOLDER, ComponentSource, EngineBuilder
from sdrt.engines.onnx_files import external_files, lend_file, load_graph
from sdrt.engines.step_graph import COMPOSER_VERSION, compose_step_graph
from sdrt.errors import BuildError
from sdrt.runners.base import STEP

_RECORD_NAME = "component.json"
_BUILDERS_VERSION = 1  # part of every key: raise it when a builder makes other engines of the same ONNX
_UNMEASURED = ParityRecord(metric="max_relative", measured=float("inf"), bound=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltComponent:
    """An engine in a staged bundle; its parity is still to be measured. `key` names everything that entered it."""

    record: ComponentRecord
    key: str
    from_cache: bool


class _Kept(msgspec.Struct, forbid_unknown_fields=True):
    """What the cache remembers of an engine beside its files, so that a rebuild reads neither."""

    files: tuple[FileRecord, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def make_component(
    builder: EngineBuilder, source: ComponentSource, precision: Precision, staged: Path, store: Store
) -> BuiltComponent:
    """Put the component's engine into the staged bundle, from the cache if it is there.

    BuildError: the graph or its weights are damaged, or the backend refuses them.
    """
    folder = staged / ENGINES_FOLDER / source.name
    folder.mkdir(parents=True)
    model = load_graph(source.onnx_path)
    weights = external_files(model, source.onnx_path)
    key = _component_key(builder, source, precision, [source.onnx_path, *weights], store)
    from_cache = store.fetch(key, folder)
    if not from_cache:
        kept = _build(builder, source, precision, folder, model, weights)
        (folder / _RECORD_NAME).write_bytes(msgspec.json.encode(kept))
        store.keep(key, folder)
    kept = msgspec.json.decode((folder / _RECORD_NAME).read_bytes(), type=_Kept)
    (folder / _RECORD_NAME).unlink()
    record = ComponentRecord(
        name=source.name, files=kept.files, inputs=kept.inputs, outputs=kept.outputs, parity=_UNMEASURED
    )
    return BuiltComponent(record=record, key=key, from_cache=from_cache)


def _component_key(
    builder: EngineBuilder, source: ComponentSource, precision: Precision, files: list[Path], store: Store
) -> str:
    settings = msgspec.to_builtins(replace(source, onnx_path=Path(source.onnx_path.name)), enc_hook=str)
    hashes: list[JsonValue] = [[file.name, store.sha256(file)] for file in files]
    return cache_key(
        stage="engine",
        backend=builder.name,
        backend_version=builder.version,
        device=builder.device,
        precision=precision,
        features=list(builder.features(precision)),
        builders_version=_BUILDERS_VERSION,
        composer_version=COMPOSER_VERSION if source.name == STEP else 0,
        onnx_version=onnx.__version__,
        source=settings,
        files=hashes,
    )


def _build(
    builder: EngineBuilder,
    source: ComponentSource,
    precision: Precision,
    folder: Path,
    model: onnx.ModelProto,
    weights: tuple[Path, ...],
) -> _Kept:
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".work.") as work:
        if source.name == STEP:
            model = compose_step_graph(model, source.state_slots)
            source = replace(source, onnx_path=_place_composed(model, source, weights, Path(work)))
        names = builder.build(source, precision, folder)
    root = folder.parent.parent
    return _Kept(
        files=tuple(record_file(root, folder / name) for name in names),
        inputs=_specs(model.graph.input, {initializer.name for initializer in model.graph.initializer}),
        outputs=_specs(model.graph.output, set()),
    )


def _place_composed(model: onnx.ModelProto, source: ComponentSource, weights: tuple[Path, ...], work: Path) -> Path:
    """Save the composed graph beside the UNet's weights, which are lent, not copied."""
    for file in weights:
        target = work / file.relative_to(source.onnx_path.parent)
        target.parent.mkdir(parents=True, exist_ok=True)
        lend_file(file, target)
    path = work / source.onnx_path.name
    onnx.save(model, path)
    return path


def _specs(values: "list[onnx.ValueInfoProto]", weights: set[str]) -> tuple[TensorSpec, ...]:
    return tuple(_spec(value) for value in values if value.name not in weights)


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
