"""`sdrt verify`: a bundle's hashes and its golden image, checked on this machine; where it loses parity, if asked."""

import time
from typing import TYPE_CHECKING, Annotated

import typer

from sdrt.cli.bisect import bisect_model, bisection_lines
from sdrt.cli.build import parity_text
from sdrt.cli.options import AsJson, BundleFolder, OnProvider, Threads
from sdrt.cli.terminal import emit, facts, progress_bar, seconds_text, size_text, title
from sdrt.errors import RequestError

if TYPE_CHECKING:
    from sdrt.bundle import Bundle, JsonValue


def verify(
    bundle: BundleFolder,
    bisect: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Instead of drawing, compare an fp16 bundle's inner tensors with MODEL, of which it was built.",
            show_default=False,
        ),
    ] = None,
    bound: Annotated[
        float | None,
        typer.Option(
            metavar="ERROR",
            help="With --bisect: the relative error that counts as lost. Default: what the seal allows.",
            show_default=False,
        ),
    ] = None,
    threads: Threads = None,
    provider: OnProvider = None,
    as_json: AsJson = False,
) -> None:
    """Check every hash of a bundle, and draw its golden image again."""
    from sdrt.bundle import Bundle

    if bound is not None and bisect is None:
        raise RequestError("--bound was given without --bisect", hint="name the model: --bisect MODEL")
    if provider is not None and bisect is not None:
        raise RequestError("--provider was given beside --bisect, which runs on the CPU", hint="leave one of them out")
    opened = Bundle.open(bundle)
    if bisect is None:
        _verify(opened, threads, provider, as_json=as_json)
    else:
        _bisect(opened, bisect, bound, threads, as_json=as_json)


def _verify(bundle: "Bundle", threads: int | None, provider: str | None, *, as_json: bool) -> None:
    import msgspec

    from sdrt.verify import verify_bundle

    with progress_bar() as progress:
        found = verify_bundle(bundle, threads=threads, provider=provider, progress=progress)
    now, allowed = parity_text(found.parity)
    then, _ = parity_text(found.sealed)
    rows = [
        ("files", f"{found.files} with the sealed sha256, {size_text(found.size_bytes)}"),
        ("golden image", f"{now} from {bundle.manifest.golden.reference} (sealed with {then}, allowed {allowed})"),
        ("checked in", seconds_text(found.seconds)),
    ]
    if found.completed:
        rows.append(("device", "drawn on it for the first time: the seal is complete"))
    result = {"bundle": str(bundle.path), "valid": True, **msgspec.to_builtins(found)}
    emit(result, [title(f"{bundle.path}: as it was sealed"), *facts(rows)], as_json=as_json)


def _bisect(bundle: "Bundle", model: str, bound: float | None, threads: int | None, *, as_json: bool) -> None:
    from sdrt.bundle import verify_files

    began = time.perf_counter()
    with progress_bar() as progress:
        verify_files(bundle, progress)
        components = bisect_model(bundle, model, bound=bound, threads=threads, progress=progress)
    seconds = time.perf_counter() - began
    rows = [("files", "as they were sealed; the golden image was not drawn"), ("bisected in", seconds_text(seconds))]
    result: dict[str, JsonValue] = {
        "bundle": str(bundle.path),
        "model": model,
        "seconds": round(seconds, 3),
        "components": [*components],
    }
    lines = [title(f"{bundle.path}: bisected against {model}"), *facts(rows), "", *bisection_lines(components)]
    emit(result, lines, as_json=as_json)
