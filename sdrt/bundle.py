"""The bundle: its manifest as plain data, reading and checking it. Nothing here runs an engine."""

from dataclasses import dataclass
from typing import Literal

JsonValue = None | bool | int | float | str | list["JsonValue"] | dict[str, "JsonValue"]

FORMAT_VERSION = 1
MANIFEST_NAME = "bundle.json"

BackendName = Literal["openvino", "onnxruntime", "tensorrt"]
Precision = Literal["fp32", "fp16", "bf16", "int8"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """A tensor at an engine's border. Dynamic dimensions are names ("lanes", "height")."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """A file of the bundle; `path` is relative to the bundle, with forward slashes."""

    path: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityRecord:
    """How far a result was from the PyTorch reference when the bundle was sealed, and how far it may be.

    metric: "max_relative" (largest |a - b| over largest |b|), "max_absolute", or "psnr_db" (higher is better).
    """

    metric: Literal["max_relative", "max_absolute", "psnr_db"]
    measured: float
    bound: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ComponentRecord:
    """One engine: its files (the first is the one to open), its border, its parity."""

    name: str
    files: tuple[FileRecord, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    parity: ParityRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendRecord:
    """What the engines need: backend, its version, the device kind and the CPU or GPU features."""

    name: BackendName
    version: str
    device: str
    features: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapeProfile:
    """Which requests the engines accept, in images and pixels.

    Either `sizes` lists every (height, width), or it is empty and all multiples of `multiple_of`
    between `minimum` and `maximum` (both as (height, width), inclusive) are accepted.
    """

    sizes: tuple[tuple[int, int], ...]
    minimum: tuple[int, int]
    maximum: tuple[int, int]
    multiple_of: int
    max_batch: int
    text_length: int

    def accepts(self, height: int, width: int) -> bool:
        """Whether an image of this size can be made."""
        if self.sizes:
            return (height, width) in self.sizes
        on_grid = height % self.multiple_of == 0 and width % self.multiple_of == 0
        inside = self.minimum[0] <= height <= self.maximum[0] and self.minimum[1] <= width <= self.maximum[1]
        return on_grid and inside


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRecord:
    """What the runtime has to know of the checkpoint."""

    name: str
    identity: str  # sha256 over configs and weights
    task: Literal["text-to-image"]
    latent_channels: int
    vae_downsample: int
    vae_scaling_factor: float
    prompt_embeds_dim: int
    default_height: int
    default_width: int
    scheduler_class: str
    scheduler_config: dict[str, JsonValue]


@dataclass(frozen=True, slots=True, kw_only=True)
class GoldenRecord:
    """The evidence of the whole image: what was asked, of which reference, and how close it came."""

    reference: str  # "PyTorch 2.13.0, diffusers 0.42.1, float32"
    prompt: str
    seed: int
    num_inference_steps: int
    guidance_scale: float
    height: int
    width: int
    file: FileRecord  # .npz with the reference's image, uint8 [H, W, 3], as `image`
    parity: ParityRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The content of bundle.json."""

    format_version: int
    sdrt_version: str
    model: ModelRecord
    backend: BackendRecord
    precision: Precision
    state_slots: int
    profile: ShapeProfile
    components: tuple[ComponentRecord, ...]
    tokenizer: tuple[FileRecord, ...]
    golden: GoldenRecord
