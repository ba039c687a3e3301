"""The seam between sdrt and a backend: what a runner can be asked, as data and one protocol."""

from collections.abc import Mapping
from types import TracebackType
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.generic]
FloatArray = npt.NDArray[np.float32]

TEXT_ENCODER = "text_encoder"
STEP = "step"
VAE_DECODER = "vae_decoder"
VAE_ENCODER = "vae_encoder"


class Runner(Protocol):
    """Executes the engines of one bundle on one device. Not thread-safe: one caller at a time.

    Components and their tensors (names, dtypes and dynamic shapes are in the bundle's manifest):

    - `text_encoder`: input_ids [B, L] → last_hidden_state float32 [B, L, d]
    - `step`: the inputs of the step graph (`docs/architecture.md`) → next_state float32 [R, n, C, h, w]
    - `vae_decoder`: latent_sample float32 [B, C, h, w] → sample float32 [B, 3, H, W] in about [-1, 1]
    - `vae_encoder`: sample float32 [B, 3, H, W] → latent_parameters float32 [B, 2C, h, w] (mean, log-variance)
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
