"""ONNX models as files: reading a graph without its weights, and finding, checking and placing the weights' files."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import numpy.typing as npt
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from sdrt.engines.weight_files import weight_files, write_weights
from sdrt.errors import BuildError

MODEL_NAME = "model.onnx"


def load_graph(path: Path) -> onnx.ModelProto:
    """The model at `path`, with its external weights left on disk. BuildError: not there, not ONNX."""
    try:
        model = onnx.load(os.fspath(path), load_external_data=False)
    except FileNotFoundError:
        raise BuildError(f"{path} does not exist", hint="export the checkpoint again") from None
    except (DecodeError, OSError) as error:
        raise BuildError(f"{path} is not a readable ONNX file: {error}", hint="export the checkpoint again") from error
    if not model.graph.node:
        raise BuildError(f"{path} holds no graph", hint="export the checkpoint again")
    return model


def default_opset(model: onnx.ModelProto) -> int:
    """The version of ONNX's own operators that the model is written in; 0 where it does not say."""
    return next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)


def load_whole(path: Path) -> onnx.ModelProto:
    """The model at `path` with all of its weights in memory. BuildError: as `load_graph` and `external_files`.

    onnx's own loader refuses weights that have a second hard link, such as those in a build cache.
    """
    model = load_graph(path)
    external_files(model, path)
    for tensor in _external_tensors(model.graph):
        tensor.raw_data = weight_array(tensor, path).tobytes()
        tensor.data_location = onnx.TensorProto.DEFAULT
        del tensor.external_data[:]
    return model


def external_files(model: onnx.ModelProto, path: Path) -> tuple[Path, ...]:
    """The files beside `path` that hold the model's weights, each once.

    BuildError: a weight's file is missing, too short, or outside the model's folder.
    """
    ends: dict[str, int] = {}
    for tensor in _external_tensors(model.graph):
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        end = _count(entries.get("offset", "0"), tensor.name) + _count(entries.get("length", "0"), tensor.name)
        ends[location] = max(end, ends.get(location, 0))
    return tuple(_checked_file(location, path, end) for location, end in sorted(ends.items()))


def weight_array(tensor: onnx.TensorProto, path: Path) -> npt.NDArray[np.generic]:
    """The value of a weight of the model at `path`; one in a file of its own is mapped, not read."""
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return onnx.numpy_helper.to_array(tensor)
    entries = {entry.key: entry.value for entry in tensor.external_data}
    file = _checked_file(entries.get("location", ""), path, 0)
    dtype, offset = (
        onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type),
        _count(entries.get("offset", "0"), tensor.name),
    )
    return np.memmap(file, dtype, mode="r", offset=offset, shape=tuple(tensor.dims))


def place_external(tensor: onnx.TensorProto, location: str, offset: int, length: int) -> None:
    """Say where a weight's bytes lie: in the file `location` beside the model. It holds none itself any more."""
    tensor.ClearField("raw_data")
    del tensor.external_data[:]
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)


def write_divided(source: Path, folder: Path) -> tuple[str, ...]:
    """Write the model at `source` into `folder` with its external weights divided as `weight_files` does.

    Returns the names of the files, the model first. BuildError: as `load_graph` and `external_files`.
    """
    model = load_graph(source)
    external_files(model, source)
    tensors = list(_external_tensors(model.graph))
    names = [MODEL_NAME]
    for part in weight_files([tensor.name for tensor in tensors]):
        arrays = [weight_array(tensors[index], source) for index in part.weights]
        location = f"{MODEL_NAME}{part.suffix}.data"
        offsets = write_weights(folder / location, arrays)
        for index, offset, array in zip(part.weights, offsets, arrays, strict=True):
            place_external(tensors[index], location, offset, array.nbytes)
        names.append(location)
    onnx.save(model, folder / MODEL_NAME)
    return tuple(names)


def place_file(source: Path, target: Path) -> None:
    """A real file `target` with the content of `source`, which may be a link."""
    shutil.copyfile(source, target)


def lend_file(source: Path, target: Path) -> None:
    """Make `source` readable as `target` for a moment: no copy where the file system can link."""
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or one without hard links
        place_file(source, target)


def _external_tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    for tensor in _tensors(graph):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            yield tensor


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _tensors(inner)


def _count(text: str, tensor: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise BuildError(f"the weight {tensor} lies at {text!r} of its file", hint="export the checkpoint again")
    return int(text)


def _checked_file(location: str, path: Path, end: int) -> Path:
    parts = PurePosixPath(location).parts
    escapes = ".." in parts or location.startswith("/") or "\\" in location or "\0" in location
    if not parts or escapes or PureWindowsPath(location).drive:
        raise BuildError(
            f"{path.name} places weights at {location!r}, outside its folder",
            hint="do not use this file unless you know who made it",
        )
    file = path.parent.joinpath(*parts)
    if not any(file.resolve().is_relative_to(root) for root in _allowed_roots(path.parent)):
        raise BuildError(
            f"{file} is a link to {file.resolve()}, outside the model's folder",
            hint="put the file itself there",
        )
    if not file.is_file():
        raise BuildError(f"{file} does not exist", hint="copy the weights' file along with the model, or export again")
    if file.stat().st_size < end:
        raise BuildError(
            f"{file} is {file.stat().st_size} bytes, but its model needs {end}",
            hint="the file was cut short: copy it again, or export the checkpoint again",
        )
    return file


def _allowed_roots(folder: Path) -> tuple[Path, ...]:
    """The folder itself and, in a Hugging Face cache, the store that its snapshots link to."""
    stores = [parent.parent / "blobs" for parent in folder.absolute().parents if parent.name == "snapshots"]
    return (folder.resolve(), *(store.resolve() for store in stores))
