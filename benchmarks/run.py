"""A comparison: contestants take turns, round by round in rotating order, on the same cases."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sdrt.benchmarks.contestants import Contestant, ContestantSpec, Drawing, Picture
from sdrt.benchmarks.measure import Ratio, Spread, psnr, ratio, spread

Say = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One picture to draw, in the names of `sdrt.Request`."""

    prompt: str
    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float
    seed: int
    scheduler: str | None = None

    def arguments(self) -> dict[str, Any]:
        """The case without its defaults."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {name: value for name, value in fields.items() if value is not None}


@dataclass(slots=True, kw_only=True, eq=False)
class Record:
    """What one contestant did: its first image cold, then one drawing a round."""

    name: str
    version: str
    load_seconds: float
    first: Drawing
    rounds: list[Drawing] = field(default_factory=list)

    @property
    def peak_bytes(self) -> int:
        """The process's largest resident size."""
        return max(drawing.peak_bytes for drawing in (self.first, *self.rounds))

    def totals(self) -> list[float]:
        """End-to-end seconds of each round."""
        return [drawing.total_seconds for drawing in self.rounds]

    def steps(self) -> list[float]:
        """Median seconds of a network evaluation, a value a round."""
        return [float(np.median(drawing.step_seconds)) for drawing in self.rounds]


@dataclass(frozen=True, slots=True, kw_only=True)
class Parity:
    """How far a contestant's first pictures are from the reference's, on the same seeds."""

    largest_difference: int  # of 255
    psnr_db: float


def compare(
    specs: Sequence[ContestantSpec], cases: Sequence[Case], *, rounds: int, warmup: int, say: Say
) -> list[Record]:
    """Run every contestant on cases[round % len(cases)], interleaved. The first drawing of each is kept apart."""
    total = len(specs) * (1 + warmup + rounds)
    done = 0
    with ExitStack() as stack:
        running: list[tuple[Contestant, Record]] = []
        for spec in specs:
            say(f"{spec.name}: load and first image", done, total)
            contestant = stack.enter_context(Contestant(spec))
            first = contestant.draw(cases[0].arguments())
            record = Record(
                name=spec.name,
                version=contestant.described["version"],
                load_seconds=contestant.load_seconds,
                first=first,
            )
            running.append((contestant, record))
            done += 1
        for number in range(warmup + rounds):
            case = cases[max(number - warmup, 0) % len(cases)]
            turn = number % len(running)
            for contestant, record in (*running[turn:], *running[:turn]):
                say(f"{record.name}: round {number + 1} of {warmup + rounds}", done, total)
                drawing = contestant.draw(case.arguments())
                if number >= warmup:
                    record.rounds.append(drawing)
                done += 1
    return [record for _, record in running]


def parity(record: Record, reference: Record) -> Parity:
    """Compare pictures of the same case, first image and every round."""
    pairs: list[tuple[Picture, Picture]] = [(record.first.picture, reference.first.picture)]
    pairs += [(a.picture, b.picture) for a, b in zip(record.rounds, reference.rounds, strict=True)]
    differences = [int(np.abs(a.astype(int) - b.astype(int)).max()) for a, b in pairs]
    return Parity(largest_difference=max(differences), psnr_db=min(psnr(a, b) for a, b in pairs))


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the report's table. Ratios are other / ours; None for this runtime itself."""

    name: str
    version: str
    load_seconds: float
    first_image_seconds: float
    start_to_image_seconds: float
    text_encoder: Spread
    step: Spread
    vae_decoder: Spread
    total: Spread
    peak_bytes: int
    step_ratio: Ratio | None
    total_ratio: Ratio | None
    start_to_image_ratio: float | None
    parity: Parity | None


def summarise(records: Sequence[Record], *, ours: str, reference: str | None) -> list[Row]:
    """The table: every contestant against ours in speed, and against the reference in pixels."""
    by_name: Mapping[str, Record] = {record.name: record for record in records}
    us = by_name[ours]
    truth = by_name.get(reference) if reference is not None else None
    return [_row(record, us, truth) for record in records]


def _row(record: Record, us: Record, truth: Record | None) -> Row:
    own = record is us
    start = record.load_seconds + record.first.total_seconds
    return Row(
        name=record.name,
        version=record.version,
        load_seconds=record.load_seconds,
        first_image_seconds=record.first.total_seconds,
        start_to_image_seconds=start,
        text_encoder=spread([drawing.text_encoder_seconds for drawing in record.rounds]),
        step=spread([seconds for drawing in record.rounds for seconds in drawing.step_seconds]),
        vae_decoder=spread([drawing.vae_decoder_seconds for drawing in record.rounds]),
        total=spread(record.totals()),
        peak_bytes=record.peak_bytes,
        step_ratio=None if own else ratio(record.steps(), us.steps()),
        total_ratio=None if own else ratio(record.totals(), us.totals()),
        start_to_image_ratio=None if own else start / (us.load_seconds + us.first.total_seconds),
        parity=None if truth is None or record is truth else parity(record, truth),
    )
