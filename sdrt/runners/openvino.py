"""The OpenVINO runner: opens the .xml engines of a bundle on the CPU."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from sdrt.bundle import Bundle, ComponentRecord
from sdrt.errors import BackendError
from sdrt.runners.base import IN_FLOAT32, STEP, TEXT_ENCODER, VAE_DECODER, Array, FloatArray
from sdrt.runners.cpu import available_cores, float32_lanes, is_x86
from sdrt.runners.feeds import asked_component, checked_feeds
from sdrt.runners.mapped_files import MappedFiles
from sdrt.runners.usual import Shapes, usual_shapes
from sdrt.runners.winograd import filter_minimally

_OPENED_AT_ONCE = (TEXT_ENCODER, STEP, VAE_DECODER)  # what every image needs; the VAE encoder waits for its first use


class OpenVinoRunner:
    """Runs a bundle's engines through OpenVINO. Not thread-safe.

    An engine whose shapes are usually the same is compiled for just those, which is faster, in float32 also
    because its large convolutions take fewer multiplications (`filter_minimally`). For any other shape it is compiled
    once more, on first use, with dynamic dimensions.

    Engines in float32 for one size and one image at a time take turns: only the one that ran last keeps the memory of
    its intermediate values, which for a VAE is most of a gigabyte at 512×512. Of a real model they run for seconds, to
    which filling that memory anew adds little. Engines for batches keep theirs, as images are decoded there between the
    steps of others, and so do those of bf16, which are faster and with which it was not measured.
    """

    def __init__(self, bundle: Bundle, *, threads: int | None = None) -> None:
        import openvino

        self._bundle = bundle
        self._core: Any = openvino.Core()
        self._threads = available_cores() if threads is None else threads
        # By component, and whether for its usual shapes alone; each with what holds the weights that it reads.
        self._requests: dict[tuple[str, bool], tuple[Any, object]] = {}
        self._closed = False
        self._usual: dict[str, Shapes | None] = {
            record.name: usual_shapes(bundle, record) for record in bundle.manifest.components
        }
        for name in _OPENED_AT_ONCE:
            self._request(bundle.component(name), usual=self._usual[name] is not None)
        self._take_turns = bundle.manifest.precision == "fp32" and self._usual[STEP] is not None
        self._ran_last: Any = None

    def run(self, component: str, feeds: Mapping[str, Array]) -> dict[str, FloatArray]:
        """See `Runner.run`."""
        if self._closed:
            raise BackendError(f"{component} was asked of a runner that is closed", hint="open the bundle again")
        record = asked_component(self._bundle, component)
        ready = checked_feeds(record, feeds)
        usual = self._usual[component]
        # The weights are kept here too: the runner may be closed meanwhile.
        request, _weights = self._request(record, usual=usual == {name: array.shape for name, array in ready.items()})
        try:
            if self._take_turns:
                self._give_back_others(request)
            request.infer(ready, share_inputs=True)
            return {
                spec.name: np.array(request.get_tensor(spec.name).data, dtype=np.float32) for spec in record.outputs
            }
        except RuntimeError as error:
            raise BackendError(
                f"{component} failed in OpenVINO: {_last_line(error)}", hint="check the bundle with: sdrt verify"
            ) from error
        except MemoryError as error:
            raise BackendError(
                f"{component} needs more memory than there is", hint="ask for fewer or smaller images"
            ) from error

    def close(self) -> None:
        """See `Runner.close`."""
        self._closed = True
        self._ran_last = None
        self._requests.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _give_back_others(self, request: Any) -> None:  # noqa: ANN401
        last, self._ran_last = self._ran_last, request  # the runner may be closed meanwhile
        if last is not None and last is not request:
            last.get_compiled_model().release_memory()

    def _request(self, component: ComponentRecord, *, usual: bool) -> tuple[Any, object]:
        key = (component.name, usual)
        if key not in self._requests:
            self._requests[key] = self._compile(component, self._usual[component.name] if usual else None)
        return self._requests[key]

    def _compile(self, component: ComponentRecord, shapes: Shapes | None) -> tuple[Any, object]:
        path = self._bundle.file(component.files[0])
        try:
            model, weights = read_ir(self._core, [self._bundle.file(file) for file in component.files])
            with weights.given_back():  # what is compiled has its own copy of nearly all of them
                settings = self._settings(component.name)
                replaced: tuple[Any, ...] = ()
                if shapes is not None:
                    model.reshape({name: list(shape) for name, shape in shapes.items()})
                    if settings["INFERENCE_PRECISION_HINT"] == "f32" and is_x86():
                        replaced = filter_minimally(model, lanes=float32_lanes(), threads=self._threads)
                request = self._core.compile_model(model, "CPU", settings).create_infer_request()
                return request, (weights, replaced)
        except (RuntimeError, OSError, UnicodeDecodeError) as error:
            raise BackendError(
                f"OpenVINO cannot open {path}: {_last_line(error)}",
                hint="check the bundle with: sdrt verify",
            ) from error
        except MemoryError as error:
            raise BackendError(f"{path} needs more memory than there is", hint="free some memory") from error

    def _settings(self, component: str) -> dict[str, object]:
        half = self._bundle.manifest.precision == "bf16" and component not in IN_FLOAT32
        return {
            "INFERENCE_PRECISION_HINT": "bf16" if half else "f32",
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": self._threads,
        }


def read_ir(core: Any, files: Sequence[Path]) -> tuple[Any, MappedFiles]:  # noqa: ANN401
    """An IR, read from its model's file and those of its weights; and these, as one.

    They have to be kept as long as the model and everything that is compiled from it. Raises RuntimeError, as OpenVINO
    does, OSError, UnicodeDecodeError.
    """
    import openvino

    model, *weights = files
    mapped = MappedFiles(weights)
    return core.read_model(model.read_text("utf-8"), openvino.Tensor(mapped.array, shared_memory=True)), mapped


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
