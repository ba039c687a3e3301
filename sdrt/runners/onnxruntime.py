"""The ONNX Runtime runner: opens the .onnx engines of a bundle on the CPU."""

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import numpy as np

from sdrt.bundle import Bundle, ComponentRecord
from sdrt.errors import BackendError
from sdrt.runners.base import STEP, TEXT_ENCODER, VAE_DECODER, Array, FloatArray
from sdrt.runners.cpu import available_cores
from sdrt.runners.feeds import asked_component, checked_feeds

_PROVIDERS = ["CPUExecutionProvider"]
_OPENED_AT_ONCE = (TEXT_ENCODER, STEP, VAE_DECODER)


class OnnxRuntimeRunner:
    """Runs a bundle's engines through ONNX Runtime. Not thread-safe."""

    def __init__(self, bundle: Bundle, *, threads: int | None = None) -> None:
        self._bundle = bundle
        self._threads = available_cores() if threads is None else threads
        self._closed = False
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
        import onnxruntime

        path = self._bundle.file(component.files[0])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        try:
            session = onnxruntime.InferenceSession(path, options, providers=_PROVIDERS)
        except Exception as error:  # as above
            hint = "check the bundle with: sdrt verify"
            raise BackendError(f"ONNX Runtime cannot open {path}: {error}", hint=hint) from error
        check_providers(session.get_providers())
        return session


def check_providers(actual: list[str]) -> None:
    """Raise BackendError when ONNX Runtime fell back to another execution provider than the one asked for."""
    if actual != _PROVIDERS:
        raise BackendError(
            f"ONNX Runtime runs on {actual}, not on {_PROVIDERS} as asked",
            hint="install the onnxruntime package that has this provider",
        )
