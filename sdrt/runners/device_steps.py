"""A batch that stays on the GPU from step to step: state, prompt_embeds and all rows of the plans.

The host queues one row ahead: it copies a row's few numbers into the engine's border on the device, launches the
captured step, and waits for the row before. So the GPU never waits for the host while a step takes longer than that.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sdrt.errors import BackendError
from sdrt.philox import PhiloxDraw
from sdrt.runners.base import STEP, Array, FloatArray, RowNoise
from sdrt.runners.cuda import Pinned
from sdrt.runners.device_engines import DeviceEngines, Prepared, typed
from sdrt.runners.device_pool import Lease

STATE, NEXT_STATE, NOISE = "state", "next_state", "noise"
_ALIGNMENT = 256
_STAGINGS = 2  # for noise: one is filled while the row before may still be uploading from the other


@dataclass(frozen=True, slots=True, kw_only=True)
class _Span:
    """The events around one row's work. follows: the row before it was the last work of the device."""

    start: int
    end: int
    follows: bool


class DeviceSteps:
    """See `Steps`. Several may be open: each has a home on the device, and takes turns at the engine's border.

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
        self._inputs, self._rows = tuple(inputs), tuple(rows)
        self._length = min(len(array) for array in rows.values())
        self._done = 0
        self._stagings: list[Lease[Pinned]] = []
        self._unread: list[_Span] = []
        self._last_end: int | None = None
        self._seconds: list[float] = []
        self._gap = 0.0
        self._broken = self._closed = False
        engines.prepare(STEP, self._shapes)  # shapes outside every profile are refused now
        self._places: dict[str, int] = {}
        self._home = self._settle({**inputs, **rows})

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
            driver, stream = self._engines.driver, self._engines.stream
            shape, pinned = self._shapes[STATE], self._border.pinned[STATE]
            source = self._border.device[STATE] if self._border.tenant is self else self._places[STATE]
            driver.download(pinned.address, source, self._size(STATE), stream)
            driver.synchronize(stream)
            while self._unread:
                self._read_oldest()
            return np.array(self._border.staged(STATE, shape), np.float32)

    def seconds(self) -> tuple[float, ...]:
        """See `Steps.seconds`."""
        return tuple(self._seconds)

    def gap_seconds(self) -> float:
        """See `Steps.gap_seconds`."""
        return self._gap

    def move_out(self) -> None:
        """See `Tenant.move_out`; the lock is held."""
        if not (self._closed or self._broken):
            self._engines.driver.copy(
                self._places[STATE], self._border.device[STATE], self._size(STATE), self._engines.stream
            )

    def close(self) -> None:
        """See `Steps.close`."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if self._border.tenant is self:
                self._border.tenant = None
            self._forget(self)
            try:
                self._engines.driver.synchronize(self._engines.stream)
            finally:
                self._release()

    def _settle(self, arrays: Mapping[str, Array]) -> Lease[int]:
        """Bring the state, what stays, and all rows to a place of their own on the device."""
        engines = self._engines
        ready = {name: np.ascontiguousarray(array, self._border.dtypes[name]) for name, array in arrays.items()}
        offsets, total = {}, 0
        for name, array in ready.items():
            offsets[name] = total
            total += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
        home = engines.device_pool.take(total)
        try:
            with engines.staging(total) as staging:
                for name, array in ready.items():
                    content = staging.bytes[offsets[name] : offsets[name] + array.nbytes]
                    np.copyto(content, array.reshape(-1).view(np.uint8))
                engines.driver.upload(home.block, staging.address, total, engines.stream)
                engines.driver.synchronize(engines.stream)
        except BaseException:
            engines.device_pool.give(home)
            raise
        self._places = {name: home.block + offset for name, offset in offsets.items()}
        return home

    def _check_usable(self) -> None:
        if self._closed or self._broken:
            reason = "failed before" if self._broken else "are closed"
            raise BackendError(f"these steps {reason}", hint="start the request again")

    def _advance(self, noise: Sequence[RowNoise]) -> None:
        engines, driver, stream = self._engines, self._engines.driver, self._engines.stream
        prepared = engines.prepare(STEP, self._shapes)
        follows = self._border.tenant is self
        if not follows:
            engines.claim(self._border, self)
            for name in self._inputs:
                driver.copy(self._border.device[name], self._places[name], self._size(name), stream)
        work = self._work(prepared)
        start = driver.record_event(stream)
        try:
            self._queue_row(noise)
            engines.launch(prepared, "step", work)
            end = driver.record_event(stream)
        except BaseException:
            driver.destroy_event(start)
            raise
        self._unread.append(_Span(start=start, end=end, follows=follows))
        self._done += 1
        engines.capture(prepared, "step", work)
        while len(self._unread) > 1:
            self._read_oldest()

    def _work(self, prepared: Prepared) -> Callable[[], None]:
        driver, stream, border = self._engines.driver, self._engines.stream, self._border

        def queue() -> None:
            prepared.context.enqueue(stream)
            driver.copy(border.device[STATE], border.device[NEXT_STATE], self._size(STATE), stream)

        return queue

    def _queue_row(self, noise: Sequence[RowNoise]) -> None:
        """Bring the row's numbers and each request's noise to their places.

        Where there is no noise, what was there before stays: its coefficient is 0.
        """
        driver, stream = self._engines.driver, self._engines.stream
        for name in self._rows:
            size = self._size(name)
            driver.copy(self._border.device[name], self._places[name] + self._done * size, size, stream)
        one = self._border.bytes_of(NOISE, self._shapes[NOISE][1:])
        uploads = self._staged(noise)
        for index, numbers in enumerate(noise):
            target = self._border.device[NOISE] + index * one
            if isinstance(numbers, PhiloxDraw):
                driver.fill_normal(target, numbers, stream)
            elif numbers is not None:
                driver.upload(target, next(uploads), one, stream)

    def _staged(self, noise: Sequence[RowNoise]) -> Iterator[int]:
        """The addresses, one after the other, of the host's numbers in pinned memory."""
        numbers = [(index, each) for index, each in enumerate(noise) if isinstance(each, np.ndarray)]
        if numbers and not self._stagings:
            self._stagings = [self._engines.pinned_pool.take(self._size(NOISE)) for _ in range(_STAGINGS)]
        for index, each in numbers:
            # The row before the last has ended, so its staging memory is free again.
            pinned = self._stagings[self._done % _STAGINGS].block
            staged = typed(pinned, self._border.dtypes[NOISE], self._shapes[NOISE])
            np.copyto(staged[index], each)
            yield pinned.address + index * staged[index].nbytes

    def _size(self, name: str) -> int:
        return self._border.bytes_of(name, self._shapes[name])

    def _read_oldest(self) -> None:
        """Wait for the oldest unread row and note its times."""
        driver = self._engines.driver
        span = self._unread.pop(0)
        driver.wait(span.end)
        self._seconds.append(driver.elapsed_seconds(span.start, span.end))
        if self._last_end is not None:
            if span.follows:
                self._gap += driver.elapsed_seconds(self._last_end, span.start)
            driver.destroy_event(self._last_end)
        driver.destroy_event(span.start)
        self._last_end = span.end

    def _release(self) -> None:
        """Give back what is on the device. The stream's work has ended."""
        events = [event for span in self._unread for event in (span.start, span.end)]
        for event in [*events, *([] if self._last_end is None else [self._last_end])]:
            self._engines.driver.destroy_event(event)
        self._unread.clear()
        self._last_end = None
        self._engines.device_pool.give(self._home)
        for lease in self._stagings:
            self._engines.pinned_pool.give(lease)
        self._stagings.clear()
