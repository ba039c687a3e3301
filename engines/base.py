"""The seam between the engines stage and a backend: what a builder of engines can be asked."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from sdrt.bundle import BackendName, DepthEstimation, JsonValue, Precision, ShapeProfile
from sdrt.plan.clamping import Thresholding
from sdrt.progress import Progress, silent

ENGINES_FOLDER = "engines"


@dataclass(frozen=True, slots=True, kw_only=True)
class ComponentSource:
    """One component as ONNX: where its graph is, and everything that a builder may specialise it on.

    onnx_path: the graph; its external data lies in the same folder. profile: which sizes and batches it must accept.
    max_lanes: most network evaluations of one step. vae_downsample: pixels per latent on one side.
    default_height, default_width: the model's own size, in pixels.
    thresholding: how the step graph cuts estimates of x₀ that are too large, where the scheduler asks for that.
    controls, control_features: how many ControlNets are in the network, and the channels of what each sees.
    depth_estimation: what the depth estimator is given, where there is one.
    composed: the graph is what the engine is built of; else the step graph is still to be composed around the network.
    """

    name: str
    onnx_path: Path
    profile: ShapeProfile
    max_lanes: int
    state_slots: int
    latent_channels: int
    conditioning_channels: int
    prompt_embeds_dim: int
    vae_downsample: int
    default_height: int
    default_width: int
    thresholding: Thresholding | None = None
    controls: int = 0
    control_features: int = 0
    depth_estimation: DepthEstimation | None = None
    composed: bool = False


class EngineBuilder(Protocol):
    """Makes the engines of one backend. Equal files, precision, version, features and settings give equal engines."""

    @property
    def name(self) -> BackendName:
        """The backend as bundles name it."""
        ...

    @property
    def version(self) -> str:
        """The backend's own version; part of every cache key and of the bundle."""
        ...

    @property
    def device(self) -> str:
        """The kind of device the engines run on: "cpu", or for a GPU its architecture."""
        ...

    @property
    def runs_here(self) -> bool:
        """Whether this machine has the device that the engines run on; if not, they are built ahead of time."""
        ...

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """What this builder can make here, the one that "auto" means first."""
        ...

    def features(self, precision: Precision) -> tuple[str, ...]:
        """The device features that engines of this precision need, as `sdrt.runners` names them."""
        ...

    def settings(self, source: ComponentSource) -> dict[str, JsonValue]:
        """Everything about `source` but its files that changes the engine; part of the cache key."""
        ...

    def build(
        self, source: ComponentSource, precision: Precision, folder: Path, *, progress: Progress = silent
    ) -> Sequence[str]:
        """Write the component's engine into the empty `folder`. progress: of builds that take long.

        Returns the names of the files written, the one that a runner opens first.
        BuildError: the backend refuses the graph. BackendError: it is not installed. OutputError: the disk is full.
        """
        ...
