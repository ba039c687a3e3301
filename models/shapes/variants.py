"""The task variants of `shapes`: whole diffusers folders, put together from the checkpoint and what differs from it."""

import json
import shutil
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from pathlib import Path

from sdrt.bundle import JsonValue
from sdrt.cache import cache_key
from sdrt.errors import CheckpointError
from sdrt.files import staged_directory

DEPTH_DOWNLOADS: dict[str, object] = {"depth_estimator": [None, None], "feature_extractor": [None, None]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A variant's pipeline class, and the entries of model_index.json that are its own; no class for a ControlNet."""

    pipeline: str | None
    index: dict[str, object] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()  # entries of the checkpoint's index that the pipeline class does not take


VARIANTS = {
    "inpaint": Variant(pipeline="StableDiffusionInpaintPipeline"),
    "upscale": Variant(
        pipeline="StableDiffusionUpscalePipeline",
        index={
            "low_res_scheduler": ["diffusers", "DDPMScheduler"],
            "watermarker": [None, None],
            "max_noise_level": 350,
        },
        dropped=("image_encoder", "requires_safety_checker"),
    ),
    "depth": Variant(
        pipeline="StableDiffusionDepth2ImgPipeline",
        index=DEPTH_DOWNLOADS,
        dropped=("image_encoder", "requires_safety_checker", "safety_checker"),
    ),
    "edges": Variant(pipeline=None),
}


def variant_key(name: str) -> str:
    """What tells a variant's folder from that of other weights. Raises CheckpointError as `variant_checkpoint` does."""
    models, own = _folders(name)
    stamps: list[JsonValue] = []
    for root in (models / "checkpoint", own):
        files = (path for path in sorted(root.rglob("*")) if path.is_file())
        stamps += [[path.relative_to(models).as_posix(), *_stamp(path)] for path in files]
    return cache_key(variant=name, made_as=json.loads(json.dumps(asdict(VARIANTS[name]))), files=stamps)


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def variant_checkpoint(name: str, into: Path, *, overwrite: bool = True) -> Path:
    """Write the whole diffusers folder of a variant to `into`/`name`, replacing one that is there; returns it.

    The ControlNet's folder ("edges") holds that model alone. Raises CheckpointError for a name that is not in
    VARIANTS and for weights that are not there, OutputError without `overwrite` for a folder that is there.
    """
    models, own = _folders(name)
    variant, base = VARIANTS[name], models / "checkpoint"
    into.mkdir(parents=True, exist_ok=True)
    with staged_directory(into / name, overwrite=overwrite) as folder:
        if variant.pipeline is not None:
            for part in sorted(path for path in base.iterdir() if path.is_dir() and not (own / path.name).exists()):
                shutil.copytree(part, folder / part.name)
            index = json.loads((base / "model_index.json").read_text())
            (folder / "model_index.json").write_text(json.dumps(_index(name, variant, index), indent=2) + "\n")
        shutil.copytree(own, folder, dirs_exist_ok=True)
    return into / name


def _folders(name: str) -> tuple[Path, Path]:
    """(the folder of all models, that of what is the variant's own)."""
    if name not in VARIANTS:
        raise CheckpointError(f"shapes has no variant {name!r}", hint=f"there are: {', '.join(VARIANTS)}")
    models = Path(str(files("sdrt.models.shapes")))
    if not (models / name).is_dir():
        raise CheckpointError(
            f"the weights of shapes' variant {name!r} are not there",
            hint="a clone of sdrt has them and an installed wheel has not; or train them: "
            f"python -m sdrt.models.shapes.train_variants --only {name}",
        )
    return models, models / name


def _index(name: str, variant: Variant, base: dict[str, object]) -> dict[str, object]:
    kept = {key: value for key, value in base.items() if key not in variant.dropped}
    return kept | {"_class_name": variant.pipeline, "_name_or_path": f"shapes-{name}"} | variant.index
