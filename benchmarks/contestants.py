"""Contestants as child processes: started, asked to draw, stopped. Only one computes at a time."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
import numpy.typing as npt

from sdrt.errors import BackendError

Picture = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True)
class ContestantSpec:
    """name: as the report shows it; command: how it is started."""

    name: str
    command: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Drawing:
    """One picture, uint8 [H, W, 3], and where its seconds went. `step_seconds`: one entry a network evaluation."""

    picture: Picture
    total_seconds: float
    text_encoder_seconds: float
    step_seconds: tuple[float, ...]
    vae_decoder_seconds: float
    peak_bytes: int


class Contestant:
    """A running contestant. `load_seconds` is from the start of its process until it can draw."""

    def __init__(self, spec: ContestantSpec) -> None:
        self.spec = spec
        self._log: IO[str] = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        began = time.perf_counter()
        self._process = subprocess.Popen(
            spec.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
        )
        self.described: Mapping[str, Any] = self._read()["ready"]
        self.load_seconds = time.perf_counter() - began

    def draw(self, case: Mapping[str, Any]) -> Drawing:
        """Draw one case. Raises BackendError when the contestant died."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "image.npy"
            self._write({"draw": dict(case), "image": str(path)})
            timings = self._read()["drawn"]
            picture = np.load(path, allow_pickle=False)
        return Drawing(
            picture=picture,
            total_seconds=timings["total_seconds"],
            text_encoder_seconds=timings["text_encoder_seconds"],
            step_seconds=tuple(timings["step_seconds"]),
            vae_decoder_seconds=timings["vae_decoder_seconds"],
            peak_bytes=timings["peak_bytes"],
        )

    def close(self) -> None:
        """Stop the process."""
        if self._process.poll() is None:
            self._process.terminate()
            self._process.wait()
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write(self, message: Mapping[str, Any]) -> None:
        if self._process.stdin is None:
            raise ValueError("the contestant was started without a pipe")
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._death() from None

    def _read(self) -> Mapping[str, Any]:
        if self._process.stdout is None:
            raise ValueError("the contestant was started without a pipe")
        line = self._process.stdout.readline()
        if not line:
            raise self._death()
        message: Mapping[str, Any] = json.loads(line)
        return message

    def _death(self) -> BackendError:
        self._process.wait()
        self._log.seek(0)
        lines = [line.strip() for line in self._log.read().splitlines() if line.strip()]
        last = lines[-1] if lines else "it printed nothing"
        code = self._process.returncode
        return BackendError(
            f"the contestant {self.spec.name} ended with code {code}: {last}",
            hint="run it alone to see more: " + " ".join(self.spec.command),
        )


def compiled(bundle: Path, *, threads: int | None) -> ContestantSpec:
    """This runtime on a bundle."""
    command = (sys.executable, "-m", "sdrt.benchmarks.baselines.compiled", str(bundle))
    return ContestantSpec(name="sdrt", command=(*command, *_threads(threads)))


def pytorch(model: Path, precision: str, *, threads: int | None, compile_unet: bool = False) -> ContestantSpec:
    """diffusers, eager or with torch.compile."""
    command = (sys.executable, "-m", "sdrt.benchmarks.baselines.pytorch", str(model), "--precision", precision)
    suffix = "compile" if compile_unet else "eager"
    flags = ("--compile",) if compile_unet else ()
    return ContestantSpec(name=f"PyTorch {suffix} {precision}", command=(*command, *flags, *_threads(threads)))


def openvino_genai(model_ir: Path, python: Path, *, threads: int | None) -> ContestantSpec:
    """OpenVINO GenAI under the interpreter of its own environment, on the model as its own tools convert it."""
    script = Path(__file__).parent / "baselines" / "openvino_genai.py"
    return ContestantSpec(name="OpenVINO GenAI", command=(str(python), str(script), str(model_ir), *_threads(threads)))


def _threads(threads: int | None) -> Sequence[str]:
    return () if threads is None else ("--threads", str(threads))
