"""Building what a suite needs, with the command line a user has, timed as whole processes."""

import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from sdrt.errors import BuildError


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """A finished command: its wall seconds and the largest resident size of it and its children."""

    seconds: float
    peak_bytes: int


def build_bundle(model: Path, out: Path, *flags: str) -> Built:
    """Run `sdrt build`. Raises BuildError with what it printed."""
    return run_timed([str(Path(sys.executable).with_name("sdrt")), "build", str(model), "--out", str(out), *flags])


def run_timed(command: list[str]) -> Built:
    """Run a command to its end. Raises BuildError when it fails."""
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    seconds = time.perf_counter() - began
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        tail = " / ".join(lines[-3:])
        raise BuildError(f"{' '.join(command[:3])} failed: {tail}", hint="run it alone: " + " ".join(command))
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return Built(seconds=seconds, peak_bytes=peak)
