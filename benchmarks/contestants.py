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

import sdrt
from sdrt.errors import BackendError

Picture = npt.NDArray[np.uint8]

SDRT = "sdrt"
PYTORCH_FP32 = "PyTorch eager fp32"
PYTORCH_BF16 = "PyTorch eager bf16"
PYTORCH_COMPILE = "PyTorch compile fp32"
OPENVINO_GENAI = "OpenVINO GenAI"

_GRACE_SECONDS = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ContestantSpec:
    """name: as the report shows it; command: how it is started."""

    name: str
    command: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Drawing:
    """One picture, uint8 [H, W, 3], and where its seconds went. `step_seconds`: one entry a network evaluation.

    gpu_bytes: memory of the GPU that the process holds; gap_seconds: how long in all the GPU waited between steps.
    """

    picture: Picture
    total_seconds: float
    text_encoder_seconds: float
    step_seconds: tuple[float, ...]
    vae_decoder_seconds: float
    peak_bytes: int
    gpu_bytes: int | None = None
    gap_seconds: float | None = None


class Contestant:
    """A running contestant. `load_seconds` is from the start of its process until it can draw.

    `described` holds its version, and of the load the seconds of imports and of opening the model.
    """

    def __init__(self, spec: ContestantSpec) -> None:
        self.spec = spec
        self._log: IO[str] = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        began = time.perf_counter()
        try:
            self._process = subprocess.Popen(
                spec.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
            )
        except OSError as error:
            self._log.close()
            raise BackendError(
                f"the contestant {spec.name} cannot be started: {spec.command[0]}: {error.strerror}",
                hint="leave it out with --contestants, or install what it needs",
            ) from error
        try:
            self.described: Mapping[str, Any] = self._read("ready")
        except BaseException:
            self.close()
            raise
        self.load_seconds = time.perf_counter() - began

    def draw(self, case: Mapping[str, Any]) -> Drawing:
        """Draw one case. Raises BackendError when the contestant died."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "image.npy"
            self._write({"draw": dict(case), "image": str(path)})
            timings = self._read("drawn")
            picture = np.load(path, allow_pickle=False)
        return Drawing(
            picture=picture,
            total_seconds=timings["total_seconds"],
            text_encoder_seconds=timings["text_encoder_seconds"],
            step_seconds=tuple(timings["step_seconds"]),
            vae_decoder_seconds=timings["vae_decoder_seconds"],
            peak_bytes=timings["peak_bytes"],
            gpu_bytes=timings.get("gpu_bytes"),
            gap_seconds=timings.get("gap_seconds"),
        )

    def close(self) -> None:
        """Stop the process."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(_GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            if stream is not None:
                _close_quietly(stream)

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

    def _read(self, kind: str) -> Mapping[str, Any]:
        if self._process.stdout is None:
            raise ValueError("the contestant was started without a pipe")
        line = self._process.stdout.readline()
        if not line:
            raise self._death()
        try:
            message: Mapping[str, Any] = json.loads(line)[kind]
        except (ValueError, KeyError, TypeError):
            raise BackendError(
                f"the contestant {self.spec.name} answered {line.strip()[:120]!r}", hint="run it alone: " + self._alone
            ) from None
        return message

    @property
    def _alone(self) -> str:
        return " ".join(self.spec.command)

    def _death(self) -> BackendError:
        self._process.wait()
        self._log.seek(0)
        lines = [line.strip() for line in self._log.read().splitlines() if line.strip()]
        last = lines[-1] if lines else "it printed nothing"
        code = self._process.returncode
        if code == -9:
            return BackendError(
                f"the contestant {self.spec.name} was killed, most likely for want of memory",
                hint="keep one contestant in memory at a time with: --resident 1",
            )
        return BackendError(
            f"the contestant {self.spec.name} ended with code {code}: {last}",
            hint="run it alone to see more: " + self._alone,
        )


def compiled(
    bundle: Path, *, threads: int | None, provider: str | None = None, watch_gpu: bool = False
) -> ContestantSpec:
    """This runtime on a bundle. watch_gpu: report the memory that it takes of a GPU."""
    command = (sys.executable, "-m", "sdrt.benchmarks.baselines.compiled", str(bundle))
    flags = (*([] if provider is None else ["--provider", provider]), *(["--watch-gpu"] if watch_gpu else []))
    return ContestantSpec(name=SDRT, command=(*command, *flags, *_threads(threads)))


def pytorch(
    model: Path,
    precision: str,
    *,
    threads: int | None,
    task: str = "text-to-image",
    compile_unet: bool = False,
    cuda: bool = False,
) -> ContestantSpec:
    """The task's pipeline of diffusers, eager or with torch.compile, on the CPU or on a GPU."""
    module = ("-m", "sdrt.benchmarks.baselines.pytorch")
    command = (sys.executable, *module, str(model), "--task", task, "--precision", precision)
    suffix = "compile" if compile_unet else "eager"
    flags = (*(["--compile"] if compile_unet else []), *(["--cuda"] if cuda else []))
    where = " CUDA" if cuda else ""
    return ContestantSpec(name=f"PyTorch {suffix} {precision}{where}", command=(*command, *flags, *_threads(threads)))


def openvino_genai(model_ir: Path, python: Path, *, threads: int | None) -> ContestantSpec:
    """OpenVINO GenAI under the interpreter of its own environment, on the model as its own tools convert it."""
    script = Path(__file__).parent / "baselines" / "openvino_genai.py"
    runtime = Path(sdrt.__file__).resolve().parent.parent
    command = (str(python), str(script), str(model_ir), "--runtime", str(runtime))
    return ContestantSpec(name=OPENVINO_GENAI, command=(*command, *_threads(threads)))


def _threads(threads: int | None) -> Sequence[str]:
    return () if threads is None else ("--threads", str(threads))


def _close_quietly(stream: IO[str]) -> None:
    try:
        stream.close()
    except BrokenPipeError:  # what was still to be sent to a dead contestant
        return
