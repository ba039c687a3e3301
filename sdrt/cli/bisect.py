"""The bisection of `sdrt verify --bisect`: a bundle and its model in, the nodes that lose parity out."""

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdrt.cli.build import check_diffusers_folder, is_onnx_folder, thread_flags
from sdrt.cli.options import model_folder
from sdrt.cli.stages import BISECT, EXPORT, check_installed, run_stage
from sdrt.cli.terminal import facts, table, title
from sdrt.errors import RequestError
from sdrt.progress import Progress

if TYPE_CHECKING:
    from rich.text import Text

    from sdrt.bundle import Bundle

_HEAD = ("component", "node", "operator", "at or after", "in", "error", "of its inputs", "largest value")


def bisect_model(
    bundle: "Bundle", model: str, *, bound: float | None, threads: int | None, progress: Progress
) -> list[dict[str, Any]]:
    """What the bisection stage finds in each component; MODEL is exported first unless it is an ONNX folder.

    RequestError: the bundle is not FP16, or the bound is no error. CheckpointError: not the bundle's model.
    """
    _check_request(bundle, bound)
    check_installed(BISECT)
    folder = model_folder(model)
    flags = [*([] if bound is None else ["--bound", repr(bound)]), *thread_flags(threads)]
    with tempfile.TemporaryDirectory(dir=_room(), prefix=".bisect.") as work:
        if not is_onnx_folder(folder):
            folder = _exported(bundle, folder, Path(work), threads, progress)
        result = run_stage(BISECT, [str(bundle.path), str(folder), work, *flags], progress)
    components: list[dict[str, Any]] = result["components"]
    return components


def bisection_lines(components: Sequence[Mapping[str, Any]]) -> "list[Text | str]":
    """What was compared, and a table of the losses, if there are any."""
    rows = [(item["component"], _compared(item)) for item in components]
    losses = [row for item in components for row in _loss_rows(item)]
    if not losses:
        return [title("Nothing to find: no tensor that was compared leaves its bound"), *facts(rows)]
    shown = table(_HEAD, losses, left=(0, 1, 2, 3, 4))
    return [title("Where parity is lost first"), *facts(rows), "", *shown]


def _compared(item: Mapping[str, Any]) -> str:
    found = item["findings"]
    counts = f"{found['compared']:,} of {found['tensors']:,} tensors compared ({item['evaluated_on']})"
    lost = f"{len(found['losses'])} nodes go" if found["losses"] else "none is"
    return f"{counts}, {lost} beyond {item['bound']:.1e}"


def _loss_rows(item: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for loss in item["findings"]["losses"]:
        yield (
            item["component"],
            loss["node"],
            loss["operator"],
            loss["module"] or "",
            "float32" if loss["in_float32"] else "float16",
            "not finite" if loss["error"] is None else f"{loss['error']:.1e}",
            f"{loss['input_error']:.1e}",
            f"{loss['largest']:.4g}",
        )


def _check_request(bundle: "Bundle", bound: float | None) -> None:
    precision = bundle.manifest.precision
    if precision == "fp32":
        raise RequestError(
            f"{bundle.path} computes in float32: there is no lower precision to look into", hint="leave --bisect out"
        )
    if precision != "fp16":
        raise RequestError(
            f"--bisect looks into fp16 bundles; {bundle.path} is {precision}",
            hint="leave --bisect out, or build another one with --backend tensorrt",
        )
    if bound is not None and not (math.isfinite(bound) and bound > 0):
        raise RequestError(f"--bound {bound} is no relative error", hint="write one such as 1e-3")


def _exported(bundle: "Bundle", folder: Path, work: Path, threads: int | None, progress: Progress) -> Path:
    """The checkpoint as ONNX in `work`, with golden results of the size that the bundle was built with.

    RequestError: the bundle has ControlNets too.
    """
    golden = bundle.manifest.golden
    if bundle.manifest.model.controlnets:
        raise RequestError(
            f"{bundle.path} has ControlNets, and {folder} holds none",
            hint="name what this writes: python -m sdrt.export MODEL OUT --controlnet FOLDER",
        )
    check_diffusers_folder(folder, [])
    exported = work / "onnx"
    size = f"{golden.height}x{golden.width}"
    flags = ["--linked", "--golden-size", size, *thread_flags(threads)]
    run_stage(EXPORT, [str(folder), str(exported), *flags], progress)
    return exported


def _room() -> Path | None:
    """The cache's own disk, from which graphs are linked instead of copied; else where temporary files go."""
    from sdrt.cache import default_cache_root

    root = default_cache_root()
    return root if root.is_dir() else None
