"""Checkpoint in, ONNX folder out: the export stage as one function, component by component, through the cache."""

import shutil
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import msgspec

from sdrt.bundle import JsonValue
from sdrt.cache import Store, cache_key
from sdrt.export.checkpoint import (
    CONTROLNET,
    TINY_VAE,
    Checkpoint,
    component_hashes,
    model_record,
    open_checkpoint,
)
from sdrt.export.golden import draw_reference, golden_request, reference_name, save_reference
from sdrt.exported import EXPORT_FORMAT_VERSION, EXPORT_RECORD_NAME, ExportRecord, GoldenRequest
from sdrt.files import staged_directory, unshare
from sdrt.progress import Progress, silent
from sdrt.runners.cpu import available_cores

EXPORTER_VERSION = 4  # raise it when the same checkpoint would give other ONNX files
SOURCES = {
    "text_encoder": "text_encoder",
    "unet": "unet",
    "vae_decoder": "vae",
    "vae_encoder": "vae",
    "control_embedding": CONTROLNET,
    "depth_estimator": "depth_estimator",
    "tiny_vae_decoder": TINY_VAE,
}
_COPIED = ("tokenizer", "scheduler")


def export_model(
    model: Path,
    out: Path,
    *,
    controlnets: Sequence[Path] = (),
    tiny_vae: Path | None = None,
    golden_size: tuple[int, int] | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    linked: bool = False,
    progress: Progress = silent,
    store: Store | None = None,
) -> ExportRecord:
    """Export a diffusers folder to the layout of `sdrt.exported`.

    controlnets: diffusers folders of ControlNets, which become a part of its UNet. tiny_vae: one of an AutoencoderTiny,
    whose decoder is exported too.
    golden_size: (height, width) of the reference image, by default the model's own size. A component whose inputs
    did not change comes from the cache, and an unchanged checkpoint never loads PyTorch.
    linked: files may be hard links into the cache. Faster, for a folder that is soon removed; onnx.load refuses them.
    Raises CheckpointError, ExportError, OutputError.
    """
    store = Store() if store is None else store
    checkpoint = open_checkpoint(model, controlnets, tiny_vae)
    request = golden_request(checkpoint, golden_size)
    record = ExportRecord(
        format_version=EXPORT_FORMAT_VERSION,
        model=model_record(checkpoint, store),
        reference=reference_name(),
        golden=request,
    )
    cores = available_cores() if threads is None else threads
    there = {*checkpoint.weights, *([CONTROLNET] if checkpoint.controlnets else [])}
    components = [name for name, source in SOURCES.items() if source in there]
    stages = [*components, "reference image"]
    with staged_directory(out, overwrite=overwrite) as staged:
        (staged / "golden").mkdir()
        for done, name in enumerate(components):
            progress(f"export {name}", done, len(stages))
            _place(store, _component_key(checkpoint, name, store), staged, _Exporting(checkpoint, name, cores))
        progress("draw the reference image", len(components), len(stages))
        _place(store, _image_key(record), staged, _Drawing(checkpoint, request, cores))
        for folder in (*_COPIED, *_copied_where_there(checkpoint)):
            shutil.copytree(checkpoint.path / folder, staged / folder)
        shutil.copyfile(checkpoint.path / "model_index.json", staged / "model_index.json")
        if not linked:
            unshare(staged)
        (staged / EXPORT_RECORD_NAME).write_bytes(msgspec.json.encode(record))
        progress("exported", len(stages), len(stages))
    return record


def _copied_where_there(checkpoint: Checkpoint) -> list[str]:
    owners = {"low_res_scheduler": checkpoint.noise_augmentation, "feature_extractor": checkpoint.depth_estimation}
    return [folder for folder, owner in owners.items() if owner is not None]


class _Exporting:
    """Makes one component's files in a folder: traced, checked, with its golden inputs and output."""

    def __init__(self, checkpoint: Checkpoint, name: str, threads: int) -> None:
        self.checkpoint, self.name, self.threads = checkpoint, name, threads

    def __call__(self, folder: Path) -> None:
        from sdrt.export.produce import export_component

        export_component(self.checkpoint, self.name, folder, threads=self.threads)


class _Drawing:
    """Makes golden/image.npz in a folder."""

    def __init__(self, checkpoint: Checkpoint, request: GoldenRequest, threads: int) -> None:
        self.checkpoint, self.request, self.threads = checkpoint, request, threads

    def __call__(self, folder: Path) -> None:
        import torch

        torch.set_num_threads(self.threads)
        (folder / "golden").mkdir()
        save_reference(draw_reference(self.checkpoint, self.request), folder / "golden" / "image.npz")


def _place(store: Store, key: str, staged: Path, make: "_Exporting | _Drawing") -> None:
    """Bring a result into the staged folder: from the cache, or made now and then kept."""
    if store.fetch(key, staged):
        return
    with tempfile.TemporaryDirectory(dir=staged, prefix=".making-") as name:
        made = Path(name) / "made"  # with the usual permissions, which the temporary folder itself has not
        made.mkdir()
        make(made)
        store.keep(key, made)
        shutil.copytree(made, staged, dirs_exist_ok=True, copy_function=_move)


def _move(source: str, target: str) -> None:
    Path(source).replace(target)


def _component_key(checkpoint: Checkpoint, name: str, store: Store) -> str:
    return cache_key(
        stage="export",
        component=name,
        exporter=EXPORTER_VERSION,
        files=dict(component_hashes(checkpoint, SOURCES[name], store)),
        versions=_versions("torch", "diffusers", "transformers", "onnxscript", "onnx-ir"),
    )


def _image_key(record: ExportRecord) -> str:
    return cache_key(
        stage="reference image",
        exporter=EXPORTER_VERSION,
        identity=record.model.identity,
        reference=record.reference,
        versions=_versions("transformers", "pillow"),
        request=msgspec.to_builtins(record.golden),
    )


def _versions(*packages: str) -> dict[str, JsonValue]:
    return {package: version(package) for package in packages}
