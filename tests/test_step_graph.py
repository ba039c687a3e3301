"""The step graph: against the mathematics on both CPU backends, and the promises it makes to neighbours."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from sdrt.engines.base import ComponentSource
from sdrt.engines.openvino import OpenVinoBuilder
from sdrt.engines.profile import parse_profile
from sdrt.engines.step_graph import compose_step_graph
from sdrt.errors import BuildError
from sdrt.plan.clamping import Thresholding
from sdrt.runners.cpu import native_precision
from sdrt.runners.openvino import read_ir

SLOTS = 6
BACKENDS = ["onnxruntime", "openvino fp32"] + ["openvino bf16"] * (native_precision() == "bf16")


@pytest.fixture(scope="session")
def unet_path(tiny_export):
    return tiny_export / "unet" / "model.onnx"


@pytest.fixture(scope="session")
def unet(unet_path):
    """The network alone, in float32 on ONNX Runtime: [M, C, h, w]."""
    import onnxruntime

    session = onnxruntime.InferenceSession(unet_path)

    def evaluate(sample, timestep, prompt_embeds):
        feeds = {"sample": sample, "timestep": timestep, "encoder_hidden_states": prompt_embeds}
        return session.run(None, feeds)[0]

    return evaluate


@pytest.fixture(scope="session")
def steps(unet_path, tmp_path_factory):
    """The step graph as a function of its feeds, for each backend."""
    folder = place_step(unet_path, tmp_path_factory.mktemp("step"))
    return {name: open_step(name, folder, tmp_path_factory.mktemp("engine")) for name in BACKENDS}


def place_step(unet_path, folder, *, change=lambda model: None, thresholding=None):
    model = onnx.load(unet_path, load_external_data=False)
    change(model)
    (folder / "model.onnx.data").write_bytes((unet_path.parent / "model.onnx.data").read_bytes())
    onnx.save(compose_step_graph(model, SLOTS, thresholding), folder / "model.onnx")
    return folder


def open_step(name, folder, engine, **source):
    path = folder / "model.onnx"
    if name == "onnxruntime":
        import onnxruntime

        session = onnxruntime.InferenceSession(path)
        return lambda feeds: session.run(None, feeds)[0]
    import openvino

    precision = name.split()[1]
    files = OpenVinoBuilder().build(replace(step_source(path), **source), precision, engine)
    hint = {"INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[precision], "INFERENCE_NUM_THREADS": 1}
    core = openvino.Core()
    model, weights = read_ir(core, [engine / name for name in files])
    compiled = core.compile_model(model, "CPU", hint)
    return lambda feeds, _=weights: compiled(feeds)["next_state"].copy()


def step_source(path):
    return ComponentSource(
        default_height=64,
        default_width=64,
        name="step",
        onnx_path=path,
        profile=parse_profile("64..256", "1..4", default=(64, 64), multiple_of=16, text_length=77),
        max_lanes=8,
        state_slots=SLOTS,
        latent_channels=4,
        conditioning_channels=0,
        prompt_embeds_dim=32,
        vae_downsample=8,
    )


def random_feeds(requests, owners, *, height=8, width=8, length=77, seed=0):
    """Feeds for `requests` whose lanes belong to `owners`, in any order."""
    random = np.random.default_rng(seed)
    lanes = len(owners)

    def normal(*shape):
        return random.standard_normal(shape, np.float32)

    guidance = np.zeros((requests, lanes), np.float32)
    guidance[owners, np.arange(lanes)] = normal(lanes)
    return {
        "state": normal(requests, SLOTS, 4, height, width),
        "input_scale": random.uniform(0.05, 1, requests).astype(np.float32),
        "lane_request": np.array(owners, np.int64),
        "timestep": random.uniform(0, 999, lanes).astype(np.float32),
        "prompt_embeds": normal(lanes, length, 32),
        "guidance": guidance,
        "rescale_lanes": (guidance > 0).astype(np.float32),
        "guidance_rescale": np.zeros(requests, np.float32),
        "clamp": np.zeros((requests, 3), np.float32),
        "transition": normal(requests, SLOTS, SLOTS + 3),
        "noise": normal(requests, 4, height, width),
        "mask": np.where(normal(requests, 1, height, width) > 0, 1, random.uniform(0, 1)).astype(np.float32),
        "known": normal(requests, 2, 4, height, width),
        "known_weights": normal(requests, 2),
    }


def expected_step(unet, feeds, threshold=None):
    """The definition of a step, in float64 but for the network."""
    scaled = feeds["state"][:, 0] * feeds["input_scale"][:, None, None, None]
    lanes = unet(scaled[feeds["lane_request"]], feeds["timestep"], feeds["prompt_embeds"]).astype(np.float64)
    output, aim = (np.einsum("rm,mchw->rchw", feeds[name], lanes) for name in ("guidance", "rescale_lanes"))
    share = feeds["guidance_rescale"].astype(np.float64)[:, None, None, None]
    deviations = [each.std((1, 2, 3), ddof=1, keepdims=True) for each in (aim, output)]
    output = np.where(share == 0, output, share * output * deviations[0] / deviations[1] + (1 - share) * output)
    on_latents, on_output, limit = feeds["clamp"].astype(np.float64).T[:, :, None, None, None]
    x0 = on_latents * feeds["state"][:, 0] + on_output * output
    excess = (np.clip(x0, -limit, limit) if threshold is None else threshold(x0)) - x0
    stack = np.concatenate([feeds["state"], output[:, None], feeds["noise"][:, None], excess[:, None]], axis=1)
    moved = np.einsum("rij,rjchw->richw", feeds["transition"].astype(np.float64), stack)
    known = np.einsum("rk,rkchw->rchw", feeds["known_weights"].astype(np.float64), feeds["known"])
    mask = feeds["mask"].astype(np.float64)
    moved[:, 0] = mask * moved[:, 0] + (1 - mask) * known
    return moved


def pass_output_only(feeds):
    """Make the first slot of the next state the model output itself."""
    feeds["transition"] = np.zeros_like(feeds["transition"])
    feeds["transition"][:, 0, SLOTS] = 1
    feeds["mask"] = np.ones_like(feeds["mask"])
    return feeds


def of_request(feeds, request):
    """The same request alone."""
    lanes = np.flatnonzero(feeds["lane_request"] == request)
    its_own = ("state", "input_scale", "guidance_rescale", "clamp", "transition", "noise")
    its_own += ("mask", "known", "known_weights")
    of_both = ("guidance", "rescale_lanes")
    alone = {name: feeds[name][[request] if name in its_own else lanes] for name in feeds if name not in of_both}
    return {
        **alone,
        "lane_request": np.zeros(len(lanes), np.int64),
        **{name: feeds[name][[request]][:, lanes] for name in of_both},
    }


def relative_error(measured, expected):
    return np.abs(measured - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino fp32"])
@pytest.mark.parametrize(
    ("requests", "owners", "sides", "length"),
    [
        (1, [0], (8, 8), 77),
        (1, [0, 0], (16, 8), 77),
        (2, [0, 0, 1, 1], (8, 24), 154),
        (3, [2, 0, 1, 0, 2], (8, 16), 77),
        (4, [3, 2, 1, 0], (4, 4), 12),
    ],
)
def test_a_step_is_its_definition(steps, unet, backend, requests, owners, sides, length):
    feeds = random_feeds(requests, owners, height=sides[0], width=sides[1], length=length)
    assert relative_error(steps[backend](feeds), expected_step(unet, feeds)) < 5e-6


def with_rescale_and_clamp(feeds):
    """Every second request rescales, every third clamps."""
    count = len(feeds["state"])
    feeds["guidance_rescale"][::2] = np.linspace(0.3, 1, count, dtype=np.float32)[::2]
    feeds["clamp"][::3] = np.array([1.4, -0.8, 0.9], np.float32)
    return feeds


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_rescales_and_clamps_by_its_definition(steps, unet, backend):
    feeds = with_rescale_and_clamp(random_feeds(4, [3, 2, 1, 0, 0, 2]))
    bound = 3e-2 if "bf16" in backend else 5e-6
    assert relative_error(steps[backend](feeds), expected_step(unet, feeds)) < bound
    plain = {**feeds, "guidance_rescale": np.zeros(4, np.float32)}
    assert relative_error(steps[backend](plain)[0], expected_step(unet, feeds)[0]) > 0.01


@pytest.mark.parametrize("backend", BACKENDS)
def test_rescaling_one_request_does_not_touch_another(steps, backend):
    feeds = random_feeds(2, [0, 1, 1])
    plain = steps[backend](feeds)
    feeds["guidance_rescale"][0], feeds["clamp"][0] = 0.7, (1, 0.5, 0.1)
    after = steps[backend](feeds)
    assert np.array_equal(after[1], plain[1])
    assert not np.array_equal(after[0], plain[0])


@pytest.mark.parametrize("ratio", [0.5, 0.995, 1.0])
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino fp32"])
def test_a_step_thresholds_by_quantiles_where_it_is_composed_so(unet_path, unet, tmp_path, backend, ratio):
    folder = place_step(unet_path, tmp_path, thresholding=Thresholding(ratio=ratio, maximum=1.5))
    feeds = random_feeds(3, [0, 1, 1, 2], height=16)
    feeds["clamp"][:2] = [[1.4, -0.8, 1.5], [0.2, 0.1, 1.5]]  # the third request asks for nothing

    def threshold(x0):
        limit = np.quantile(np.abs(x0).reshape(3, -1), ratio, axis=1).clip(1, 1.5)[:, None, None, None]
        return np.where(np.arange(3)[:, None, None, None] < 2, x0.clip(-limit, limit) / limit, x0)

    (tmp_path / "engine").mkdir()
    made = open_step(backend, folder, tmp_path / "engine")(feeds)
    assert relative_error(made, expected_step(unet, feeds, threshold)) < 5e-6


CONTROLS, CONTROL_FEATURES = 2, 16


@pytest.fixture(scope="module")
def steered(steered_export, tmp_path_factory):
    """The step graph of a network with two ControlNets, as `steps`."""
    folder = place_step(steered_export / "unet" / "model.onnx", tmp_path_factory.mktemp("step"))
    sizes = {"controls": CONTROLS, "control_features": CONTROL_FEATURES}
    return {name: open_step(name, folder, tmp_path_factory.mktemp("engine"), **sizes) for name in BACKENDS}


def with_controls(feeds, seed=1):
    """The feeds, and what steers each request."""
    random = np.random.default_rng(seed)
    requests, _, _, height, width = feeds["state"].shape
    shape = (requests, CONTROLS, CONTROL_FEATURES, height, width)
    scales = random.uniform(0.5, 1.5, (requests, CONTROLS)).astype(np.float32)
    return {**feeds, "control": random.standard_normal(shape, np.float32), "control_scales": scales}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("owners", "sides"), [([0], (8, 8)), ([2, 0, 1, 0, 2], (8, 16)), ([1, 1, 0], (7, 9))], ids=str)
def test_a_step_with_controlnets_is_its_definition(steered, steered_export, backend, owners, sides):
    import onnxruntime

    session = onnxruntime.InferenceSession(steered_export / "unet" / "model.onnx")
    feeds = with_controls(random_feeds(max(owners) + 1, owners, height=sides[0], width=sides[1]))

    def network(sample, timestep, prompt_embeds):
        own = {name: feeds[name][feeds["lane_request"]] for name in ("control", "control_scales")}
        brought = {"sample": sample, "timestep": timestep, "encoder_hidden_states": prompt_embeds}
        return session.run(None, brought | own)[0]

    bound = 3e-2 if "bf16" in backend else 5e-6
    assert relative_error(steered[backend](feeds), expected_step(network, feeds)) < bound


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_steers_one_request_does_not_reach_another(steered, backend):
    feeds = with_controls(random_feeds(2, [0, 1, 1]))
    before = steered[backend](feeds)
    feeds["control"][0] *= 2
    after = steered[backend](feeds)
    assert np.array_equal(after[1], before[1])
    assert not np.array_equal(after[0], before[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_controlnet_with_a_scale_of_zero_has_no_say_whatever_it_sees(steered, backend):
    feeds = with_controls(random_feeds(2, [0, 1]))
    feeds["control_scales"][:] = [[0, 0], [0, 1]]
    before = steered[backend](feeds)
    feeds["control"][0], feeds["control"][1, 0] = 3, -2
    assert np.array_equal(steered[backend](feeds), before)
    feeds["control"][1, 1] = -2
    assert not np.array_equal(steered[backend](feeds)[1], before[1])


@pytest.mark.skipif("openvino bf16" not in BACKENDS, reason="this CPU does not compute in bf16")
def test_a_step_in_bf16_is_its_definition_within_bf16(steps, unet):
    feeds = random_feeds(3, [2, 0, 1, 0, 2])
    assert relative_error(steps["openvino bf16"](feeds), expected_step(unet, feeds)) < 3e-2


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_identity_transition_leaves_every_bit_of_the_state(steps, backend):
    feeds = random_feeds(3, [0, 0, 1, 2, 2])
    feeds["transition"] = np.zeros_like(feeds["transition"])
    feeds["transition"][:, :, :SLOTS] = np.eye(SLOTS, dtype=np.float32)
    feeds["mask"] = np.ones_like(feeds["mask"])
    assert np.array_equal(steps[backend](feeds), feeds["state"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_coefficients_and_noise_are_not_rounded(steps, backend):
    feeds = random_feeds(2, [0, 1])
    feeds["transition"] = np.zeros_like(feeds["transition"])
    feeds["transition"][:, 0, 0] = np.float32(0.99951171875)  # 1 - 2^-11: bf16 would make it 1
    feeds["transition"][:, 1, SLOTS + 1] = np.float32(1.00048828125)
    feeds["mask"] = np.ones_like(feeds["mask"])
    after = steps[backend](feeds)
    assert np.array_equal(after[:, 0], feeds["state"][:, 0] * np.float32(0.99951171875))
    assert np.array_equal(after[:, 1], feeds["noise"] * np.float32(1.00048828125))


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_known_is_exactly_there_where_nothing_is_drawn(steps, backend):
    feeds = random_feeds(2, [0, 1])
    feeds["mask"] = np.zeros_like(feeds["mask"])
    feeds["mask"][:, :, :4] = 1
    feeds["known_weights"] = np.array([[1, 0], [0, 2]], np.float32)
    after = steps[backend](feeds)
    assert np.array_equal(after[0, 0, :, 4:], feeds["known"][0, 0, :, 4:])
    assert np.array_equal(after[1, 0, :, 4:], 2 * feeds["known"][1, 1, :, 4:])
    drawn = steps[backend](feeds | {"mask": np.ones_like(feeds["mask"])})
    assert np.array_equal(after[:, 1:], drawn[:, 1:])
    assert np.array_equal(after[:, 0, :, :4], drawn[:, 0, :, :4])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_request_is_the_same_in_a_mixed_batch_as_alone(steps, backend):
    feeds = random_feeds(3, [0, 1, 2, 1, 0])
    together = steps[backend](feeds)
    for request in range(3):
        alone = steps[backend](of_request(feeds, request))[0]
        if backend == "onnxruntime":  # its convolutions choose another kernel for a batch of one
            assert relative_error(together[request], alone) < 1e-6
        else:
            assert np.array_equal(together[request], alone)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_what_is_not_finite_in_one_request_does_not_reach_another(steps, backend, poison):
    feeds = random_feeds(2, [0, 0, 1, 1])
    clean = steps[backend](feeds)
    feeds["prompt_embeds"][0] = poison
    feeds["state"][0, 0] = poison
    feeds["noise"][0] = poison
    after = steps[backend](feeds)
    assert np.array_equal(after[1], clean[1])
    assert not np.isfinite(after[0]).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_inert_lane_and_an_inert_request_change_nothing(steps, backend):
    feeds = random_feeds(1, [0, 0])
    padded = random_feeds(2, [0, 0, 1])
    for name, array in feeds.items():
        padded[name][tuple(slice(size) for size in array.shape)] = array
    for name in ("guidance", "rescale_lanes"):
        padded[name][1], padded[name][:, 2] = 0, 0
    alone, together = steps[backend](feeds)[0], steps[backend](padded)[0]
    tolerance = 1e-6 if backend == "onnxruntime" else 0
    assert np.abs(together - alone).max() <= tolerance * np.abs(alone).max()


@pytest.mark.skipif("openvino bf16" not in BACKENDS, reason="this CPU does not compute in bf16")
@pytest.mark.parametrize("timestep", [981.0, 981.37, 983.0, 541.4, 999.0])
def test_bf16_does_not_round_the_timestep(steps, timestep):
    """In bf16 both 981 and 981.37 are 980, whose network output differs by more than bf16's own error."""
    feeds = pass_output_only(random_feeds(1, [0]))
    feeds["timestep"][:] = timestep
    exact, measured = (steps[name](feeds)[:, 0] for name in ("openvino fp32", "openvino bf16"))
    assert relative_error(measured, exact) < 2e-2
    feeds["timestep"][:] = timestep - 1
    assert not np.array_equal(measured, steps["openvino bf16"](feeds)[:, 0])


def with_type(element_type):
    """Give the UNet a timestep of another type, the way other exporters do: the network casts it itself."""

    def change(model):
        graph = model.graph
        for node in graph.node:
            node.input[:] = ["timestep_as_float" if name == "timestep" else name for name in node.input]
        nodes = [helper.make_node("Cast", ["timestep"], ["timestep_as_float"], to=TensorProto.FLOAT), *graph.node]
        del graph.node[:]
        graph.node.extend(nodes)
        declared = next(value for value in graph.input if value.name == "timestep")
        declared.type.tensor_type.elem_type = element_type

    return change


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("element_type", [TensorProto.INT64, TensorProto.INT32, TensorProto.DOUBLE])
def test_a_unet_may_take_its_timestep_in_any_type(steps, unet_path, tmp_path, backend, element_type):
    folder = place_step(unet_path, tmp_path, change=with_type(element_type))
    (tmp_path / "engine").mkdir()
    step = open_step(backend, folder, tmp_path / "engine")
    feeds = pass_output_only(random_feeds(2, [0, 0, 1]))
    feeds["timestep"][:] = [981, 981, 23]
    assert relative_error(step(feeds), steps[backend](feeds)) < 1e-6


def test_a_fractional_timestep_is_rounded_not_cut_for_an_integer_input(unet_path, tmp_path, steps):
    step = open_step("onnxruntime", place_step(unet_path, tmp_path, change=with_type(TensorProto.INT64)), tmp_path)
    feeds = pass_output_only(random_feeds(1, [0]))
    feeds["timestep"][:] = 980.6
    rounded = step(feeds)
    feeds["timestep"][:] = 981
    assert np.array_equal(rounded, step(feeds))


def test_names_of_the_unet_may_clash_with_those_of_the_step(unet_path, tmp_path, steps, unet):
    def rename_inner(model):
        renames = {model.graph.node[20].output[0]: "noise", model.graph.node[40].output[0]: "next_state"}
        for node in model.graph.node:
            node.input[:] = [renames.get(name, name) for name in node.input]
            node.output[:] = [renames.get(name, name) for name in node.output]

    step = open_step("onnxruntime", place_step(unet_path, tmp_path, change=rename_inner), tmp_path)
    feeds = random_feeds(1, [0, 0])
    assert relative_error(step(feeds), expected_step(unet, feeds)) < 5e-6


def test_weights_keep_their_names_and_stay_on_disk(unet_path):
    model = onnx.load(unet_path, load_external_data=False)
    before = model.SerializeToString()
    step = compose_step_graph(model, SLOTS)
    weights = {weight.name: weight for weight in step.graph.initializer}
    for weight in model.graph.initializer:
        assert weights[weight.name].external_data == weight.external_data
    assert all(name.startswith("sdrt.") for name in weights.keys() - {w.name for w in model.graph.initializer})
    assert model.SerializeToString() == before


def test_the_step_says_nothing_of_the_machine_that_exported_it(unet_path):
    step = compose_step_graph(onnx.load(unet_path, load_external_data=False), SLOTS)
    assert b".py" not in step.SerializeToString()


def test_the_composed_graph_is_valid_onnx(unet_path, tmp_path):
    onnx.checker.check_model(place_step(unet_path, tmp_path) / "model.onnx", full_check=True)


def tiny_unet(inputs=None, outputs=("out_sample",), opset=18):
    """A network with any border."""
    standard = {
        "sample": (TensorProto.FLOAT, ["b", 4, "h", "w"]),
        "timestep": (TensorProto.FLOAT, ["b"]),
        "encoder_hidden_states": (TensorProto.FLOAT, ["b", "l", 32]),
    }
    declared = {name: entry for name, entry in (standard | (inputs or {})).items() if entry is not None}
    graph = helper.make_graph(
        [helper.make_node("Identity", ["sample"], [name]) for name in outputs],
        "unet",
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in declared.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", 4, "h", "w"]) for name in outputs],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])


@pytest.mark.parametrize(
    ("unet", "said"),
    [
        (tiny_unet({"timestep": None}), "timestep"),
        (tiny_unet({"sample": None, "x": (TensorProto.FLOAT, ["b", 4, "h", "w"])}), "lacks sample and also wants x"),
        (tiny_unet({"class_labels": (TensorProto.FLOAT, ["b"])}), "class_labels is of type FLOAT"),
        (tiny_unet({"sample": (TensorProto.FLOAT, ["b", 3, "h", "w"])}), "takes 3 channels and gives 4"),
        (tiny_unet({"control": (TensorProto.FLOAT, ["b", 1, 16, "h", "w"])}), "lacks control_scales"),
        (tiny_unet({"control_scales": (TensorProto.FLOAT, ["b", 1])}), "lacks control"),
        (
            tiny_unet(
                {
                    "control": (TensorProto.FLOAT, ["b", "k", 16, "h", "w"]),
                    "control_scales": (TensorProto.FLOAT, ["b", "k"]),
                }
            ),
            r"control has the shape \('b', 'k', 16, 'h', 'w'\)",
        ),
        (
            tiny_unet(
                {
                    "control": (TensorProto.FLOAT16, ["b", 1, 16, "h", "w"]),
                    "control_scales": (TensorProto.FLOAT, ["b", 1]),
                }
            ),
            "control is of type FLOAT16",
        ),
        (
            tiny_unet({"text_embeds": (TensorProto.FLOAT, ["b", 8]), "time_ids": (TensorProto.FLOAT, ["b", 6])}),
            "time_ids",
        ),
        (tiny_unet({"timestep": (TensorProto.FLOAT, [])}), "one timestep for all lanes"),
        (tiny_unet({"timestep": (TensorProto.INT64, [1])}), "one timestep for all lanes"),
        (tiny_unet({"timestep": (TensorProto.STRING, ["b"])}), "STRING"),
        (tiny_unet({"sample": (TensorProto.INT8, ["b", 4, "h", "w"])}), "INT8"),
        (tiny_unet({"sample": (TensorProto.FLOAT, ["b", 4, "h"])}), "4 dimensions"),
        (tiny_unet({"encoder_hidden_states": (TensorProto.FLOAT, ["b", 32])}), "3 dimensions"),
        (tiny_unet(outputs=("out_sample", "hidden")), "hidden"),
        (tiny_unet(opset=11), "opset 11"),
    ],
)
def test_a_unet_that_cannot_be_served_is_refused_by_name(unet, said):
    with pytest.raises(BuildError, match=said) as refusal:
        compose_step_graph(unet, SLOTS)
    assert refusal.value.hint


def test_weights_named_like_the_steps_tensors_are_refused():
    unet = tiny_unet()
    unet.graph.initializer.append(helper.make_tensor("noise", TensorProto.FLOAT, [1], [0.0]))
    with pytest.raises(BuildError, match="noise"):
        compose_step_graph(unet, SLOTS)


def test_the_engines_stage_never_imports_torch():
    modules = "build, components, evidence, openvino, onnxruntime, onnx_folder, precision, reference, seal, __main__"
    code = (
        f"from sdrt.engines import {modules}\n"
        "import sys; openvino.OpenVinoBuilder().version; onnxruntime.OnnxRuntimeBuilder().version\n"
        "found = {'torch', 'diffusers', 'transformers', 'onnxscript'} & set(sys.modules)\n"
        "sys.exit(f'imported {found}' if found else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_bf16_engines_are_stored_in_half_but_for_what_is_computed_in_float32(unet_path, tmp_path):
    import openvino

    from sdrt.engines.openvino import _float32_constants, _float32_nodes

    folder = tmp_path / "step"
    folder.mkdir()
    place_step(unet_path, folder)
    stored = {}
    for precision in ("fp32", "bf16"):
        engine = tmp_path / precision
        engine.mkdir()
        OpenVinoBuilder().build(step_source(folder / "model.onnx"), precision, engine)
        stored[precision] = openvino.Core().read_model(engine / "model.xml")
    sizes = {name: (tmp_path / name / "model.bin").stat().st_size for name in stored}
    assert sizes["bf16"] < 0.6 * sizes["fp32"]
    exact = _float32_constants(stored["fp32"], _float32_nodes(stored["fp32"], "step"))
    assert any(value.size > 1 for value in exact.values())  # the frequencies of the timestep's sinusoids
    for name, value in exact.items():
        kept = [
            node
            for node in stored["bf16"].get_ordered_ops()
            if node.get_type_name() == "Constant" and node.get_friendly_name() in (name, f"{name}_compressed")
        ]
        assert kept
        for node in kept:
            np.testing.assert_array_equal(np.array(node.data, np.float32), value, err_msg=name)
