"""A component's float32 ONNX in, its mixed FP16 ONNX and the account of it out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sdrt.bundle import MeasuredIsland
from sdrt.engines.half.calibration import calibrate
from sdrt.engines.half.graph import read_float_graph, write_half
from sdrt.engines.half.rules import kept_by_rule
from sdrt.engines.onnx_files import load_graph
from sdrt.runners.base import Array

CONVERTER_VERSION = 1  # part of every cache key: raise it with any change to the mixed graph or its emulation


@dataclass(frozen=True, slots=True, kw_only=True)
class HalfReport:
    """What a mixed graph keeps in float32: nodes by rule, each with its reason, and nodes as measured.

    nodes: how many the component has in all.
    """

    nodes: int
    by_rule: Mapping[str, str]
    findings: tuple[MeasuredIsland, ...]


def convert_to_half(
    source: Path,
    target: Path,
    feeds: Sequence[Mapping[str, Array]],
    *,
    upcast_attention: bool = False,
    force_upcast: bool = False,
    threads: int | None = None,
) -> HalfReport:
    """Write the mixed graph of the model at `source` to `target`, in another folder, with its weights beside it.

    feeds: inputs to calibrate with. upcast_attention: see `kept_by_rule`. force_upcast: keep the whole model in float32
    if one node has to; diffusers writes this into the config of every VAE, also of those that halves do no harm.
    BuildError: the model cannot be converted, or is not finite in float32 already.
    """
    graph = read_float_graph(load_graph(source))
    by_rule = kept_by_rule(graph, upcast_attention=upcast_attention)
    findings = tuple(calibrate(graph, by_rule, source, feeds, target.parent, threads=threads))
    if force_upcast and findings:
        by_rule = {node.name: "force_upcast" for node in graph.model.graph.node} | by_rule
    write_half(graph, {*by_rule, *(finding.node for finding in findings)}, source, target)
    return HalfReport(nodes=len(graph.model.graph.node), by_rule=by_rule, findings=findings)
