"""Where parity is lost: two graphs of one model evaluated on the same inputs, and the first tensors that part ways."""

import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from sdrt.engines.half.graph import SENTINEL, FloatGraph
from sdrt.engines.onnx_files import external_files, lend_file
from sdrt.engines.onnx_session import run_onnx
from sdrt.parity import max_relative
from sdrt.runners.base import Array

CHUNK_BYTES = 2**30  # of tensors that are evaluated at once, in each of the two graphs
MOST_LOSSES = 8  # reported of a component

_SHAPES_ONLY = ("Shape", "Size")  # what these give does not depend on the values that they are given
_WEIGHTS = (".weight", ".bias")

Evaluate: TypeAlias = Callable[[Sequence[str]], Sequence[Mapping[str, Array]]]
"""The tensors of these names, once for each of the inputs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """How far a tensor is off, relative to its largest magnitude in float32; the worst over all inputs.

    error: infinite where the lower precision gives NaN or infinity.
    """

    error: float
    largest: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """A node that loses parity: its result is beyond the bound, all that it was given is within.

    module: of the checkpoint, by the name of the node's own weights, else of the nearest ones before it.
    error: None where the lower precision gives NaN or infinity. input_error: the worst among the tensors that the node
    reads. largest: magnitude of the result in float32. in_float32: the node itself is not rounded to halves.
    """

    tensor: str
    node: str
    operator: str
    module: str | None
    in_float32: bool
    error: float | None
    input_error: float
    largest: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """What a search found: how many of the tensors it compared, and the losses in graph order."""

    tensors: int
    compared: int
    losses: tuple[Loss, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lineage:
    """The tensors that both graphs have, in graph order, and for each the ones that it is computed from directly."""

    order: tuple[str, ...]
    parents: Mapping[str, frozenset[str]]

    def ancestors(self, tensor: str) -> list[str]:
        """Everything that `tensor` is computed from, in graph order."""
        reached: set[str] = set()
        pending = [tensor]
        while pending:
            for parent in self.parents[pending.pop()] - reached:
                reached.add(parent)
                pending.append(parent)
        return [name for name in self.order if name in reached]

    def descendants(self, tensor: str) -> set[str]:
        """`tensor` and everything that is computed from it."""
        reached = {tensor}
        for name in self.order:
            if not reached.isdisjoint(self.parents[name]):
                reached.add(name)
        return reached


def find_losses(
    graph: FloatGraph,
    lower: onnx.ModelProto,
    evaluate_exact: Evaluate,
    evaluate_lower: Evaluate,
    sizes: Mapping[str, int],
    *,
    bound: float,
    in_float32: Collection[str] = (),
    chunk_bytes: int = CHUNK_BYTES,
) -> Findings:
    """Find the nodes of `graph` at which the lower precision first leaves `bound`, by bisection.

    lower: the same model with other types, its tensors under the same names. sizes: bytes of each tensor over all
    inputs. in_float32: the names of nodes that keep float32 in `lower`.
    What follows a loss without a tensor within the bound between them is beyond it because of the first; a second
    fault there is found once the first is mended. What does not fit into `chunk_bytes` at once is probed evenly, and
    again before the first probe that is beyond the bound. A loss that later tensors hide may be missed then;
    `Findings` tells how many it compared.
    """
    lineage = trace_lineage(graph, {name for node in lower.graph.node for name in node.output})

    def compare(names: Sequence[str]) -> Mapping[str, Difference]:
        exact = evaluate_exact(names)
        return {name: _worst(name, exact, near) for near in [evaluate_lower(names)] for name in names}

    search = _Search(lineage=lineage, compare=compare, sizes=sizes, bound=bound, chunk_bytes=chunk_bytes)
    search.probe(
        lineage.order, beside=[value.name for value in graph.model.graph.output if value.name in lineage.parents]
    )
    found = search.origins()
    losses = [_loss(graph, search, name, in_float32) for name in lineage.order if name in found]
    return Findings(tensors=len(lineage.order), compared=len(search.known), losses=tuple(losses))


def trace_lineage(graph: FloatGraph, others: Collection[str]) -> Lineage:
    """The float32 tensors that nodes of `graph` make and that are also among `others`, but for what is constant."""
    constants = _constants(graph)
    sources: dict[str, frozenset[str]] = {}
    parents: dict[str, frozenset[str]] = {}
    for node in graph.model.graph.node:
        read = () if node.op_type in _SHAPES_ONLY else node.input
        above = frozenset[str]().union(*(sources.get(name, frozenset()) for name in read))
        for name in node.output:
            if name in graph.floats and name in others and name not in constants:
                parents[name] = above
                sources[name] = frozenset((name,))
            else:
                sources[name] = above
    return Lineage(order=tuple(parents), parents=parents)


def difference(exact: Array, lower: Array) -> Difference:
    """Compare two tensors of one name; values that stand for infinity, as masks do, are left out."""
    whole = np.asarray(exact, np.float32)
    near = np.asarray(lower, np.float32)
    if whole.shape != near.shape:
        return Difference(error=float("inf"), largest=float(np.abs(whole).max(initial=0.0)))
    counts = np.abs(whole) < SENTINEL
    whole, near = (np.where(counts, array, np.float32(0)) for array in (whole, near))
    return Difference(error=max_relative(near, whole), largest=float(np.abs(whole).max(initial=0.0)))


def module_of(graph: FloatGraph, node: onnx.NodeProto) -> str | None:
    """The checkpoint's module that a node belongs to, as far as the names of weights tell; see `Loss`."""
    constants = _constants(graph)
    seen: set[str] = set()
    level = [node]
    while level:
        for each in level:
            if (module := _own_module(graph, each, constants)) is not None:
                return module
        names = list(dict.fromkeys(name for each in level for name in each.input if name not in seen))
        seen.update(names)
        level = [graph.producers[name] for name in names if name in graph.producers]
    return None


def cut_graph(model: onnx.ModelProto, names: Collection[str]) -> onnx.ModelProto:
    """The part of a model that makes the float32 tensors `names`, which become its outputs.

    What is computed of weights alone stands just before its first reader, so that it is not held from the beginning.
    """
    wanted = set(names)
    nodes = []
    for node in reversed(model.graph.node):
        if not wanted.isdisjoint(node.output):
            wanted.update(node.input)
            nodes.append(node)
    cut = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions)
    weights = {weight.name for weight in model.graph.initializer}
    cut.graph.name = model.graph.name or "cut"
    cut.graph.node.extend(_delayed(nodes[::-1], weights))
    cut.graph.initializer.extend(weight for weight in model.graph.initializer if weight.name in wanted)
    cut.graph.input.extend(value for value in model.graph.input if value.name in wanted or value.name not in weights)
    cut.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names)
    return cut


def onnx_evaluator(
    model: onnx.ModelProto, source: Path, feeds: Sequence[Mapping[str, Array]], work: Path, *, threads: int | None
) -> Evaluate:
    """Evaluate a model, whose weights lie beside the file `source`, in ONNX Runtime as it is written, without fusing.

    work: an existing folder with room for graphs. What it raises: BuildError, BackendError as `run_onnx` does.
    """

    def evaluate(names: Sequence[str]) -> list[dict[str, Array]]:
        return _run(cut_graph(model, names), names, source, feeds, work, threads)

    return evaluate


def measure_sizes(
    graph: FloatGraph, source: Path, feeds: Sequence[Mapping[str, Array]], work: Path, *, threads: int | None
) -> dict[str, int]:
    """Bytes of every float32 tensor that a node makes, over all of `feeds`; none of them is held."""
    names = [name for node in graph.model.graph.node for name in node.output if name in graph.floats]
    outputs = {name: f"sized.{index}" for index, name in enumerate(names)}
    counted = cut_graph(graph.model, names)
    nodes = list(counted.graph.node)
    del counted.graph.node[:], counted.graph.output[:]
    for node in nodes:
        counted.graph.node.append(node)
        sized = [name for name in node.output if name in outputs]
        counted.graph.node.extend(helper.make_node("Size", [name], [outputs[name]]) for name in sized)
    counted.graph.output.extend(
        helper.make_tensor_value_info(output, TensorProto.INT64, []) for output in outputs.values()
    )
    runs = _run(counted, list(outputs.values()), source, feeds, work, threads)
    return {name: sum(int(run[output]) for run in runs) * 4 for name, output in outputs.items()}


@dataclass(slots=True, kw_only=True)
class _Search:
    """A bisection under way. known: what was compared so far."""

    lineage: Lineage
    compare: Callable[[Sequence[str]], Mapping[str, Difference]]
    sizes: Mapping[str, int]
    bound: float
    chunk_bytes: int
    known: dict[str, Difference] = field(default_factory=dict)

    def origins(self) -> list[str]:
        """Tensors beyond the bound whose parents are all within it, as far as probes tell; at most `MOST_LOSSES`."""
        found: list[str] = []
        while len(found) < MOST_LOSSES:
            target = self._unexplained(found)
            if target is None and found:
                self.probe(self._beside(found))
                target = self._unexplained(found)
            if target is None:
                break
            found.append(self._origin(target))
        return found

    def measure(self, names: Iterable[str]) -> None:
        """Compare all of these, in as many chunks as their sizes ask for."""
        left = [name for name in names if name not in self.known]
        while left:
            chunk = left[:1]
            room = self.chunk_bytes - self._bytes(chunk)
            for name in left[1:]:
                room -= self._bytes([name])
                if room < 0:
                    break
                chunk.append(name)
            self.known |= self.compare(chunk)
            left = left[len(chunk) :]

    def probe(self, names: Sequence[str], *, beside: Sequence[str] = ()) -> None:
        """Compare as many of these as one chunk holds, spread evenly, the last always among them; `beside` them all."""
        left = [name for name in names if name not in self.known]
        count = len(left)
        chosen = _spread(left, count)
        while count > 1 and self._bytes(chosen) > self.chunk_bytes:
            count //= 2
            chosen = _spread(left, count)
        self.measure(dict.fromkeys((*beside, *chosen)))

    def _unexplained(self, found: Sequence[str]) -> str | None:
        """The first tensor beyond the bound that no other one is the reason of."""
        lost = (name for name in self.lineage.order if self._is_lost(name) and name not in found)
        return next((name for name in lost if not self._is_explained(name)), None)

    def _is_explained(self, tensor: str) -> bool:
        """Whether a tensor beyond the bound leads to this one without any between them that is within."""
        seen: set[str] = set()
        pending = [tensor]
        while pending:
            for parent in self.lineage.parents[pending.pop()] - seen:
                if self._is_lost(parent):
                    return True
                seen.add(parent)
                if parent not in self.known:
                    pending.append(parent)
        return False

    def _origin(self, target: str) -> str:
        """Where the loss began of which `target` is a result: the parents of that tensor are all within the bound."""
        while True:
            gap = self._gap(target)
            if gap:
                self.probe(gap)
                nearer = gap
            else:
                nearer = sorted(self.lineage.parents[target], key=self.lineage.order.index)
                self.measure(nearer)
            earlier = next((name for name in nearer if self._is_lost(name)), None)
            if earlier is None and not gap:
                return target
            target = earlier or target

    def _beside(self, found: Iterable[str]) -> list[str]:
        """What does not depend on any of `found`."""
        downstream = set().union(*(self.lineage.descendants(name) for name in found))
        return [name for name in self.lineage.order if name not in downstream]

    def _gap(self, target: str) -> list[str]:
        """The ancestors of `target` between the last one that is known to be within the bound and itself."""
        gap: list[str] = []
        for name in self.lineage.ancestors(target):
            if name not in self.known:
                gap.append(name)
            elif not self._is_lost(name):
                gap.clear()
        return gap

    def _is_lost(self, name: str) -> bool:
        return name in self.known and not self.known[name].error <= self.bound

    def _bytes(self, names: Sequence[str]) -> int:
        return sum(self.sizes.get(name, 0) for name in names)


def _spread(names: Sequence[str], count: int) -> list[str]:
    return [names[(index + 1) * len(names) // count - 1] for index in range(count)]


def _worst(name: str, exact: Sequence[Mapping[str, Array]], lower: Sequence[Mapping[str, Array]]) -> Difference:
    each = [difference(one[name], other[name]) for one, other in zip(exact, lower, strict=True)]
    return Difference(error=max(item.error for item in each), largest=max(item.largest for item in each))


def _constants(graph: FloatGraph) -> set[str]:
    """The weights, and what is computed from weights alone, such as their transposes."""
    constants = set(graph.weights)
    for node in graph.model.graph.node:
        if constants.issuperset(filter(None, node.input)):
            constants.update(node.output)
    return constants


def _delayed(nodes: Sequence[onnx.NodeProto], weights: AbstractSet[str]) -> Iterator[onnx.NodeProto]:
    waiting = {node.output[0]: node for node in nodes if len(node.output) == 1 and weights >= set(node.input)}
    for node in nodes:
        if node.output[0] in waiting:
            continue
        for name in node.input:
            if name in waiting:
                yield waiting.pop(name)
        yield node
    yield from waiting.values()


def _own_module(graph: FloatGraph, node: onnx.NodeProto, constants: Collection[str]) -> str | None:
    pending = [name for name in node.input if name in constants]
    while pending:
        name = pending.pop()
        if name in graph.producers:
            pending.extend(graph.producers[name].input)
        elif name.endswith(_WEIGHTS):
            return str(name.rpartition(".")[0])
    return None


def _loss(graph: FloatGraph, search: _Search, tensor: str, in_float32: Collection[str]) -> Loss:
    node = graph.producers[tensor]
    error = search.known[tensor].error
    return Loss(
        tensor=tensor,
        node=node.name,
        operator=node.op_type,
        module=module_of(graph, node),
        in_float32=node.name in in_float32,
        error=error if np.isfinite(error) else None,
        input_error=max((search.known[name].error for name in search.lineage.parents[tensor]), default=0.0),
        largest=search.known[tensor].largest,
    )


def _run(
    model: onnx.ModelProto,
    names: Sequence[str],
    source: Path,
    feeds: Sequence[Mapping[str, Array]],
    work: Path,
    threads: int | None,
) -> list[dict[str, npt.NDArray[np.generic]]]:
    """Run a model whose weights lie beside `source`; they are lent for as long as it takes."""
    with tempfile.TemporaryDirectory(dir=work, prefix=".cut.") as folder:
        path = Path(folder) / source.name
        for file in external_files(model, source):
            target = path.parent / file.relative_to(source.parent)
            target.parent.mkdir(parents=True, exist_ok=True)
            lend_file(file, target)
        onnx.save(model, path)
        return run_onnx(path, feeds, names=names, threads=threads, optimised=False, in_file_order=True)
