"""Verifying a sealed bundle on this machine: every hash, then the golden image drawn again and compared."""

import time
import zipfile
from dataclasses import dataclass, replace

import numpy as np

from sdrt.bundle import Bundle, GoldenRecord, ParityRecord, verify_files, write_manifest
from sdrt.errors import BundleError, ParityError
from sdrt.golden import request_of
from sdrt.parity import Pixels, image_parity, meets
from sdrt.pipeline import Pipeline
from sdrt.progress import Progress, silent
from sdrt.runners import open_runner
from sdrt.runners.providers import choose_provider


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What was found: how many files and bytes have their hash, and the golden image's parity, then and now.

    completed: the bundle was built without its device, and this was the first time on one: the seal now says so.
    """

    files: int
    size_bytes: int
    sealed: ParityRecord
    parity: ParityRecord
    seconds: float
    completed: bool


def verify_bundle(
    bundle: Bundle, *, threads: int | None = None, provider: str | None = None, progress: Progress = silent
) -> Verification:
    """Check a bundle as a whole on this machine; complete the seal of one that was built without its device.

    provider: see `open_runner`. BundleError: a file is not the one that was sealed. BackendError: the engines do not
    run here. RequestError: the backend has no such provider.
    ParityError: they run, but do not make the golden image.
    """
    began = time.perf_counter()
    choose_provider(provider, bundle.manifest.backend)  # before minutes of hashing
    verify_files(bundle, progress)
    golden = bundle.manifest.golden
    expected = read_golden_image(bundle)
    made = _draw(bundle, golden, threads, provider, progress)
    parity = image_parity(made, expected, metric=golden.parity.metric, bound=golden.parity.bound)
    if not meets(parity):
        raise ParityError(
            f"the golden image is off on this machine: {parity.metric} {parity.measured:.4g}, "
            f"the seal allows {parity.bound:.4g}",
            hint="rebuild the bundle on this machine with: sdrt build (--precision fp32 if it stays so)",
        )
    if not bundle.manifest.device_verified:
        complete_seal(bundle, parity)
    records = list(bundle.files())
    return Verification(
        files=len(records),
        size_bytes=sum(record.size_bytes for record in records),
        sealed=golden.parity,
        parity=parity,
        seconds=time.perf_counter() - began,
        completed=not bundle.manifest.device_verified,
    )


def complete_seal(bundle: Bundle, parity: ParityRecord) -> None:
    """Write into the manifest that the golden image was drawn on a device, and how close. OutputError: read-only."""
    golden = replace(bundle.manifest.golden, parity=parity)
    write_manifest(bundle.path, replace(bundle.manifest, golden=golden, device_verified=True), overwrite=True)


def read_golden_image(bundle: Bundle) -> Pixels:
    """The reference's image in a bundle, uint8 [H, W, 3]. Raises BundleError."""
    golden = bundle.manifest.golden
    path = bundle.file(golden.file)
    rebuild = "rebuild the bundle with: sdrt build"
    try:
        with np.load(path, allow_pickle=False) as arrays:
            image = arrays["image"]
    except (OSError, ValueError, EOFError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise BundleError(f"{path} cannot be read: {error}", hint=rebuild) from error
    shape = (golden.height, golden.width, 3)
    if image.dtype != np.uint8 or image.shape != shape:
        raise BundleError(f"{path} holds {image.dtype} {image.shape}, not an image of {shape}", hint=rebuild)
    pixels: Pixels = image
    return pixels


def _draw(
    bundle: Bundle, golden: GoldenRecord, threads: int | None, provider: str | None, progress: Progress
) -> Pixels:
    progress("loading the engines", 0, 1)
    request = request_of(golden, bundle.manifest.model)
    with Pipeline(bundle, open_runner(bundle, threads=threads, provider=provider)) as pipeline:
        for event in pipeline.stream(request, latents=False):
            progress("golden image", event.row, event.rows)
            if event.result is not None:
                return np.asarray(event.result.images[0], np.uint8)
    raise RuntimeError("the last step carried no result")
