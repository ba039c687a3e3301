"""`python -m sdrt.engines.bisect_stage BUNDLE ONNX_FOLDER WORK`: where a bundle's components lose parity.

A child process that speaks the worker protocol; its result is {"components": [a `ComponentFindings` each]}.
"""

import argparse
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from sdrt.bundle import Bundle, JsonValue, ModelRecord, TinyVaeRecord
from sdrt.cache import Store
from sdrt.engines.base import ComponentSource
from sdrt.engines.bisect import Findings, find_losses, measure_sizes, onnx_evaluator
from sdrt.engines.bisect_tensorrt import EngineHost, find_engine_host, tensorrt_evaluator
from sdrt.engines.build import component_source
from sdrt.engines.components import place_composed
from sdrt.engines.half.graph import read_float_graph
from sdrt.engines.halves import MixedGraph, calibration_feeds, make_mixed_graph
from sdrt.engines.memory import check_memory
from sdrt.engines.onnx_files import external_files, load_graph
from sdrt.engines.onnx_folder import OnnxFolder, read_onnx_folder
from sdrt.engines.reference import golden_inputs
from sdrt.errors import CheckpointError, RequestError
from sdrt.progress import Progress
from sdrt.runners.base import TINY_VAE_DECODER, Array
from sdrt.worker import serve

EMULATION = "CPU emulation"


@dataclass(frozen=True, slots=True, kw_only=True)
class ComponentFindings:
    """What was found in one component. evaluated_on: what stood for the bundle's engine. bound: what counts as lost."""

    component: str
    evaluated_on: str
    bound: float
    findings: Findings


def bisect_bundle(
    bundle: Bundle, onnx_folder: Path, work: Path, *, bound: float | None, threads: int | None, progress: Progress
) -> list[ComponentFindings]:
    """Compare every component of an FP16 bundle with its float32 graph, on the inputs that it was calibrated with.

    onnx_folder: the model that the bundle was built from. work: an existing folder with room for its graphs.
    bound: the relative error that counts as lost; None is what the seal allows each component.
    RequestError: the bundle is not FP16. CheckpointError: the model is another one. BuildError: a graph is damaged.
    """
    manifest = bundle.manifest
    if manifest.precision != "fp16":
        raise RequestError(f"{bundle.path} is {manifest.precision}: FP16 graphs are compared", hint="build one in fp16")
    folder = read_onnx_folder(onnx_folder)
    check_same_model(bundle, folder)
    host = find_engine_host(manifest.backend)
    inputs = golden_inputs(folder, manifest.profile)
    found: list[ComponentFindings] = []
    if manifest.model.tiny_vae is not None and folder.model.tiny_vae is None:
        warnings.warn(f"the model was named without its tiny VAE: {TINY_VAE_DECODER} is not compared", stacklevel=2)
    halves = [component for component in manifest.components if component.name in inputs]  # those of the model
    for done, component in enumerate(halves):
        progress(f"bisecting {component.name}", done, len(halves))
        source = replace(component_source(component.name, folder, manifest.profile), state_slots=manifest.state_slots)
        with tempfile.TemporaryDirectory(dir=work, prefix=".bisect.") as room:
            mixed = make_mixed_graph(source, folder, inputs[component.name], Path(room), Store(), threads=threads)
            if component.islands not in (None, mixed.islands):
                warnings.warn(
                    f"{component.name} of {bundle.path} keeps other nodes in float32 than this sdrt would: "
                    "what is compared is the graph of a build today",
                    stacklevel=2,
                )
            limit = component.parity.bound if bound is None else bound
            found.extend(_bisect_component(source, mixed, inputs[component.name], Path(room), host, limit, threads))
    progress("bisecting", len(halves), len(halves))
    return found


def check_same_model(bundle: Bundle, folder: OnnxFolder) -> None:
    """CheckpointError unless `folder` is the model that the bundle was built from, and a tiny VAE in both is one."""
    built, given = bundle.manifest.model, folder.model
    _check_identity(bundle, "model", built, given)
    if built.tiny_vae is not None and given.tiny_vae is not None:
        _check_identity(bundle, "tiny VAE", built.tiny_vae, given.tiny_vae)


def _check_identity(
    bundle: Bundle, what: str, built: ModelRecord | TinyVaeRecord, given: ModelRecord | TinyVaeRecord
) -> None:
    if built.identity != given.identity:
        raise CheckpointError(
            f"the {what} is not the one this bundle was built from: it is {given.name} ({given.identity[:12]}), "
            f"the bundle was built from {built.name} ({built.identity[:12]})",
            hint=f"name the checkpoint or ONNX folder that {bundle.path} was built from, unchanged",
        )


def _bisect_component(
    source: ComponentSource,
    mixed: MixedGraph,
    inputs: Mapping[str, Array],
    work: Path,
    host: EngineHost | None,
    bound: float,
    threads: int | None,
) -> list[ComponentFindings]:
    """By the emulation, and by TensorRT where there is a GPU."""
    composed = work / "composed"
    composed.mkdir()
    path = place_composed(source, composed)
    graph = read_float_graph(load_graph(path))
    check_memory(f"bisecting {source.name}", sum(file.stat().st_size for file in external_files(graph.model, path)))
    feeds = calibration_feeds(source, inputs)
    exact = onnx_evaluator(graph.model, path, feeds, work, threads=threads)
    sizes = measure_sizes(graph, path, feeds, work, threads=threads)
    kept = {*mixed.report.by_rule, *(island.node for island in mixed.report.findings)}
    emulated, half = mixed.emulated.onnx_path, mixed.source.onnx_path
    model = load_graph(emulated)
    lowers = {EMULATION: (model, onnx_evaluator(model, emulated, feeds, work, threads=threads))}
    if host is not None:
        evaluate = tensorrt_evaluator(half, feeds, host.library)
        lowers[f"{host.library} on {host.device}"] = (load_graph(half), evaluate)
    return [
        ComponentFindings(
            component=source.name,
            evaluated_on=name,
            bound=bound,
            findings=find_losses(graph, lower, exact, evaluate, sizes, bound=bound, in_float32=kept),
        )
        for name, (lower, evaluate) in lowers.items()
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the arguments and speak the worker protocol."""
    parser = argparse.ArgumentParser(prog="python -m sdrt.engines.bisect_stage", description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("onnx_folder", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--bound", type=float, default=None)
    parser.add_argument("--threads", type=int, default=None)
    parsed = parser.parse_args(arguments)

    def run(progress: Progress) -> JsonValue:
        found = bisect_bundle(
            Bundle.open(parsed.bundle),
            parsed.onnx_folder,
            parsed.work,
            bound=parsed.bound,
            threads=parsed.threads,
            progress=progress,
        )
        return {"components": msgspec.to_builtins(found)}

    return serve(run)


if __name__ == "__main__":
    sys.exit(main())
