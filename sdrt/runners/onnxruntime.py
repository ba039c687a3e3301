"""The ONNX Runtime runner: opens the .onnx engines of a bundle on the CPU, or on NVIDIA's execution providers."""

import warnings
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import numpy as np

from sdrt.bundle import Bundle, ComponentRecord
from sdrt.errors import BackendError
from sdrt.runners.base import STEP, TEXT_ENCODER, VAE_DECODER, Array, FloatArray
from sdrt.runners.cpu import available_cores
from sdrt.runners.feeds import asked_component, checked_feeds
from sdrt.runners.onnxruntime_session import open_bound_session, open_cpu_session, provider_devices
from sdrt.runners.providers import PROVIDERS, Provider, captures

_OPENED_AT_ONCE = (TEXT_ENCODER, STEP, VAE_DECODER)


class OnnxRuntimeRunner:
    """Runs a bundle's engines through ONNX Runtime on one execution provider. Not thread-safe."""

    def __init__(self, bundle: Bundle, *, threads: int | None = None, provider: Provider = PROVIDERS["cpu"]) -> None:
        self._bundle = bundle
        self._threads = available_cores() if threads is None else threads
        self._provider = provider
        self._closed = False
        self._devices = provider_devices(provider)
        self._sessions: dict[str, Any] = {name: self._open(bundle.component(name)) for name in _OPENED_AT_ONCE}

    def run(self, component: str, feeds: Mapping[str, Array]) -> dict[str, FloatArray]:
        """See `Runner.run`."""
        if self._closed:
            raise BackendError(f"{component} was asked of a runner that is closed", hint="open the bundle again")
        record = asked_component(self._bundle, component)
        ready = checked_feeds(record, feeds)
        if component not in self._sessions:
            self._sessions[component] = self._open(record)
        names = [spec.name for spec in record.outputs]
        try:
            outputs = self._sessions[component].run(names, ready)
        except Exception as error:  # ONNX Runtime raises one class per status code, with no common base
            raise BackendError(
                f"{component} failed in ONNX Runtime: {error}", hint="check the bundle with: sdrt verify"
            ) from error
        return {name: np.asarray(output, np.float32) for name, output in zip(names, outputs, strict=True)}

    def close(self) -> None:
        """See `Runner.close`."""
        self._closed = True
        self._sessions.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self, component: ComponentRecord) -> Any:  # noqa: ANN401  (ONNX Runtime's classes are untyped)
        path = self._bundle.file(component.files[0])
        if self._provider.name == "cpu":
            return open_cpu_session(path, threads=self._threads)
        graphs = captures(self._provider, component.name)
        try:
            return self._open_bound(component, graphs=graphs)
        except BackendError as refusal:
            if not graphs:
                raise
            # A graph that leaves nodes to the CPU cannot be captured; it can be run. Any other cause fails again.
            session = self._open_bound(component, graphs=False)
            warnings.warn(f"{component.name} runs without CUDA graphs: {refusal.message}", stacklevel=2)
            return session

    def _open_bound(self, component: ComponentRecord, *, graphs: bool) -> Any:  # noqa: ANN401
        return open_bound_session(
            self._bundle.file(component.files[0]),
            component.name,
            self._provider,
            self._devices,
            threads=self._threads,
            graphs=graphs,
            kernels=self._bundle.path / "kernels",
        )
