"""OpenVINO IRs as files, with what `save_model` cannot write: float32 nodes in bf16, weights in several files."""

import xml.etree.ElementTree as ElementTree
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sdrt.engines.weight_files import append_weight, weight_files, write_weights
from sdrt.errors import BuildError
from sdrt.runners.mapped_files import joined_offsets

MODEL_NAME = "model.xml"
WEIGHTS_NAME = "model.bin"
# The CPU plugin keeps a node that carries this in float32, also when the inference precision is bf16.
_KEEP_FLOAT32 = {"name": "DisablePrecisionConversion", "version": "0", "value": "dynamic:f16"}
_COMPRESSED = "_compressed"  # what OpenVINO appends to the name of a constant that it stores in float16
_NOT_COMPUTED = ("Parameter", "Const", "Result")


def keep_float32(folder: Path, nodes: Collection[str], exact: Mapping[str, npt.NDArray[np.float32]]) -> None:
    """Mark nodes of the IR in `folder` to be computed in float32, and store their constants (`exact`) whole again.

    BuildError: OpenVINO wrote another kind of IR. OSError: it cannot be written.
    """
    tree = ElementTree.parse(folder / MODEL_NAME)
    compressed = {f"{name}{_COMPRESSED}": value for name, value in exact.items()}
    for layer in tree.iterfind("./layers/layer"):
        name = layer.get("name", "")
        if layer.get("type") == "Const" and name in compressed:
            _store_whole(layer, compressed[name], folder / WEIGHTS_NAME)
        if name not in nodes or layer.get("type") in _NOT_COMPUTED:
            continue
        info = layer.find("rt_info")
        if info is None:
            info = ElementTree.Element("rt_info")
            layer.insert(1 if layer.find("data") is not None else 0, info)
        ElementTree.SubElement(info, "attribute", _KEEP_FLOAT32)
    tree.write(folder / MODEL_NAME, encoding="utf-8", xml_declaration=True)


def divide_weights(folder: Path) -> tuple[str, ...]:
    """Divide the weights of the IR in `folder` as `weight_files` does; returns their files' names, the own ones' first.

    The IR then reads its constants from those files at their `joined_offsets`.
    BuildError: OpenVINO wrote another kind of IR. OSError: it cannot be written.
    """
    tree = ElementTree.parse(folder / MODEL_NAME)
    layers = [layer for layer in tree.iterfind("./layers/layer") if layer.get("type") == "Const"]
    data = [_data(layer) for layer in layers]
    spans = [(int(entry.attrib["offset"]), int(entry.attrib["size"])) for entry in data]
    parts = weight_files([layer.get("name", "").removesuffix(_COMPRESSED) for layer in layers])
    whole = folder / WEIGHTS_NAME
    content = np.memmap(whole, np.uint8, mode="r")
    files, begins = [], []
    for part in parts:
        stored = list(dict.fromkeys(spans[index] for index in part.weights))  # OpenVINO stores equal constants once
        files.append(whole.with_name(f"model{part.suffix}.divided"))
        offsets = write_weights(files[-1], (content[offset : offset + size] for offset, size in stored))
        begins.append(dict(zip(stored, offsets, strict=True)))
    del content  # of a file that is replaced below, which Windows refuses while it is mapped
    *starts, _ = joined_offsets([file.stat().st_size for file in files])
    for part, begin, start in zip(parts, begins, starts, strict=True):
        for index in part.weights:
            data[index].set("offset", str(start + begin[spans[index]]))
    tree.write(folder / MODEL_NAME, encoding="utf-8", xml_declaration=True)
    return tuple(file.replace(file.with_suffix(whole.suffix)).name for file in files)


def _store_whole(layer: ElementTree.Element, value: npt.NDArray[np.float32], weights: Path) -> None:
    """Append a constant to the weights in float32 and point its layer there; the conversion after it does nothing."""
    data, port = _data(layer), layer.find("output/port")
    if port is None:
        raise BuildError(f"OpenVINO wrote {layer.get('name')} without its port", hint="report this with the model")
    with weights.open("ab") as file:
        offset = append_weight(file, value)
    data.attrib |= {"element_type": "f32", "offset": str(offset), "size": str(value.nbytes)}
    port.set("precision", "FP32")


def _data(layer: ElementTree.Element) -> ElementTree.Element:
    data = layer.find("data")
    if data is None:
        raise BuildError(f"OpenVINO wrote {layer.get('name')} without its data", hint="report this with the model")
    return data
