"""Which nodes keep float32 by rule: where halves are known to lose the image, whatever the weights."""

from collections.abc import Iterator

import onnx

from sdrt.engines.half.graph import FloatGraph
from sdrt.engines.step_graph import PREFIX, TIMESTEP

_PERIODIC = ("Sin", "Cos")
_STATISTICS = ("InstanceNormalization", "GroupNormalization", "LayerNormalization", "ReduceMean", "ReduceSumSquare")
_ELEMENTWISE = ("Add", "Sub", "Mul", "Div", "Where", "Max", "Min", "Reshape", "Transpose", "Cast")


def kept_by_rule(graph: FloatGraph, *, upcast_attention: bool) -> dict[str, str]:
    """The names of the nodes to keep in float32, each with the reason.

    - the step graph's own nodes: latents and the sampler's coefficients are float32;
    - the timestep up to its sinusoids: their phases reach hundreds of radians, where halves are 0.25 apart;
    - statistics of normalisations: sums of thousands of squares;
    - with `upcast_attention`, as checkpoints of Stable Diffusion 2.1 ask for: the attention scores and their softmax.
    """
    nodes = graph.model.graph.node
    kept = {node.name: "statistics" for node in nodes if node.op_type in _STATISTICS}
    if upcast_attention:
        softmaxes = [node for node in nodes if node.op_type == "Softmax"]
        kept |= {name: "upcast_attention" for softmax in softmaxes for name in _scores(graph, softmax)}
    kept |= dict.fromkeys(_timestep_nodes(graph), "timestep")
    return kept | {node.name: "step graph" for node in nodes if node.name.startswith(PREFIX)}


def _scores(graph: FloatGraph, softmax: onnx.NodeProto) -> Iterator[str]:
    """The softmax, the product of queries and keys that it reads, and what lies between them."""
    yield softmax.name
    pending = [softmax.input[0]]
    while pending:
        producer = graph.producers.get(pending.pop())
        if producer is None:
            continue
        if producer.op_type == "MatMul":
            yield producer.name
        elif producer.op_type in _ELEMENTWISE:
            yield producer.name
            pending.extend(name for name in producer.input if name in graph.floats)


def _timestep_nodes(graph: FloatGraph) -> set[str]:
    """The nodes on a way from the timestep to a sinusoid."""
    reached = _readers(graph, TIMESTEP)
    wanted: set[str] = set()
    for node in reversed(graph.model.graph.node):
        users = {user.name for name in node.output for user in graph.consumers.get(name, ())}
        if node.name in reached and (node.op_type in _PERIODIC or users & wanted):
            wanted.add(node.name)
    return wanted


def _readers(graph: FloatGraph, tensor: str) -> set[str]:
    """The nodes that depend on `tensor`."""
    reached: set[str] = set()
    pending = [tensor]
    while pending:
        for node in graph.consumers.get(pending.pop(), ()):
            if node.name not in reached:
                reached.add(node.name)
                pending.extend(node.output)
    return reached
