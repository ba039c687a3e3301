"""Bisection: the node at which halves lose parity is the one that is named, whatever lies around it."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sdrt.bundle import Bundle, write_manifest
from sdrt.cli import run_command
from sdrt.engines import bisect_stage
from sdrt.engines.bisect import (
    MOST_LOSSES,
    cut_graph,
    difference,
    find_losses,
    measure_sizes,
    module_of,
    onnx_evaluator,
    trace_lineage,
)
from sdrt.engines.bisect_stage import EMULATION, bisect_bundle
from sdrt.engines.bisect_tensorrt import EngineHost, find_engine_host
from sdrt.engines.build import BuildOptions, build_bundle
from sdrt.engines.half.emulation import emulate_half
from sdrt.engines.half.graph import SENTINEL, read_float_graph, write_half
from sdrt.engines.onnx_files import load_graph, load_whole
from sdrt.errors import BuildError, CheckpointError, RequestError
from sdrt.progress import silent

BOUND = 1e-2
HEALTHY = [("scale", "Mul", ("x", "half"), ("a",)), ("shift", "Add", ("a", "x"), ("y",))]
# 1000 + x − 1000: halves near 1000 are 1/2 apart.
CANCELLING = [("lift", "Add", ("x", "thousand"), ("a",)), ("cancel", "Sub", ("a", "thousand"), ("y",))]
OVERFLOWING = [("up", "Mul", ("x", "huge"), ("a",)), ("down", "Div", ("a", "huge"), ("y",))]
WEIGHTS = {"half": [0.5], "thousand": [1000.0], "huge": [60000.0]}
X = np.array([0.71, 1.23, 1.87, 2.6], np.float32)


def save_graph(folder, nodes, weights=WEIGHTS, *, outputs=("y",)):
    """A float32 model of a few nodes on x [4]; weights are name → values."""
    read = {name for _, _, take, _ in nodes for name in take}
    graph = helper.make_graph(
        [helper.make_node(operator, list(take), list(give), name=name) for name, operator, take, give in nodes],
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None]) for name in outputs],
        [numpy_helper.from_array(np.array(value, np.float32), name) for name, value in weights.items() if name in read],
    )
    path = folder / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def chain(source, target, prefix, *, count=60):
    """A long way from one tensor to another, on which nothing is lost."""
    names = [source, *(f"{prefix}{index}" for index in range(count - 1)), target]
    return [(f"{prefix}_{index}", "Neg", (names[index],), (names[index + 1],)) for index in range(count)]


@pytest.fixture
def bisect(tmp_path):
    """Bisect a graph against itself in halves, and note which tensors were evaluated together."""

    def bisect(nodes, *, kept=(), bound=BOUND, chunk_bytes=2**30, feeds=({"x": X},), **options):
        source = save_graph(tmp_path, nodes, **options)
        graph = read_float_graph(load_graph(source))
        write_half(graph, kept, source, tmp_path / "half.onnx")
        emulate_half(tmp_path / "half.onnx", tmp_path / "emulated.onnx")
        lower = load_graph(tmp_path / "emulated.onnx")
        exact = onnx_evaluator(graph.model, source, feeds, tmp_path, threads=1)

        def noted(names):
            bisect.chunks.append(list(names))
            return exact(names)

        return find_losses(
            graph,
            lower,
            noted,
            onnx_evaluator(lower, tmp_path / "emulated.onnx", feeds, tmp_path, threads=1),
            measure_sizes(graph, source, feeds, tmp_path, threads=1),
            bound=bound,
            in_float32=kept,
            chunk_bytes=chunk_bytes,
        )

    bisect.chunks = []
    return bisect


def nodes_of(findings):
    return [loss.node for loss in findings.losses]


class TestFinding:
    def test_a_healthy_graph_has_no_losses_and_all_of_it_was_compared(self, bisect):
        findings = bisect(HEALTHY)
        assert findings.losses == ()
        assert findings.compared == findings.tensors == 2

    def test_a_difference_of_nearly_equal_values_is_named_with_its_numbers(self, bisect):
        (loss,) = bisect(CANCELLING).losses
        assert (loss.tensor, loss.node, loss.operator, loss.in_float32) == ("y", "cancel", "Sub", False)
        assert loss.input_error < BOUND < loss.error < 0.1
        assert loss.largest == pytest.approx(2.6, abs=1e-3)

    def test_an_overflow_is_a_loss_without_an_error_that_a_number_could_state(self, bisect):
        (loss,) = bisect(OVERFLOWING).losses
        assert (loss.node, loss.error) == ("up", None)
        assert loss.largest == pytest.approx(2.6 * 60000)

    def test_a_node_in_float32_that_makes_its_inputs_rounding_large_is_told_as_such(self, bisect):
        (loss,) = bisect(CANCELLING, kept={"cancel"}).losses
        assert (loss.node, loss.in_float32) == ("cancel", True)

    def test_a_mended_node_is_no_longer_found(self, bisect):
        assert bisect(CANCELLING, kept={"lift", "cancel"}).losses == ()

    def test_the_bound_decides(self, bisect):
        assert nodes_of(bisect(HEALTHY, bound=1e-9)) == ["scale"]
        assert bisect(CANCELLING, bound=0.1).losses == ()

    def test_the_worst_of_several_inputs_counts(self, bisect):
        assert bisect(OVERFLOWING, feeds=({"x": X / 1000},)).losses == ()
        assert nodes_of(bisect(OVERFLOWING, feeds=({"x": X / 1000}, {"x": X}))) == ["up"]

    def test_a_fault_behind_a_fault_waits_until_the_first_is_mended(self, bisect):
        second = [("scale", "Mul", ("y", "half"), ("b",)), ("up", "Mul", ("b", "huge"), ("z",))]
        assert nodes_of(bisect(CANCELLING + second, outputs=("z",))) == ["cancel"]
        mended = {"lift", "cancel"}
        assert nodes_of(bisect(CANCELLING + second, outputs=("z",), kept=mended)) == ["up"]

    def test_a_fault_behind_one_that_was_made_up_for_is_found_too(self, bisect):
        hidden = [*CANCELLING, ("hide", "Mul", ("y", "tiny"), ("b",)), ("add", "Add", ("b", "x"), ("c",))]
        second = [("lift2", "Add", ("c", "thousand"), ("d",)), ("cancel2", "Sub", ("d", "thousand"), ("z",))]
        found = bisect(hidden + second, weights=WEIGHTS | {"tiny": [1e-4]}, outputs=("z",))
        assert nodes_of(found) == ["cancel", "cancel2"]

    def test_faults_on_branches_of_their_own_are_all_found_in_graph_order(self, bisect):
        other = [("up", "Mul", ("x", "huge"), ("b",)), ("down", "Div", ("b", "huge"), ("c",))]
        joined = [*CANCELLING[:1], *other, *CANCELLING[1:], ("join", "Add", ("y", "c"), ("z",))]
        assert nodes_of(bisect(joined, outputs=("z",))) == ["up", "cancel"]

    def test_no_more_than_a_handful_are_reported(self, bisect):
        branches = [(f"up{index}", "Mul", ("x", "huge"), (f"a{index}",)) for index in range(MOST_LOSSES + 2)]
        found = bisect(branches, outputs=tuple(f"a{index}" for index in range(MOST_LOSSES + 2)))
        assert len(found.losses) == MOST_LOSSES


LONG = [
    *chain("x", "before", "p"),
    ("lift", "Add", ("before", "thousand"), ("a",)),
    *CANCELLING[1:],
    *chain("y", "z", "q"),
]


class TestBisecting:
    """With room for few tensors at a time: a tensor of this graph is 16 bytes."""

    @pytest.mark.parametrize("at_once", [1, 2, 8, 1000])
    def test_long_ways_before_and_after_the_fault_do_not_confuse_it(self, bisect, at_once):
        findings = bisect(LONG, outputs=("z",), chunk_bytes=16 * at_once)
        assert nodes_of(findings) == ["cancel"]
        assert max(len(chunk) for chunk in bisect.chunks) <= at_once

    def test_only_a_part_of_a_long_graph_is_compared(self, bisect):
        findings = bisect(LONG, outputs=("z",), chunk_bytes=16 * 8)
        assert findings.tensors == 122
        assert findings.compared < 40

    def test_the_sizes_of_all_inputs_count(self, bisect):
        bisect(LONG, outputs=("z",), chunk_bytes=16 * 8, feeds=({"x": X}, {"x": -X}))
        assert max(len(chunk) for chunk in bisect.chunks) <= 4

    def test_a_tensor_that_is_larger_than_the_room_is_evaluated_alone(self, bisect):
        assert nodes_of(bisect(CANCELLING, chunk_bytes=1)) == ["cancel"]
        assert {len(chunk) for chunk in bisect.chunks} == {1}

    def test_a_branch_that_is_within_the_bound_does_not_hide_one_that_is_not(self, bisect):
        """In graph order the healthy branch lies between the fault and the output."""
        faulty = [*CANCELLING, *chain("y", "u", "q", count=20)]
        healthy = chain("x", "v", "r", count=90)
        findings = bisect([*faulty, *healthy, ("join", "Add", ("u", "v"), ("z",))], outputs=("z",), chunk_bytes=16 * 4)
        assert nodes_of(findings) == ["cancel"]

    def test_a_fault_beside_one_that_explains_the_result_is_sought_too(self, bisect):
        graph = [("up", "Mul", ("x", "huge"), ("v",)), *CANCELLING, *chain("y", "u", "q"), ("join", "Add", "uv", "z")]
        assert nodes_of(bisect(graph, outputs=("z",), chunk_bytes=16 * 2)) == ["up", "cancel"]

    def test_many_results_are_compared_a_few_at_a_time(self, bisect):
        bisect(
            [(f"n{index}", "Neg", ("x",), (f"a{index}",)) for index in range(9)],
            outputs=[f"a{i}" for i in range(9)],
            chunk_bytes=16 * 2,
        )
        assert sorted(map(len, bisect.chunks)) == [1, 2, 2, 2, 2]

    def test_what_later_tensors_hide_may_be_missed_and_the_count_says_so(self, bisect):
        hidden = [*CANCELLING, ("hide", "Mul", ("y", "tiny"), ("b",)), ("end", "Add", ("b", "x"), ("c",))]
        graph = [*hidden, *chain("c", "z", "q")]
        weights = WEIGHTS | {"tiny": [1e-4]}
        few = bisect(graph, weights=weights, outputs=("z",), chunk_bytes=16 * 2)
        assert (few.losses, few.compared < few.tensors) == ((), True)
        assert nodes_of(bisect(graph, weights=weights, outputs=("z",))) == ["cancel"]


class TestParts:
    def test_values_that_stand_for_infinity_are_not_compared(self):
        mask = np.array([-np.inf, np.finfo(np.float32).min, 2.0, SENTINEL], np.float32)
        found = difference(mask, np.array([-65504, -65504, 2.5, 65504], np.float16))
        assert (found.error, found.largest) == (0.25, 2.0)

    @pytest.mark.parametrize("wrong", [np.nan, np.inf])
    def test_what_is_not_finite_is_infinitely_far(self, wrong):
        assert difference(np.ones(2, np.float32), np.array([1, wrong], np.float32)).error == np.inf

    def test_another_shape_is_infinitely_far(self):
        assert difference(np.ones(2, np.float32), np.ones(3, np.float32)).error == np.inf

    def test_shapes_and_weights_have_no_part_in_a_lineage(self, tmp_path):
        nodes = [
            ("before", "Neg", ("x",), ("n",)),
            ("size", "Shape", ("n",), ("s",)),
            ("turn", "Neg", ("half",), ("w",)),
            ("fill", "ConstantOfShape", ("s",), ("zeros",)),
            ("add", "Add", ("x", "w"), ("a",)),
            ("join", "Add", ("a", "zeros"), ("y",)),
        ]
        graph = read_float_graph(load_graph(save_graph(tmp_path, nodes)))
        lineage = trace_lineage(graph, {"n", "zeros", "w", "a", "y"})
        assert lineage.order == ("n", "zeros", "a", "y")
        assert lineage.parents == {"n": frozenset(), "zeros": frozenset(), "a": frozenset(), "y": {"a", "zeros"}}

    def test_parents_are_sought_beyond_tensors_that_the_other_graph_lacks(self, tmp_path):
        graph = read_float_graph(load_graph(save_graph(tmp_path, chain("x", "y", "t", count=4))))
        lineage = trace_lineage(graph, {"t0", "y"})
        assert lineage.parents["y"] == {"t0"}
        assert lineage.ancestors("y") == ["t0"]
        assert lineage.descendants("t0") == {"t0", "y"}

    def test_a_cut_holds_only_what_its_outputs_need(self, tmp_path):
        model = load_graph(save_graph(tmp_path, [*CANCELLING, ("more", "Mul", ("y", "half"), ("z",))], outputs=("z",)))
        cut = cut_graph(model, ["a"])
        assert [node.name for node in cut.graph.node] == ["lift"]
        assert [weight.name for weight in cut.graph.initializer] == ["thousand"]
        assert [value.name for value in cut.graph.output] == ["a"]

    def test_what_is_computed_of_weights_stands_before_its_reader(self, tmp_path):
        nodes = [("turn", "Neg", ("half",), ("w",)), *chain("x", "a", "t", count=2), ("add", "Add", ("a", "w"), ("y",))]
        cut = cut_graph(load_graph(save_graph(tmp_path, nodes)), ["y", "w"])
        assert [node.name for node in cut.graph.node] == ["t_0", "t_1", "turn", "add"]

    def test_the_module_is_that_of_the_nodes_weights_else_of_the_nearest_before(self, tmp_path):
        weights = {"mid.norm.weight": [1.0], "mid.proj.weight": [2.0], "plain": [3.0]}
        nodes = [
            ("first", "Mul", ("x", "mid.norm.weight"), ("a",)),
            ("turn", "Neg", ("mid.proj.weight",), ("w",)),
            ("project", "Mul", ("a", "w"), ("b",)),
            ("after", "Add", ("b", "plain"), ("y",)),
            ("alone", "Neg", ("x",), ("z",)),
        ]
        graph = read_float_graph(load_graph(save_graph(tmp_path, nodes, weights, outputs=("y", "z"))))
        modules = {node.name: module_of(graph, node) for node in graph.model.graph.node if node.name != "turn"}
        assert modules == {"first": "mid.norm", "project": "mid.proj", "after": "mid.proj", "alone": None}

    def test_a_graph_that_does_not_run_is_a_build_error(self, tmp_path):
        source = save_graph(tmp_path, HEALTHY)
        evaluate = onnx_evaluator(load_graph(source), source, [{"x": np.ones((3, 2), np.float32)}], tmp_path, threads=1)
        with pytest.raises(BuildError, match="cannot run"):
            evaluate(["y"])
        assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


@pytest.fixture(scope="module")
def half_bundle(tiny_export, tmp_path_factory):
    """What a TensorRT build on a machine without a GPU seals, as far as its manifest goes."""
    target = tmp_path_factory.mktemp("bisected") / "half.sdrt"
    build_bundle(tiny_export, target, BuildOptions(backend="onnxruntime", sizes="64x64", batch="1"), silent)
    bundle = Bundle.open(target)
    components = tuple(replace(item, parity=replace(item.parity, bound=2e-2)) for item in bundle.manifest.components)
    write_manifest(target, replace(bundle.manifest, precision="fp16", components=components), overwrite=True)
    return target


@pytest.fixture
def sick_export(tiny_export, tmp_path):
    """The tiny model with a residual stream in its UNet that goes beyond the range of halves."""
    folder = shutil.copytree(tiny_export, tmp_path / "sick")
    model = load_whole(folder / "unet" / "model.onnx")
    for weight in model.graph.initializer:
        if weight.name in ("conv_in.weight", "conv_in.bias"):
            weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1e5), weight.name))
    (folder / "unet" / "model.onnx.data").unlink()
    onnx.save(model, folder / "unet" / "model.onnx")
    return folder


def verify(capsys, *arguments):
    code = run_command(["verify", *map(str, arguments), "--threads", "1", "--json"])
    return code, json.loads(capsys.readouterr().out)


class TestBundles:
    def test_a_sound_bundle_has_nothing_to_find_and_says_so(self, half_bundle, tiny_export, capsys):
        assert run_command(["verify", str(half_bundle), "--bisect", str(tiny_export), "--threads", "1"]) == 0
        shown = capsys.readouterr().out
        assert "Nothing to find: no tensor that was compared leaves its bound" in shown
        assert "the golden image was not drawn" in shown

    def test_all_components_are_compared_whole(self, half_bundle, tiny_export, capsys):
        code, result = verify(capsys, half_bundle, "--bisect", tiny_export)
        assert code == 0
        assert [item["component"] for item in result["components"]] == [
            "text_encoder",
            "step",
            "vae_decoder",
            "vae_encoder",
        ]
        for item in result["components"]:
            findings = item["findings"]
            assert (item["evaluated_on"], item["bound"], findings["losses"]) == (EMULATION, 2e-2, [])
            assert findings["compared"] == findings["tensors"] > 50

    def test_a_bound_of_ones_own_shows_where_it_is_passed_first(self, half_bundle, tiny_export, capsys):
        code, result = verify(capsys, half_bundle, "--bisect", tiny_export, "--bound", "1e-4")
        assert code == 0
        losses = {item["component"]: item["findings"]["losses"] for item in result["components"]}
        assert losses["vae_encoder"][0]["module"] == "encoder.conv_in"
        assert losses["vae_encoder"][0]["operator"] == "Conv"
        assert run_command(["verify", str(half_bundle), "--bisect", str(tiny_export), "--bound", "1e-4"]) == 0
        shown = capsys.readouterr().out
        assert "Where parity is lost first" in shown
        assert "encoder.conv_in" in shown

    def test_a_checkpoint_is_exported_first(self, half_bundle, tiny_checkpoint, capsys):
        code, result = verify(capsys, half_bundle, "--bisect", tiny_checkpoint)
        assert code == 0
        assert len(result["components"]) == 4

    def test_an_overflow_in_the_network_is_named_with_its_module(self, half_bundle, sick_export, tmp_path, monkeypatch):
        """The nodes that calibration would keep in float32 are not kept."""
        from sdrt.engines.half import convert

        monkeypatch.setenv("SDRT_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(convert, "calibrate", lambda *_, **__: [])
        found = bisect_bundle(Bundle.open(half_bundle), sick_export, tmp_path, bound=None, threads=1, progress=silent)
        step = next(item for item in found if item.component == "step")
        assert [(loss.operator, loss.module, loss.error) for loss in step.findings.losses] == [
            ("Conv", "conv_in", None)
        ]
        assert [item.component for item in found if item.findings.losses] == ["step"]

    def test_another_model_is_refused_by_its_identity(self, half_bundle, tiny_export, tmp_path, capsys):
        other = shutil.copytree(tiny_export, tmp_path / "other")
        record = json.loads((other / "export.json").read_text())
        record["model"] |= {"identity": "ab" * 32, "name": "stranger"}
        (other / "export.json").write_text(json.dumps(record))
        code, result = verify(capsys, half_bundle, "--bisect", other)
        assert (code, result["error"]["kind"]) == (1, "CheckpointError")
        assert (
            "the model is not the one this bundle was built from: it is stranger (abababababab)"
            in (result["error"]["message"])
        )

    def test_what_is_no_model_is_refused(self, half_bundle, tmp_path, capsys):
        code, result = verify(capsys, half_bundle, "--bisect", tmp_path / "nowhere")
        assert (code, result["error"]["kind"]) == (1, "CheckpointError")

    def test_weights_outside_the_models_folder_are_refused(self, half_bundle, tiny_export, tmp_path, capsys):
        hostile = shutil.copytree(tiny_export, tmp_path / "hostile")
        path = hostile / "vae_decoder" / "model.onnx"
        model = onnx.load(path, load_external_data=False)
        for weight in model.graph.initializer:
            for entry in weight.external_data:
                if entry.key == "location":
                    entry.value = "../../secret"
        onnx.save(model, path)
        code, result = verify(capsys, half_bundle, "--bisect", hostile)
        assert (code, result["error"]["kind"]) == (1, "BuildError")
        assert "outside its folder" in result["error"]["message"]

    def test_a_damaged_file_of_the_bundle_is_found_before_anything_is_compared(self, half_bundle, tmp_path, capsys):
        copy = shutil.copytree(half_bundle, tmp_path / "copy")
        file = next((copy / "engines" / "step").iterdir())
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        code, result = verify(capsys, copy, "--bisect", tmp_path / "nowhere")
        assert (code, result["error"]["kind"]) == (1, "BundleError")

    def test_a_float32_bundle_has_no_lower_precision(self, tiny_bundle, tiny_export, capsys):
        code, result = verify(capsys, tiny_bundle, "--bisect", tiny_export)
        assert code == 2
        assert "computes in float32" in result["error"]["message"]

    @pytest.mark.parametrize("bound", ["0", "-1", "nan", "inf"])
    def test_an_impossible_bound_is_refused(self, half_bundle, tiny_export, capsys, bound):
        code, result = verify(capsys, half_bundle, "--bisect", tiny_export, "--bound", bound)
        assert (code, result["error"]["kind"]) == (2, "RequestError")

    def test_a_bound_alone_is_refused(self, half_bundle, capsys):
        code, result = verify(capsys, half_bundle, "--bound", "1e-3")
        assert code == 2
        assert "without --bisect" in result["error"]["message"]

    def test_the_stage_itself_refuses_what_is_not_fp16(self, tiny_bundle, tiny_export, tmp_path):
        with pytest.raises(RequestError, match="fp32"):
            bisect_bundle(Bundle.open(tiny_bundle), tiny_export, tmp_path, bound=None, threads=1, progress=silent)

    def test_another_graph_than_the_bundles_is_said(self, half_bundle, tiny_export, tmp_path):
        bundle = Bundle.open(half_bundle)
        from sdrt.bundle import Float32Islands

        other = Float32Islands(nodes=1, by_rule={}, measured=())
        components = tuple(replace(item, islands=other) for item in bundle.manifest.components[:1])
        changed = replace(bundle, manifest=replace(bundle.manifest, components=components))
        with pytest.warns(UserWarning, match="text_encoder .* keeps other nodes in float32"):
            bisect_bundle(changed, tiny_export, tmp_path, bound=None, threads=1, progress=silent)

    def test_nothing_is_left_where_it_worked(self, half_bundle, tiny_export, tmp_path):
        bisect_bundle(Bundle.open(half_bundle), tiny_export, tmp_path, bound=None, threads=1, progress=silent)
        assert list(tmp_path.iterdir()) == []


class TestEngines:
    """A GPU's part, with an evaluation of another kind in its place."""

    def test_where_a_gpu_is_both_are_reported(self, half_bundle, tiny_export, tmp_path, monkeypatch):
        def evaluator(path, feeds, library):
            model = load_graph(path.with_name("emulated.onnx"))
            inner = onnx_evaluator(model, path.with_name("emulated.onnx"), feeds, tmp_path, threads=1)
            # A device that gets one component's output wrong.
            spoil = path.parent.name == "vae_decoder"
            return lambda names: [
                {name: run[name] * (2 if spoil and name == "sample" else 1) for name in names} for run in inner(names)
            ]

        host = EngineHost(library="tensorrt_rtx", device="a GPU")
        monkeypatch.setattr(bisect_stage, "find_engine_host", lambda _: host)
        monkeypatch.setattr(bisect_stage, "tensorrt_evaluator", evaluator)
        found = bisect_bundle(Bundle.open(half_bundle), tiny_export, tmp_path, bound=None, threads=1, progress=silent)
        places = [EMULATION, "tensorrt_rtx on a GPU"]
        assert [item.evaluated_on for item in found] == places * 4
        lost = [(item.component, item.evaluated_on) for item in found if item.findings.losses]
        assert lost == [("vae_decoder", places[1])]
        assert [loss.tensor for item in found for loss in item.findings.losses] == ["sample"]

    def test_a_bundle_of_another_backend_needs_none(self, half_bundle):
        assert find_engine_host(Bundle.open(half_bundle).manifest.backend) is None


def test_the_stage_is_a_child_process_with_the_protocol(half_bundle, tiny_export, tmp_path):
    command = [sys.executable, "-m", "sdrt.engines.bisect_stage", half_bundle, tiny_export, tmp_path, "--threads", "1"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list(json.loads(done.stdout.splitlines()[-1])["result"]) == ["components"]


def test_a_stranger_is_told_apart_in_the_stage(half_bundle, tiny_export):
    folder = bisect_stage.read_onnx_folder(tiny_export)
    stranger = replace(folder, model=replace(folder.model, identity="0" * 64))
    with pytest.raises(CheckpointError, match="000000000000"):
        bisect_stage.check_same_model(Bundle.open(half_bundle), stranger)
    bisect_stage.check_same_model(Bundle.open(half_bundle), folder)
