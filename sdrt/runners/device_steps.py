"""A batch that stays on the GPU from step to step: state, prompt_embeds and all rows of the plans.

The host queues one row ahead: it copies a row's few numbers into the engine's border on the device, launches the
captured step, and waits for the row before. So the GPU never waits for the host while a step takes longer than that.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sdrt.errors import BackendError
from sdrt.philox import PhiloxDraw
from sdrt.runners.base import STEP, Array, FloatArray, RowNoise
from sdrt.runners.cuda import Pinned
from sdrt.runners.device_engines import DeviceEngines, Prepared, typed

STATE, NEXT_STATE, NOISE = "state", "next_state", "noise"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Table:
    """All rows of one input, on the device."""

    address: int
    row_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Span:
    """The events around one row's work."""

    start: int
    end: int


class DeviceSteps:
    """See `Steps`. Several may be open: when another needs the border, the state moves out to the host and back in.

    inputs: state, lane_request, prompt_embeds, guidance, noise (zeros: what is there before a row brings its own);
    rows: input_scale, timestep, transition, each [rows, …].
    lock: held while the device is used; `__init__` runs with it held. forget: called with this when it is closed.
    """

    def __init__(
        self,
        engines: DeviceEngines,
        lock: threading.Lock,
        *,
        inputs: Mapping[str, Array],
        rows: Mapping[str, Array],
        forget: Callable[["DeviceSteps"], None],
    ) -> None:
        self._engines = engines
        self._lock = lock
        self._forget = forget
        self._border = engines.border(STEP)
        self._shapes = {name: array.shape for name, array in inputs.items()}
        self._shapes |= {name: array.shape[1:] for name, array in rows.items()}
        self._inputs = {name: self._as_declared(name, array) for name, array in inputs.items()}
        self._rows = {name: self._as_declared(name, array) for name, array in rows.items()}
        self._length = min(len(array) for array in rows.values())
        self._done = 0
        self._tables: dict[str, _Table] = {}
        self._staging: tuple[Pinned, ...] = ()
        self._unread: list[_Span] = []
        self._last_end: int | None = None
        self._seconds: list[float] = []
        self._gap = 0.0
        self._broken = self._closed = False
        engines.prepare(STEP, self._shapes)  # shapes outside every profile are refused now

    def advance(self, noise: Sequence[RowNoise]) -> None:
        """See `Steps.advance`."""
        with self._lock:
            self._check_usable()
            if self._done >= self._length:
                raise BackendError(f"row {self._done} of {self._length} was asked for", hint="this is a fault of sdrt")
            try:
                self._advance(noise)
            except BaseException:
                self._broken = True
                raise

    def state(self) -> FloatArray:
        """See `Steps.state`."""
        with self._lock:
            self._check_usable()
            if self._border.tenant is self:
                self._fetch_state()
            state: FloatArray = self._inputs[STATE].astype(np.float32)
            return state

    def seconds(self) -> tuple[float, ...]:
        """See `Steps.seconds`."""
        return tuple(self._seconds)

    def gap_seconds(self) -> float:
        """See `Steps.gap_seconds`."""
        return self._gap

    def move_out(self) -> None:
        """See `Tenant.move_out`; the lock is held."""
        if not (self._closed or self._broken):
            self._fetch_state()
        self._release()

    def close(self) -> None:
        """See `Steps.close`."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._engines.driver.synchronize(self._engines.stream)
            if self._border.tenant is self:
                self._border.tenant = None
            self._release()
            self._forget(self)

    def _as_declared(self, name: str, array: Array) -> Array:
        return np.ascontiguousarray(array, dtype=self._border.dtypes[name])

    def _check_usable(self) -> None:
        if self._closed or self._broken:
            reason = "failed before" if self._broken else "are closed"
            raise BackendError(f"these steps {reason}", hint="start the request again")

    def _advance(self, noise: Sequence[RowNoise]) -> None:
        engines, driver, stream = self._engines, self._engines.driver, self._engines.stream
        prepared = engines.prepare(STEP, self._shapes)
        engines.claim(self._border, self)
        if not self._tables:
            self._move_in()
        work = self._work(prepared)
        start = driver.record_event(stream)
        try:
            self._queue_row(noise)
            engines.launch(prepared, "step", work)
            end = driver.record_event(stream)
        except BaseException:
            driver.destroy_event(start)
            raise
        self._unread.append(_Span(start=start, end=end))
        self._done += 1
        engines.capture(prepared, "step", work)
        while len(self._unread) > 1:
            self._read_oldest()

    def _work(self, prepared: Prepared) -> Callable[[], None]:
        driver, stream, border = self._engines.driver, self._engines.stream, self._border

        def queue() -> None:
            prepared.context.enqueue(stream)
            size = border.bytes_of(STATE, self._shapes[STATE])
            driver.copy(border.device[STATE], border.device[NEXT_STATE], size, stream)

        return queue

    def _queue_row(self, noise: Sequence[RowNoise]) -> None:
        """Bring the row's numbers and each request's noise to their places.

        Where there is no noise, what was there before stays: its coefficient is 0.
        """
        driver, stream = self._engines.driver, self._engines.stream
        for name, table in self._tables.items():
            source = table.address + self._done * table.row_bytes
            driver.copy(self._border.device[name], source, table.row_bytes, stream)
        shape = self._shapes[NOISE]
        one = self._border.bytes_of(NOISE, shape[1:])
        # The row before the last has ended, so its staging memory is free again.
        staging = self._staging[self._done % len(self._staging)]
        staged = typed(staging, self._border.dtypes[NOISE], shape)
        for index, numbers in enumerate(noise):
            target = self._border.device[NOISE] + index * one
            if isinstance(numbers, PhiloxDraw):
                driver.fill_normal(target, numbers, stream)
            elif numbers is not None:
                np.copyto(staged[index], numbers)
                driver.upload(target, staging.address + index * one, one, stream)

    def _move_in(self) -> None:
        """Bring the state, what stays, and all rows to the device."""
        engines, border = self._engines, self._border
        driver, stream = engines.driver, engines.stream
        driver.synchronize(stream)
        total = sum(array.nbytes for array in self._rows.values())
        noise_bytes = border.bytes_of(NOISE, self._shapes[NOISE])
        block, staging = engines.reserve("rows", total), engines.reserve_pinned("rows", total)
        self._staging = tuple(engines.reserve_pinned(f"noise {index}", noise_bytes) for index in (0, 1))
        for name, array in self._inputs.items():
            np.copyto(border.staged(name, array.shape), array)
            driver.upload(border.device[name], border.pinned[name].address, array.nbytes, stream)
        offset = 0
        for name, array in self._rows.items():
            np.copyto(staging.bytes[offset : offset + array.nbytes], array.reshape(-1).view(np.uint8))
            self._tables[name] = _Table(address=block + offset, row_bytes=array.nbytes // len(array))
            offset += array.nbytes
        driver.upload(block, staging.address, total, stream)
        driver.synchronize(stream)

    def _fetch_state(self) -> None:
        """Wait for the queued rows and keep their state on the host."""
        driver, stream, border = self._engines.driver, self._engines.stream, self._border
        shape = self._shapes[STATE]
        pinned = border.pinned[STATE]
        driver.download(pinned.address, border.device[STATE], border.bytes_of(STATE, shape), stream)
        driver.synchronize(stream)
        self._inputs[STATE] = border.staged(STATE, shape).copy()
        while self._unread:
            self._read_oldest()

    def _read_oldest(self) -> None:
        """Wait for the oldest unread row and note its times."""
        driver = self._engines.driver
        span = self._unread.pop(0)
        driver.wait(span.end)
        self._seconds.append(driver.elapsed_seconds(span.start, span.end))
        if self._last_end is not None:
            self._gap += driver.elapsed_seconds(self._last_end, span.start)
            driver.destroy_event(self._last_end)
        driver.destroy_event(span.start)
        self._last_end = span.end

    def _release(self) -> None:
        """Forget what lies on the device. The stream's work has ended."""
        events = [event for span in self._unread for event in (span.start, span.end)]
        for event in [*events, *([] if self._last_end is None else [self._last_end])]:
            self._engines.driver.destroy_event(event)
        self._unread.clear()
        self._last_end = None  # the way back to the device is no gap between two steps
        self._tables.clear()
