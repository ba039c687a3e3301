"""Sealing: every engine and the whole image measured against the reference, through the runner that will serve them."""

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from sdrt.bundle import Bundle, ParityRecord, Precision
from sdrt.engines.step_graph import CLASS_LABELS, CONTROL, CONTROL_SCALES, PROMPT_EMBEDS, SAMPLE, TIMESTEP
from sdrt.errors import BuildError, ParityError
from sdrt.exported import GoldenRequest
from sdrt.golden import request_of
from sdrt.parity import image_parity, max_relative, meets
from sdrt.pipeline import Pipeline
from sdrt.runners.base import (
    CONTROL_EMBEDDING,
    DEPTH_ESTIMATOR,
    IN_FLOAT32,
    STEP,
    TEXT_ENCODER,
    TINY_VAE_DECODER,
    VAE_DECODER,
    VAE_ENCODER,
    Array,
    FloatArray,
    Runner,
)

# Largest error relative to the largest value. In bf16 what runs once stays in float32, and a timestep that is
# rounded to bf16 costs a step more than its bound.
FLOAT32_BOUND = 2e-4
BF16_BOUNDS: Mapping[str, float] = MappingProxyType(
    {
        **dict.fromkeys(IN_FLOAT32, FLOAT32_BOUND),
        STEP: 3e-2,
        VAE_DECODER: 5e-2,
        VAE_ENCODER: 5e-2,
        TINY_VAE_DECODER: 5e-2,
    }
)
FP16_BOUNDS: Mapping[str, float] = MappingProxyType(
    {
        TEXT_ENCODER: 1e-2,
        DEPTH_ESTIMATOR: 1e-2,
        CONTROL_EMBEDDING: 1e-2,
        STEP: 1e-2,
        VAE_DECODER: 2e-2,
        VAE_ENCODER: 2e-2,
        TINY_VAE_DECODER: 2e-2,
    }
)
IMAGE_LEVELS = 1  # of 255, in float32
IMAGE_PSNR_DB = 35.0  # in bf16 and fp16
_DAMAGED = "export the checkpoint again"


@dataclass(frozen=True, slots=True, kw_only=True)
class GoldenResult:
    """What a component must make of given inputs."""

    inputs: Mapping[str, Array]
    outputs: Mapping[str, FloatArray]


def read_golden(path: Path) -> GoldenResult:
    """Read "input.<name>" and "output.<name>" arrays. BuildError: not there, damaged, or without outputs."""
    arrays = _read_arrays(path)
    inputs = {name.removeprefix("input."): array for name, array in arrays.items() if name.startswith("input.")}
    outputs = {
        name.removeprefix("output."): array.astype(np.float32)
        for name, array in arrays.items()
        if name.startswith("output.")
    }
    if not inputs or not outputs:
        raise BuildError(f"{path} holds no golden inputs or outputs", hint=_DAMAGED)
    return GoldenResult(inputs=inputs, outputs=outputs)


def read_golden_image(path: Path) -> npt.NDArray[np.uint8]:
    """The reference image, uint8 [H, W, 3]. BuildError: not there or damaged."""
    image = _read_arrays(path).get("image")
    if image is None or image.dtype != np.uint8 or image.ndim != 3:
        raise BuildError(f"{path} holds no image", hint=_DAMAGED)
    return image.astype(np.uint8, copy=False)


def check_component(
    runner: Runner, name: str, golden: GoldenResult, *, precision: Precision, slots: int, channels: int
) -> ParityRecord:
    """Run one component on its golden inputs. slots, channels: of the step graph's state.

    ParityError: too far from the golden outputs. BuildError: the golden outputs are not those of the component.
    """
    if name == STEP:
        output = _evaluate_network(runner, golden.inputs, slots, channels)
        measured = dict.fromkeys(golden.outputs, output)
    else:
        measured = runner.run(name, golden.inputs)
    if unknown := sorted(golden.outputs.keys() - measured.keys()):
        raise BuildError(f"{name} has no output {', '.join(unknown)}, but its golden results do", hint=_DAMAGED)
    worst = max(max_relative(measured[key], array) for key, array in golden.outputs.items())
    bound = {"fp16": FP16_BOUNDS, "bf16": BF16_BOUNDS}.get(precision, {}).get(name, FLOAT32_BOUND)
    if not worst <= bound:
        raise ParityError(
            f"{name} is off by {worst:.2e} of the largest value, more than {bound:.0e}", hint=_advice(precision)
        )
    return ParityRecord(metric="max_relative", measured=worst, bound=bound)


def check_image(
    bundle: Bundle, runner: Runner, request: GoldenRequest, image: npt.NDArray[np.uint8], *, precision: Precision
) -> ParityRecord:
    """Make the golden request's image with the runtime. ParityError: too far from `image`, uint8 [H, W, 3]."""
    made = make_image(bundle, runner, request)
    if made.shape != image.shape:
        raise ParityError(f"the image has the shape {made.shape}, the reference {image.shape}", hint=_DAMAGED)
    if precision == "fp32":
        record = image_parity(made, image, metric="max_absolute", bound=IMAGE_LEVELS / 255)
        far = f"a pixel of the golden image is off by {record.measured * 255:.0f}/255, more than {IMAGE_LEVELS}/255"
    else:
        record = image_parity(made, image, metric="psnr_db", bound=IMAGE_PSNR_DB)
        far = f"the golden image has {record.measured:.1f} dB PSNR, less than {IMAGE_PSNR_DB:.0f} dB"
    if not meets(record):
        raise ParityError(far, hint=_advice(precision))
    return record


def _evaluate_network(runner: Runner, inputs: Mapping[str, Array], slots: int, channels: int) -> FloatArray:
    """The network's own output, through the step graph."""
    return runner.run(STEP, step_feeds(inputs, slots, channels))["next_state"][:, 0]


def step_feeds(inputs: Mapping[str, Array], slots: int, channels: int) -> dict[str, Array]:
    """The step graph's inputs that leave the network's own output for `inputs` in each request's first slot.

    channels: those of the latents; what the sample has beside them is the conditioning.
    """
    sample = np.asarray(inputs[SAMPLE], np.float32)
    latents, conditioning = sample[:, :channels], sample[:, channels:]
    count, _, height, width = latents.shape
    state = np.zeros((count, slots, channels, height, width), np.float32)
    state[:, 0] = latents
    transition = np.zeros((count, slots, slots + 3), np.float32)
    transition[:, 0, slots] = 1
    feeds: dict[str, Array] = {
        "state": state,
        "input_scale": np.ones(count, np.float32),
        "lane_request": np.arange(count),
        "timestep": np.asarray(inputs[TIMESTEP], np.float32).reshape(-1),
        "prompt_embeds": np.asarray(inputs[PROMPT_EMBEDS], np.float32),
        "guidance": np.eye(count, dtype=np.float32),
        "rescale_lanes": np.zeros((count, count), np.float32),
        "guidance_rescale": np.zeros(count, np.float32),
        "clamp": np.zeros((count, 3), np.float32),
        "transition": transition,
        "noise": np.zeros_like(latents),
        "mask": np.ones((count, 1, height, width), np.float32),
        "known": np.zeros((count, 2, channels, height, width), np.float32),
        "known_weights": np.zeros((count, 2), np.float32),
    }
    if conditioning.size:
        feeds |= {"conditioning": conditioning, "lane_conditioning": np.ones(count, np.float32)}
    if CLASS_LABELS in inputs:
        feeds[CLASS_LABELS] = np.asarray(inputs[CLASS_LABELS], np.int64)
    if CONTROL in inputs:
        feeds |= {name: np.asarray(inputs[name], np.float32) for name in (CONTROL, CONTROL_SCALES)}
    return feeds


def make_image(bundle: Bundle, runner: Runner, request: GoldenRequest) -> npt.NDArray[np.uint8]:
    """The golden request's image as this runtime makes it, uint8 [H, W, 3]."""
    result = Pipeline(bundle, runner).generate(request_of(request, bundle.manifest.model))
    return np.asarray(result.images[0], np.uint8)


def _read_arrays(path: Path) -> dict[str, npt.NDArray[np.generic]]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise BuildError(f"{path} cannot be read: {error}", hint=_DAMAGED) from error


def _advice(precision: Precision) -> str:
    if precision == "fp32":
        return "nothing was sealed; export the checkpoint again, or try the other --backend"
    if precision == "fp16":
        return "nothing was sealed; build it with --backend openvino or --precision fp32, and report the model"
    return "nothing was sealed; build it with --precision fp32"
