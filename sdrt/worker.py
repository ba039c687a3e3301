"""Stages as child processes: the line protocol between the command line and export, engines and benchmarks.

The child prints JSON lines: {"progress": [stage, done, total]}, {"warning": text}, and at the end either
{"result": …} or {"error": {"kind", "message", "hint"}}. Whatever else it prints goes to standard error.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, TextIO

from sdrt import errors
from sdrt.bundle import JsonValue
from sdrt.errors import Cancelled, SdrtError
from sdrt.progress import Progress, silent

_GRACE_SECONDS = 10.0


def serve(main: Callable[[Progress], JsonValue]) -> int:
    """Run a stage as a child: report to the parent in the protocol, and return the exit code."""
    with _protocol_stream() as stream:

        def say(**message: JsonValue) -> None:
            stream.write(json.dumps(message) + "\n")
            stream.flush()

        def progress(stage: str, done: int, total: int) -> None:
            say(progress=[stage, done, total])

        def show_warning(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if issubclass(category, UserWarning):
                say(warning=str(message))

        warnings.showwarning = show_warning
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            say(result=main(progress))
        except SdrtError as error:
            say(error={"kind": type(error).__name__, "message": error.message, "hint": error.hint})
            return error.exit_code
        except KeyboardInterrupt:
            say(error={"kind": "Cancelled", "message": "cancelled", "hint": "nothing was left behind"})
            return Cancelled.exit_code
        return 0


@contextlib.contextmanager
def _protocol_stream() -> Iterator[IO[str]]:
    """Standard output for the protocol alone: prints of libraries are sent to standard error."""
    sys.stdout.flush()
    own = os.dup(1)
    os.dup2(2, 1)
    with os.fdopen(own, "w", encoding="utf-8") as stream:
        yield stream


def run_child(
    module: str,
    arguments: Sequence[str],
    progress: Progress = silent,
    *,
    log: Path | None = None,
    hint_if_absent: str = 'pip install "sdrt[export]"',
    grace_seconds: float = _GRACE_SECONDS,
) -> JsonValue:
    """Run `python -m module arguments…` that speaks the protocol, and return its result.

    grace_seconds: how long it may take to end when it is stopped, then it is killed. A child that is itself stopped by
    a parent needs less than that parent gives.
    Its standard error goes to the file `log`, else is kept for the message of an unexpected death.
    Raises the SdrtError that the child reports. Ctrl-C stops the child and raises Cancelled.
    """
    command = [sys.executable, "-m", module, *arguments]
    with contextlib.ExitStack() as stack:
        if log is not None:
            stderr = stack.enter_context(log.open("w+", encoding="utf-8", errors="replace"))
        else:
            stderr = stack.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace"))
        # A session of its own: Ctrl-C reaches the child once, through us.
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, start_new_session=True)
        try:
            outcome = _follow(child, progress)
            child.wait()
        except BaseException as error:
            _stop(child, grace_seconds)
            if isinstance(error, KeyboardInterrupt):
                raise Cancelled("cancelled", hint="nothing was left behind; run the command again") from None
            raise
        if outcome is None:
            raise _unexpected_death(module, child.returncode, stderr, hint_if_absent)
    if "error" in outcome:
        raise _reported_error(outcome["error"])
    return outcome["result"]


def _follow(child: subprocess.Popen[str], progress: Progress) -> dict[str, JsonValue] | None:
    if child.stdout is None:
        raise ValueError("the child was started without a pipe")
    outcome = None
    with child.stdout:
        for line in child.stdout:
            message = _message(line)
            if "progress" in message:
                progress(*message["progress"])
            elif "warning" in message:
                warnings.warn(message["warning"], stacklevel=3)
            elif "result" in message or "error" in message:
                outcome = message
    return outcome


def _message(line: str) -> dict[str, Any]:
    """A line of the protocol; empty for what a library printed before the child began to serve."""
    try:
        message = json.loads(line)
    except ValueError:
        return {}
    return message if isinstance(message, dict) else {}


def _stop(child: subprocess.Popen[str], grace_seconds: float) -> None:
    child.terminate()
    try:
        child.wait(grace_seconds)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _reported_error(report: JsonValue) -> SdrtError:
    if not isinstance(report, dict):
        raise TypeError(f"a child reported {report!r}, which is not an error")
    named = getattr(errors, str(report["kind"]), None)
    kind = named if isinstance(named, type) and issubclass(named, SdrtError) else SdrtError
    return kind(str(report["message"]), hint=str(report["hint"]))


def _unexpected_death(module: str, code: int, stderr: IO[str], hint_if_absent: str) -> SdrtError:
    stderr.seek(0)
    lines = [line.strip() for line in stderr.read().splitlines() if line.strip()]
    last = lines[-1] if lines else "it printed nothing"
    if "ModuleNotFoundError" in last:
        return errors.BuildError(f"{module} needs a package that is not installed: {last}", hint=hint_if_absent)
    if code == -signal.SIGKILL:
        hint = "this is usually the system running out of memory: close other programs or use a smaller --sizes"
        return errors.BuildError(f"{module} was killed", hint=hint)
    return errors.BuildError(
        f"{module} ended with code {code}: {last}", hint="set SDRT_DEBUG=1 to see its whole output"
    )
