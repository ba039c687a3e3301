"""Building a bundle: engines made or fetched, sealed with parity, and moved into place as a whole."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sdrt._version import VERSION
from sdrt.bundle import (
    FORMAT_VERSION,
    BackendRecord,
    FileRecord,
    Float32Islands,
    GoldenRecord,
    Manifest,
    ParityRecord,
    Precision,
    ShapeProfile,
    record_file,
    write_manifest,
)
from sdrt.cache import Store
from sdrt.engines.base import ComponentSource, EngineBuilder
from sdrt.engines.components import BuiltComponent, make_component
from sdrt.engines.evidence import Evidence, Subject, gather_evidence, golden_record
from sdrt.engines.halves import MixedGraph, make_mixed_graph
from sdrt.engines.onnx_folder import OnnxFolder, read_onnx_folder
from sdrt.engines.precision import choose_builder, choose_precision
from sdrt.engines.profile import parse_profile
from sdrt.engines.reference import golden_inputs
from sdrt.errors import Cancelled
from sdrt.files import check_replaceable, check_writable, staged_directory
from sdrt.plan.clamping import read_thresholding
from sdrt.plan.rows import MAX_STATE_SLOTS
from sdrt.progress import Progress
from sdrt.runners.base import VAE_DECODER, VAE_DECODER_FLOAT32


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    """How to build: the options of `sdrt build`. `sizes=None` means around the model's own size.

    targets: GPU architectures that TensorRT engines are for ("sm89"); none means every recent one.
    refit: TensorRT engines that take other weights later.
    """

    backend: str = "auto"
    precision: str = "auto"
    sizes: str | None = None
    batch: str = "1..4"
    targets: tuple[str, ...] = ()
    refit: bool = False
    threads: int | None = None
    overwrite: bool = False


def build_bundle(onnx_folder: Path, out: Path, options: BuildOptions, progress: Progress) -> Manifest:
    """Build and seal a bundle at `out` from an ONNX folder; returns its manifest.

    Nothing is left at `out` unless every engine and the golden image pass parity. Finished engines stay in the
    cache, so a build that was stopped goes on where it was.
    RequestError: impossible options. CheckpointError: not an ONNX folder. BuildError: an engine cannot be built.
    ParityError: an engine is wrong. OutputError: `out` exists or cannot be written. Cancelled: Ctrl-C.
    """
    try:
        return _build(onnx_folder, out, options, progress)
    except KeyboardInterrupt:
        raise Cancelled(
            "the build was cancelled", hint="run the command again: finished engines are kept in the cache"
        ) from None


def _build(onnx_folder: Path, out: Path, options: BuildOptions, progress: Progress) -> Manifest:
    check_replaceable(out, mark="bundle.json", overwrite=options.overwrite)
    builder = choose_builder(options.backend, options.targets, refit=options.refit)
    precision = choose_precision(options.precision, builder)
    folder = read_onnx_folder(onnx_folder)
    profile = parse_profile(
        options.sizes,
        options.batch,
        default=(folder.model.default_height, folder.model.default_width),
        multiple_of=folder.model.size_multiple,
        text_length=folder.model.text_length,
    )
    check_writable(out)
    sources = [component_source(name, folder, profile) for name in folder.components]
    store = Store()
    with staged_directory(out, overwrite=options.overwrite) as staged, _work_folder(staged) as work:
        mixed = (
            _make_mixed_graphs(folder, sources, profile, work, store, options, progress) if precision == "fp16" else []
        )
        ready = [*(graph.source for graph in mixed), *_float32_spares(mixed, sources)] or sources
        components = _make_components(builder, ready, precision, staged, store, progress)
        manifest = _unsealed(folder, builder, precision, profile, components, _copy_tokenizer(folder, staged))
        subject = Subject(
            folder=folder,
            sources=sources,
            components=components,
            staged=staged,
            manifest=manifest,
            emulated=() if builder.runs_here else (*(graph.emulated for graph in mixed), *ready[len(mixed) :]),
        )
        evidence = gather_evidence(subject, store, options.threads, progress)
        manifest = _sealed(manifest, evidence, {graph.source.name: graph.islands for graph in mixed}, staged)
        write_manifest(staged, manifest)
    return manifest


@contextlib.contextmanager
def _work_folder(staged: Path) -> Iterator[Path]:
    """Room in the staged bundle for what is needed only while it is built."""
    with tempfile.TemporaryDirectory(dir=staged, prefix=".graphs.") as work:
        yield Path(work)


def _make_mixed_graphs(
    folder: OnnxFolder,
    sources: Sequence[ComponentSource],
    profile: ShapeProfile,
    work: Path,
    store: Store,
    options: BuildOptions,
    progress: Progress,
) -> list[MixedGraph]:
    graphs = []
    inputs = golden_inputs(folder, profile)
    for done, source in enumerate(sources):
        progress("float16 graphs", done, len(sources))
        graphs.append(make_mixed_graph(source, folder, inputs[source.name], work, store, threads=options.threads))
    progress("float16 graphs", len(sources), len(sources))
    return graphs


def _float32_spares(mixed: Sequence[MixedGraph], sources: Sequence[ComponentSource]) -> list[ComponentSource]:
    """The VAE's decoder once more in float32, for images at which halves overflow; none where it is float32 anyway."""
    rounded = {graph.source.name for graph in mixed if not graph.islands.everything}
    return [replace(source, name=VAE_DECODER_FLOAT32) for source in sources if source.name in rounded & {VAE_DECODER}]


def component_source(name: str, folder: OnnxFolder, profile: ShapeProfile) -> ComponentSource:
    """One of the folder's components, with everything that a builder may specialise it on."""
    return ComponentSource(
        name=name,
        onnx_path=folder.onnx_path(name),
        profile=profile,
        max_lanes=profile.max_batch * folder.model.lanes_per_image,
        state_slots=MAX_STATE_SLOTS,
        latent_channels=folder.model.latent_channels,
        conditioning_channels=folder.model.conditioning_channels,
        prompt_embeds_dim=folder.model.prompt_embeds_dim,
        vae_downsample=folder.model.vae_downsample,
        default_height=folder.model.default_height,
        default_width=folder.model.default_width,
        thresholding=read_thresholding(folder.model.scheduler_config),
        controls=len(folder.model.controlnets),
        control_features=folder.model.control_features,
        depth_estimation=folder.model.depth_estimation,
    )


def _make_components(
    builder: EngineBuilder,
    sources: Sequence[ComponentSource],
    precision: Precision,
    staged: Path,
    store: Store,
    progress: Progress,
) -> list[BuiltComponent]:
    components = []
    for done, source in enumerate(sources):
        progress("engines", done, len(sources))
        components.append(make_component(builder, source, precision, staged, store, progress))
    progress("engines", len(sources), len(sources))
    return components


def _copy_tokenizer(folder: OnnxFolder, staged: Path) -> tuple[FileRecord, ...]:
    target = staged / "tokenizer"
    target.mkdir()
    for file in folder.tokenizer_files():
        shutil.copyfile(file, target / file.name)
    return tuple(record_file(staged, target / file.name) for file in folder.tokenizer_files())


def _unsealed(
    folder: OnnxFolder,
    builder: EngineBuilder,
    precision: Precision,
    profile: ShapeProfile,
    components: Sequence[BuiltComponent],
    tokenizer: tuple[FileRecord, ...],
) -> Manifest:
    """The manifest before anything was measured. It is never written: its bounds cannot be met."""
    unmeasured = ParityRecord(metric="max_absolute", measured=float("inf"), bound=0.0)
    nothing = GoldenRecord(
        reference="",
        prompt="",
        seed=0,
        num_inference_steps=1,
        guidance_scale=1.0,
        height=0,
        width=0,
        file=FileRecord(path="", sha256="", size_bytes=0),
        parity=unmeasured,
    )
    return Manifest(
        format_version=FORMAT_VERSION,
        sdrt_version=VERSION,
        model=folder.model,
        backend=BackendRecord(
            name=builder.name,
            version=builder.version,
            device=builder.device,
            features=builder.features(precision),
        ),
        precision=precision,
        state_slots=MAX_STATE_SLOTS,
        profile=profile,
        components=tuple(component.record for component in components),
        tokenizer=tokenizer,
        golden=nothing,
        device_verified=builder.runs_here,
    )


def _sealed(manifest: Manifest, evidence: Evidence, islands: Mapping[str, Float32Islands], staged: Path) -> Manifest:
    components = tuple(
        replace(component, parity=evidence.components[component.name], islands=islands.get(component.name))
        for component in manifest.components
    )
    return replace(manifest, components=components, golden=golden_record(evidence, staged))
