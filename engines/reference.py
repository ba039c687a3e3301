"""What a bundle is measured against: the exporter's golden results, else ONNX Runtime in float32 on the given ONNX."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sdrt.bundle import Bundle, Manifest, ShapeProfile
from sdrt.engines.onnx_files import external_files, lend_file, load_graph
from sdrt.engines.onnx_folder import FOLDER_OF, OnnxFolder
from sdrt.engines.step_graph import PROMPT_EMBEDS, SAMPLE, TIMESTEP
from sdrt.errors import BackendError, BuildError
from sdrt.exported import GoldenRequest
from sdrt.runners.base import STEP, TEXT_ENCODER, VAE_DECODER, VAE_ENCODER, Array
from sdrt.engines.seal import GoldenResult, read_golden

IMAGE_NAME = "image.npz"
_TIMESTEP = 981.0
_REQUEST = GoldenRequest(
    prompt="a red circle on a white background",
    seed=0,
    num_inference_steps=4,
    guidance_scale=5.0,
    height=0,
    width=0,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """Where the truth comes from, in words, and what it says: of each component, and of one request's image."""

    description: str
    request: GoldenRequest
    results: Mapping[str, GoldenResult]
    image: npt.NDArray[np.uint8]
