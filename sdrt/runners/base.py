"""The seam between sdrt and a backend: what a runner can be asked, as data and one protocol."""

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Protocol, Self, runtime_checkable

import numpy as np
import numpy.typing as npt

from sdrt.philox import PhiloxDraw

Array = npt.NDArray[np.generic]
FloatArray = npt.NDArray[np.float32]
# One request's noise of one row, float32 [C, h, w]: none, numbers, or the recipe of numbers that are made anywhere.
RowNoise = FloatArray | PhiloxDraw | None

TEXT_ENCODER = "text_encoder"
STEP = "step"
VAE_DECODER = "vae_decoder"
VAE_ENCODER = "vae_encoder"
DEPTH_ESTIMATOR = "depth_estimator"
CONTROL_EMBEDDING = "control_embedding"
VAE_DECODER_FLOAT32 = "vae_decoder_float32"  # of FP16 bundles: what decodes again when the other one overflows
TINY_VAE_DECODER = "tiny_vae_decoder"  # of bundles built with one: for previews, and for requests that ask for it

# What works on as many values as an image has pixels.
IN_PIXELS = (VAE_DECODER, VAE_DECODER_FLOAT32, TINY_VAE_DECODER, VAE_ENCODER)
# What a bf16 bundle computes in float32: it runs once a request, and its error would reach every step.
IN_FLOAT32 = (TEXT_ENCODER, DEPTH_ESTIMATOR, CONTROL_EMBEDDING)


class Runner(Protocol):
    """Executes the engines of one bundle on one device. Not thread-safe: one caller at a time.

    Components and their tensors (names, dtypes and dynamic shapes are in the bundle's manifest):

    - `text_encoder`: input_ids [B, L] → last_hidden_state float32 [B, L, d]
    - `step`: the inputs of the step graph (`docs/architecture.md`) → next_state float32 [R, n, C, h, w]
    - `vae_decoder`: latent_sample float32 [B, C, h, w] → sample float32 [B, 3, H, W] in about [-1, 1]
    - `vae_decoder_float32`: the same, in bundles whose `vae_decoder` is not float32 throughout
    - `tiny_vae_decoder`: the same, in bundles built with a tiny VAE, divided by that one's scaling factor
    - `vae_encoder`: sample float32 [B, 3, H, W] → latent_parameters float32 [B, 2C, h, w] (mean, log-variance)
    - `depth_estimator`: pixel_values float32 [1, 3, H, W] → predicted_depth float32 [1, H', W'], in bundles whose
      checkpoint brought one
    - `control_embedding`: controlnet_cond float32 [B, k, 3, H, W] in [0, 1] → control float32 [B, k, c, h, w], in
      bundles with k ControlNets
    """

    def run(self, component: str, feeds: Mapping[str, Array]) -> dict[str, FloatArray]:
        """Evaluate one component once.

        Feeds are cast to the dtype that the engine declares. The returned arrays belong to the caller.
        Raises BackendError when the backend fails, with the component's name.
        """
        ...

    def close(self) -> None:
        """Release the device. Safe to call twice; `run` afterwards raises BackendError."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Steps(Protocol):
    """A batch whose state stays on the device while its plans' rows run. Not thread-safe."""

    def advance(self, noise: Sequence[RowNoise]) -> None:
        """Queue the next row, with an entry of noise for each of the first requests, the others having none.

        It waits at most for the row before it.

        Raises BackendError when the backend fails; the state is lost then.
        """
        ...

    def state(self) -> FloatArray:
        """Wait for the queued rows; the state after them, float32 [R, n, C, h, w], belongs to the caller."""
        ...

    def seconds(self) -> tuple[float, ...]:
        """The device's time of each row that has run, since the start; complete after `state`."""
        ...

    def gap_seconds(self) -> float:
        """How long in all the device waited for the host between one row and the next; complete after `state`."""
        ...

    def close(self) -> None:
        """Give the device's memory to others. Safe to call twice."""
        ...


@runtime_checkable
class SteppingRunner(Runner, Protocol):
    """A runner that can keep a batch on its device, so that the host does nothing between steps but launch."""

    def batch_size(self, requests: int, lanes: int) -> tuple[int, int]:
        """The counts of requests and lanes to pad such a batch to, so that few graphs serve every mixture."""
        ...

    def open_steps(self, inputs: Mapping[str, Array], rows: Mapping[str, Array]) -> Steps:
        """Start a batch. inputs: what stays, as in the step graph; rows: what changes, with a first dimension of rows.

        Raises BackendError for tensors or shapes that the engine does not take.
        """
        ...
