"""How a contestant talks to the benchmark: JSON lines on its standard streams. Standard library and numpy only.

The contestant first says {"ready": {...}}; the parent sends {"draw": {...case}, "image": path} and gets
{"drawn": {...timings}}, or closes the stream to end it. This file also runs under a peer's own interpreter,
without sdrt.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

Case = Mapping[str, Any]
Drawn = tuple[Any, dict[str, Any]]


def serve(
    imports: Callable[[], object],
    load: Callable[[], Callable[[Case], Drawn]],
    describe: Callable[[], dict[str, Any]],
    *,
    watch_gpu: bool = False,
) -> None:
    """Import and load once, then draw until the parent closes the stream.

    `draw` returns the image, uint8 [H, W, 3], and its timings: text_encoder_seconds, step_seconds (one entry a
    network evaluation), vae_decoder_seconds. Its wall time and the process's peak memory are added here; with
    watch_gpu also by how much more of the GPU's memory is in use than before the process began.
    """
    before = gpu_bytes() if watch_gpu else None
    own = os.dup(1)
    os.dup2(2, 1)  # prints of libraries go to standard error
    with os.fdopen(own, "w", encoding="utf-8") as stream:
        began = time.perf_counter()
        imports()
        imported = time.perf_counter()
        draw = load()
        opened = time.perf_counter()
        seconds = {"import_seconds": imported - began, "open_seconds": opened - imported}
        _say(stream, {"ready": {**seconds, **describe()}})
        for line in sys.stdin:
            message = json.loads(line)
            began = time.perf_counter()
            image, timings = draw(message["draw"])
            total = time.perf_counter() - began
            np.save(message["image"], np.asarray(image, np.uint8))
            on_gpu = None if before is None else gpu_bytes() - before
            memory = {"peak_bytes": peak_bytes(), "gpu_bytes": on_gpu}
            _say(stream, {"drawn": {"total_seconds": total, **memory, **timings}})


def peak_bytes(process: str = "self") -> int:
    """The largest resident size that a process ever had; unlike getrusage, without what its parent had."""
    status = Path("/proc", process, "status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def gpu_bytes() -> int:
    """What all processes together use of the memory of this process's first GPU."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").partition(",")[0]
    query = ["nvidia-smi", f"--id={visible or 0}", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return int(subprocess.run(query, capture_output=True, text=True, check=True).stdout) * 2**20


def _say(stream: Any, message: dict[str, Any]) -> None:
    stream.write(json.dumps(message) + "\n")
    stream.flush()
