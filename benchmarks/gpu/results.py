"""What a run of the GPU runbook found, as data: one outcome for each stage, kept after each, so that a run goes on."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec

from sdrt.bundle import JsonValue
from sdrt.errors import BuildError
from sdrt.files import write_atomically

RESULTS_NAME = "results.json"
SUMMARY_NAME = "summary.md"

State = Literal["passed", "missed", "failed", "out of time", "waits for a GPU"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """Something that has to hold. measured: None when it could not be measured, which is a miss."""

    name: str
    measured: float | None
    bound: float
    kind: Literal["at least", "at most"] = "at least"

    @property
    def met(self) -> bool:
        """Whether it was measured and holds. NaN does not."""
        if self.measured is None:
            return False
        return self.measured >= self.bound if self.kind == "at least" else self.measured <= self.bound


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """What a stage measured."""

    bounds: Sequence[Bound] = ()
    figures: Mapping[str, JsonValue] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a stage ended. source: of the code that ran; error: why it did not pass, as a user would read it."""

    stage: str
    state: State
    seconds: float
    source: str
    bounds: tuple[Bound, ...] = ()
    figures: dict[str, Any] = field(default_factory=dict)  # JsonValue, which msgspec cannot read: it is recursive
    error: str | None = None


def state_of(findings: Findings) -> State:
    """Passed, or missed when a bound does not hold."""
    return "passed" if all(bound.met for bound in findings.bounds) else "missed"


def read_outcomes(folder: Path) -> dict[str, Outcome]:
    """What earlier runs found, by stage; empty when there were none. BuildError: the file is damaged."""
    path = folder / RESULTS_NAME
    if not path.is_file():
        return {}
    try:
        known = msgspec.json.decode(path.read_bytes(), type=dict[str, Outcome])
    except msgspec.MsgspecError as error:
        raise BuildError(f"{path} cannot be read: {error}", hint="remove it, and all stages run again") from error
    return known


def write_outcomes(folder: Path, outcomes: Mapping[str, Outcome], machine: Mapping[str, JsonValue]) -> None:
    """Keep what was found, for the next run (results.json) and for a reader (summary.md)."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = {name: asdict(outcome) for name, outcome in outcomes.items()}
    write_atomically(folder / RESULTS_NAME, (json.dumps(plain, indent=2) + "\n").encode(), overwrite=True)
    write_atomically(folder / SUMMARY_NAME, summary(outcomes, machine).encode(), overwrite=True)


def summary(outcomes: Mapping[str, Outcome], machine: Mapping[str, JsonValue]) -> str:
    """The same in words and tables."""
    lines = ["# GPU runbook", "", *(f"- {name}: {value}" for name, value in machine.items()), ""]
    sources = {outcome.source for outcome in outcomes.values()}
    if len(sources) > 1:
        lines += [f"The stages ran on {len(sources)} states of the source; see results.json.", ""]
    lines += ["| stage | outcome | seconds |", "| --- | --- | --- |"]
    lines += [f"| {each.stage} | {each.state} | {each.seconds:.0f} |" for each in outcomes.values()]
    for outcome in outcomes.values():
        lines += ["", f"## {outcome.stage}", ""]
        if outcome.error is not None:
            lines += [outcome.error, ""]
        if outcome.bounds:
            lines += ["| bar | measured | bound | |", "| --- | --- | --- | --- |"]
            lines += [_bound_line(bound) for bound in outcome.bounds]
            lines.append("")
        lines += [f"- {name}: {_shown(value)}" for name, value in outcome.figures.items()]
    return "\n".join(lines) + "\n"


def _bound_line(bound: Bound) -> str:
    measured = "not measured" if bound.measured is None else f"{bound.measured:.6g}"
    return f"| {bound.name} | {measured} | {bound.kind} {bound.bound:g} | {'met' if bound.met else 'MISSED'} |"


def _shown(value: JsonValue) -> str:
    return f"{value:.6g}" if isinstance(value, float) else json.dumps(value, ensure_ascii=False)


def source_digest() -> str:
    """A name for the code that runs here, wherever it lies: of every Python and CUDA file of these packages."""
    import sdrt
    from sdrt import benchmarks, engines, export

    digest = hashlib.sha256()
    for package in (sdrt, benchmarks, engines, export):
        folder = Path(str(package.__file__)).resolve().parent  # the checkout's, also where links lead to it
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".py", ".ptx"):
                digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]
