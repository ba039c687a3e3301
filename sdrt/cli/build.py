"""`sdrt build`: a model becomes a bundle, through the export and engines stages."""

import json
import re
import tempfile
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from sdrt.cli.options import AsJson, Force, Size, controlnet_folder, model_folder, parse_size
from sdrt.cli.stages import ENGINES, EXPORT, check_installed, run_stage
from sdrt.cli.terminal import emit, facts, progress_bar, seconds_text, size_text, table, title
from sdrt.errors import BuildError, CheckpointError, RequestError
from sdrt.progress import Progress

if TYPE_CHECKING:
    from rich.text import Text

    from sdrt.bundle import Bundle, JsonValue, ParityRecord

BACKEND_INSTALLS = {
    "openvino": "pip install sdrt",
    "onnxruntime": 'pip install "sdrt[onnxruntime]"',
    "tensorrt": 'pip install "sdrt[tensorrt]"',
}
BACKEND_MODULES = {"tensorrt": ("tensorrt", "tensorrt_rtx")}  # any of these; else the backend's own name
LARGEST_BATCH = 64
UNVERIFIED = "the FP16 graphs, on a CPU; the engines wait for a GPU: sdrt verify"
_BATCH = re.compile(r"(?:1\.\.)?([0-9]{1,3})")
_SIDE = re.compile(r"[0-9]{1,6}")
_SIZES_HINT = (
    "write WIDTHxHEIGHT: a list (512x512,512x768), a range of both sides (256..1024), or of each (256x256..1024x768)"
)


def build(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A diffusers folder, an ONNX folder, or an embedded model: shapes, in a clone also shapes-inpaint, "
            "shapes-depth, shapes-upscale.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="BUNDLE", help="The folder to make.")],
    controlnet: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FOLDER",
            help="A ControlNet in the diffusers layout, in a clone also shapes-edges, to steer with; again for more.",
            show_default=False,
        ),
    ] = None,
    backend: Annotated[
        Literal["auto", "openvino", "onnxruntime", "tensorrt"], typer.Option(help="What compiles and runs the engines.")
    ] = "auto",
    precision: Annotated[
        Literal["auto", "fp32", "bf16", "fp16"],
        typer.Option(help="auto is fp16 for tensorrt; else bf16 where the CPU computes in it, else fp32."),
    ] = "auto",
    sizes: Annotated[
        str | None,
        typer.Option(
            metavar="SIZES",
            help="Image sizes: 512x512,512x768 or 256..1024. Default: half to one and a half times the model's own.",
            show_default=False,
        ),
    ] = None,
    batch: Annotated[str, typer.Option(metavar="1..N", help="Images at a time, at most N.")] = "1..4",
    tiny_vae: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Also a small decoder, a diffusers AutoencoderTiny, for previews and `sdrt run --vae tiny`.",
            show_default=False,
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            "--threads", "--jobs", min=1, metavar="N", help="CPU threads. Default: every core.", show_default=False
        ),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SM", help="For tensorrt: a GPU architecture (sm89), again for more. Default: every recent one."
        ),
    ] = None,
    refit: Annotated[
        bool, typer.Option("--refit", help="For tensorrt, on a GPU: engines that take other weights later.")
    ] = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Build a bundle: export MODEL, compile its engines, seal them.

    The engines are checked against PyTorch before.
    """
    began = time.monotonic()
    flags = ["--backend", backend, "--precision", precision, "--batch", batch]
    flags += [] if sizes is None else ["--sizes", sizes]
    flags += [part for each in target or () for part in ("--target", each)]
    if refit:
        _check_refit(backend)
    with progress_bar(phases=True) as progress:
        bundle, peak_bytes = build_bundle(
            model,
            out,
            flags,
            controlnets=[controlnet_folder(each) for each in controlnet or ()],
            sizes=sizes,
            refit=refit,
            tiny_vae=tiny_vae,
            threads=threads,
            force=force,
            progress=progress,
        )
    seconds = time.monotonic() - began
    result = _result(bundle, seconds) | {"peak_bytes": peak_bytes}
    emit(result, _summary(bundle, seconds), as_json=as_json)


def build_bundle(
    model: str,
    out: Path,
    flags: Sequence[str],
    *,
    controlnets: Sequence[Path] = (),
    sizes: str | None,
    refit: bool = False,
    tiny_vae: Path | None = None,
    threads: int | None,
    force: bool,
    progress: Progress,
) -> "tuple[Bundle, int | None]":
    """Build MODEL at `out`; returns the bundle and the export's peak memory, where it ran.

    flags: options of the engines stage. controlnets: folders of ControlNets. Everything that can be refused early is
    refused before work begins.
    """
    from sdrt.bundle import Bundle
    from sdrt.files import check_replaceable, check_writable, output_errors

    options = dict(zip(flags[::2], flags[1::2], strict=True))
    listed = listed_sizes(sizes)
    golden = listed[0] if listed else None
    _check_batch(options.get("--batch", "1"))
    _check_backend(options.get("--backend", "auto"))
    _check_precision(options.get("--precision", "auto"), options.get("--backend", "auto"))
    check_replaceable(out, mark="bundle.json", overwrite=force)
    check_writable(out)
    folder = model_folder(model)
    switches = [*(["--refit"] if refit else []), *(["--overwrite"] if force else [])]
    flags = [*flags, *thread_flags(threads), *switches]
    check_controlnet_folders(controlnets, folder)
    if is_onnx_folder(folder):
        if tiny_vae is not None:
            raise RequestError(
                f"--tiny-vae is exported with its checkpoint, and {folder} was exported already",
                hint="name the diffusers folder, or leave --tiny-vae out",
            )
        run_stage(ENGINES, [str(folder), str(out), *flags], progress)
        return Bundle.open(out), None
    check_diffusers_folder(folder, listed)
    check_installed(ENGINES)
    with (
        output_errors(out),
        tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.", suffix=".export.partial") as work,
    ):
        exported = Path(work) / "onnx"
        size_flags = [] if golden is None else ["--golden-size", f"{golden[0]}x{golden[1]}"]
        stage_flags = ["--linked", *size_flags, *thread_flags(threads)]
        stage_flags += [part for each in controlnets for part in ("--controlnet", str(each))]
        stage_flags += [] if tiny_vae is None else ["--tiny-vae", str(tiny_vae)]
        record = run_stage(EXPORT, [str(folder), str(exported), *stage_flags], progress)
        run_stage(ENGINES, [str(exported), str(out), *flags], progress)
    return Bundle.open(out), record.get("peak_bytes")


def listed_sizes(sizes: str | None) -> list[Size]:
    """The (height, width) of each size that --sizes names: those of a list, or the two ends of a range.

    The reference image is drawn at the first. Raises RequestError when the text is neither list nor range.
    """
    if sizes is None:
        return []
    parts = [part.strip() for part in (sizes.split("..") if ".." in sizes else sizes.split(","))]
    if ".." in sizes and len(parts) != 2:
        raise RequestError(f"--sizes {sizes!r} is not one range", hint=_SIZES_HINT)
    read = []
    for part in parts:
        if ".." in sizes and _SIDE.fullmatch(part):
            read.append((int(part), int(part)))
            continue
        try:
            read.append(parse_size(part))
        except RequestError:
            raise RequestError(f"--sizes {sizes!r}: {part!r} is not a size", hint=_SIZES_HINT) from None
    if min(side for size in read for side in size) < 1:
        raise RequestError(f"--sizes {sizes!r} holds an empty size", hint=_SIZES_HINT)
    if ".." in sizes and (read[0][0] > read[1][0] or read[0][1] > read[1][1]):
        raise RequestError(f"--sizes {sizes!r} ends below its start", hint=_SIZES_HINT)
    return read


def is_onnx_folder(folder: Path) -> bool:
    """Whether a model folder holds ONNX components rather than weights."""
    return (folder / "unet" / "model.onnx").is_file()


def parity_text(parity: "ParityRecord") -> tuple[str, str]:
    """What was measured and what is allowed, for people."""
    if parity.metric == "psnr_db":
        return f"{parity.measured:.1f} dB", f"≥ {parity.bound:.0f} dB"
    if parity.metric == "max_absolute":
        return f"{parity.measured * 255:.2g}/255", f"≤ {parity.bound * 255:.2g}/255"
    return f"{parity.measured:.1e}", f"≤ {parity.bound:.0e}"


def parity_table(bundle: "Bundle") -> "list[Text]":
    """The evidence in a bundle's seal: each engine, then the whole image."""
    manifest = bundle.manifest
    rows = [
        (item.name, size_text(sum(file.size_bytes for file in item.files)), *parity_text(item.parity))
        for item in manifest.components
    ]
    rows.append(("golden image", "", *parity_text(manifest.golden.parity)))
    return table(("engine", "size", "error", "allowed"), rows)


def bundle_bytes(bundle: "Bundle") -> int:
    """The size of every file that the manifest lists."""
    return sum(record.size_bytes for record in bundle.files())


def _check_batch(batch: str) -> None:
    match = _BATCH.fullmatch(batch.strip())
    if match is None or not 1 <= int(match[1]) <= LARGEST_BATCH:
        raise RequestError(
            f"--batch {batch!r} is no number of images",
            hint=f'write "1..4" for up to four at a time; the largest is 1..{LARGEST_BATCH}',
        )


def _check_refit(backend: str) -> None:
    """Refuse now what the engines stage would refuse after the export."""
    if backend != "tensorrt":
        raise RequestError(f"{backend} has no engines to refit", hint="leave --refit out, or --backend tensorrt")
    from sdrt.runners.nvidia import require_device

    require_device()


def _check_backend(backend: str) -> None:
    needed = "openvino" if backend == "auto" else backend
    if all(find_spec(name) is None for name in BACKEND_MODULES.get(needed, (needed,))):
        raise BuildError(f"the backend {needed} is not installed", hint=BACKEND_INSTALLS[needed])


def _check_precision(precision: str, backend: str) -> None:
    from sdrt.runners.precisions import precisions_of

    name = "openvino" if backend == "auto" else backend
    possible = precisions_of(name)
    if precision not in ("auto", *possible):
        raise BuildError(
            f"{name} cannot build {precision} on this machine", hint=f"choose one of: auto, {', '.join(possible)}"
        )


def check_diffusers_folder(folder: Path, sizes: Sequence[Size]) -> None:
    """Refuse what is no diffusers folder (CheckpointError), or has no such size (RequestError), before it is exported.

    BuildError: what exports it is not installed.
    """
    if not folder.is_dir():
        hint = "name a diffusers folder; convert a single file with diffusers' from_single_file and save_pretrained"
        raise CheckpointError(f"{folder} is a file, not a diffusers folder", hint=hint)
    if not (folder / "model_index.json").is_file():
        raise CheckpointError(
            f"{folder} is not a diffusers folder: it has no model_index.json",
            hint="name the folder that holds model_index.json, or fetch the checkpoint again",
        )
    check_installed(EXPORT)
    multiple = size_multiple(folder)
    if multiple is None:
        return
    for height, width in sizes:
        if height % multiple or width % multiple:
            near = "x".join(str(max(1, round(side / multiple)) * multiple) for side in (width, height))
            raise RequestError(
                f"{width}x{height} is not a size of this model: both sides must be multiples of {multiple} pixels",
                hint=f"the nearest one is {near}",
            )


def check_controlnet_folders(controlnets: Sequence[Path], model: Path) -> None:
    """Refuse ControlNets that are not there (CheckpointError), or for a network that is traced already (RequestError).

    Whether they fit the model is the export stage's to say.
    """
    if controlnets and is_onnx_folder(model):
        raise RequestError(
            f"--controlnet is given, but {model} is an ONNX folder, whose UNet is traced as it is",
            hint="name the diffusers folder, or export it again: python -m sdrt.export MODEL OUT --controlnet FOLDER",
        )
    for folder in controlnets:
        if not (folder / "config.json").is_file():
            missing = "it has no config.json" if folder.is_dir() else "there is no such folder"
            raise CheckpointError(
                f"{folder} is not a ControlNet: {missing}",
                hint="name the folder that holds the ControlNet's config.json and its safetensors weights",
            )


def size_multiple(folder: Path) -> int | None:
    """The pixel grid of a model folder; None where its configs do not tell (the stages then refuse it).

    It is the VAE's, and the UNet's too where another exporter traced it.
    """
    from sdrt.exported import EXPORT_RECORD_NAME

    multiple = 1
    foreign = is_onnx_folder(folder) and not (folder / EXPORT_RECORD_NAME).exists()
    for component in ("vae_decoder" if is_onnx_folder(folder) else "vae", *(["unet"] if foreign else [])):
        try:
            config = json.loads((folder / component / "config.json").read_bytes())
            levels = len(config["block_out_channels"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        multiple *= 2 ** (levels - 1)
    return multiple


def thread_flags(threads: int | None) -> list[str]:
    """--threads for a stage, where it was given."""
    return [] if threads is None else ["--threads", str(threads)]


def _result(bundle: "Bundle", seconds: float) -> "dict[str, JsonValue]":
    import msgspec

    manifest = bundle.manifest
    parity: dict[str, JsonValue] = {item.name: msgspec.to_builtins(item.parity) for item in manifest.components}
    parity["golden image"] = msgspec.to_builtins(manifest.golden.parity)
    return {
        "bundle": str(bundle.path),
        "seconds": round(seconds, 3),
        "size_bytes": bundle_bytes(bundle),
        "model": manifest.model.name,
        "backend": manifest.backend.name,
        "precision": manifest.precision,
        "parity": parity,
    }


def _summary(bundle: "Bundle", seconds: float) -> "list[Text | str]":
    from sdrt.sizes import describe_sizes

    manifest = bundle.manifest
    rows = [
        ("bundle", str(bundle.path)),
        ("size", size_text(bundle_bytes(bundle))),
        ("backend", f"{manifest.backend.name} {manifest.backend.version.split('-')[0]}, {manifest.precision}"),
        ("images", f"{describe_sizes(manifest.profile)}; up to {manifest.profile.max_batch} at a time"),
        ("reference", manifest.golden.reference),
        ("built in", seconds_text(seconds)),
    ]
    if not manifest.device_verified:
        rows.append(("verified", UNVERIFIED))
    return [title(f"{manifest.model.name}: built, checked and sealed"), *facts(rows), "", *parity_table(bundle)]
