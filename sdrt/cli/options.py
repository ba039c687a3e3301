"""Options that several commands share: their names, their help, and how their texts are read."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import typer

from sdrt.errors import BundleError, CheckpointError, OutputError, RequestError

AsJson: TypeAlias = Annotated[bool, typer.Option("--json", help="Print one JSON object; everything else on stderr.")]
Threads: TypeAlias = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="CPU threads. Default: every core.", show_default=False)
]
OnProvider: TypeAlias = Annotated[
    Literal["cpu", "cuda", "tensorrt", "tensorrt-rtx"] | None,
    typer.Option(
        "--provider", help="For onnxruntime bundles: the execution provider. Default: cpu.", show_default=False
    ),
]
Force: TypeAlias = Annotated[bool, typer.Option("--force", help="Overwrite what is there already.")]


def check_built(bundle: Path | None) -> Path | None:
    """BUNDLE as it is. Raises BundleError for the name of an embedded model, of which a bundle can be built."""
    if bundle is not None and not bundle.exists() and _is_embedded_model(str(bundle)):
        raise BundleError(
            f"{bundle} is a model, of which a bundle is to be built first",
            hint=f"sdrt build {bundle} --out {bundle}.sdrt, then name {bundle}.sdrt",
        )
    return bundle


BundleFolder: TypeAlias = Annotated[
    Path,
    typer.Argument(
        metavar="BUNDLE", help="The folder that `sdrt build` wrote.", callback=check_built, show_default=False
    ),
]
Size: TypeAlias = tuple[int, int]

EMBEDDED = "shapes"
EMBEDDED_CONTROLNET = "shapes-edges"
_PICTURE = Path("picture.png")  # for hints
_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tiff", ".npy", ".npz")
_SIZE = re.compile(r"([0-9]{1,6})[xX]([0-9]{1,6})")


def parse_size(text: str) -> Size:
    """(height, width) of a text WIDTHxHEIGHT. Raises RequestError."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise RequestError(f"{text!r} is not a size", hint="write WIDTHxHEIGHT, such as 512x768")
    return int(match[2]), int(match[1])


def chosen_size(size: str | None, width: int | None, height: int | None) -> tuple[int | None, int | None]:
    """(height, width) from --size or --width and --height. Raises RequestError when both were given."""
    if size is None:
        return height, width
    if width is not None or height is not None:
        raise RequestError("--size was given beside --width or --height", hint="give one of the two")
    return parse_size(size)


def numbered(out: Path, count: int) -> list[Path]:
    """Where `count` images go: out.png, or out-1.png, out-2.png… Raises RequestError as `beside` does."""
    return [out] if count == 1 else [beside(out, str(number)) for number in range(1, count + 1)]


def beside(out: Path, ending: str) -> Path:
    """Where another picture of the same kind goes: out-ENDING.png. Raises RequestError for a path without a name."""
    if not out.name:
        raise RequestError(f"--out is {str(out)!r}, a folder", hint=f"name a file: --out {out / _PICTURE}")
    return out.with_name(f"{out.stem}-{ending}{out.suffix}")


def check_outputs(paths: Sequence[Path], suffix: str, *, force: bool) -> None:
    """Refuse outputs before any work: a wrong ending (RequestError), existing or unwritable (OutputError)."""
    from sdrt.files import check_writable, refuse_existing

    for path in paths:
        if path.suffix.lower() != suffix:
            stem = path.stem if path.suffix.lower() in _ENDINGS else path.name  # of v1.5, .5 is no ending
            name = path / f"{_PICTURE.stem}{suffix}" if path.is_dir() else path.with_name(f"{stem}{suffix}")
            raise RequestError(f"the output {path} does not end in {suffix}", hint=f"name it so: --out {name}")
        if path.is_dir():
            raise RequestError(f"the output {path} is a folder", hint=f"name a file that ends in {suffix}")
        refuse_existing(path, overwrite=force)
    check_writable(paths[0])


def is_embedded(model: str) -> bool:
    """Whether MODEL names the embedded model or a variant of it, and no path."""
    return model == EMBEDDED or (model.startswith(f"{EMBEDDED}-") and not Path(model).exists())


def _is_embedded_model(name: str) -> bool:
    """Whether an embedded model of this very name is one of which a bundle can be built: a ControlNet is not."""
    if not is_embedded(name):
        return False
    from sdrt.models.shapes.variants import VARIANTS

    variant = VARIANTS.get(name.removeprefix(f"{EMBEDDED}-"))
    return name == EMBEDDED or (variant is not None and variant.pipeline is not None)


def model_folder(model: str) -> Path:
    """The folder of MODEL: a path, or the embedded model or one of its variants by name. Raises CheckpointError."""
    if is_embedded(model):
        return _embedded_folder() if model == EMBEDDED else _variant_folder(model.removeprefix(f"{EMBEDDED}-"))
    folder = Path(model)
    if not folder.exists():
        raise CheckpointError(
            f"there is no model at {model}", hint=f"check the path, or use the embedded model: {EMBEDDED}"
        )
    return folder


def controlnet_folder(path: Path) -> Path:
    """A ControlNet's folder: a path as it is, or that of the embedded model under its name, shapes-edges."""
    return path if path.exists() or str(path) != EMBEDDED_CONTROLNET else model_folder(str(path))


def _variant_folder(name: str) -> Path:
    """A variant of the embedded model, put together in the build cache unless it is there."""
    from sdrt.cache import default_cache_root
    from sdrt.models.shapes.variants import variant_checkpoint, variant_key

    root = default_cache_root() / "models" / variant_key(name)
    folder = root / name
    if not folder.is_dir():
        try:
            variant_checkpoint(name, root, overwrite=False)
        except OutputError:
            if not folder.is_dir():  # else another process has just made the same
                raise
    return folder


def _embedded_folder() -> Path:
    from importlib.resources import files

    folder = Path(str(files("sdrt.models.shapes"))) / "checkpoint"
    if not (folder / "model_index.json").is_file():
        raise CheckpointError(
            f"this installation lacks the embedded model ({folder})",
            hint="reinstall sdrt: pip install --force-reinstall sdrt",
        )
    return folder
