"""FP16 graphs: what is float16 in them, what stays float32 and why, and that the CPU shows what a GPU would do."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sdrt.engines.half.calibration import HEADROOM, LARGEST_KEPT_HALF
from sdrt.engines.half.convert import convert_to_half
from sdrt.engines.half.emulation import emulate_half
from sdrt.engines.half.graph import LARGEST, half_tensors, read_float_graph, to_half, write_half
from sdrt.engines.half.rules import kept_by_rule
from sdrt.engines.onnx_files import load_graph, load_whole
from sdrt.engines.onnx_session import run_onnx
from sdrt.engines.seal import read_golden
from sdrt.errors import BuildError
from sdrt.parity import max_relative

COMPONENTS = ("text_encoder", "unet", "vae_decoder", "vae_encoder")


def save_graph(folder, nodes, weights=(), *, inputs=("x",), outputs=("y",), shape=(4,)):
    """A float32 model of a few nodes; weights are name → array."""
    graph = helper.make_graph(
        [helper.make_node(operator, list(take), list(give), name=name) for name, operator, take, give in nodes],
        "test",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in inputs],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * len(shape)) for name in outputs],
        [numpy_helper.from_array(np.asarray(value, np.float32), name) for name, value in dict(weights).items()],
    )
    path = folder / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def plain_half(source, folder, kept=()):
    """The graph with everything but `kept` in float16; its emulation."""
    write_half(read_float_graph(load_graph(source)), kept, source, folder / "half.onnx")
    emulate_half(folder / "half.onnx", folder / "emulated.onnx")
    return folder / "emulated.onnx"


def evaluate(path, **feeds):
    return next(iter(run_onnx(path, [feeds])[0].values()))


TWICE_UP_TWICE_DOWN = [
    ("up1", "Mul", ("x", "c"), ("a",)),
    ("up2", "Mul", ("a", "c"), ("b",)),
    ("down1", "Div", ("b", "c"), ("d",)),
    ("down2", "Div", ("d", "c"), ("y",)),
]


class TestEmulation:
    def test_shows_the_overflow_that_a_gpu_would_have(self, tmp_path):
        source = save_graph(tmp_path, TWICE_UP_TWICE_DOWN, {"c": 300.0})
        emulated = plain_half(source, tmp_path)
        y = evaluate(emulated, x=np.array([1, 0.5, 0.001, -1], np.float32))
        assert list(np.isinf(y)) == [True, False, False, True]

    def test_is_needed_because_the_cpu_alone_hides_it(self, tmp_path):
        source = save_graph(tmp_path, TWICE_UP_TWICE_DOWN, {"c": 300.0})
        plain_half(source, tmp_path)
        assert np.isfinite(evaluate(tmp_path / "half.onnx", x=np.ones(4, np.float32))).all()

    def test_rounds_every_result_and_every_weight_to_a_half(self, tmp_path):
        source = save_graph(tmp_path, [("add", "Add", ("x", "w"), ("y",))], {"w": [0.1] * 4})
        emulated = plain_half(source, tmp_path)
        x = np.array([0, 1, 2000.3, 1e-9], np.float32)
        expected = (x.astype(np.float16).astype(np.float32) + np.float32(np.float16(0.1))).astype(np.float16)
        assert np.array_equal(evaluate(emulated, x=x), expected.astype(np.float32))


class TestGraph:
    @pytest.mark.parametrize("component", COMPONENTS)
    def test_keeps_borders_and_the_names_of_weights(self, tiny_export, tmp_path, component):
        source = tiny_export / component / "model.onnx"
        graph = read_float_graph(load_graph(source))
        write_half(graph, kept_by_rule(graph, upcast_attention=False), source, tmp_path / "model.onnx")
        onnx.checker.check_model(tmp_path / "model.onnx", full_check=True)
        before, after = load_graph(source).graph, load_graph(tmp_path / "model.onnx").graph
        assert list(after.input) == list(before.input)
        assert list(after.output) == list(before.output)
        assert {weight.name for weight in before.initializer} <= {weight.name for weight in after.initializer}

    def test_stores_weights_as_halves_except_those_that_float32_nodes_read(self, tmp_path):
        nodes = [
            ("a", "Mul", ("x", "w"), ("m",)),
            ("b", "Add", ("m", "both"), ("n",)),
            ("c", "Sub", ("n", "both"), ("y",)),
        ]
        source = save_graph(tmp_path, nodes, {"w": [1.0], "both": [2.0]})
        graph = read_float_graph(load_graph(source))
        write_half(graph, {"c"}, source, tmp_path / "half.onnx")
        types = {weight.name: weight.data_type for weight in load_graph(tmp_path / "half.onnx").graph.initializer}
        assert types == {"w": TensorProto.FLOAT16, "both": TensorProto.FLOAT}
        assert half_tensors(graph, {"c"}) == {"w", "m", "n"}

    def test_gives_each_tensor_in_another_type_one_cast(self, tmp_path):
        nodes = [
            ("a", "Neg", ("x",), ("m",)),
            ("b", "Exp", ("m",), ("n",)),
            ("c", "Sin", ("m",), ("o",)),
            ("d", "Add", ("n", "o"), ("y",)),
        ]
        source = save_graph(tmp_path, nodes)
        write_half(read_float_graph(load_graph(source)), {"b", "c"}, source, tmp_path / "half.onnx")
        casts = [
            (node.input[0], node.attribute[0].i)
            for node in load_graph(tmp_path / "half.onnx").graph.node
            if node.op_type == "Cast"
        ]
        f16, f32 = TensorProto.FLOAT16, TensorProto.FLOAT
        assert casts == [("x", f16), ("m", f32), ("n", f16), ("o", f16), ("y.half", f32)]

    def test_leaves_the_scales_of_resize_in_float32(self, tmp_path):
        nodes = [("up", "Resize", ("x", "", "scales"), ("y",))]
        source = save_graph(tmp_path, nodes, {"scales": [1, 1, 2, 2]}, shape=(1, 1, 2, 2))
        write_half(read_float_graph(load_graph(source)), (), source, tmp_path / "half.onnx")
        onnx.checker.check_model(tmp_path / "half.onnx", full_check=True)
        assert load_graph(tmp_path / "half.onnx").graph.initializer[0].data_type == TensorProto.FLOAT

    def test_a_mask_becomes_the_largest_half_and_not_infinity(self):
        values = np.array([np.finfo(np.float32).min, -np.inf, 1e5, 1.0], np.float32)
        assert to_half(values).tolist() == [-LARGEST, -np.inf, np.inf, 1.0]

    def test_refuses_a_graph_that_branches(self, tmp_path):
        inner = helper.make_graph(
            [helper.make_node("Identity", ["x"], ["z"])],
            "then",
            [],
            [helper.make_tensor_value_info("z", TensorProto.FLOAT, [4])],
        )
        source = save_graph(tmp_path, [("yes", "Identity", ("x",), ("y",))])
        model = load_whole(source)
        model.graph.node[0].CopyFrom(
            helper.make_node("If", ["condition"], ["y"], name="choice", then_branch=inner, else_branch=inner)
        )
        with pytest.raises(BuildError, match="choice holds a graph of its own"):
            read_float_graph(model)


class TestRules:
    def test_the_timestep_is_float32_up_to_its_sinusoids(self, tiny_export):
        graph = read_float_graph(load_graph(tiny_export / "unet" / "model.onnx"))
        kept = kept_by_rule(graph, upcast_attention=False)
        operators = sorted(
            graph_node.op_type for graph_node in graph.model.graph.node if kept.get(graph_node.name) == "timestep"
        )
        assert operators == ["Cos", "Mul", "Sin", "Unsqueeze"]

    def test_upcast_attention_keeps_the_scores_and_their_softmax(self, tiny_export):
        graph = read_float_graph(load_graph(tiny_export / "unet" / "model.onnx"))
        kept = kept_by_rule(graph, upcast_attention=True)
        nodes = {node.name: node for node in graph.model.graph.node}
        softmaxes = [node for node in nodes.values() if node.op_type == "Softmax"]
        assert softmaxes
        for softmax in softmaxes:
            product = graph.producers[softmax.input[0]]
            assert kept[softmax.name] == kept[product.name] == "upcast_attention"
            assert product.op_type == "MatMul"
        assert not set(kept_by_rule(graph, upcast_attention=False).values()) & {"upcast_attention"}

    def test_statistics_of_normalisations_are_float32(self, tiny_export):
        for component in COMPONENTS:
            graph = read_float_graph(load_graph(tiny_export / component / "model.onnx"))
            kept = kept_by_rule(graph, upcast_attention=False)
            norms = {node.name for node in graph.model.graph.node if node.op_type.endswith("Normalization")}
            assert norms
            assert norms <= set(kept)


class TestCalibration:
    def convert(self, source, tmp_path, *feeds):
        (tmp_path / "half").mkdir()
        return convert_to_half(source, tmp_path / "half" / "model.onnx", feeds)

    def test_finds_the_nodes_around_a_value_that_is_too_large(self, tmp_path):
        source = save_graph(tmp_path, TWICE_UP_TWICE_DOWN, {"c": 300.0})
        report = self.convert(source, tmp_path, {"x": np.ones(4, np.float32)})
        assert [(finding.node, finding.reason, finding.value) for finding in report.findings] == [
            ("up2", "overflow", 90000.0),
            ("down1", "overflow", 90000.0),
        ]
        emulate_half(tmp_path / "half" / "model.onnx", tmp_path / "half" / "emulated.onnx")
        assert evaluate(tmp_path / "half" / "emulated.onnx", x=np.ones(4, np.float32)) == pytest.approx(1.0, abs=1e-3)

    @pytest.mark.parametrize(("factor", "found"), [(0.99, 0), (1.01, 2)])
    def test_leaves_room_for_other_inputs(self, tmp_path, factor, found):
        source = save_graph(tmp_path, [("a", "Neg", ("x",), ("m",)), ("b", "Neg", ("m",), ("y",))])
        assert pytest.approx(LARGEST) == HEADROOM * LARGEST_KEPT_HALF
        report = self.convert(source, tmp_path, {"x": np.full(4, LARGEST_KEPT_HALF * factor, np.float32)})
        assert len(report.findings) == found

    def test_finds_a_difference_of_nearly_equal_values(self, tmp_path):
        source = save_graph(tmp_path, [("difference", "Sub", ("x", "w"), ("y",))], {"w": [100.0]})
        report = self.convert(source, tmp_path, {"x": np.array([100.01, 100.02, 100.03, 100.04], np.float32)})
        assert [(finding.node, finding.reason) for finding in report.findings] == [("difference", "precision")]

    def test_finds_a_weight_that_no_half_holds(self, tmp_path):
        source = save_graph(tmp_path, [("scale", "Mul", ("x", "w"), ("y",))], {"w": [1e6]})
        report = self.convert(source, tmp_path, {"x": np.full(4, 1e-6, np.float32)})
        assert [(finding.node, finding.reason) for finding in report.findings] == [("scale", "overflow")]

    def test_takes_the_worst_of_several_inputs(self, tmp_path):
        source = save_graph(tmp_path, [("a", "Neg", ("x",), ("y",))])
        report = self.convert(source, tmp_path, {"x": np.full(4, 5e4, np.float32)}, {"x": np.ones(4, np.float32)})
        assert report.findings[0].value == 5e4

    def test_does_not_take_a_mask_for_an_overflow(self, tiny_export, tmp_path):
        golden = read_golden(tiny_export / "golden" / "text_encoder.npz")
        report = self.convert(tiny_export / "text_encoder" / "model.onnx", tmp_path, golden.inputs)
        assert report.findings == ()

    def test_refuses_a_model_that_is_not_finite_in_float32(self, tmp_path):
        source = save_graph(tmp_path, [("log", "Log", ("x",), ("y",))])
        with pytest.raises(BuildError, match="y is not finite even in float32"):
            self.convert(source, tmp_path, {"x": np.full(4, -1, np.float32)})


@pytest.mark.parametrize("component", COMPONENTS)
def test_the_mixed_graph_agrees_with_pytorch(tiny_export, tmp_path, component):
    golden = read_golden(tiny_export / "golden" / f"{component}.npz")
    convert_to_half(tiny_export / component / "model.onnx", tmp_path / "model.onnx", [golden.inputs])
    emulate_half(tmp_path / "model.onnx", tmp_path / "emulated.onnx")
    made = run_onnx(tmp_path / "emulated.onnx", [golden.inputs])[0]
    worst = max(max_relative(made[name], array) for name, array in golden.outputs.items())
    assert 1e-6 < worst < 1e-2


STRESS = np.float32(1e5)  # takes the residual stream beyond the range of halves; normalisations take it back


@pytest.fixture(scope="module")
def stressed(tiny_export, tmp_path_factory):
    """The tiny UNet with scaled weights."""
    model = load_whole(tiny_export / "unet" / "model.onnx")
    for weight in model.graph.initializer:
        if weight.name in ("conv_in.weight", "conv_in.bias"):
            weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * STRESS, weight.name))
    path = tmp_path_factory.mktemp("stressed") / "model.onnx"
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module")
def stress_feeds(tiny_export):
    return dict(read_golden(tiny_export / "golden" / "unet.npz").inputs)


@pytest.mark.parametrize("force_upcast", [False, True])
def test_force_upcast_keeps_a_model_that_overflows_whole(stressed, stress_feeds, tmp_path, force_upcast):
    convert_to_half(stressed, tmp_path / "model.onnx", [stress_feeds], force_upcast=force_upcast)
    types = {weight.data_type for weight in load_graph(tmp_path / "model.onnx").graph.initializer}
    assert (TensorProto.FLOAT16 in types) is not force_upcast


def test_force_upcast_alone_changes_nothing(tiny_export, stress_feeds, tmp_path):
    """diffusers writes it into every VAE's config."""
    convert_to_half(tiny_export / "unet" / "model.onnx", tmp_path / "model.onnx", [stress_feeds], force_upcast=True)
    types = {weight.data_type for weight in load_graph(tmp_path / "model.onnx").graph.initializer}
    assert TensorProto.FLOAT16 in types


def test_plain_halves_fail_under_stress(stressed, stress_feeds, tmp_path):
    graph = read_float_graph(load_graph(stressed))
    emulated = plain_half(stressed, tmp_path, kept_by_rule(graph, upcast_attention=False))
    assert not np.isfinite(evaluate(emulated, **stress_feeds)).all()


def test_the_mixed_graph_passes_under_stress(stressed, stress_feeds, tmp_path):
    exact = evaluate(stressed, **stress_feeds)
    report = convert_to_half(stressed, tmp_path / "model.onnx", [stress_feeds])
    emulate_half(tmp_path / "model.onnx", tmp_path / "emulated.onnx")
    assert max_relative(evaluate(tmp_path / "emulated.onnx", **stress_feeds), exact) < 1e-2
    overflowing = [finding for finding in report.findings if finding.reason == "overflow"]
    assert "node_conv2d" in {finding.node for finding in overflowing}
    assert len(overflowing) < report.nodes / 2
