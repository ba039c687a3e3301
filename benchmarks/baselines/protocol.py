"""How a contestant talks to the benchmark: JSON lines on its standard streams. Standard library and numpy only.

The parent sends {"draw": {...case}, "image": path} or {"stop": true}; the contestant first says {"ready": {...}},
then answers each draw with its timings. This file also runs under a peer's own interpreter, without sdrt.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Case = Mapping[str, Any]
Drawn = tuple[Any, dict[str, Any]]


def serve(load: Callable[[], Callable[[Case], Drawn]], describe: Callable[[], dict[str, Any]]) -> None:
    """Load once, then draw until told to stop. `draw` returns the image, uint8 [H, W, 3], and its timings."""
    own = os.dup(1)
    os.dup2(2, 1)  # prints of libraries go to standard error
    with os.fdopen(own, "w") as stream:
        began = time.perf_counter()
        draw = load()
        _say(stream, {"ready": {"open_seconds": time.perf_counter() - began, **describe()}})
        for line in sys.stdin:
            message = json.loads(line)
            if "stop" in message:
                return
            began = time.perf_counter()
            image, timings = draw(message["draw"])
            total = time.perf_counter() - began
            np.save(message["image"], np.asarray(image))
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            _say(stream, {"drawn": {"total_seconds": total, "peak_bytes": peak, **timings}})


def _say(stream: Any, message: dict[str, Any]) -> None:
    stream.write(json.dumps(message) + "\n")
    stream.flush()
