"""One image on its way through its plan: its state, its row, its generator, its lanes. State and nothing else."""

from dataclasses import dataclass, field

import numpy as np

from sdrt.guidance import Lane
from sdrt.noise import TorchGenerator
from sdrt.plan import SamplingPlan
from sdrt.runners.base import FloatArray


@dataclass(slots=True, kw_only=True, eq=False)
class Trajectory:
    """state: float32 [n, C, h, w], the latents in slot 0. `row` is the next row of the plan to run."""

    plan: SamplingPlan
    lanes: tuple[Lane, ...]
    generator: TorchGenerator
    state: FloatArray
    row: int = 0
    _noise: FloatArray | None = field(default=None, repr=False)

    @property
    def finished(self) -> bool:
        """Whether every row has run."""
        return self.row >= len(self.plan)

    @property
    def latents(self) -> FloatArray:
        """The current latents, float32 [C, h, w]."""
        latents: FloatArray = self.state[0]
        return latents

    @property
    def size(self) -> tuple[int, int]:
        """(h, w) of the latents: only trajectories of one size can share a step."""
        return self.state.shape[2], self.state.shape[3]

    def noise(self) -> FloatArray:
        """This row's noise, float32 [C, h, w]. Drawn once a row, however often the row is tried; zeros if none."""
        if self._noise is None:
            shape = self.state.shape[1:]
            fresh = self.plan.draws_noise(self.row)
            self._noise = self.generator.randn((1, *shape))[0] if fresh else np.zeros(shape, np.float32)
        return self._noise

    def advance(self, state: FloatArray) -> None:
        """Take the next state, float32 [n, C, h, w], and go on to the next row."""
        self.state = state
        self.row += 1
        self._noise = None


def start_trajectory(
    *, plan: SamplingPlan, lanes: tuple[Lane, ...], seed: int, slots: int, shape: tuple[int, int, int]
) -> Trajectory:
    """A trajectory at row 0. shape: (C, h, w). The noise is that of torch.randn((1, C, h, w)) with this seed."""
    generator = TorchGenerator(seed)
    state = np.zeros((slots, *shape), np.float32)
    state[0] = generator.randn((1, *shape))[0] * np.float32(plan.initial_scale)
    return Trajectory(plan=plan, lanes=lanes, generator=generator, state=state)
