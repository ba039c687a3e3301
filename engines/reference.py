"""What a bundle is measured against: the exporter's golden results, else ONNX Runtime in float32 on the given ONNX."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sdrt.bundle import BackendRecord, Bundle, Manifest, Precision, ShapeProfile
from sdrt.depth import input_size
from sdrt.engines.base import ComponentSource
from sdrt.engines.components import build_component
from sdrt.engines.onnx_files import lend_file
from sdrt.engines.onnx_folder import OnnxFolder
from sdrt.engines.onnx_session import run_onnx
from sdrt.engines.onnxruntime import OnnxRuntimeBuilder
from sdrt.engines.seal import GoldenResult, make_image, read_golden, read_golden_image
from sdrt.engines.step_graph import CLASS_LABELS, CONTROL, CONTROL_SCALES, PROMPT_EMBEDS, SAMPLE, TIMESTEP
from sdrt.errors import BuildError
from sdrt.exported import GoldenRequest
from sdrt.golden import NOISE_LEVEL
from sdrt.runners import open_runner
from sdrt.runners.base import (
    CONTROL_EMBEDDING,
    DEPTH_ESTIMATOR,
    STEP,
    TEXT_ENCODER,
    TINY_VAE_DECODER,
    VAE_DECODER,
    VAE_ENCODER,
    Array,
)

_TIMESTEP = 981.0  # large and odd: low precision shows here first
_PROMPT, _SEED, _STEPS, _GUIDANCE_SCALE = "a red circle on a white background", 0, 4, 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """Where the truth comes from, in words, and what it says: of each component, and of one request's image."""

    description: str
    request: GoldenRequest
    results: Mapping[str, GoldenResult]
    image: npt.NDArray[np.uint8]


def image_is_exported(folder: OnnxFolder, profile: ShapeProfile) -> bool:
    """Whether the exporter left a golden image, and of a size that the engines will accept."""
    return folder.golden is not None and profile.accepts(folder.golden.height, folder.golden.width)


def find_reference(
    folder: OnnxFolder, sources: Sequence[ComponentSource], manifest: Manifest, work: Path, *, threads: int | None
) -> Reference:
    """The exporter's golden results where it left them; for the rest the given ONNX itself is run.

    manifest: that of the bundle to be sealed; work: an empty folder, for what is needed only here.
    BuildError: the golden results or the ONNX files are damaged. BackendError: ONNX Runtime is needed and absent.
    """
    request = _request(folder, manifest.profile)
    if folder.golden is not None:
        results = {component: read_golden(folder.golden_path(name)) for component, name in folder.components.items()}
    else:
        results = {
            component: GoldenResult(inputs=inputs, outputs=_evaluate(folder.onnx_path(component), inputs, threads))
            for component, inputs in _component_feeds(folder, request).items()
        }
    if image_is_exported(folder, manifest.profile):
        image = read_golden_image(folder.golden_path("image"))
        return Reference(description=str(folder.reference), request=request, results=results, image=image)
    bundle = runtime_bundle(folder, sources, manifest, work)
    with open_runner(bundle, threads=threads) as runner:
        image = make_image(bundle, runner, request)
    own = f"ONNX Runtime {bundle.manifest.backend.version}, float32, on the given ONNX, the VAE's group norms in rows"
    description = own if folder.reference is None else f"{folder.reference}; the image: {own}"
    return Reference(description=description, request=request, results=results, image=image)


def golden_inputs(folder: OnnxFolder, profile: ShapeProfile) -> dict[str, Mapping[str, Array]]:
    """What each component is measured on: the exporter's golden inputs, else inputs drawn here. Raises BuildError."""
    if folder.golden is not None:
        return {
            component: read_golden(folder.golden_path(name)).inputs for component, name in folder.components.items()
        }
    return _component_feeds(folder, _request(folder, profile))


def runtime_bundle(folder: OnnxFolder, sources: Sequence[ComponentSource], manifest: Manifest, work: Path) -> Bundle:
    """A bundle in `work`, for a moment, that runs `sources` in ONNX Runtime; its files are lent."""
    (work / "tokenizer").mkdir()
    for file in folder.tokenizer_files():
        lend_file(file, work / "tokenizer" / file.name)
    builder = OnnxRuntimeBuilder(lend=True)
    components = tuple(build_component(builder, source, "fp32", work) for source in sources)
    backend = BackendRecord(name=builder.name, version=builder.version, device=builder.device, features=())
    precision: Precision = "fp32"
    return Bundle(path=work, manifest=replace(manifest, backend=backend, precision=precision, components=components))


def _request(folder: OnnxFolder, profile: ShapeProfile) -> GoldenRequest:
    """The golden request, or a stand-in, in a size that the profile accepts: the model's own if possible."""
    if folder.golden is not None and image_is_exported(folder, profile):
        return folder.golden
    own = (folder.model.default_height, folder.model.default_width)
    height, width = own if profile.accepts(*own) else (profile.sizes[0] if profile.sizes else profile.minimum)
    if folder.golden is not None:
        return replace(folder.golden, height=height, width=width)
    return GoldenRequest(
        prompt=_PROMPT,
        seed=_SEED,
        num_inference_steps=_STEPS,
        guidance_scale=_GUIDANCE_SCALE,
        height=height,
        width=width,
    )


def _component_feeds(folder: OnnxFolder, request: GoldenRequest) -> dict[str, Mapping[str, Array]]:
    random = np.random.default_rng(_SEED)
    model = folder.model
    latents = (1, model.latent_channels, request.height // model.vae_downsample, request.width // model.vae_downsample)

    def normal(*shape: int) -> npt.NDArray[np.float32]:
        return random.standard_normal(shape, np.float32)

    sample = (1, model.latent_channels + model.conditioning_channels, *latents[2:])
    step: dict[str, Array] = {
        SAMPLE: normal(*sample),
        TIMESTEP: np.array([_TIMESTEP], np.float32),
        PROMPT_EMBEDS: normal(1, folder.model.text_length, model.prompt_embeds_dim),
    }
    if model.noise_augmentation is not None:
        step[CLASS_LABELS] = np.array([NOISE_LEVEL])
    if model.controlnets:
        step[CONTROL] = normal(1, len(model.controlnets), model.control_features, *latents[2:])
        step[CONTROL_SCALES] = np.ones((1, len(model.controlnets)), np.float32)
    feeds: dict[str, Mapping[str, Array]] = {
        TEXT_ENCODER: {"input_ids": random.integers(0, _vocabulary(folder), (1, folder.model.text_length))},
        STEP: step,
        VAE_DECODER: {"latent_sample": normal(*latents)},
        VAE_ENCODER: {"sample": normal(1, 3, request.height, request.width).clip(-1, 1)},
    }
    if model.controlnets:
        pictures = (1, len(model.controlnets), 3, request.height, request.width)
        feeds[CONTROL_EMBEDDING] = {"controlnet_cond": random.random(pictures, np.float32)}
    if (estimation := model.depth_estimation) is not None:
        size = input_size(estimation, request.height, request.width)
        feeds[DEPTH_ESTIMATOR] = {
            "pixel_values": normal(1, 3, *(size if estimation.takes is None else estimation.takes))
        }
    if model.tiny_vae is not None:
        feeds[TINY_VAE_DECODER] = {"latent_sample": normal(*latents)}
    return feeds


def _vocabulary(folder: OnnxFolder) -> int:
    """How many token ids the text encoder knows."""
    file = folder.path / "text_encoder" / "config.json"
    try:
        size = json.loads(file.read_bytes())["vocab_size"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BuildError(f"{file} does not say vocab_size", hint="export the checkpoint again") from error
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise BuildError(f"{file}: vocab_size is {size!r}", hint="export the checkpoint again")
    return size


def _evaluate(path: Path, inputs: Mapping[str, Array], threads: int | None) -> dict[str, npt.NDArray[np.float32]]:
    """Run an ONNX file as it is."""
    (outputs,) = run_onnx(path, [inputs], threads=threads)
    return {name: np.asarray(output, np.float32) for name, output in outputs.items()}
