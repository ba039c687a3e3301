"""The GPU runbook: python -m sdrt.benchmarks.gpu --out DIR [--stage NAME]… (docs/gpu.md).

Each stage is a process of its own with a budget of time. What it found is kept at once, so that the next run goes on.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import msgspec

from sdrt.benchmarks.gpu.results import Outcome, read_outcomes, source_digest, state_of, write_outcomes
from sdrt.benchmarks.gpu.stages import STAGES, Stage, Work
from sdrt.benchmarks.machine import describe_machine
from sdrt.bundle import JsonValue
from sdrt.errors import BackendError, SdrtError
from sdrt.runners.nvidia import has_device

ONE = "--only-here"  # how the parent starts a stage's process
GRACE_SECONDS = 20.0  # more than a build takes to stop its own children


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stages that have not passed. Exits 0 when all passed, 1 when one did not, 3 when they wait for a GPU."""
    options = _parser().parse_args(arguments)
    work = Work(folder=options.work.absolute(), out=options.out.absolute(), threads=options.threads)
    chosen = [stage for stage in STAGES if options.stage is None or stage.name in options.stage]
    if options.only_here is not None:
        return _run_here(next(stage for stage in STAGES if stage.name == options.only_here), work)
    outcomes = read_outcomes(work.out)
    began = time.monotonic()
    for stage in chosen:
        known = outcomes.get(stage.name)
        if known is not None and known.state == "passed" and not options.again:
            print(f"{stage.name:10} passed before", flush=True)
            continue
        left = options.limit - (time.monotonic() - began)
        if left < min(stage.seconds, options.limit):
            print(f"{stage.name:10} left for the next run: {left:.0f} s are too few", flush=True)
            continue
        print(f"{stage.name:10} {stage.shows} …", flush=True)
        outcomes[stage.name] = _run_apart(stage, work, min(stage.seconds, left))
        in_order = {each.name: outcomes[each.name] for each in STAGES if each.name in outcomes}
        write_outcomes(work.out, in_order, _machine())
        print(_line(outcomes[stage.name]), flush=True)
    print(f"results: {work.out}")
    return _verdict([outcomes.get(stage.name) for stage in chosen])


def _verdict(outcomes: Sequence[Outcome | None]) -> int:
    states = {"left" if outcome is None else outcome.state for outcome in outcomes}
    if states <= {"passed"}:
        return 0
    return 3 if states <= {"passed", "waits for a GPU", "left"} else 1


def _line(outcome: Outcome) -> str:
    lines = [f"{outcome.stage:10} {outcome.state} in {outcome.seconds:.0f} s"]
    for bound in outcome.bounds:
        verdict = "met" if bound.met else "MISSED"
        lines.append(f"{'':10} {verdict:6} {bound.name}: {bound.measured} ({bound.kind} {bound.bound:g})")
    return "\n".join(lines if outcome.error is None else [*lines, f"{'':10} {outcome.error}"])


def _run_apart(stage: Stage, work: Work, seconds: float) -> Outcome:
    """The stage in a process of its own, which is stopped when its time is over."""
    command = [sys.executable, "-m", "sdrt.benchmarks.gpu", ONE, stage.name]
    command += ["--work", str(work.folder), "--out", str(work.out)]
    command += [] if work.threads is None else ["--threads", str(work.threads)]
    began = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as child:
        try:
            printed, _ = child.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            _stop(child)
            return Outcome(
                stage=stage.name,
                state="out of time",
                seconds=time.monotonic() - began,
                source=source_digest(),
                error=f"it was stopped after its {seconds:.0f} seconds",
            )
        except BaseException:
            _stop(child)
            raise
    try:
        found = msgspec.json.decode(printed.splitlines()[-1], type=Outcome)
    except (msgspec.MsgspecError, IndexError):
        return Outcome(
            stage=stage.name,
            state="failed",
            seconds=time.monotonic() - began,
            source=source_digest(),
            error=f"its process ended with code {child.returncode} and said nothing; see the log above",
        )
    return found


def _stop(child: "subprocess.Popen[str]") -> None:
    """With all that it started: what builds has children in sessions of their own, which it alone can stop."""
    os.killpg(child.pid, signal.SIGTERM)
    try:
        child.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def _run_here(stage: Stage, work: Work) -> int:
    """The stage in this process; its outcome is the last line on standard output."""
    own, sys.stdout = sys.stdout, sys.stderr  # prints of libraries go to standard error
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that children are stopped on the way out
    work.folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    error, state, findings = None, "failed", None
    try:
        findings = stage.run(work)
        state = state_of(findings)
    except SdrtError as caught:
        error = f"{caught.message}; {caught.hint}"
        if isinstance(caught, BackendError) and not has_device():
            state = "waits for a GPU"
    except Exception as caught:  # a fault of a stage is its outcome, and the next stage runs
        traceback.print_exc()
        error = f"{type(caught).__name__}: {caught}"
    outcome = {
        "stage": stage.name,
        "state": state,
        "seconds": round(time.monotonic() - began, 1),
        "source": source_digest(),
        "bounds": [] if findings is None else msgspec.to_builtins(list(findings.bounds)),
        "figures": {} if findings is None else dict(findings.figures),
        "error": error,
    }
    own.write(json.dumps(outcome) + "\n")
    own.flush()
    return 0 if state == "passed" else 1


def _machine() -> dict[str, JsonValue]:
    machine = describe_machine()
    return {name: machine[name] for name in ("cpu", "cores", "memory_gib", "system", "python", "commit")}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sdrt.benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="where results go")
    parser.add_argument("--work", type=Path, default=Path("build/gpu"), help="where bundles are, or are made")
    parser.add_argument(
        "--stage", action="append", choices=[stage.name for stage in STAGES], help="only this; again for more"
    )
    parser.add_argument("--again", action="store_true", help="also stages that passed before")
    parser.add_argument("--limit", type=float, default=1800, metavar="SECONDS", help="for all stages of this run")
    parser.add_argument("--threads", type=int)
    parser.add_argument(ONE, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
