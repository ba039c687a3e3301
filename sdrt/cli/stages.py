"""The stages that the command line starts as child processes, with what it takes to run them."""

import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sdrt.cli.terminal import debugging
from sdrt.errors import BuildError
from sdrt.progress import Progress

EXPORT, ENGINES, BENCHMARKS = "sdrt.export", "sdrt.engines", "sdrt.benchmarks"
BISECT = "sdrt.engines.bisect_stage"
NEEDS = {
    EXPORT: ("torch", "diffusers", "transformers", "onnx", "onnxscript", "safetensors"),
    ENGINES: ("onnx",),
    BISECT: ("onnx", "onnxruntime"),
    BENCHMARKS: ("jinja2", "psutil", "scipy"),
}
EXTRAS = {EXPORT: "export", ENGINES: "engines", BISECT: "engines", BENCHMARKS: "bench"}


def run_stage(module: str, arguments: Sequence[str], progress: Progress) -> dict[str, Any]:
    """Run a stage to its end and return its result. Raises its error; BuildError when a package is missing.

    With SDRT_DEBUG its whole standard error is shown.
    """
    from sdrt.worker import run_child

    check_installed(module)
    install = install_hint(module)
    with tempfile.TemporaryDirectory(prefix="sdrt-log-") as folder:
        log = Path(folder) / "stderr.txt"
        try:
            result = run_child(module, arguments, progress, log=log, hint_if_absent=install)
        finally:
            if debugging() and log.is_file():
                sys.stderr.write(log.read_text(encoding="utf-8", errors="replace"))
    if not isinstance(result, dict):
        raise BuildError(
            f"{module} reported {result!r}", hint="install sdrt again: its parts are of different versions"
        )
    return result


def check_installed(module: str) -> None:
    """Raise BuildError unless every package that a stage needs is there."""
    absent = [name for name in NEEDS[module] if find_spec(name) is None]
    if absent:
        raise BuildError(f"{', '.join(absent)} must be installed for this command", hint=install_hint(module))


def install_hint(module: str) -> str:
    """The command that installs what a stage needs."""
    return f'pip install "sdrt[{EXTRAS[module]}]"'
