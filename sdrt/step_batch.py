"""Trajectories that take their steps together: on the host one by one, in windows, or on a device that keeps them."""

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np

from sdrt.denoiser import lasting_inputs, not_finite, pad_inputs, row_inputs, run_step, step_alone
from sdrt.errors import ParityError
from sdrt.runners.base import STEP, Array, FloatArray, Runner, SteppingRunner, Steps
from sdrt.trajectory import Trajectory

Faults = dict[Trajectory, ParityError]


class StepBatch(Protocol):
    """The same trajectories from the first `advance` until one of them is finished. Not thread-safe."""

    @property
    def trajectories(self) -> tuple[Trajectory, ...]:
        """Who is in it."""
        ...

    @property
    def within_row(self) -> bool:
        """Whether the last `advance` ended in the middle of a row, of which the next one is another part."""
        ...

    def advance(self) -> Faults:
        """Run one row of each; on a device perhaps only queue it. Once one is finished, all are collected.

        A row that is more than one call of the runner ends with the call that makes `within_row` False: others may have
        theirs in between. Returns the trajectories that are known by now to be not finite, each with its error.
        """
        ...

    def collect(self) -> Faults:
        """Bring states and rows of the trajectories up to date. Those that are not finite do not advance."""
        ...

    def take_seconds(self) -> tuple[float, ...]:
        """The time of each row that has run since the last call."""
        ...

    def gap_seconds(self) -> float | None:
        """How long the device waited for the host between rows, up to the last `collect`; None: it was not measured."""
        ...

    def close(self) -> None:
        """Release what the runner holds for it. Rows that were not collected are lost."""
        ...


def open_batch(runner: Runner, trajectories: Sequence[Trajectory]) -> StepBatch:
    """Start. All trajectories have latents of one size and rows left."""
    members = tuple(trajectories)
    if members[0].windows is not None:
        return _WindowBatch(runner, members)
    return _DeviceBatch(runner, members) if isinstance(runner, SteppingRunner) else _HostBatch(runner, members)


def advance_row(batch: StepBatch) -> Faults:
    """Run one whole row. See `StepBatch.advance`."""
    faults = batch.advance()
    while batch.within_row:
        faults = batch.advance()
    return faults


def _inputs_while_alike(trajectories: Sequence[Trajectory]) -> tuple[int, dict[str, Array], dict[str, Array]]:
    """(how many rows until lanes change, what stays for them with zeros as noise, what each of them has of its own)."""
    rows = min(item.rows_alike for item in trajectories)
    lasting = lasting_inputs(trajectories)
    lasting["noise"] = np.zeros_like(lasting["state"][:, 0])
    return rows, lasting, row_inputs(trajectories, rows)


class _CollectedAtOnce:
    """What batches have in common that leave nothing queued: what `advance` has run is over when it returns."""

    def __init__(self, runner: Runner, trajectories: tuple[Trajectory, ...]) -> None:
        self.trajectories = trajectories
        self._runner = runner
        self._seconds: list[float] = []

    def collect(self) -> Faults:
        return {}

    def take_seconds(self) -> tuple[float, ...]:
        taken, self._seconds = tuple(self._seconds), []
        return taken

    def gap_seconds(self) -> float | None:
        return None


class _HostBatch(_CollectedAtOnce):
    """Each row is a call of the runner, and collected at once.

    What stays from row to row is put together once, and the next row's noise is drawn while the runner works.
    """

    within_row = False

    def __init__(self, runner: Runner, trajectories: tuple[Trajectory, ...]) -> None:
        super().__init__(runner, trajectories)
        self._lasting: dict[str, Array] = {}
        self._rows: dict[str, Array] = {}
        self._row = self._left = 0  # of the rows that have the same lanes
        drawing = any(item.plan.draws_noise(row) for item in trajectories for row in range(item.row, len(item.plan)))
        self._drawer = ThreadPoolExecutor(1, thread_name_prefix="sdrt-noise") if drawing else None
        self._drawn: Future[None] | None = None

    def advance(self) -> Faults:
        began = time.perf_counter()
        if self._left == 0:
            self._open()
        feeds = self._feeds()
        if self._drawer is not None:
            self._drawn = self._drawer.submit(_draw_ahead, self.trajectories)
        try:
            state = self._runner.run(STEP, feeds)["next_state"]
        finally:
            self._wait_for_noise()
        faults = self._take(state)
        self._seconds.append(time.perf_counter() - began)
        return faults

    def close(self) -> None:
        if self._drawer is not None:
            self._drawer.shutdown()

    def _open(self) -> None:
        """Put together what the rows until the next change of lanes need."""
        self._row = 0
        self._left, self._lasting, self._rows = _inputs_while_alike(self.trajectories)

    def _feeds(self) -> dict[str, Array]:
        noise = self._lasting["noise"]
        for index, item in enumerate(self.trajectories):
            if item.plan.draws_noise(item.row):
                noise[index] = item.noise()
            elif item.row and item.plan.draws_noise(item.row - 1):
                noise[index] = 0
        return self._lasting | {name: rows[self._row] for name, rows in self._rows.items()}

    def _take(self, state: FloatArray) -> Faults:
        """Advance by one row to `state`. Where it is not finite, each is tried alone: see `step_trajectories`."""
        if not _all_finite(state):
            self._left = 0
            return step_alone(self._runner, self.trajectories)
        for item, own in zip(self.trajectories, state, strict=True):
            item.advance(own)
        self._lasting["state"] = state
        self._row += 1
        self._left -= 1
        return {}

    def _wait_for_noise(self) -> None:
        if self._drawn is not None:
            self._drawn.result()
            self._drawn = None


class _WindowBatch(_CollectedAtOnce):
    """Each row of a trajectory is that of all its windows, a few in each call of the runner, blended on the host.

    One `advance` is one such call. All trajectories take their row together, after the last of its calls.
    """

    def __init__(self, runner: Runner, trajectories: tuple[Trajectory, ...]) -> None:
        super().__init__(runner, trajectories)
        self._states: list[FloatArray] = []  # of those whose windows have all run in this row
        self._pieces: list[FloatArray] = []  # of the next one's
        self._spent = 0.0

    @property
    def within_row(self) -> bool:
        return bool(self._states or self._pieces)

    def advance(self) -> Faults:
        began = time.perf_counter()
        item = self.trajectories[len(self._states)]
        windows = item.windows
        if windows is None:
            raise ValueError("a trajectory without windows is among those that have some")
        together = windows.parts[len(self._pieces) :][: windows.at_once]
        self._pieces += run_step(self._runner, [item.within(window) for window in together])
        if len(self._pieces) == len(windows.parts):
            self._states.append(windows.joined(self._pieces))
            self._pieces = []
        over = len(self._states) == len(self.trajectories)
        faults = self._take() if over else {}
        self._spent += time.perf_counter() - began
        if over:
            self._seconds.append(self._spent)
            self._spent = 0.0
        return faults

    def close(self) -> None:
        pass

    def _take(self) -> Faults:
        states, self._states, faults = self._states, [], {}
        for item, state in zip(self.trajectories, states, strict=True):
            if _all_finite(state):
                item.advance(state)
            else:
                faults[item] = not_finite(item)
        return faults


def _draw_ahead(trajectories: Sequence[Trajectory]) -> None:
    for item in trajectories:
        item.draw_ahead()


def _all_finite(values: FloatArray) -> bool:
    """A sum of squares is not finite if a term is not; where only the sum is too large, every value is looked at."""
    flat = values.reshape(-1)
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(np.dot(flat, flat)) or np.isfinite(flat).all())


class _DeviceBatch:
    """Rows are queued; states are fetched when somebody asks, when a trajectory is finished, or when its lanes change.

    A value that is not finite stays so from row to row, and no row mixes requests: so it is enough to look at the end.
    """

    within_row = False

    def __init__(self, runner: SteppingRunner, trajectories: tuple[Trajectory, ...]) -> None:
        self.trajectories = trajectories
        self._runner = runner
        self._seconds: list[float] = []  # of steps that are closed
        self._gap = 0.0
        self._taken = 0
        self._ahead = 0  # rows queued since the last collection
        self._left = 0  # rows until the steps end
        self._steps: Steps | None = self._open()

    def advance(self) -> Faults:
        steps = self._steps = self._steps or self._open()
        steps.advance([item.next_noise(self._ahead) for item in self.trajectories])
        self._ahead += 1
        self._left -= 1
        if self._left:
            return {}
        faults = self.collect()
        self._end()
        return faults

    def collect(self) -> Faults:
        if self._ahead == 0 or self._steps is None:
            return {}
        faults = {}
        states = self._steps.state()[: len(self.trajectories)]  # what follows is padding
        for trajectory, state in zip(self.trajectories, states, strict=True):
            if np.isfinite(state).all():
                trajectory.advance(state.copy(), self._ahead)
            else:
                faults[trajectory] = not_finite(trajectory, self._ahead)
        self._ahead = 0
        return faults

    def take_seconds(self) -> tuple[float, ...]:
        seconds = (*self._seconds, *(() if self._steps is None else self._steps.seconds()))
        taken, self._taken = seconds[self._taken :], len(seconds)
        return taken

    def gap_seconds(self) -> float | None:
        return self._gap + (0.0 if self._steps is None else self._steps.gap_seconds())

    def close(self) -> None:
        if self._steps is not None:
            self._steps.close()

    def _open(self) -> Steps:
        self._left, inputs, rows = _inputs_while_alike(self.trajectories)
        requests, lanes = self._runner.batch_size(len(self.trajectories), len(inputs["lane_request"]))
        return self._runner.open_steps(*pad_inputs(inputs, rows, requests=requests, lanes=lanes))

    def _end(self) -> None:
        if self._steps is not None:
            self._seconds.extend(self._steps.seconds())
            self._gap += self._steps.gap_seconds()
            self._steps.close()
            self._steps = None
