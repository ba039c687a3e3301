"""What is this folder? Recognising a Stable Diffusion checkpoint, and refusing what cannot be exported."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from sdrt.bundle import DepthEstimation, ModelRecord, ModelTask, NoiseAugmentation, TinyVaeRecord
from sdrt.cache import Store, cache_key
from sdrt.depth import PROCESSOR_FILE, read_depth_estimation
from sdrt.errors import CheckpointError
from sdrt.export.controlnet import ControlNet, check_controlnet
from sdrt.export.tiny_vae import check_tiny_vae, check_tiny_vae_folder
from sdrt.exported import MAX_NOISE_LEVEL, task_of_channels
from sdrt.pipeline_configs import latent_sides, scheduler_config_of, vae_scaling_factor

COMPONENT_CLASSES: Mapping[str, str] = {
    "text_encoder": "CLIPTextModel",
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
}
# Components that a checkpoint may be without, and the files that decide with them what they do.
CONTROLNET = "controlnet"  # where components have the names of a checkpoint's folders: the ControlNets beside it
TINY_VAE = "tiny_vae"  # and a tiny VAE beside it
OPTIONAL_CLASSES: Mapping[str, str] = {"depth_estimator": "DPTForDepthEstimation"}
_COMPANIONS: Mapping[str, tuple[str, ...]] = {"depth_estimator": (PROCESSOR_FILE,)}
# Which checkpoints each pipeline class is saved with: those of text-to-image do for any whose UNet needs no more.
SUPPORTED_PIPELINES: Mapping[str, tuple[ModelTask, ...]] = {
    "StableDiffusionPipeline": ("text-to-image",),
    "StableDiffusionImg2ImgPipeline": ("text-to-image",),
    "StableDiffusionInpaintPipeline": ("inpainting", "text-to-image"),
    "StableDiffusionUpscalePipeline": ("upscaling",),
    "StableDiffusionDepth2ImgPipeline": ("depth-to-image",),
    "StableDiffusionInstructPix2PixPipeline": ("editing",),
}
_KNOWN_PIPELINES: Mapping[str, str] = {
    "StableDiffusionXLPipeline": "Stable Diffusion XL",
    "StableDiffusion3Pipeline": "Stable Diffusion 3",
    "FluxPipeline": "Flux",
}
# UNet options that change its inputs, with the value that leaves them as Stable Diffusion 1.x and 2.x have them.
_UNET_DEFAULTS: Mapping[str, object] = {
    "class_embed_type": None,
    "addition_embed_type": None,
    "encoder_hid_dim": None,
    "time_cond_proj_dim": None,
    "center_input_sample": False,
}
_SUPPORTED = (
    "sdrt exports models of the Stable Diffusion 1.x and 2.x layout: text-to-image, inpainting, x4 upscaling, "
    "depth-to-image, InstructPix2Pix"
)
STEERED: tuple[ModelTask, ...] = ("text-to-image", "inpainting")  # the checkpoints that ControlNets go with
_LARGEST_HEADER_BYTES = 100 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checked diffusers folder.

    name: as the checkpoint calls itself, else its folder's. configs: component → its config.json. weights: component →
    its safetensors files. variant: the infix of the weights' names ("fp16"), where the folder holds only that.
    controlnets: those that are to steer its UNet. tiny_vae: the folder of one that lies beside it, a component as well.
    """

    path: Path
    name: str
    configs: Mapping[str, Mapping[str, Any]]
    weights: Mapping[str, tuple[Path, ...]]
    variant: Mapping[str, str | None]
    scheduler_class: str
    scheduler_config: Mapping[str, Any]
    noise_augmentation: NoiseAugmentation | None = None
    depth_estimation: DepthEstimation | None = None
    controlnets: tuple[ControlNet, ...] = ()
    tiny_vae: Path | None = None

    @property
    def size_bytes(self) -> int:
        """The weights' size on disk."""
        weights = [*self.weights.values(), *(control.weights for control in self.controlnets)]
        return sum(path.stat().st_size for paths in weights for path in paths)

    def folder(self, component: str) -> Path:
        """Where a component's config and weights lie; of several ControlNets the first one's."""
        if component == CONTROLNET:
            return self.controlnets[0].path
        return self.tiny_vae if component == TINY_VAE and self.tiny_vae is not None else self.path / component

    @property
    def vae_downsample(self) -> int:
        """Pixels per latent on one side."""
        return int(2 ** (len(self.configs["vae"]["block_out_channels"]) - 1))

    @property
    def unet_grid(self) -> int:
        """The latent pixels that become one at the UNet's coarsest."""
        return int(2 ** (len(self.configs["unet"]["block_out_channels"]) - 1))

    @property
    def num_class_embeds(self) -> int | None:
        """How many classes the UNet knows; None for one without."""
        count = self.configs["unet"].get("num_class_embeds")
        return None if count is None else int(count)

    @property
    def conditioning_channels(self) -> int:
        """How many channels the UNet takes beside the latents'."""
        return int(self.configs["unet"]["in_channels"]) - int(self.configs["vae"]["latent_channels"])

    @property
    def task(self) -> ModelTask:
        """What the checkpoint was made for."""
        return task_of_channels(self.conditioning_channels)

    @property
    def default_size(self) -> tuple[int, int]:
        """(height, width) in pixels that the model was trained for."""
        height, width = latent_sides(self.task, self.configs["unet"])
        return height * self.vae_downsample, width * self.vae_downsample


def open_checkpoint(path: Path, controlnets: Sequence[Path] = (), tiny_vae: Path | None = None) -> Checkpoint:
    """Recognise and check a diffusers folder, ControlNets for its UNet, and a tiny VAE that decodes its latents.

    Raises CheckpointError with what is wrong and what to do.
    """
    if not path.is_dir():
        if path.is_file():
            hint = "convert a single file to a diffusers folder first (diffusers' from_single_file and save_pretrained)"
            raise CheckpointError(f"{path} is a file, not a diffusers folder", hint=hint)
        raise CheckpointError(f"there is no checkpoint at {path}", hint="check the path; it must be a diffusers folder")
    index = _read_json(path / "model_index.json")
    _check_pipeline(path, index)
    folders = {name: _component_folder(path, name) for name in (*COMPONENT_CLASSES, *_present_options(path, index))}
    if tiny_vae is not None:
        folders[TINY_VAE] = check_tiny_vae_folder(tiny_vae)
    configs = {name: _read_json(folder / "config.json") for name, folder in folders.items()}
    located = {name: _locate_weights(folder) for name, folder in folders.items()}
    scheduler = _read_json(_component_folder(path, "scheduler") / "scheduler_config.json")
    checkpoint = Checkpoint(
        path=path,
        name=Path(str(index.get("_name_or_path", ""))).name or path.resolve().name,
        configs=configs,
        weights={name: files for name, (files, _) in located.items()},
        variant={name: variant for name, (_, variant) in located.items()},
        scheduler_class=str(index["scheduler"][1]),
        scheduler_config=scheduler,
        noise_augmentation=_noise_augmentation(path, index),
        depth_estimation=_depth_estimation(path, configs),
        controlnets=tuple(_open_controlnet(folder) for folder in controlnets),
        tiny_vae=tiny_vae,
    )
    _check_tokenizer(path)
    _check_unet(checkpoint)
    _check_task(checkpoint, str(index.get("_class_name")))
    _check_controlnets(checkpoint)
    if tiny_vae is not None:
        latent_channels = int(configs["vae"]["latent_channels"])
        check_tiny_vae(tiny_vae, configs[TINY_VAE], latent_channels, checkpoint.vae_downsample)
    return checkpoint


def component_hashes(checkpoint: Checkpoint, component: str, store: Store) -> dict[str, str]:
    """File name → sha256 of a component's config, its weights, and what else decides how it is exported."""
    hashes: dict[str, str] = {}
    if component in ("unet", CONTROLNET):
        for index, control in enumerate(checkpoint.controlnets):
            files = (control.path / "config.json", *control.weights)
            hashes |= {f"{CONTROLNET}/{index}/{path.name}": store.sha256(path) for path in files}
    if component == CONTROLNET:
        return hashes
    companions = (checkpoint.path / name for name in _COMPANIONS.get(component, ()))
    files = (checkpoint.folder(component) / "config.json", *checkpoint.weights[component], *companions)
    return hashes | {path.name: store.sha256(path) for path in files}


def identity_of(checkpoint: Checkpoint, store: Store) -> str:
    """One sha256 over everything that decides the model's images; a tiny VAE, which has its own, is beside it."""
    folders = ("tokenizer", "scheduler")
    files = [path for folder in folders for path in sorted((checkpoint.path / folder).rglob("*")) if path.is_file()]
    others = {path.relative_to(checkpoint.path).as_posix(): store.sha256(path) for path in files}
    if checkpoint.scheduler_class != checkpoint.scheduler_config.get("_class_name"):
        others["scheduler"] = checkpoint.scheduler_class
    if checkpoint.noise_augmentation is not None:
        others["low_res_scheduler"] = store.sha256(checkpoint.path / "low_res_scheduler" / "scheduler_config.json")
    for name in (name for name in checkpoint.weights if name != TINY_VAE):
        hashes = component_hashes(checkpoint, name, store)
        others |= {f"{name}/{file}": digest for file, digest in hashes.items()}
    return cache_key(files={**others})


def model_record(checkpoint: Checkpoint, store: Store) -> ModelRecord:
    """What the runtime has to know of this checkpoint."""
    height, width = checkpoint.default_size
    return ModelRecord(
        name=checkpoint.name,
        identity=identity_of(checkpoint, store),
        task=checkpoint.task,
        latent_channels=int(checkpoint.configs["vae"]["latent_channels"]),
        conditioning_channels=checkpoint.conditioning_channels,
        vae_downsample=checkpoint.vae_downsample,
        size_multiple=checkpoint.vae_downsample,
        vae_scaling_factor=vae_scaling_factor(checkpoint.task, checkpoint.configs["vae"]),
        prompt_embeds_dim=int(checkpoint.configs["unet"]["cross_attention_dim"]),
        text_length=int(checkpoint.configs["text_encoder"].get("max_position_embeddings", 77)),
        default_height=height,
        default_width=width,
        scheduler_class=checkpoint.scheduler_class,
        scheduler_config=pipeline_scheduler_config(checkpoint),
        noise_augmentation=checkpoint.noise_augmentation,
        depth_estimation=checkpoint.depth_estimation,
        controlnets=tuple(control.name for control in checkpoint.controlnets),
        control_features=checkpoint.controlnets[0].features if checkpoint.controlnets else 0,
        tiny_vae=_tiny_vae_record(checkpoint, store),
    )


def _tiny_vae_record(checkpoint: Checkpoint, store: Store) -> TinyVaeRecord | None:
    if checkpoint.tiny_vae is None:
        return None
    return TinyVaeRecord(
        name=checkpoint.tiny_vae.resolve().name,
        identity=cache_key(files={**component_hashes(checkpoint, TINY_VAE, store)}),
        scaling_factor=float(checkpoint.configs[TINY_VAE].get("scaling_factor", 1.0)),
    )


def pipeline_scheduler_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The scheduler's config as the checkpoint's pipeline sets it, or, where it has ControlNets, as theirs does."""
    return scheduler_config_of(
        checkpoint.task,
        checkpoint.scheduler_class,
        checkpoint.scheduler_config,
        steered=bool(checkpoint.controlnets),
    )


def _noise_augmentation(path: Path, index: Mapping[str, Any]) -> NoiseAugmentation | None:
    """What an upscaler does to its small image; None for other checkpoints."""
    if "low_res_scheduler" not in index:
        return None
    config = _read_json(_component_folder(path, "low_res_scheduler") / "scheduler_config.json")
    return NoiseAugmentation(
        scheduler_config=config, max_noise_level=int(index.get("max_noise_level", MAX_NOISE_LEVEL))
    )


def _present_options(path: Path, index: Mapping[str, Any]) -> tuple[str, ...]:
    """The components of `OPTIONAL_CLASSES` that the checkpoint has. Raises CheckpointError for another class."""
    present = []
    for name, known in OPTIONAL_CLASSES.items():
        entry = index.get(name)
        kind = entry[1] if isinstance(entry, list) and len(entry) == 2 else entry
        if kind is None:
            continue
        if kind != known:
            hint = f"to do without it, set {name} to [null, null] in model_index.json"
            raise CheckpointError(f"the {name} of {path} is a {kind}, not a {known}", hint=hint)
        present.append(name)
    return tuple(present)


def _depth_estimation(path: Path, configs: Mapping[str, Mapping[str, Any]]) -> DepthEstimation | None:
    """What the checkpoint's depth estimator is given; None where it has none."""
    if "depth_estimator" not in configs:
        return None
    return read_depth_estimation(
        _read_json(path / PROCESSOR_FILE), configs["depth_estimator"], str(path / PROCESSOR_FILE)
    )


def _open_controlnet(path: Path) -> ControlNet:
    if not path.is_dir():
        hint = "name the folder that holds the ControlNet's config.json and its safetensors weights"
        raise CheckpointError(f"there is no ControlNet folder at {path}", hint=hint)
    config = _read_json(path / "config.json")
    weights, variant = _locate_weights(path)
    return ControlNet(path=path, name=path.resolve().name, config=config, weights=weights, variant=variant)


def _check_controlnets(checkpoint: Checkpoint) -> None:
    if checkpoint.controlnets and checkpoint.task not in STEERED:
        raise CheckpointError(
            f"{checkpoint.path} is made for {checkpoint.task}, which no ControlNet steers",
            hint=f"ControlNets go with checkpoints for {' and '.join(STEERED)}",
        )
    unet, vae = checkpoint.configs["unet"], checkpoint.configs["vae"]
    for control in checkpoint.controlnets:
        check_controlnet(control, unet, int(vae["latent_channels"]), checkpoint.vae_downsample)


def check_safetensors(path: Path) -> None:
    """Raise CheckpointError unless the file is a whole safetensors file (header and length agree)."""
    size = path.stat().st_size
    download = "download or copy it again"
    with path.open("rb") as file:
        head = file.read(8)
        length = int.from_bytes(head, "little")
        if len(head) < 8 or length > min(size, _LARGEST_HEADER_BYTES):
            raise CheckpointError(f"{path} is not a safetensors file, or was cut off in its header", hint=download)
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise CheckpointError(f"{path} has a damaged safetensors header: {error}", hint=download) from error
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise CheckpointError(f"{path} has {size} bytes; its header says {expected}", hint=download)


def _check_pipeline(path: Path, index: Mapping[str, Any]) -> None:
    kind = str(index.get("_class_name"))
    if kind not in SUPPORTED_PIPELINES:
        described = f" ({_KNOWN_PIPELINES[kind]})" if kind in _KNOWN_PIPELINES else ""
        steered = "build the checkpoint without it, and add it with: --controlnet FOLDER/controlnet"
        raise CheckpointError(
            f"{path} is a {kind}{described}", hint=f"{_SUPPORTED}; {steered}" if "ControlNet" in kind else _SUPPORTED
        )
    for component in (*COMPONENT_CLASSES, "tokenizer", "scheduler"):
        entry = index.get(component)
        if not isinstance(entry, list) or len(entry) != 2 or entry[1] is None:
            hint = "download the whole checkpoint again"
            raise CheckpointError(f"{path / 'model_index.json'} names no {component}", hint=hint)
        if component in COMPONENT_CLASSES and entry[1] != COMPONENT_CLASSES[component]:
            raise CheckpointError(
                f"the {component} of {path} is a {entry[1]}, not a {COMPONENT_CLASSES[component]}", hint=_SUPPORTED
            )


def _check_tokenizer(path: Path) -> None:
    folder = _component_folder(path, "tokenizer")
    kinds = (("tokenizer.json",), ("vocab.json", "merges.txt"))
    if not any(all((folder / name).is_file() for name in kind) for kind in kinds):
        hint = "download the tokenizer folder again: tokenizer.json, or vocab.json and merges.txt"
        raise CheckpointError(f"{folder} holds no tokenizer", hint=hint)


def _check_unet(checkpoint: Checkpoint) -> None:
    unet, latent = checkpoint.configs["unet"], checkpoint.configs["vae"].get("latent_channels")
    if unet.get("out_channels", latent) != latent:
        raise CheckpointError(
            f"the UNet of {checkpoint.path} gives {unet['out_channels']} channels; the VAE has {latent}",
            hint=_SUPPORTED,
        )
    for option, plain in _UNET_DEFAULTS.items():
        if unet.get(option, plain) != plain:
            raise CheckpointError(
                f"the UNet of {checkpoint.path} has {option} = {unet[option]!r}, which sdrt does not export",
                hint=_SUPPORTED,
            )


def _check_task(checkpoint: Checkpoint, pipeline: str) -> None:
    """The UNet's inputs, the pipeline's name and the other components have to tell the same."""
    task = checkpoint.task
    if task not in SUPPORTED_PIPELINES[pipeline]:
        raise CheckpointError(
            f"{checkpoint.path} is a {pipeline}, but its UNet is one for {task}",
            hint=f"if that is right, name {_pipeline_of(task)} as _class_name in model_index.json",
        )
    for needed, there, what in (
        (task == "upscaling", checkpoint.num_class_embeds is not None, "num_class_embeds"),
        (task == "upscaling", checkpoint.noise_augmentation is not None, "low_res_scheduler"),
    ):
        if needed != there:
            verb = "lacks" if needed else "has"
            raise CheckpointError(f"{checkpoint.path}, made for {task}, {verb} {what}", hint=_SUPPORTED)


def _pipeline_of(task: ModelTask) -> str:
    return next(name for name, tasks in SUPPORTED_PIPELINES.items() if tasks[0] == task)


def _component_folder(path: Path, name: str) -> Path:
    folder = path / name
    if not folder.is_dir():
        raise CheckpointError(f"{path} has no {name} folder", hint="download the whole checkpoint again")
    return folder


def _locate_weights(folder: Path) -> tuple[tuple[Path, ...], str | None]:
    partial = [path.name for path in folder.iterdir() if path.name.endswith((".incomplete", ".part", ".partial"))]
    if partial:
        raise CheckpointError(f"{folder / partial[0]} is a half-finished download", hint="finish the download")
    for variant in (None, "fp16", "bf16", "fp32", "non_ema"):
        files = _weights_of_variant(folder, variant)
        if files:
            for path in files:
                check_safetensors(path)
            return files, variant
    if any(path.suffix in (".bin", ".ckpt", ".pt", ".pth") for path in folder.iterdir()):
        raise CheckpointError(
            f"{folder} holds only pickled weights, which can run code when loaded",
            hint="convert them first: load with diffusers and save_pretrained(..., safe_serialization=True)",
        )
    others = [path.name for path in folder.iterdir() if path.suffix == ".safetensors"]
    if others:
        names = "diffusion_pytorch_model.safetensors or model.safetensors"
        raise CheckpointError(
            f"{folder} holds {others[0]} alone, under no name that is loaded", hint=f"name it {names}"
        )
    raise CheckpointError(f"{folder} holds no safetensors weights", hint="download the whole checkpoint again")


def _weights_of_variant(folder: Path, variant: str | None) -> tuple[Path, ...]:
    """Those that the libraries would load: diffusers looks for an index first, transformers for a single file."""
    infix = "" if variant is None else f".{variant}"
    for stem, index_first in (("diffusion_pytorch_model", True), ("model", False)):
        single, index = folder / f"{stem}{infix}.safetensors", folder / f"{stem}.safetensors.index{infix}.json"
        if single.is_file() and not (index_first and index.is_file()):
            return (single,)
        if index.is_file():
            return tuple(_shards(folder, _read_json(index)))
    return ()


def _shards(folder: Path, index: Mapping[str, Any]) -> Iterator[Path]:
    places = index.get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError(f"the weight index of {folder} names no files", hint="download the checkpoint again")
    for name in sorted(set(places.values())):
        pure = PurePosixPath(name)
        if pure.name != name or os.sep in name or "\\" in name or "\0" in name:
            raise CheckpointError(
                f"the weight index of {folder} names {name!r}, outside it", hint="do not use this file"
            )
        if not (folder / name).is_file():
            raise CheckpointError(
                f"{folder / name} is missing, which the weight index names",
                hint="download the whole checkpoint again; beside a single file, delete the index",
            )
        yield folder / name


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        hint = "name a whole diffusers folder: model_index.json, unet/, vae/, text_encoder/, tokenizer/, scheduler/"
        raise CheckpointError(f"{path} is missing", hint=hint) from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}", hint="download it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object", hint="download it again")
    return content
