"""Bundles for the GPU runbook: taken as they are where they load, otherwise built with the user's command."""

from pathlib import Path

from sdrt.benchmarks.builds import run_timed, sdrt_command
from sdrt.benchmarks.gpu.results import Findings
from sdrt.benchmarks.suites import sd15
from sdrt.bundle import Bundle, JsonValue
from sdrt.errors import BackendError, BundleError
from sdrt.runners import open_runner
from sdrt.runners.nvidia import has_device


def make_shapes(out: Path, cache: Path, *, threads: int | None) -> Findings:
    """The embedded model for 64 to 192 pixels and up to four images. Raises BuildError, BundleError."""
    return _made("shapes", out, ["--batch", "1..4"], cache, threads)


def make_sd15(checkpoint: Path, out: Path, cache: Path, *, threads: int | None) -> Findings:
    """A checkpoint with random weights, and its bundle for 512x512, one image. Raises BuildError, BundleError."""
    sd15.make_checkpoint(checkpoint)
    size = f"{sd15.SIDE}x{sd15.SIDE}"
    return _made(str(checkpoint), out, ["--sizes", size, "--batch", "1"], cache, threads)


def _made(model: str, out: Path, flags: list[str], cache: Path, threads: int | None) -> Findings:
    found = out.is_dir()
    refusal = _refusal(out) if found else None
    figures: dict[str, JsonValue] = {"found ready": found and refusal is None}
    if not found or refusal is not None:
        command = [*sdrt_command(), "build", model, "--out", str(out), "--backend", "tensorrt", "--precision", "fp16"]
        command += [*flags, *([] if threads is None else ["--threads", str(threads)]), *(["--force"] if found else [])]
        built = run_timed(command, environment={"SDRT_CACHE": str(cache)})
        figures |= {"build seconds": round(built.seconds, 1), "build peak GB": round(built.peak_bytes / 1e9, 2)}
    if refusal is not None:
        figures["built anew, because"] = refusal
    manifest = Bundle.open(out).manifest
    figures |= {
        "library": f"{', '.join(manifest.backend.features) or manifest.backend.name} {manifest.backend.version}",
        "golden image": f"{manifest.golden.parity.measured:.1f} {manifest.golden.parity.metric}",
        "verified on a device": manifest.device_verified,
    }
    return Findings(figures=figures)


def _refusal(path: Path) -> str | None:
    """Why a bundle does not open on the GPU that is here; None when it does, or when there is none that could tell."""
    if not has_device():
        return None
    try:
        open_runner(Bundle.open(path)).close()
    except (BackendError, BundleError) as error:
        return error.message
    return None
