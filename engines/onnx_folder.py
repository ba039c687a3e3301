"""The ONNX folder that a build starts from: what it says of its model, whoever exported it."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from sdrt.bundle import DepthEstimation, JsonValue, ModelRecord, NoiseAugmentation
from sdrt.depth import PROCESSOR_FILE, read_depth_estimation
from sdrt.engines.onnx_files import MODEL_NAME
from sdrt.errors import CheckpointError
from sdrt.exported import (
    EXPORT_FORMAT_VERSION,
    EXPORT_RECORD_NAME,
    MAX_NOISE_LEVEL,
    ExportRecord,
    GoldenRequest,
    task_of_channels,
)
from sdrt.pipeline_configs import latent_sides, scheduler_config_of, vae_scaling_factor
from sdrt.runners.base import (
    CONTROL_EMBEDDING,
    DEPTH_ESTIMATOR,
    STEP,
    TEXT_ENCODER,
    TINY_VAE_DECODER,
    VAE_DECODER,
    VAE_ENCODER,
)

FOLDER_OF = {
    TEXT_ENCODER: "text_encoder",
    STEP: "unet",
    VAE_DECODER: "vae_decoder",
    VAE_ENCODER: "vae_encoder",
    CONTROL_EMBEDDING: "control_embedding",
    DEPTH_ESTIMATOR: "depth_estimator",
    TINY_VAE_DECODER: "tiny_vae_decoder",
}
# Which models have the components that not all have.
OPTIONAL: Mapping[str, Callable[[ModelRecord], bool]] = {
    CONTROL_EMBEDDING: lambda model: bool(model.controlnets),
    DEPTH_ESTIMATOR: lambda model: model.depth_estimation is not None,
    TINY_VAE_DECODER: lambda model: model.tiny_vae is not None,
}
_REEXPORT = "export the checkpoint again, or name the folder that holds model_index.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxFolder:
    """A model as ONNX components.

    reference and golden: what the exporter's golden results were made with; None if it left none.
    """

    path: Path
    model: ModelRecord
    reference: str | None
    golden: GoldenRequest | None

    @property
    def components(self) -> Mapping[str, str]:
        """Those that the model has, and the folder of each."""
        return {
            name: folder for name, folder in FOLDER_OF.items() if name not in OPTIONAL or OPTIONAL[name](self.model)
        }

    def onnx_path(self, component: str) -> Path:
        """The component's graph."""
        return self.path / FOLDER_OF[component] / MODEL_NAME

    def golden_path(self, name: str) -> Path:
        """The golden results of a component (by its folder), or of the "image"."""
        return self.path / "golden" / f"{name}.npz"

    def tokenizer_files(self) -> tuple[Path, ...]:
        """What the tokenizer is loaded from."""
        return tuple(sorted(file for file in (self.path / "tokenizer").iterdir() if file.is_file()))


def read_onnx_folder(path: Path) -> OnnxFolder:
    """Read the configs of an ONNX folder. CheckpointError: something is missing, damaged or of an unknown kind."""
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder", hint="name the folder of an exported model")
    always = [folder for name, folder in FOLDER_OF.items() if name not in OPTIONAL]
    _check_there(path, [*(f"{folder}/{MODEL_NAME}" for folder in always), "tokenizer"])
    record = _read_export_record(path)
    read = OnnxFolder(
        path=path,
        model=_model_of_configs(path) if record is None else record.model,
        reference=None if record is None else record.reference,
        golden=None if record is None else record.golden,
    )
    _check_there(path, [f"{folder}/{MODEL_NAME}" for folder in read.components.values()])
    return read


def _check_there(path: Path, needed: Sequence[str]) -> None:
    if missing := [name for name in needed if not (path / name).exists()]:
        raise CheckpointError(f"{path} lacks {', '.join(missing)}", hint=_REEXPORT)


def _read_export_record(path: Path) -> ExportRecord | None:
    file = path / EXPORT_RECORD_NAME
    if not file.exists():
        return None
    try:
        record = msgspec.json.decode(file.read_bytes(), type=ExportRecord)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} is not an export record: {error}", hint=_REEXPORT) from error
    if record.format_version != EXPORT_FORMAT_VERSION:
        raise CheckpointError(
            f"{file} is of format {record.format_version}; this sdrt reads {EXPORT_FORMAT_VERSION}", hint=_REEXPORT
        )
    return record


def _model_of_configs(path: Path) -> ModelRecord:
    """The model record of a folder that another exporter made."""
    unet_file, vae_file = path / "unet" / "config.json", path / "vae_decoder" / "config.json"
    unet, vae = _read_json(unet_file), _read_json(vae_file)
    scheduler = _read_json(path / "scheduler" / "scheduler_config.json")
    scheduler_class = _scheduler_class(path, scheduler)
    levels = len(_list(unet, "block_out_channels", unet_file))
    vae_downsample = 2 ** (len(_list(vae, "block_out_channels", vae_file)) - 1)
    latent_channels = _whole(unet, "out_channels", unet_file) if "out_channels" in unet else 4
    conditioning_channels = _whole(unet, "in_channels", unet_file) - latent_channels
    task = task_of_channels(conditioning_channels)
    height, width = latent_sides(task, unet)
    return ModelRecord(
        name=path.resolve().name,
        identity=_identity(path),
        task=task,
        latent_channels=latent_channels,
        conditioning_channels=conditioning_channels,
        vae_downsample=vae_downsample,
        size_multiple=vae_downsample * 2 ** (levels - 1),
        noise_augmentation=_noise_augmentation(path),
        depth_estimation=_depth_estimation(path),
        vae_scaling_factor=vae_scaling_factor(task, vae),
        prompt_embeds_dim=_whole(unet, "cross_attention_dim", unet_file),
        text_length=_text_length(path),
        default_height=height * vae_downsample,
        default_width=width * vae_downsample,
        scheduler_class=scheduler_class,
        scheduler_config=scheduler_config_of(task, scheduler_class, scheduler, steered=False),
    )


def _scheduler_class(path: Path, scheduler: Mapping[str, JsonValue]) -> str:
    """That of model_index.json, which counts in diffusers, where the exporter wrote one."""
    entry = _index(path).get("scheduler")
    named = entry[1] if isinstance(entry, list) and len(entry) == 2 else scheduler.get("_class_name", "")
    return str(named)


def _index(path: Path) -> dict[str, JsonValue]:
    """The content of model_index.json; nothing where the exporter wrote none."""
    file = path / "model_index.json"
    return _read_json(file) if file.exists() else {}


def _noise_augmentation(path: Path) -> NoiseAugmentation | None:
    file = path / "low_res_scheduler" / "scheduler_config.json"
    if not file.exists():
        return None
    level = _index(path).get("max_noise_level", MAX_NOISE_LEVEL)
    if isinstance(level, bool) or not isinstance(level, int):
        raise CheckpointError(f"{path / 'model_index.json'}: max_noise_level is {level!r}", hint=_REEXPORT)
    return NoiseAugmentation(scheduler_config=dict(_read_json(file)), max_noise_level=level)


def _depth_estimation(path: Path) -> DepthEstimation | None:
    """What the folder's depth estimator is given; None where the folder holds none."""
    folder = path / FOLDER_OF[DEPTH_ESTIMATOR]
    if not (folder / MODEL_NAME).exists():
        return None
    file = path / PROCESSOR_FILE
    return read_depth_estimation(_read_json(file), _read_json(folder / "config.json"), str(file))


def _identity(path: Path) -> str:
    """sha256 over the model's configs and graphs. The weights themselves enter the cache keys."""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        if file.name in (MODEL_NAME, "config.json", "scheduler_config.json", "preprocessor_config.json"):
            digest.update(file.relative_to(path).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def _text_length(path: Path) -> int:
    file = path / "text_encoder" / "config.json"
    if not file.exists():
        return 77
    return _whole(_read_json(file), "max_position_embeddings", file)


def _read_json(file: Path) -> dict[str, JsonValue]:
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}", hint=_REEXPORT) from error
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON: {error}", hint=_REEXPORT) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds no JSON object", hint=_REEXPORT)
    return content


def _list(config: Mapping[str, JsonValue], name: str, file: Path) -> list[JsonValue]:
    value = config.get(name)
    if not isinstance(value, list) or not value:
        raise CheckpointError(f"{file}: {name} is {value!r}, not a list", hint=_REEXPORT)
    return value


def _whole(config: Mapping[str, JsonValue], name: str, file: Path) -> int:
    value = config.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"{file}: {name} is {value!r}, not a positive whole number", hint=_REEXPORT)
    return value
