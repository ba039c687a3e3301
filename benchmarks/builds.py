"""Making what a suite needs, with the command lines a user has, timed as whole processes."""

import hashlib
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from sdrt.errors import BuildError

_SAMPLE_SECONDS = 0.1
PEER_PINS = Path(__file__).parent / "baselines" / "peers.txt"


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """A finished command: its wall seconds, and the largest resident size of any one of its processes."""

    seconds: float
    peak_bytes: int


def build_bundle(model: Path, out: Path, *flags: str, cache: Path) -> Built:
    """Run `sdrt build` with a build cache of its own. Raises BuildError with what it printed."""
    command = [*sdrt_command(), "build", str(model), "--out", str(out), *flags]
    return run_timed(command, environment={"SDRT_CACHE": str(cache)})


def sdrt_command() -> list[str]:
    """The command line of the sdrt that runs here, installed or not."""
    return [sys.executable, "-m", "sdrt"]


def convert_for_genai(checkpoint: Path, out: Path, python: Path) -> None:
    """Convert a checkpoint to OpenVINO IR with the peer's own tools, unless it is there. Raises BuildError."""
    if not out.is_dir():
        out.parent.mkdir(parents=True, exist_ok=True)
        script = PEER_PINS.with_name("convert_openvino_genai.py")
        run_timed([str(python), str(script), str(checkpoint), str(out)])


def ensure_peers(python: Path) -> None:
    """Make the environment of the peers, with its pinned packages, unless its interpreter is there.

    Raises BuildError when it cannot be made.
    """
    if python.exists():
        return
    folder = python.absolute().parent.parent
    run_timed([sys.executable, "-m", "venv", str(folder)])
    try:
        run_timed([str(python), "-m", "pip", "install", "--quiet", "--requirement", str(PEER_PINS)])
    except BaseException:
        python.unlink()  # so that the next run does not take a half-made environment for a whole one
        raise


def ensure_tensorrt(folder: Path) -> Path:
    """The interpreter of a venv with the `tensorrt` extra, made anew when the pinned versions have changed.

    A venv of its own: what builds for NVIDIA needs neither PyTorch nor a GPU. Raises BuildError.
    """
    root = Path(__file__).resolve().parents[1]
    pins = [root / "constraints.txt", root / "pyproject.toml"]
    wanted = hashlib.sha256(b"".join(file.read_bytes() for file in pins)).hexdigest()
    interpreter, stamp = folder.absolute() / "bin" / "python", folder / "stamp"
    if not stamp.is_file() or stamp.read_text() != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        run_timed([sys.executable, "-m", "venv", str(folder)])
        quiet = ["--quiet", "--disable-pip-version-check", "--constraint", str(pins[0])]
        run_timed([str(interpreter), "-m", "pip", "install", *quiet, "--editable", f"{root}[tensorrt]"])
        stamp.write_text(wanted)
    return interpreter


def run_timed(command: list[str], *, environment: Mapping[str, str] | None = None) -> Built:
    """Run a command to its end. Raises BuildError when it fails; stops it when interrupted."""
    began = time.perf_counter()
    variables = None if environment is None else {**os.environ, **environment}
    try:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=variables,
        )
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be started: {error.strerror}", hint="install it first") from error
    try:
        with _watched(child.pid) as peak_of:
            _, printed = child.communicate()
    except BaseException:
        child.terminate()
        child.wait()
        raise
    seconds = time.perf_counter() - began
    if child.returncode != 0:
        lines = [line.strip() for line in printed.splitlines() if line.strip()]
        raise BuildError(
            f"{' '.join(command[:3])} failed: {' / '.join(lines[-3:])}", hint="run it alone: " + " ".join(command)
        )
    return Built(seconds=seconds, peak_bytes=peak_of())


class _watched:  # noqa: N801  (used as a verb)
    """While the block runs, the largest resident size of any process of the tree under `pid` is noted."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._largest = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Callable[[], int]:
        self._thread.start()
        return lambda: self._largest

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._over.is_set():
            self._largest = max(self._largest, _largest_of_tree(self._pid))
            self._over.wait(_SAMPLE_SECONDS)


def _largest_of_tree(pid: int) -> int:
    largest = 0
    try:
        parent = psutil.Process(pid)
        tree = [parent, *parent.children(recursive=True)]
    except psutil.Error:
        return 0
    for process in tree:
        try:
            largest = max(largest, process.memory_info().rss)
        except psutil.Error:  # it ended meanwhile
            continue
    return largest
