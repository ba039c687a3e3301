"""What the command line says and how: results on stdout, progress, warnings and errors on stderr."""

import contextlib
import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from sdrt.cli.wording import in_options
from sdrt.errors import RequestError, SdrtError
from sdrt.progress import Progress, silent

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from sdrt.bundle import JsonValue


def emit(result: "Mapping[str, JsonValue]", lines: "Sequence[Text | str]", *, as_json: bool) -> None:
    """Print a command's result: one JSON object, or the lines for a person."""
    if as_json:
        print(json.dumps(result), flush=True)
        return
    console = _console(stderr=False)
    for line in lines:
        console.print(line)


def facts(rows: Sequence[tuple[str, str]]) -> "list[Text]":
    """Lines of "label  value", the values aligned."""
    from rich.text import Text

    width = max((len(label) for label, _ in rows), default=0)
    return [Text.assemble((f"  {label.ljust(width)}", "cyan"), "   ", one_line(value)) for label, value in rows]


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: Sequence[int] = (0,)) -> "list[Text]":
    """Lines of a table, the columns `left` to the left and the others to the right. Never cut at the edge."""
    from rich.text import Text

    cells = [[one_line(cell) for cell in row] for row in (head, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    lines = []
    for number, row in enumerate(cells):
        padded = [
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        text = "   ".join(padded).rstrip()
        lines.append(Text(f"  {text}", style="cyan" if number == 0 else ""))
    return lines


def title(text: str) -> "Text":
    """A line above others."""
    from rich.text import Text

    return Text(one_line(text), style="bold")


def one_line(text: str) -> str:
    """The text without line breaks and control characters, which names and prompts from files may hold."""
    return "".join(character if character.isprintable() else " " for character in text).strip()


def size_text(size_bytes: int) -> str:
    """A file size for people."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size_bytes >= factor:
            return f"{size_bytes / factor:.1f} {unit}"
    return f"{size_bytes} B"


def seconds_text(seconds: float) -> str:
    """A duration for people."""
    if seconds >= 60:
        return f"{int(seconds) // 60} min {int(seconds) % 60} s"
    return f"{seconds * 1000:.1f} ms" if seconds < 0.1 else f"{seconds:.2f} s"


@contextlib.contextmanager
def progress_bar(*, phases: bool = False) -> Iterator[Progress]:
    """A progress bar on stderr while the block runs; where stderr is no terminal, nothing, or with `phases` lines.

    phases: for commands that take minutes: a line when a stage begins, with the seconds since the block did.
    """
    if not sys.stderr.isatty():
        yield _phase_lines() if phases else silent
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bars(*columns, console=_console(stderr=True), transient=True, redirect_stdout=False) as bars:
        task = bars.add_task("starting", total=None)

        def report(stage: str, done: int, total: int) -> None:
            bars.update(task, description=one_line(stage), completed=done, total=total)

        yield report


def _phase_lines() -> Progress:
    began, current = time.monotonic(), ""

    def report(stage: str, done: int, total: int) -> None:
        nonlocal current
        if stage == current or done >= total:
            return
        current = stage
        try:
            print(f"{time.monotonic() - began:5.0f} s  {one_line(stage)}", file=sys.stderr, flush=True)
        except OSError:  # whoever read the lines has left; the work goes on without them
            discard(sys.stderr)

    return report


def discard(stream: TextIO) -> None:
    """Write nothing to a stream any more, whose reader has left: what it still holds would fail again at the end."""
    with contextlib.suppress(OSError), Path(os.devnull).open("wb") as nowhere:  # or it has no file to replace
        os.dup2(nowhere.fileno(), stream.fileno())


@contextlib.contextmanager
def warnings_as_lines(given: Collection[str] = ()) -> Iterator[None]:
    """Print each UserWarning as one line, `warning: …`, and no other warning. given: see `print_warning`."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if issubclass(category, UserWarning):
            print_warning(str(message), given)

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show
        yield


def print_warning(message: str, given: Collection[str] = ()) -> None:
    """One line on stderr, with options instead of fields. given: the command's arguments, which stay as they are."""
    _say("warning", "bold yellow", in_options(message, given))


def print_error(error: SdrtError, given: Collection[str] = (), *, as_json: bool) -> int:
    """Two lines on stderr, with --json also an object on stdout; returns the exit code.

    What is wrong with a request is said of the options that make it. given: see `print_warning`.
    """
    if debugging():
        traceback.print_exception(error, file=sys.stderr)
    message, hint = error.message, error.hint
    if isinstance(error, RequestError):
        message, hint = in_options(message, given), in_options(hint, given)
    _say("error", "bold red", message)
    _say("hint", "bold", hint)
    if as_json:
        report = {"kind": type(error).__name__, "message": one_line(message), "hint": one_line(hint)}
        # Where stdout itself is what failed, the two lines have to do.
        with contextlib.suppress(OSError):
            print(json.dumps({"error": report}), flush=True)
    return error.exit_code


def debugging() -> bool:
    """Whether the user asked for tracebacks."""
    return os.environ.get("SDRT_DEBUG", "") not in ("", "0")


def _say(word: str, style: str, message: str) -> None:
    from rich.text import Text

    _console(stderr=True).print(Text.assemble((f"{word}:", style), " ", one_line(message)))


def _console(*, stderr: bool) -> "Console":
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, markup=False, emoji=False, soft_wrap=True)
