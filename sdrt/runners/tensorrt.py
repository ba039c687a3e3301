"""The TensorRT runner: opens the .engine files of a bundle on an NVIDIA GPU, and replays them as CUDA graphs.

No PyTorch: memory, streams and graphs through `CudaDriver`. `run` is a call with everything that goes in and out;
`open_steps` keeps a batch on the device from step to step.
"""

import contextlib
import threading
from collections.abc import Mapping
from types import TracebackType
from typing import Self

import numpy as np

from sdrt.bundle import Bundle
from sdrt.errors import BackendError
from sdrt.runners.base import STEP, TEXT_ENCODER, VAE_DECODER, Array, FloatArray
from sdrt.runners.cuda import CudaDriver
from sdrt.runners.device_engines import Border, Counters, DeviceEngines, Prepared
from sdrt.runners.device_steps import DeviceSteps
from sdrt.runners.feeds import asked_component, checked_feeds

MOST_GRAPHS = 32  # sets of shapes; each may have a graph for calls and one for steps
_OPENED_AT_ONCE = (TEXT_ENCODER, STEP, VAE_DECODER)


class TensorRtRunner:
    """Runs a bundle's engines through TensorRT. Calls from several threads are served one after the other.

    capture: False launches everything plainly, to compare with or to look for a fault.
    """

    def __init__(
        self, bundle: Bundle, driver: CudaDriver, *, most_graphs: int = MOST_GRAPHS, capture: bool = True
    ) -> None:
        self._bundle = bundle
        self._lock = threading.Lock()
        self._closed = False
        self._engines = DeviceEngines(bundle, driver, most_graphs=most_graphs, capture=capture)
        self._steps: set[DeviceSteps] = set()
        try:
            for name in _OPENED_AT_ONCE:
                self._engines.border(name)
        except BaseException:  # nobody else can release the device
            self.close()
            raise

    @property
    def counters(self) -> Counters:
        """How often graphs were captured, replayed and dropped."""
        return self._engines.counters

    def run(self, component: str, feeds: Mapping[str, Array]) -> dict[str, FloatArray]:
        """See `Runner.run`. Raises BackendError, before the device is touched, for shapes outside every profile."""
        with self._lock:
            self._check_open(component)
            ready = checked_feeds(asked_component(self._bundle, component), feeds)
            prepared = self._engines.prepare(component, {name: array.shape for name, array in ready.items()})
            border = self._engines.border(component)
            self._engines.claim(border, None)
            for name, array in ready.items():
                np.copyto(border.staged(name, array.shape), array)
            self._call(border, prepared)
            return {name: np.array(border.staged(name, shape), np.float32) for name, shape in prepared.outputs.items()}

    def batch_size(self, requests: int, lanes: int) -> tuple[int, int]:
        """See `SteppingRunner.batch_size`. A request costs a few operations on latents, a lane a network evaluation.

        So every batch has as many requests as the bundle allows, and at most an eighth more lanes than it needs.
        """
        most, per_image = self._bundle.manifest.profile.max_batch, self._bundle.manifest.model.lanes_per_image
        grain = 1 << max((lanes - 1).bit_length() - 3, 0)  # 1 up to 8 lanes, 2 up to 16, 4 up to 32
        padded = -(-lanes // grain) * grain
        return max(requests, most), max(lanes, min(padded, per_image * most))

    def open_steps(self, inputs: Mapping[str, Array], rows: Mapping[str, Array]) -> DeviceSteps:
        """See `SteppingRunner.open_steps`."""
        with self._lock:
            self._check_open(STEP)
            record = asked_component(self._bundle, STEP)
            first = {name: array[0] for name, array in rows.items()}
            checked_feeds(record, {**inputs, **first})
            steps = DeviceSteps(self._engines, self._lock, inputs=inputs, rows=rows, forget=self._steps.discard)
            self._steps.add(steps)
            return steps

    def refit(self, component: str, weights: Mapping[str, Array]) -> None:
        """Replace weights, under their names in the component's ONNX graph. Open steps keep their state.

        Raises BackendError when the bundle was not built for that, or the engine has no such weights.
        """
        with self._lock:
            self._check_open(component)
            self._engines.refit(component, weights)

    def close(self) -> None:
        """See `Runner.close`."""
        if self._closed:
            return
        self._closed = True
        with contextlib.ExitStack() as releases:
            releases.callback(self._engines.close)
            for steps in self._steps.copy():
                releases.callback(steps.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_open(self, component: str) -> None:
        if self._closed:
            raise BackendError(f"{component} was asked of a runner that is closed", hint="open the bundle again")

    def _call(self, border: Border, prepared: Prepared) -> None:
        """Uploads, the engine and downloads, and the wait for them: from the second time on as one graph."""
        driver, stream = self._engines.driver, self._engines.stream

        def queue() -> None:
            for name, shape in prepared.inputs.items():
                size = border.bytes_of(name, shape)
                driver.upload(border.device[name], border.pinned[name].address, size, stream)
            prepared.context.enqueue(stream)
            for name, shape in prepared.outputs.items():
                size = border.bytes_of(name, shape)
                driver.download(border.pinned[name].address, border.device[name], size, stream)

        self._engines.launch(prepared, "call", queue)
        self._engines.capture(prepared, "call", queue)
        driver.synchronize(stream)
