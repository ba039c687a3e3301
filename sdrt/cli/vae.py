"""`sdrt encode` and `sdrt decode`: between images and latents, with the bundle's VAE."""

import io
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sdrt.cli.options import AsJson, BundleFolder, Force, Threads, check_outputs, numbered
from sdrt.cli.run import written_together
from sdrt.cli.task_options import Vae
from sdrt.cli.terminal import emit, facts, progress_bar
from sdrt.errors import RequestError

if TYPE_CHECKING:
    from sdrt.bundle import Bundle
    from sdrt.pipeline import Pipeline
    from sdrt.runners.base import FloatArray


def encode(
    bundle: BundleFolder,
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="PNG, JPEG or WebP.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="NPY", help="The latents, float32 [1, C, H/f, W/f].")],
    seed: Annotated[
        int | None,
        typer.Option(metavar="N", help="Sample with this seed. Default: the mean, without noise.", show_default=False),
    ] = None,
    threads: Threads = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Encode an image as latents.

    They are times the VAE's scaling factor, and made in tiles where the image is large. Its sides are multiples of the
    VAE's factor, which is 8 for most models.
    """
    import numpy as np

    from sdrt.bundle import Bundle
    from sdrt.files import write_atomically
    from sdrt.image import open_image
    from sdrt.sizes import check_vae_size

    check_outputs([out], ".npy", force=force)
    if seed is not None and not 0 <= seed < 2**64:
        raise RequestError(f"--seed is {seed}", hint="give a whole number from 0 to 2**64 - 1")
    opened, picture = Bundle.open(bundle), open_image(image)
    check_vae_size(picture.height, picture.width, opened.manifest.model.vae_downsample)
    with progress_bar() as progress, _pipeline(opened, threads) as pipeline:
        progress("encoding", 0, 1)
        latents = pipeline.encode(picture, seed=seed)
    buffer = io.BytesIO()
    np.save(buffer, latents, allow_pickle=False)
    write_atomically(out, buffer.getvalue(), overwrite=force)
    shape = [int(side) for side in latents.shape]
    rows = [("latents", str(out)), ("shape", f"float32 {shape}"), ("image", f"{picture.width}x{picture.height}")]
    emit({"latents": str(out), "shape": list(shape), "seed": seed}, facts(rows), as_json=as_json)


def decode(
    bundle: BundleFolder,
    latents: Annotated[Path, typer.Argument(metavar="NPY", help="What `sdrt encode` wrote.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="PNG", help="The image; several become NAME-1.png …")],
    vae: Vae = None,
    threads: Threads = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Decode latents to an image.

    They are float [B, C, h, w] times the VAE's scaling factor, and decoded in tiles where the image is large.
    """
    from sdrt.bundle import Bundle
    from sdrt.resolution import resolve_vae
    from sdrt.sizes import check_vae_size
    from sdrt.vae import check_latents

    opened, array = Bundle.open(bundle), read_latents(latents)
    check_latents(array, opened.manifest.model.latent_channels)
    resolve_vae(vae, opened.manifest.model)
    paths = numbered(out, len(array))
    check_outputs(paths, ".png", force=force)
    model, side = opened.manifest.model, opened.manifest.model.vae_downsample
    check_vae_size(array.shape[2] * side, array.shape[3] * side, side)
    with progress_bar() as progress, _pipeline(opened, threads) as pipeline:
        progress("decoding", 0, 1)
        images = pipeline.decode(array, vae=vae)
    with written_together() as write:
        for index, (image, path) in enumerate(zip(images, paths, strict=True)):
            write(image, path, {"decoded_from": latents.name, "index": index, "model": model.name}, force)
    names = [str(path) for path in paths]
    rows = [("image", name) for name in names] + [("size", f"{images[0].width}x{images[0].height}")]
    emit({"images": list(names)}, facts(rows), as_json=as_json)


def read_latents(path: Path) -> "FloatArray":
    """Latents from a .npy file, float32 [B, C, h, w] and finite. Raises RequestError."""
    import numpy as np

    from sdrt.image import load_npy

    hint = "pass a file that `sdrt encode` wrote, or that numpy.save did"
    if not path.exists():
        raise RequestError(f"there is no file {path}", hint="check the path")
    array = load_npy(path, "latents", hint=hint)
    if not isinstance(array, np.ndarray) or array.dtype not in (np.float16, np.float32, np.float64):
        raise RequestError(f"{path} holds no array of floating-point numbers", hint=hint)
    if array.ndim != 4 or 0 in array.shape:
        raise RequestError(f"{path} holds an array of shape {list(array.shape)}", hint="give [batch, channels, h, w]")
    latents = np.ascontiguousarray(array, np.float32)
    if not np.isfinite(latents).all():
        raise RequestError(f"{path} holds values that are NaN or infinite", hint=hint)
    return latents


def _pipeline(bundle: "Bundle", threads: int | None) -> "Pipeline":
    from sdrt.pipeline import Pipeline
    from sdrt.runners import open_runner

    return Pipeline(bundle, open_runner(bundle, threads=threads))
