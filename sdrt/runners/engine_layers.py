"""What a built TensorRT engine is made of: the report of TensorRT's inspector, read and counted."""

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sdrt.bundle import Bundle
from sdrt.errors import BackendError
from sdrt.runners.cuda import CudaDriver

# TensorRT describes a tensor in words: "Half", "Row major linear FP16 format", "N/A due to dynamic shapes".
_TYPES: Mapping[str, re.Pattern[str]] = {
    name: re.compile(pattern, re.IGNORECASE)
    for name, pattern in {
        "bfloat16": r"bf16|bfloat16",
        "float16": r"fp16|half",
        "float8": r"fp8",
        "float32": r"fp32|\bfloat\b",
        "int8": r"int8",
        "int32": r"int32",
        "int64": r"int64",
        "bool": r"bool",
    }.items()
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerKind:
    """Layers that are alike. operator: TensorRT's name of it; outputs: their types, empty where it does not say."""

    operator: str
    outputs: tuple[str, ...]
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLayers:
    """The layers of one engine: names in order, and how many there are of each kind, the most frequent first.

    kinds: empty for an engine that was built without details.
    """

    names: tuple[str, ...]
    kinds: tuple[LayerKind, ...]


def inspect_engines(bundle: Bundle, driver: CudaDriver) -> dict[str, EngineLayers]:
    """Load each engine of a TensorRT bundle, one after the other, and read what it is made of. Closes the driver.

    Raises BackendError when an engine does not load here, or its report is no JSON.
    """
    found = {}
    try:
        for component in bundle.manifest.components:
            engine = driver.open_engine(bundle.file(component.files[0]))
            try:
                found[component.name] = read_layers(engine.layer_report())
            finally:
                engine.close()
    finally:
        driver.close()
    return found


def read_layers(report: str) -> EngineLayers:
    """Count the layers of an inspector's report, JSON with detailed layers or with names alone. Raises BackendError."""
    try:
        layers: list[Any] = list(json.loads(report)["Layers"])
    except (ValueError, KeyError, TypeError) as error:
        raise BackendError(
            f"TensorRT's inspector reports no layers: {report[:80]!r}",
            hint="look at the log above, and report the library",
        ) from error
    detailed = [layer for layer in layers if isinstance(layer, dict)]
    counted = Counter((str(layer.get("LayerType", "unknown")), _output_types(layer)) for layer in detailed)
    return EngineLayers(
        names=tuple(str(layer.get("Name")) if isinstance(layer, dict) else str(layer) for layer in layers),
        kinds=tuple(
            LayerKind(operator=operator, outputs=outputs, count=count)
            for (operator, outputs), count in sorted(counted.items(), key=lambda item: (-item[1], item[0]))
        ),
    )


def _output_types(layer: Mapping[str, Any]) -> tuple[str, ...]:
    """The element types of a layer's outputs, each once."""
    words = [
        f"{output.get('Format/Datatype', '')} {output.get('Datatype', '')}"
        for output in layer.get("Outputs", ())
        if isinstance(output, dict)
    ]
    types = (next((name for name, pattern in _TYPES.items() if pattern.search(text)), "") for text in words)
    return tuple(sorted({name for name in types if name}))
