"""A comparison: contestants take turns, round by round in rotating order, on the same cases."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import numpy as np

from sdrt.benchmarks.cases import Case
from sdrt.benchmarks.contestants import Contestant, ContestantSpec, Drawing, Picture
from sdrt.benchmarks.measure import Parity, Ratio, Spread, parity, ratio, spread

Say = Callable[[str, int, int], None]
Resident = Literal["all", "1"]
_Item = TypeVar("_Item")

# Worker threads of OpenMP and TBB spin for a while after their work, and would slow whoever is next.
_SETTLE_SECONDS = 0.3


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Start:
    """A cold start: the process from nothing to its first image.

    load_seconds: from the start of the process until it can draw; of these, imports and opening the model.
    """

    load_seconds: float
    import_seconds: float
    open_seconds: float
    first: Drawing

    @property
    def to_image_seconds(self) -> float:
        """From the start of the process to its first image."""
        return self.load_seconds + self.first.total_seconds


@dataclass(slots=True, kw_only=True, eq=False)
class Record:
    """What one contestant did: cold starts, then one warm drawing a round."""

    name: str
    version: str = ""
    starts: list[Start] = field(default_factory=list)
    rounds: list[Drawing] = field(default_factory=list)

    @property
    def peak_bytes(self) -> int:
        """The process's largest resident size."""
        return max(drawing.peak_bytes for drawing in self.drawings())

    def drawings(self) -> list[Drawing]:
        """Every drawing kept: the first of each start, then the rounds."""
        return [*(start.first for start in self.starts), *self.rounds]

    def pictures(self) -> list[Picture]:
        """Every picture kept, in the order of `drawings`."""
        return [drawing.picture for drawing in self.drawings()]

    def totals(self) -> list[float]:
        """End-to-end seconds of each round."""
        return [drawing.total_seconds for drawing in self.rounds]

    def steps(self) -> list[float]:
        """Median seconds of a network evaluation, a value a round."""
        return [float(np.median(drawing.step_seconds)) for drawing in self.rounds]


def compare(
    specs: Sequence[ContestantSpec],
    cases: Sequence[Case],
    *,
    rounds: int,
    warmup: int,
    say: Say,
    cold_starts: int = 1,
    resident: Resident = "all",
) -> list[Record]:
    """Start every contestant `cold_starts` times, then run each on cases[round % len(cases)], interleaved.

    resident: with "all", the processes of the last start stay in memory and take turns. With "1", each round starts
    each contestant anew and warms it up, so that the largest alone must fit in memory; every round is a cold start.
    """
    records = [Record(name=spec.name) for spec in specs]
    if resident == "1":
        steps = _one_at_a_time(specs, cases, records, rounds=rounds, warmup=warmup)
        total = len(specs) * rounds * (2 + warmup)
    else:
        steps = _side_by_side(specs, cases, records, rounds=rounds, warmup=warmup, cold_starts=cold_starts)
        total = len(specs) * (cold_starts + warmup + rounds)
    for done, what in enumerate(steps):
        say(what, done, total)
    return records


def _side_by_side(
    specs: Sequence[ContestantSpec],
    cases: Sequence[Case],
    records: Sequence[Record],
    *,
    rounds: int,
    warmup: int,
    cold_starts: int,
) -> Iterator[str]:
    everyone = list(zip(specs, records, strict=True))
    with ExitStack() as stack:
        running: list[tuple[Contestant, Record]] = []
        for start in range(cold_starts):
            for spec, record in rotated(everyone, start):
                yield f"{spec.name}: load and first image"
                with ExitStack() as life:
                    contestant = life.enter_context(Contestant(spec))
                    _start(contestant, record, cases[0])
                    if start + 1 == cold_starts:
                        running.append((contestant, record))
                        stack.push(life.pop_all())
        for number in range(warmup + rounds):
            case = cases[max(number - warmup, 0) % len(cases)]
            for contestant, record in rotated(running, number):
                yield f"{record.name}: round {number + 1} of {warmup + rounds}"
                drawing = _draw(contestant, case)
                if number >= warmup:
                    record.rounds.append(drawing)


def _one_at_a_time(
    specs: Sequence[ContestantSpec], cases: Sequence[Case], records: Sequence[Record], *, rounds: int, warmup: int
) -> Iterator[str]:
    everyone = list(zip(specs, records, strict=True))
    for number in range(rounds):
        case = cases[number % len(cases)]
        for spec, record in rotated(everyone, number):
            yield f"{spec.name}: load and first image"
            with Contestant(spec) as contestant:
                _start(contestant, record, cases[0])
                for _ in range(warmup):
                    yield f"{spec.name}: warming up for round {number + 1} of {rounds}"
                    _draw(contestant, case)
                yield f"{spec.name}: round {number + 1} of {rounds}"
                record.rounds.append(_draw(contestant, case))


def rotated(items: Sequence[_Item], turn: int) -> list[_Item]:
    """The items from the one whose turn it is to first."""
    first = turn % len(items) if items else 0
    return [*items[first:], *items[:first]]


def _start(contestant: Contestant, record: Record, case: Case) -> None:
    described = contestant.described
    record.version = described["version"]
    record.starts.append(
        Start(
            load_seconds=contestant.load_seconds,
            import_seconds=described["import_seconds"],
            open_seconds=described["open_seconds"],
            first=contestant.draw(case.arguments()),
        )
    )


def _draw(contestant: Contestant, case: Case) -> Drawing:
    time.sleep(_SETTLE_SECONDS)
    return contestant.draw(case.arguments())


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the report's table, in seconds. Ratios are other / ours; None for this runtime itself.

    `denoising` is the sum of an image's network evaluations; `step` pools all of them. `parity` is None for the
    reference itself and where no reference ran; `wanted_share` says how much of its captions the pictures show.
    """

    name: str
    version: str
    imports: Spread
    load: Spread
    first_image: Spread
    start_to_image: Spread
    text_encoder: Spread
    step: Spread
    denoising: Spread
    vae_decoder: Spread
    total: Spread
    peak_bytes: int
    step_ratio: Ratio | None
    total_ratio: Ratio | None
    start_ratio: Ratio | None
    parity: Parity | None
    wanted_share: float | None = None

    @property
    def ours(self) -> bool:
        """Whether this is the runtime that the others are compared with."""
        return self.total_ratio is None


def summarise(
    records: Sequence[Record],
    *,
    ours: str,
    reference: str | None,
    wanted_share: Callable[[Sequence[Picture]], float] | None = None,
) -> list[Row]:
    """The table: every contestant against ours in speed, and against the reference in pixels.

    wanted_share: given the rounds' pictures in order, how much of what was asked for they show, in [0, 1].
    """
    by_name: Mapping[str, Record] = {record.name: record for record in records}
    truth = by_name.get(reference) if reference is not None else None
    return [_row(record, by_name[ours], truth, wanted_share) for record in records]


def _row(
    record: Record, us: Record, truth: Record | None, wanted_share: Callable[[Sequence[Picture]], float] | None
) -> Row:
    own = record is us
    to_image = [start.to_image_seconds for start in record.starts]
    rounds = record.rounds
    return Row(
        name=record.name,
        version=record.version,
        imports=spread([start.import_seconds for start in record.starts]),
        load=spread([start.load_seconds for start in record.starts]),
        first_image=spread([start.first.total_seconds for start in record.starts]),
        start_to_image=spread(to_image),
        text_encoder=spread([drawing.text_encoder_seconds for drawing in rounds]),
        step=spread([seconds for drawing in rounds for seconds in drawing.step_seconds]),
        denoising=spread([sum(drawing.step_seconds) for drawing in rounds]),
        vae_decoder=spread([drawing.vae_decoder_seconds for drawing in rounds]),
        total=spread(record.totals()),
        peak_bytes=record.peak_bytes,
        step_ratio=None if own else ratio(record.steps(), us.steps()),
        total_ratio=None if own else ratio(record.totals(), us.totals()),
        start_ratio=None if own else ratio(to_image, [start.to_image_seconds for start in us.starts]),
        parity=None if truth is None or record is truth else parity(record.pictures(), truth.pictures()),
        wanted_share=None if wanted_share is None else wanted_share([drawing.picture for drawing in rounds]),
    )
