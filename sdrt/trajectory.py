"""One image on its way through its plan: its state, its row, its generator, its lanes. State and nothing else."""

from dataclasses import dataclass, field, replace

import numpy as np

from sdrt.conditions import Known, Start, Steering
from sdrt.guidance import Guidance, Lane
from sdrt.noise import Generator
from sdrt.plan import SamplingPlan
from sdrt.runners.base import FloatArray, RowNoise
from sdrt.windows import Window, Windows


@dataclass(slots=True, kw_only=True, eq=False)
class Trajectory:
    """state: float32 [n, C, h, w], the latents in slot 0. `row` is the next row of the plan to run.

    start: what it began with, and what conditions it. steering: of a bundle with ControlNets. windows: where the
    latents are larger than the engines take.
    """

    plan: SamplingPlan
    guidance: Guidance
    generator: Generator
    start: Start
    state: FloatArray
    steering: Steering | None = None
    windows: Windows | None = None
    row: int = 0
    _noise: FloatArray | None = field(default=None, repr=False)
    _next_noise: FloatArray | None = field(default=None, repr=False)

    @property
    def finished(self) -> bool:
        """Whether every row has run."""
        return self.row >= len(self.plan)

    @property
    def lanes(self) -> tuple[Lane, ...]:
        """The network evaluations of the next row."""
        return self.guidance.lanes(self.row)

    @property
    def guidance_rescale(self) -> float:
        """The rescaling of the next row's output."""
        return self.guidance.rescale_at(self.row)

    @property
    def rows_alike(self) -> int:
        """How many rows from the next one on have its lanes."""
        return self.guidance.last_alike(self.row, len(self.plan)) - self.row

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

    def draw_ahead(self) -> None:
        """Draw the noise of the row after this one now, once; this row's own was asked for before."""
        following = self.row + 1
        if self._next_noise is None and following < len(self.plan) and self.plan.draws_noise(following):
            self._next_noise = self.generator.randn((1, *self.state.shape[1:]))[0]

    def next_noise(self, ahead: int) -> RowNoise:
        """The noise of the row that is `ahead` of this one, drawn now: to be asked for once for each row, in order."""
        if not self.plan.draws_noise(self.row + ahead):
            return None
        if ahead == 0 and self._noise is not None:
            return self._noise
        return self.generator.row_noise(self.state.shape[1:])

    def within(self, window: Window) -> "Trajectory":
        """What of it lies in a window, at the same row, to be stepped once."""
        start, known, steering = self.start, self.start.known, self.steering
        inside = replace(
            start,
            latents=window.cut(start.latents),
            conditioning=None if start.conditioning is None else window.cut(start.conditioning),
            known=None
            if known is None
            else Known(latents=window.cut(known.latents), noise=window.cut(known.noise), mask=window.cut(known.mask)),
        )
        return Trajectory(
            plan=self.plan,
            guidance=self.guidance,
            generator=self.generator,
            start=inside,
            state=window.cut(self.state),
            steering=None if steering is None else replace(steering, control=window.cut(steering.control)),
            row=self.row,
            _noise=window.cut(self.noise()),
        )

    def advance(self, state: FloatArray, rows: int = 1) -> None:
        """Take the state after `rows` rows, float32 [n, C, h, w]."""
        self.state = state
        self.row += rows
        self._noise, self._next_noise = self._next_noise, None


def start_trajectory(
    *,
    plan: SamplingPlan,
    guidance: Guidance,
    generator: Generator,
    slots: int,
    start: Start,
    steering: Steering | None = None,
    windows: Windows | None = None,
) -> Trajectory:
    """A trajectory at row 0. generator: for the noise of rows."""
    state = np.zeros((slots, *start.latents.shape), np.float32)
    state[0] = start.latents
    return Trajectory(
        plan=plan,
        guidance=guidance,
        generator=generator,
        start=start,
        state=state,
        steering=steering,
        windows=windows,
    )
