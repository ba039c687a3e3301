"""The bundle: its manifest as plain data, reading and checking it. Nothing here runs an engine."""

import hashlib
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias

import msgspec

from sdrt.errors import BuildError, BundleError
from sdrt.files import contained_path, sha256_of, write_atomically
from sdrt.progress import Progress, silent

JsonValue: TypeAlias = bool | int | float | str | list["JsonValue"] | dict[str, "JsonValue"] | None

FORMAT_VERSION = 3
MANIFEST_NAME = "bundle.json"
# What msgspec raises for text that is not what it should be; the last for arrays in arrays without end.
_UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
_REBUILD = "rebuild it with: sdrt build"
_COPY_AGAIN = "copy the bundle again, or rebuild it with: sdrt build"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_DTYPES = frozenset({"float16", "float32", "float64", "int32", "int64", "uint8", "bool"})

BackendName = Literal["openvino", "onnxruntime", "tensorrt"]
Precision = Literal["fp32", "fp16", "bf16", "int8"]
Metric = Literal["max_relative", "max_absolute", "psnr_db"]
# What a checkpoint was made for, which its UNet's inputs tell.
ModelTask = Literal["text-to-image", "inpainting", "upscaling", "depth-to-image", "editing"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """A tensor at an engine's border. Dynamic dimensions are names ("lanes", "height")."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """A file of the bundle; `path` is relative to the bundle, with forward slashes."""

    path: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityRecord:
    """How far a result was from the PyTorch reference when the bundle was sealed, and how far it may be.

    metric: "max_relative" (largest |a - b| over largest |b|), "max_absolute", or "psnr_db" (higher is better).
    """

    metric: Metric
    measured: float
    bound: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredIsland:
    """A node of an FP16 graph that keeps float32 because calibration found that it has to.

    value: for "overflow" the largest magnitude met at its border; for "precision" the error that float16 inputs cause
    in this node alone, relative to its largest result.
    """

    node: str
    operator: str
    reason: Literal["overflow", "precision"]
    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Float32Islands:
    """What an FP16 graph keeps in float32: how many of its `nodes` for each rule, and which as measured."""

    nodes: int
    by_rule: dict[str, int]
    measured: tuple[MeasuredIsland, ...]

    @property
    def everything(self) -> bool:
        """Whether the whole graph is in float32."""
        return sum(self.by_rule.values()) + len(self.measured) >= self.nodes


@dataclass(frozen=True, slots=True, kw_only=True)
class ComponentRecord:
    """One engine: its files, its border, its parity; islands: of FP16 engines.

    The first file is the one to open. Those of an OpenVINO engine's weights are one after the other to it, in this
    order, at the `joined_offsets` of `sdrt.runners.mapped_files`.
    """

    name: str
    files: tuple[FileRecord, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    parity: ParityRecord
    islands: Float32Islands | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendRecord:
    """What the engines need: backend, its version, the device kind and the CPU or GPU features."""

    name: BackendName
    version: str
    device: str
    features: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapeProfile:
    """Which requests the engines accept, in images and pixels.

    Either `sizes` lists every (height, width), or it is empty and all multiples of `multiple_of`
    between `minimum` and `maximum` (both as (height, width), inclusive) are accepted.
    """

    sizes: tuple[tuple[int, int], ...]
    minimum: tuple[int, int]
    maximum: tuple[int, int]
    multiple_of: int
    max_batch: int
    text_length: int

    def accepts(self, height: int, width: int) -> bool:
        """Whether an image of this size can be made."""
        if self.sizes:
            return (height, width) in self.sizes
        on_grid = height % self.multiple_of == 0 and width % self.multiple_of == 0
        inside = self.minimum[0] <= height <= self.maximum[0] and self.minimum[1] <= width <= self.maximum[1]
        return on_grid and inside


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseAugmentation:
    """How noisy an upscaler takes its small image: the levels' schedule (a scheduler_config.json), and the highest."""

    scheduler_config: dict[str, Any]
    max_noise_level: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DepthEstimation:
    """How a picture becomes what the checkpoint's depth estimator takes; `sdrt.depth` reads and follows it.

    It is resized to height and width with the filter `resample` (of PIL), both sides a multiple of `multiple_of`; with
    keep_aspect_ratio only one of them is met. Each channel is then (pixel · scale - mean) / std, and zeros around it
    bring both sides to a multiple of `pad_to`. takes: the only (height, width) that the estimator takes; None: any.
    """

    height: int
    width: int
    keep_aspect_ratio: bool
    multiple_of: int
    resample: int
    scale: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    pad_to: int | None
    takes: tuple[int, int] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyVaeRecord:
    """A small decoder beside the VAE's own (diffusers' AutoencoderTiny): the engine `tiny_vae_decoder`."""

    name: str
    identity: str  # sha256 over its config and weights
    scaling_factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRecord:
    """What the runtime has to know of the checkpoint.

    conditioning_channels: how many channels the UNet takes beside the latents'. noise_augmentation: of upscaling.
    depth_estimation: of depth-to-image, where the checkpoint brought a depth estimator. controlnets: the names of those
    in the step graph, in order; control_features: the channels of what they make of their pictures.
    tiny_vae: built in beside the checkpoint, of whose identity it is no part.
    """

    name: str
    identity: str  # sha256 over configs and weights
    task: ModelTask
    latent_channels: int
    conditioning_channels: int
    vae_downsample: int  # pixels per latent on one side
    size_multiple: int  # both sides of an image must be multiples of this many pixels
    vae_scaling_factor: float
    prompt_embeds_dim: int
    text_length: int
    default_height: int
    default_width: int
    scheduler_class: str
    scheduler_config: dict[str, Any]  # JSON values, as the checkpoint has them
    noise_augmentation: NoiseAugmentation | None = None
    depth_estimation: DepthEstimation | None = None
    controlnets: tuple[str, ...] = ()
    control_features: int = 0
    tiny_vae: TinyVaeRecord | None = None

    @property
    def lanes_per_image(self) -> int:
        """Most network evaluations of a guided row: with and without the prompt, and of editing without the image."""
        return 3 if self.task == "editing" else 2


@dataclass(frozen=True, slots=True, kw_only=True)
class GoldenRecord:
    """The evidence of the whole image: what was asked, of which reference, and how close it came."""

    reference: str  # "PyTorch 2.13.0, diffusers 0.42.1, float32"
    prompt: str
    seed: int
    num_inference_steps: int
    guidance_scale: float
    height: int
    width: int
    file: FileRecord  # .npz with the reference's image, uint8 [H, W, 3], as `image`
    parity: ParityRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The content of bundle.json.

    device_verified: False where the engines were built without their device; every parity is then that of their FP16
    graphs on a CPU, and the first `sdrt verify` on a device completes the seal.
    """

    format_version: int
    sdrt_version: str
    model: ModelRecord
    backend: BackendRecord
    precision: Precision
    state_slots: int
    profile: ShapeProfile
    components: tuple[ComponentRecord, ...]
    tokenizer: tuple[FileRecord, ...]
    golden: GoldenRecord
    device_verified: bool = True


class _Sealed(msgspec.Struct, forbid_unknown_fields=True):
    """bundle.json: the manifest and the sha256 of its exact bytes."""

    seal: str
    manifest: msgspec.Raw


class _Version(msgspec.Struct):
    format_version: int
    sdrt_version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """A bundle on disk whose manifest was read and checked."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: Path | str) -> Self:
        """Read the manifest; check its seal and version, and that every file is there with its size.

        Raises BundleError. Hashes of the files are checked by `verify_files`.
        """
        folder = Path(path)
        bundle = cls(path=folder, manifest=read_manifest(folder))
        for record in bundle.files():
            _check_size(bundle.file(record), record)
        return bundle

    def component(self, name: str) -> ComponentRecord:
        """The engine of that name. Raises BundleError when the bundle has none."""
        for component in self.manifest.components:
            if component.name == name:
                return component
        known = ", ".join(component.name for component in self.manifest.components)
        raise BundleError(f"{self.path} has no engine {name!r}; it has {known}", hint=_REBUILD)

    def file(self, record: FileRecord) -> Path:
        """Where a file of the bundle lies. Raises BundleError when its path leaves the bundle."""
        return contained_path(self.path, record.path)

    def files(self) -> Iterator[FileRecord]:
        """Every file that the manifest lists."""
        for component in self.manifest.components:
            yield from component.files
        yield from self.manifest.tokenizer
        yield self.manifest.golden.file


def record_file(root: Path, path: Path, *, sha256: str | None = None) -> FileRecord:
    """Describe a finished file of a bundle; its hash is computed unless it is known."""
    return FileRecord(
        path=path.relative_to(root).as_posix(),
        sha256=sha256_of(path) if sha256 is None else sha256,
        size_bytes=path.stat().st_size,
    )


def write_manifest(folder: Path, manifest: Manifest, *, overwrite: bool = False) -> None:
    """Write bundle.json, which makes the folder a bundle.

    Raises BuildError for a manifest that would not be read back as it is, OutputError when it cannot be written.
    """
    body = msgspec.json.format(msgspec.json.encode(manifest), indent=2)
    if not _reads_back(body, manifest):
        raise BuildError(
            f"the manifest of {folder} holds what JSON cannot, such as NaN or infinity",
            hint="look at the model's configs, and at what was measured",
        )
    if fault := next(_faults(manifest), None):
        raise BuildError(f"the manifest of {folder} contradicts itself: {fault}", hint="export the checkpoint again")
    text = msgspec.json.encode(_Sealed(seal=_seal(body), manifest=msgspec.Raw(body)))
    write_atomically(folder / MANIFEST_NAME, text + b"\n", overwrite=overwrite)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a bundle. Raises BundleError when there is none that this version can read."""
    sealed = _read_sealed(folder)
    body = bytes(sealed.manifest)
    path = folder / MANIFEST_NAME
    try:
        version = msgspec.json.decode(body, type=_Version)
    except _UNREADABLE as error:
        raise BundleError(f"{path} is damaged: {error}", hint=_REBUILD) from error
    if version.format_version != FORMAT_VERSION:
        raise _other_version(folder, version)
    if sealed.seal != _seal(body):
        raise BundleError(f"{path} was changed after it was sealed", hint=_COPY_AGAIN)
    try:
        manifest = msgspec.json.decode(body, type=Manifest)
    except _UNREADABLE as error:
        raise BundleError(f"{path} is not a manifest: {error}", hint=_REBUILD) from error
    if fault := next(_faults(manifest), None):
        raise BundleError(f"{path} contradicts itself: {fault}", hint=_REBUILD)
    return manifest


def verify_files(bundle: Bundle, progress: Progress = silent) -> None:
    """Compare the sha256 of every file with the manifest. Raises BundleError for the first that differs.

    Files that the manifest does not list are nobody's concern. bundle.json itself is checked by `Bundle.open`.
    """
    records = list(bundle.files())
    for done, record in enumerate(records):
        progress("hashes", done, len(records))
        path = bundle.file(record)
        _check_size(path, record)
        try:
            found = sha256_of(path)
        except OSError as error:
            raise BundleError(f"{path} cannot be read: {error.strerror}", hint=_COPY_AGAIN) from error
        if found != record.sha256:
            raise BundleError(
                f"{record.path} in {bundle.path} is not the file that was sealed (its sha256 differs)",
                hint=_COPY_AGAIN,
            )
    progress("hashes", len(records), len(records))


def _reads_back(body: bytes, manifest: Manifest) -> bool:
    try:
        return msgspec.json.decode(body, type=Manifest) == manifest
    except msgspec.MsgspecError:  # NaN and infinity are written as null
        return False


def _seal(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def _read_sealed(folder: Path) -> _Sealed:
    path = folder / MANIFEST_NAME
    try:
        text = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: NUL in the path
        raise _not_a_bundle(folder) from None
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}", hint="check its permissions") from error
    try:
        return msgspec.json.decode(text, type=_Sealed)
    except _UNREADABLE as error:
        raise BundleError(f"{path} is damaged: {error}", hint=_COPY_AGAIN) from error


def _not_a_bundle(folder: Path) -> BundleError:
    build = "build one: sdrt build MODEL --out BUNDLE"
    if not folder.exists():
        return BundleError(f"there is no bundle at {folder}", hint=f"check the path, or {build}")
    if not folder.is_dir():
        return BundleError(f"{folder} is a file, not a bundle", hint=f"name the bundle's folder, or {build}")
    if (folder / "model_index.json").is_file() or (folder / "unet").is_dir():
        name = folder.resolve().name
        return BundleError(
            f"{folder} is a model, not a bundle", hint=f"build it first: sdrt build {folder} --out {name}.sdrt"
        )
    if (folder / "engines").is_dir():
        return BundleError(
            f"{folder} holds engines but no {MANIFEST_NAME}: its build was not finished, or it was not copied whole",
            hint="run the same sdrt build again (finished engines are in the cache), or copy the bundle again",
        )
    return BundleError(
        f"{folder} is not a bundle: it has no {MANIFEST_NAME}",
        hint=f"name the folder that `sdrt build` wrote, or {build}",
    )


def _other_version(folder: Path, version: _Version) -> BundleError:
    if version.format_version > FORMAT_VERSION:
        kind, hint = "newer", f"open it with sdrt {version.sdrt_version} or later, or {_REBUILD}"
    else:
        kind, hint = "older", f"{_REBUILD}, or open it with sdrt {version.sdrt_version}"
    return BundleError(
        f"{folder} has the {kind} bundle format {version.format_version} (of sdrt {version.sdrt_version}); "
        f"this sdrt reads format {FORMAT_VERSION}",
        hint=hint,
    )


def _faults(manifest: Manifest) -> Iterator[str]:
    """What no honest build writes, and what would fail far from here if it were believed."""
    names = [component.name for component in manifest.components]
    if len(set(names)) != len(names):
        yield "two engines have one name"
    model = manifest.model
    for there, what, needed in (
        (model.depth_estimation is not None, "estimates depth", "depth_estimator"),
        (bool(model.controlnets), "has ControlNets", "control_embedding"),
        (model.tiny_vae is not None, "has a tiny VAE beside it", "tiny_vae_decoder"),
    ):
        if there and needed not in names:
            yield f"the model {what}, and there is no engine {needed}"
    for component in manifest.components:
        if not component.files:
            yield f"the engine {component.name} has no file"
        for spec in (*component.inputs, *component.outputs):
            if spec.dtype not in _DTYPES:
                yield f"{spec.name} of {component.name} has the unknown type {spec.dtype!r}"
    records = [file for component in manifest.components for file in component.files]
    for record in (*records, *manifest.tokenizer, manifest.golden.file):
        if record.size_bytes < 0 or _SHA256.fullmatch(record.sha256) is None:
            yield f"the size or sha256 of {record.path!r} is none"
    for name, number in _must_be_positive(manifest).items():
        if not number > 0:
            yield f"{name} is {number}"


def _must_be_positive(manifest: Manifest) -> dict[str, float]:
    model, profile = manifest.model, manifest.profile
    return {
        "latent_channels": model.latent_channels,
        "vae_downsample": model.vae_downsample,
        "size_multiple": model.size_multiple,
        "vae_scaling_factor": model.vae_scaling_factor,
        "prompt_embeds_dim": model.prompt_embeds_dim,
        "text_length": model.text_length,
        "default_height": model.default_height,
        "default_width": model.default_width,
        "state_slots": manifest.state_slots,
        "multiple_of": profile.multiple_of,
        "max_batch": profile.max_batch,
        **({} if model.tiny_vae is None else {"the tiny VAE's scaling_factor": model.tiny_vae.scaling_factor}),
    }


def _check_size(path: Path, record: FileRecord) -> None:
    try:
        status = path.stat()
    except FileNotFoundError:
        raise BundleError(f"{record.path} is missing from the bundle ({path})", hint=_COPY_AGAIN) from None
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}", hint=_COPY_AGAIN) from error
    if not stat.S_ISREG(status.st_mode):
        raise BundleError(f"{path} is not a file, as its manifest says", hint=_COPY_AGAIN)
    if status.st_size != record.size_bytes:
        difference = abs(status.st_size - record.size_bytes)
        word = "shorter" if status.st_size < record.size_bytes else "longer"
        raise BundleError(f"{path} is {difference} bytes {word} than its manifest says", hint=_COPY_AGAIN)
