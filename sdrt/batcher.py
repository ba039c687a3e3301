"""Step-level continuous batching: many callers, one running batch that requests join and leave at any step.

State is what `_Active` and the step batches hold, policy is `admit` and `choose_size`, execution is the pipeline's; the
worker thread is the only one that computes. Its turn is: let requests leave and join, one step for one size, one image
decoded; of a large image that is encoded or decoded, one tile.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, InvalidStateError
from copy import copy
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, Self

from PIL import Image

from sdrt.errors import BackendError, BusyError, Cancelled, ClosedError, RequestError, SdrtError
from sdrt.pipeline import Cost, Followed, Pipeline, Prepared, Result, as_request
from sdrt.progress import Work, advance
from sdrt.request import Request
from sdrt.resolution import ResolvedRequest
from sdrt.step_batch import Faults, StepBatch, open_batch
from sdrt.trajectory import Trajectory

TicketState = Literal["queued", "running", "done", "failed", "cancelled"]
Size = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class BatcherStats:
    """A snapshot. occupancy: mean trajectories a step since the start; steps: step-graph evaluations."""

    queued: int
    running: int
    finished: int
    failed: int
    cancelled: int
    steps: int
    occupancy: float


class Ticket:
    """A submitted request: a handle on its result, thread-safe."""

    def __init__(self, request: ResolvedRequest, wake: Callable[[], None]) -> None:
        self.request = request
        self.future: Future[Result] = Future()
        self._wake = wake
        self._cancel_asked = False
        self._running = False

    @property
    def state(self) -> TicketState:
        """Where the request is now."""
        if not self.future.done():
            return "running" if self._running else "queued"
        if self.future.cancelled():
            return "cancelled"
        error = self.future.exception()
        if error is None:
            return "done"
        return "cancelled" if isinstance(error, Cancelled) else "failed"

    def result(self, timeout: float | None = None) -> Result:
        """Wait for the images. Raises what stopped the request, or TimeoutError after `timeout` seconds."""
        try:
            return self.future.result(timeout)
        except CancelledError:  # of the bare future
            raise _cancelled() from None

    def done(self) -> bool:
        """Whether `result` would return or raise at once."""
        return self.future.done()

    def cancel(self) -> None:
        """Stop the request: its lanes are free again within a step or a tile.

        Nothing happens when it is done.
        """
        self._cancel_asked = True
        self._wake()

    def _settle(self, outcome: Result | BaseException) -> None:
        try:
            if isinstance(outcome, Result):
                self.future.set_result(outcome)
            else:
                self.future.set_exception(outcome)
        except InvalidStateError:  # the caller cancelled the bare future
            return


@dataclass(slots=True, kw_only=True, eq=False)
class _Joining:
    """A request whose images are being begun. rested: whether it has come to rest, in the middle of a large one."""

    ticket: Ticket
    preparing: Work[Prepared]
    began: float
    rested: bool = False


@dataclass(slots=True, kw_only=True, eq=False)
class _Active:
    """A request in the running batch.

    drawing: the image that is being decoded, from its first tile on; following: that which is taken to the second pass.
    """

    ticket: Ticket
    prepared: Prepared
    began: float
    step_seconds: list[float] = field(default_factory=list)
    images: list[Image.Image] = field(default_factory=list)
    drawing: Work[tuple[Image.Image, Cost]] | None = None
    following: Work[Followed] | None = None
    vae_decoder_seconds: float = 0.0
    float32_decodes: int = 0
    followed: list[Followed] = field(default_factory=list)

    @property
    def size(self) -> Size:
        return self.prepared.trajectories[0].size

    @property
    def places(self) -> int:
        """How many plain images' room it takes in a batch."""
        return places_of(self.ticket.request)

    @property
    def finished(self) -> bool:
        """Whether it takes part in no further step. Between two passes it keeps its places: it will step again."""
        return self.prepared.finished and self.prepared.following is None


def places_of(request: ResolvedRequest) -> int:
    """How many plain images' room a request takes in a batch."""
    return request.num_images_per_prompt * request.places_per_image


def admit(waiting: Sequence[int], running: int, max_batch: int, *, undecoded: int = 0) -> int:
    """How many of the waiting requests may join now, first come, first served.

    waiting: how many places each waiting request needs, one for an image with a plain image's lanes; running: how many
    are being denoised in already; undecoded: how many are denoised and wait for the VAE. These leave their place to
    others, until a whole batch of them waits: so no more than twice `max_batch` trajectories are ever held.
    """
    if undecoded >= max_batch:
        return 0
    free, count = max_batch - running, 0
    for needed in waiting:
        if needed > free:
            break
        free -= needed
        count += 1
    return count


def choose_size(sizes: Sequence[Size], last: Size | None) -> Size:
    """Which size steps, or is decoded, next when there are several: each in turn, so none starves."""
    distinct = sorted(set(sizes))
    if last is None:
        return distinct[0]
    return next((size for size in distinct if size > last), distinct[0])


class Batcher:
    """Serves many threads with one pipeline.

    max_batch: trajectories (images) in one step; max_queue: requests that may wait before BusyError.
    """

    def __init__(self, pipeline: Pipeline, *, max_batch: int | None = None, max_queue: int = 64) -> None:
        limit = pipeline.bundle.manifest.profile.max_batch
        self.max_batch = limit if max_batch is None else max_batch
        if not 1 <= self.max_batch <= limit:
            hint = f"build the bundle with a larger --batch, or use 1 to {limit}"
            raise RequestError(f"max_batch is {max_batch}; the bundle takes up to {limit} images", hint=hint)
        if max_queue < 1:
            raise RequestError(f"max_queue is {max_queue}", hint="let at least one request wait")
        self._pipeline = pipeline
        self._max_queue = max_queue
        self._waiting: deque[Ticket] = deque()
        self._joining: list[_Joining] = []
        self._active: list[_Active] = []
        self._changed = threading.Condition()
        self._closing = self._stopping = False
        self._last_size: Size | None = None
        self._last_decoded: Size | None = None
        self._batches: dict[Size, StepBatch] = {}
        self._steps = self._stepped = 0
        self._outcomes = {"done": 0, "failed": 0, "cancelled": 0}
        self._worker = threading.Thread(target=self._work, name="sdrt-batcher", daemon=True)
        self._worker.start()

    def submit(self, prompt: str | Request, **options: Any) -> Ticket:  # noqa: ANN401  (fields of Request)
        """Queue a request, given as for `Pipeline.generate`.

        Raises at once: RequestError for a bad one; BusyError when the queue is full, so that later may do; ClosedError
        after `close`, or when the worker is gone, where only another batcher takes it.
        """
        resolved = self._pipeline.resolve(as_request(prompt, options))
        if places_of(resolved) > self.max_batch:
            composed = f" with {len(resolved.composed_prompts)} composed prompts" if resolved.composed_prompts else ""
            several = resolved.num_images_per_prompt > 1
            raise RequestError(
                f"{resolved.num_images_per_prompt} images{composed} do not fit a batch of {self.max_batch}",
                hint="send several requests with seed, seed + 1, …" if several else "compose fewer prompts",
            )
        with self._changed:
            if self._closing:
                raise ClosedError("the batcher is closed", hint="make a new one")
            if len(self._waiting) >= self._max_queue:
                raise BusyError(f"{len(self._waiting)} requests are waiting already", hint="try again later")
            ticket = Ticket(resolved, self._wake)
            self._waiting.append(ticket)
            self._changed.notify_all()
        return ticket

    def stats(self) -> BatcherStats:
        """What the batcher has done and is doing."""
        with self._changed:
            return BatcherStats(
                queued=len(self._waiting),
                running=len(self._joining) + len(self._active),
                finished=self._outcomes["done"],
                failed=self._outcomes["failed"],
                cancelled=self._outcomes["cancelled"],
                steps=self._steps,
                occupancy=self._stepped / self._steps if self._steps else 0.0,
            )

    def close(self, *, drain: bool = True) -> None:
        """Stop. Accepted requests finish first, or with `drain=False` raise Cancelled. The pipeline stays open.

        From then on `submit` raises ClosedError.
        Waits for the worker, except when called by it, that is, from a callback of a ticket's future.
        """
        with self._changed:
            self._closing = True
            self._stopping = self._stopping or not drain
            self._changed.notify_all()
        if threading.current_thread() is not self._worker:
            self._worker.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(drain=kind is None)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _work(self) -> None:
        try:
            while self._has_work():
                self._drop_cancelled()
                self._join_waiting()
                self._begin()
                self._step()
                self._decode()
        finally:
            self._close_batches()
            self._abandon()

    def _has_work(self) -> bool:
        """Wait for something to do. False when the batcher is closed and there is nothing left."""
        with self._changed:
            while not (self._waiting or self._joining or self._active or self._closing):
                self._changed.wait()
            return bool(self._waiting or self._joining or self._active)

    def _abandon(self) -> None:
        """Let nobody wait for a worker that is gone. After an orderly end there is nobody left."""
        with self._changed:
            self._closing = True
            left = [item.ticket for item in self._begun()] + [*self._waiting]
            self._joining.clear()
            self._active.clear()
            self._waiting.clear()
        for ticket in left:
            self._settle(ticket, BackendError("the batcher's worker has stopped", hint="make a new batcher"))

    def _drop_cancelled(self) -> None:
        with self._changed:
            # Asked once for each: a caller may cancel between two looks at the same ticket.
            dropped = [ticket for ticket in self._waiting if self._is_cancelled(ticket)]
            for ticket in dropped:
                self._waiting.remove(ticket)
        for ticket in dropped:
            self._settle(ticket, _cancelled())
        for item in self._begun():
            if self._is_cancelled(item.ticket):
                self._leave(item, _cancelled())

    def _begun(self) -> list[_Joining | _Active]:
        return [*self._joining, *self._active]

    def _join_waiting(self) -> None:
        undecoded, running = (
            sum(item.places for item in self._active if item.finished is finished) for finished in (True, False)
        )
        running += sum(places_of(item.ticket.request) for item in self._joining)
        with self._changed:
            needs = [places_of(ticket.request) for ticket in self._waiting]
            for _ in range(admit(needs, running, self.max_batch, undecoded=undecoded)):
                ticket = self._waiting.popleft()
                ticket._running = True
                preparing = self._pipeline.preparing(ticket.request)
                self._joining.append(_Joining(ticket=ticket, preparing=preparing, began=time.perf_counter()))

    def _begin(self) -> None:
        """Begin those who have just joined, and do one tile more of one whose image is a large one.

        Large ones begin one after the other: each is held in memory, in pixels, until all of it is encoded.
        """
        large = next((item for item in self._joining if item.rested), None)
        for item in list(self._joining):
            if large not in (None, item) and self._pipeline.begins_in_tiles(item.ticket.request):
                continue
            try:
                if self._is_cancelled(item.ticket):
                    raise _cancelled()
                prepared = advance(item.preparing)
            except Exception as error:  # whatever stops one request must not stop the others
                self._leave(item, error)
                continue
            if prepared is None:
                item.rested, large = True, item
                continue
            with self._changed:
                self._joining.remove(item)
                self._active.append(_Active(ticket=item.ticket, prepared=prepared, began=item.began))

    def _step(self) -> None:
        stepping = [item for item in self._active if not item.prepared.finished]
        if not stepping:
            self._close_batches()
            return
        sizes = [item.size for item in stepping]
        for gone in self._batches.keys() - set(sizes):  # its last request has left while others were stepping
            self._drop_batch(gone)
        self._last_size = choose_size(sizes, self._last_size)
        group = [item for item in stepping if item.size == self._last_size]
        members = [path for item in group for path in item.prepared.trajectories]
        try:
            batch = self._batch(self._last_size, members)
            if batch is None:
                return
            members = list(batch.trajectories)
            self._note(batch, batch.advance())
        except Exception as error:  # the backend failed: these requests fail, the worker lives on
            for item in group:
                if item in self._active and not set(members).isdisjoint(item.prepared.trajectories):
                    self._leave(item, _own(error))
            self._drop_batch(self._last_size)
            return
        with self._changed:
            self._steps += 1
            self._stepped += len(batch.trajectories)

    def _batch(self, size: Size, trajectories: Sequence[Trajectory]) -> StepBatch | None:
        """The batch of exactly these trajectories: the one that runs already, or a new one after the last is collected.

        Who joins one in the middle of a row waits for its end. None when that collection found a trajectory at fault:
        its request has left, so the group is another now.
        """
        batch = self._batches.get(size)
        if batch is not None:
            members = list(batch.trajectories)
            if members == list(trajectories) or (batch.within_row and set(members) <= set(trajectories)):
                return batch
            faults = batch.collect()
            self._note(batch, faults)
            self._drop_batch(size)
            if faults:
                return None
        self._batches[size] = open_batch(self._pipeline.runner, trajectories)
        return self._batches[size]

    def _note(self, batch: StepBatch, faults: Faults) -> None:
        """Give the batch's requests the times of their steps, and let those at fault leave."""
        seconds = batch.take_seconds()
        members = set(batch.trajectories)
        for item in list(self._active):
            if members.isdisjoint(item.prepared.trajectories):
                continue
            item.step_seconds.extend(seconds)
            fault = next((faults[path] for path in item.prepared.trajectories if path in faults), None)
            if fault is not None:
                self._leave(item, fault)

    def _drop_batch(self, size: Size) -> None:
        batch = self._batches.pop(size, None)
        if batch is not None:
            batch.close()

    def _close_batches(self) -> None:
        for size in list(self._batches):
            self._drop_batch(size)

    def _decode(self) -> None:
        """Decode one image, or one tile of a large one, or take one as far into its second pass: no one waits for more.

        Sizes take turns, so that small images do not wait for all tiles of a large one; one image of a size is begun.
        """
        denoised = [item for item in self._active if item.prepared.finished]
        if not denoised:
            return
        self._last_decoded = choose_size([item.size for item in denoised], self._last_decoded)
        group = [item for item in denoised if item.size == self._last_decoded]
        begun = (item for item in group if item.drawing is not None or item.following is not None)
        item = next(begun, group[0])
        try:
            if item.prepared.following is None:
                self._draw(item)
            else:
                self._follow(item)
        except Exception as error:  # a failed decode is this request's alone
            self._leave(item, error)

    def _draw(self, item: _Active) -> None:
        """Go on with an image as far as one call of the VAE takes it; with the last one the request is done."""
        if item.drawing is None:
            item.drawing = self._pipeline.measured(self._pipeline.drawing(item.prepared, len(item.images)))
        if (drawn := advance(item.drawing)) is None:
            return
        image, cost = drawn
        item.images.append(image)
        item.drawing = None
        item.vae_decoder_seconds += cost.seconds
        item.float32_decodes += cost.float32_decodes
        if len(item.images) == len(item.prepared.trajectories):
            self._leave(item, self._result(item))

    def _follow(self, item: _Active) -> None:
        """Go on likewise with an image into the second pass; with the last one they all step on, in another size."""
        if item.following is None:
            item.following = self._pipeline.following(item.prepared, len(item.followed))
        if (followed := advance(item.following)) is None:
            return
        item.followed.append(followed)
        item.following = None
        if len(item.followed) == len(item.prepared.trajectories):
            item.prepared = item.prepared.followed_by(item.followed)

    def _result(self, item: _Active) -> Result:
        return self._pipeline.finish(
            item.prepared,
            tuple(item.images),
            step_seconds=tuple(item.step_seconds),
            vae_decoder_seconds=item.vae_decoder_seconds,
            began=item.began,
            float32_decodes=item.float32_decodes,
        )

    def _is_cancelled(self, ticket: Ticket) -> bool:
        return self._stopping or ticket._cancel_asked or ticket.future.cancelled()

    def _leave(self, item: _Joining | _Active, outcome: Result | BaseException) -> None:
        with self._changed:
            if isinstance(item, _Joining):
                self._joining.remove(item)
            else:
                self._active.remove(item)
        self._settle(item.ticket, outcome)

    def _settle(self, ticket: Ticket, outcome: Result | BaseException) -> None:
        cancelled = isinstance(outcome, Cancelled) or ticket.future.cancelled()
        kind = "cancelled" if cancelled else "done" if isinstance(outcome, Result) else "failed"
        with self._changed:
            self._outcomes[kind] += 1
        ticket._settle(outcome)


def _own(error: Exception) -> Exception:
    """One for each ticket: whoever raises it adds to its traceback."""
    if not isinstance(error, SdrtError):
        return error
    own = copy(error)
    own.__cause__, own.__traceback__ = error.__cause__, error.__traceback__
    return own


def _cancelled() -> Cancelled:
    return Cancelled("the request was cancelled", hint="submit it again to run it")
