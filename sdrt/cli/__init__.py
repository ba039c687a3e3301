"""The command line: one app, its commands, and the one place where errors become lines and exit codes."""

import errno
import io
import re
import signal
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from sdrt._version import VERSION
from sdrt.cli import bench, build, demo, doctor, inspect, run, schedulers, vae, verify
from sdrt.cli.terminal import discard, print_error, warnings_as_lines
from sdrt.errors import Cancelled, OutputError, RequestError, SdrtError

__all__ = ["app", "main", "run_command"]

# The parents of typer's own usage errors, whichever click it carries.
_USAGE_ERROR, _CLICK_ERROR = typer.BadParameter.__mro__[1:3]
_IN_PLAIN_WORDS = {
    "Value error, ": "",
    "(Possible options:": "Did you mean",
    "Input should be": "it must be",
    "a valid integer": "a whole number",
    "a valid number": "a number",
}
_ALIASES = re.compile(r"'(--?[\w-]+)'(?: / '--?[\w-]+')*")
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)

app = typer.Typer(
    name="sdrt",
    help="Compiled inference for Stable Diffusion, without PyTorch at run time.",
    epilog="Try it: sdrt demo. Details of a command: sdrt COMMAND --help",
    rich_markup_mode=None,  # whose columns cut the names of options off, where a terminal is narrow
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


def _show_version(value: bool) -> None:
    if value:
        print(f"sdrt {VERSION}")
        raise typer.Exit(0)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


for _command in (
    build.build,
    run.run,
    bench.bench,
    inspect.inspect,
    verify.verify,
    vae.encode,
    vae.decode,
    demo.demo,
    doctor.doctor,
    schedulers.schedulers,
):
    app.command()(_command)


def main() -> None:
    """The program `sdrt`."""
    for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # "≤" on a terminal that knows only ASCII
    code = run_command(sys.argv[1:])
    try:
        sys.stdout.flush()
    except OSError:
        code = _close_quietly()
    sys.exit(code)


def run_command(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code.

    0, 2 for a bad argument, 130 for what was stopped (Ctrl-C, SIGTERM, SIGHUP), 1 for any other failure.
    """
    options = list(arguments)
    own = options[: options.index("--")] if "--" in options else options
    as_json = "--json" in own
    with warnings_as_lines(options):
        try:
            code = typer.main.get_command(app).main(options, prog_name="sdrt", standalone_mode=False)
        except SystemExit as error:
            return error.code if isinstance(error.code, int) else 1
        except BrokenPipeError:
            return _close_quietly()
        except (Exception, KeyboardInterrupt) as error:
            return print_error(as_sdrt_error(error, options), options, as_json=as_json)
    if code == Cancelled.exit_code:  # typer's own, where the command ended with Ctrl-C
        return print_error(as_sdrt_error(KeyboardInterrupt(), options), as_json=as_json)
    return code if isinstance(code, int) else 0


def as_sdrt_error(error: BaseException, arguments: Sequence[str]) -> SdrtError:
    """Whatever ended a command, as an error with a hint. The cause stays attached for SDRT_DEBUG."""
    if isinstance(error, SdrtError):
        return error
    known = _known_error(error, arguments)
    known.__cause__ = error
    return known


def _known_error(error: BaseException, arguments: Sequence[str]) -> SdrtError:
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return Cancelled("cancelled", hint="nothing was left behind; run the command again")
    if isinstance(error, _CLICK_ERROR):
        return _usage_error(error, arguments)
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        return OutputError("the disk is full", hint="free some space, or name an output on another disk")
    if isinstance(error, OSError) and error.strerror:
        name = "" if error.filename is None else f"{error.filename}: "
        return SdrtError(f"{name}{error.strerror}", hint="check the path and its permissions")
    if isinstance(error, MemoryError):
        return SdrtError("the memory is exhausted", hint="close other programs, or use a smaller size or batch")
    text = f"{type(error).__name__}: {error}"
    return SdrtError(f"this should not happen: {text}", hint="run it with SDRT_DEBUG=1 and report what it prints")


def _usage_error(error: BaseException, arguments: Sequence[str]) -> RequestError:
    """A message of the argument parser in the words of sdrt: its suggestion becomes the hint."""
    message = getattr(error, "format_message", error.__str__)()
    for words, plain in _IN_PLAIN_WORDS.items():
        message = message.replace(words, plain)
    message, _, suggestion = message.partition("Did you mean")
    message = _ALIASES.sub(r"\1", message).partition(", unable to parse")[0].strip().rstrip(".")
    commands = {command.callback.__name__ for command in app.registered_commands if command.callback is not None}
    command = next((word for word in arguments if word in commands), None)
    shown = "sdrt --help" if command is None else f"sdrt {command} --help"
    near = [each.strip(" '?)") for each in suggestion.split(",") if suggestion]
    hint = f"did you mean {' or '.join(near)}?" if near else f"see: {shown}"
    return RequestError(message[:1].lower() + message[1:], hint=hint)


def _close_quietly() -> int:
    """The reader of our output has gone, as `head` does: say nothing, and keep Python from saying it at exit."""
    discard(sys.stdout)
    return 1
