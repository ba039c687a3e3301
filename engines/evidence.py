"""The evidence in a seal: gathered by measuring, or found in the cache when nothing that enters it has changed."""

import hashlib
import io
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec
import numpy as np

import sdrt
from sdrt.bundle import Bundle, GoldenRecord, Manifest, ParityRecord, record_file
from sdrt.cache import Store, cache_key
from sdrt.engines.base import ComponentSource
from sdrt.engines.components import BuiltComponent
from sdrt.engines.onnx_folder import OnnxFolder
from sdrt.engines.reference import Reference, find_reference, image_is_exported, runtime_bundle
from sdrt.engines.seal import GoldenResult, check_component, check_image
from sdrt.exported import GoldenRequest
from sdrt.progress import Progress
from sdrt.runners import open_runner
from sdrt.runners.base import VAE_DECODER, VAE_DECODER_FLOAT32, VAE_ENCODER, Runner
from sdrt.runners.cpu import cpu_features, cpu_name
from sdrt.runners.usual import usual_shapes

GOLDEN_FOLDER = "golden"
IMAGE_NAME = "image.npz"
_EVIDENCE_NAME = "evidence.json"


class Evidence(msgspec.Struct, forbid_unknown_fields=True):
    """What was measured: each component's parity and the image's, against which reference, for which request."""

    reference: str
    request: GoldenRequest
    components: dict[str, ParityRecord]
    image: ParityRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """The staged bundle to be measured. `manifest` states no parity yet.

    emulated: for engines whose device is absent, the graphs that are measured in their place.
    """

    folder: OnnxFolder
    sources: Sequence[ComponentSource]
    components: Sequence[BuiltComponent]
    staged: Path
    manifest: Manifest
    emulated: tuple[ComponentSource, ...] = ()


def gather_evidence(subject: Subject, store: Store, threads: int | None, progress: Progress) -> Evidence:
    """Measure the staged engines, and leave the reference's image in the staged bundle.

    Equal engines, golden results, runtime code and CPU have equal evidence, which is then taken from the cache.
    ParityError: something is too far from the reference.
    """
    folder = subject.staged / GOLDEN_FOLDER
    folder.mkdir()
    key = _evidence_key(subject, store)
    if not store.fetch(key, folder):
        evidence = _measure(subject, threads, progress)
        (folder / _EVIDENCE_NAME).write_bytes(msgspec.json.encode(evidence))
        store.keep(key, folder)
    evidence = msgspec.json.decode((folder / _EVIDENCE_NAME).read_bytes(), type=Evidence)
    (folder / _EVIDENCE_NAME).unlink()
    return evidence


def golden_record(evidence: Evidence, staged: Path) -> GoldenRecord:
    """The part of the manifest that tells of the golden image."""
    request = evidence.request
    return GoldenRecord(
        reference=evidence.reference,
        prompt=request.prompt,
        seed=request.seed,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        height=request.height,
        width=request.width,
        file=record_file(staged, staged / GOLDEN_FOLDER / IMAGE_NAME),
        parity=evidence.image,
    )


def _measure(subject: Subject, threads: int | None, progress: Progress) -> Evidence:
    progress("reference", 0, 1)
    reference = _reference(subject, threads)
    progress("reference", 1, 1)
    _write_image(reference, subject.staged / GOLDEN_FOLDER / IMAGE_NAME)
    with tempfile.TemporaryDirectory(dir=subject.staged, prefix=".emulated.") as work:
        if subject.emulated:
            bundle = runtime_bundle(subject.folder, subject.emulated, subject.manifest, Path(work))
        else:
            bundle = Bundle(path=subject.staged, manifest=subject.manifest)
        return _measure_against(bundle, reference, subject, threads, progress)


def _measure_against(
    bundle: Bundle, reference: Reference, subject: Subject, threads: int | None, progress: Progress
) -> Evidence:
    precision, total = subject.manifest.precision, len(reference.results) + 1
    parities = {}
    # One after the other: golden inputs have shapes of their own, and two sets of engines need twice the memory.
    with open_runner(_for_any_shape(bundle), threads=threads) as runner:
        for done, (name, golden) in enumerate(reference.results.items()):
            progress("parity", done, total)
            parities[name] = _check(runner, name, golden, subject.manifest)
        if VAE_DECODER_FLOAT32 in {component.name for component in bundle.manifest.components}:
            golden = reference.results[VAE_DECODER]
            parities[VAE_DECODER_FLOAT32] = _check(runner, VAE_DECODER_FLOAT32, golden, subject.manifest)
        usual = _usual_encoding(bundle, runner)
    progress("parity", total - 1, total)
    with open_runner(bundle, threads=threads) as runner:
        image = check_image(bundle, runner, reference.request, reference.image, precision=precision)
        if usual is not None:  # the golden image has not used the encoder
            _check(runner, VAE_ENCODER, usual, subject.manifest)
    progress("parity", total, total)
    return Evidence(reference=reference.description, request=reference.request, components=parities, image=image)


def _usual_encoding(bundle: Bundle, runner: Runner) -> GoldenResult | None:
    """What the VAE encoder makes of noise in its usual shape, for which it may be computed in another way."""
    components = {component.name: component for component in bundle.manifest.components}
    shapes = usual_shapes(bundle, components[VAE_ENCODER]) if VAE_ENCODER in components else None
    if shapes is None:
        return None
    noise = {name: np.random.default_rng(0).uniform(-1, 1, shape) for name, shape in shapes.items()}
    feeds = {name: values.astype(np.float32) for name, values in noise.items()}
    return GoldenResult(inputs=feeds, outputs=runner.run(VAE_ENCODER, feeds))


def _check(runner: Runner, name: str, golden: GoldenResult, manifest: Manifest) -> ParityRecord:
    return check_component(
        runner,
        name,
        golden,
        precision=manifest.precision,
        slots=manifest.state_slots,
        channels=manifest.model.latent_channels,
    )


def _for_any_shape(bundle: Bundle) -> Bundle:
    """The same engines in a bundle without usual shapes, so that they are opened with dynamic dimensions alone."""
    return replace(bundle, manifest=replace(bundle.manifest, profile=replace(bundle.manifest.profile, sizes=())))


def _reference(subject: Subject, threads: int | None) -> Reference:
    with tempfile.TemporaryDirectory(dir=subject.staged, prefix=".reference.") as work:
        return find_reference(subject.folder, subject.sources, subject.manifest, Path(work), threads=threads)


def _write_image(reference: Reference, path: Path) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, image=reference.image)
    path.write_bytes(buffer.getvalue())


def _evidence_key(subject: Subject, store: Store) -> str:
    folder, manifest = subject.folder, subject.manifest
    names = [] if folder.golden is None else [*folder.components.values(), "image"]
    golden = [folder.golden_path(name) for name in names]
    exported = image_is_exported(folder, manifest.profile)
    return cache_key(
        stage="evidence",
        engines=[component.key for component in subject.components],
        emulated=bool(subject.emulated),
        model=msgspec.to_builtins(manifest.model),
        profile=msgspec.to_builtins(manifest.profile),  # it decides for which shapes a runner compiles
        tokenizer=[record.sha256 for record in manifest.tokenizer],
        reference=[folder.reference, None if exported and not subject.emulated else _onnxruntime_version()],
        request=msgspec.to_builtins(folder.golden),
        golden=[[path.name, store.sha256(path)] for path in golden if path.is_file()],
        runtime=_source_hash(),
        cpu=[cpu_name(), *sorted(cpu_features())],
        numpy=np.__version__,
    )


def _source_hash() -> str:
    """sha256 over the runtime's and this stage's code, which made the measurements."""
    digest = hashlib.sha256()
    for root in (Path(sdrt.__file__).parent, Path(__file__).parent):
        for file in sorted(root.rglob("*.py")):
            digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def _onnxruntime_version() -> str:
    """Found without loading it: a rebuild from the cache does not need it."""
    try:
        return version("onnxruntime")
    except PackageNotFoundError:
        return "absent"
