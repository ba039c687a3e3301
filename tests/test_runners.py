import importlib.util
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from sdrt import runners
from sdrt.bundle import BackendRecord, Bundle, ComponentRecord, ParityRecord, TensorSpec, record_file
from sdrt.errors import BackendError, BundleError, RequestError
from sdrt.runners import cpu, open_runner

SPEC = importlib.util.spec_from_file_location("small_bundle", Path(__file__).parent / "small_bundle.py")
small_bundle = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(small_bundle)

BACKENDS = ("openvino", "onnxruntime")
WIDTH = 64
TYPES = {"float32": TensorProto.FLOAT, "int32": TensorProto.INT32, "int64": TensorProto.INT64}
WEIGHT = np.random.default_rng(0).standard_normal((WIDTH, WIDTH)).astype(np.float32)


def border(name, dtype, *shape):
    return TensorSpec(name=name, dtype=dtype, shape=shape)


def graphs(timestep_type):
    """A stand-in for each component: (nodes, inputs, output). Small enough to be checked by hand."""
    to_float = helper.make_node("Cast", ["timestep"], ["t"], to=TensorProto.FLOAT)
    unsqueeze = helper.make_node("Unsqueeze", ["t", "one"], ["column"])
    return {
        "text_encoder": (
            [helper.make_node("Gather", ["weight", "input_ids"], ["last_hidden_state"])],
            [border("input_ids", "int64", "batch", "length")],
            border("last_hidden_state", "float32", "batch", "length", WIDTH),
        ),
        "step": (
            [
                helper.make_node("MatMul", ["state", "weight"], ["product"]),
                to_float,
                unsqueeze,
                helper.make_node("Add", ["product", "column"], ["next_state"]),
            ],
            [border("state", "float32", "requests", WIDTH), border("timestep", timestep_type, "requests")],
            border("next_state", "float32", "requests", WIDTH),
        ),
        "vae_decoder": (
            [helper.make_node("Tanh", ["latent_sample"], ["sample"])],
            [border("latent_sample", "float32", "batch", 4, "height", "width")],
            border("sample", "float32", "batch", 4, "height", "width"),
        ),
        "vae_encoder": (
            [helper.make_node("Neg", ["sample"], ["latent_parameters"])],
            [border("sample", "float32", "batch", 3, "height", "width")],
            border("latent_parameters", "float32", "batch", 3, "height", "width"),
        ),
    }


def value(spec):
    return helper.make_tensor_value_info(spec.name, TYPES[spec.dtype], spec.shape)


def write_onnx(path, nodes, inputs, output):
    used = {name for node in nodes for name in node.input}
    constants = [onnx.numpy_helper.from_array(WEIGHT, "weight"), onnx.numpy_helper.from_array(np.array([1]), "one")]
    graph = helper.make_graph(
        nodes,
        "g",
        [value(spec) for spec in inputs],
        [value(output)],
        [constant for constant in constants if constant.name in used],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


@pytest.fixture(scope="module")
def templates(tmp_path_factory):
    """Bundles that were made once, to be copied by each test that changes one."""
    made = {}

    def template(backend, timestep_type="float32"):
        if (backend, timestep_type) not in made:
            folder = tmp_path_factory.mktemp(f"{backend}-{timestep_type}")
            made[backend, timestep_type] = make_bundle(folder, backend, timestep_type)
        return made[backend, timestep_type]

    return template


@pytest.fixture
def copied(templates, tmp_path):
    def copy(backend, timestep_type="float32", **changes):
        template = templates(backend, timestep_type)
        shutil.copytree(template.path, tmp_path / "bundle")
        return Bundle(path=tmp_path / "bundle", manifest=replace(template.manifest, **changes))

    return copy


def make_bundle(folder, backend, timestep_type):
    """A bundle of engines that run, opened without bundle.json: the runners see only the manifest."""
    components = []
    for name, (nodes, inputs, output) in graphs(timestep_type).items():
        home = folder / "engines" / name
        home.mkdir(parents=True)
        write_onnx(home / "model.onnx", nodes, inputs, output)
        files = ["model.onnx"]
        if backend == "openvino":
            import openvino

            openvino.save_model(openvino.convert_model(home / "model.onnx"), home / "model.xml", compress_to_fp16=False)
            files = ["model.xml", "model.bin"]
        components.append(
            ComponentRecord(
                name=name,
                files=tuple(record_file(folder, home / file) for file in files),
                inputs=tuple(inputs),
                outputs=(output,),
                parity=ParityRecord(metric="max_relative", measured=0.0, bound=1e-4),
            )
        )
    small_bundle.write_files(folder / "other")
    manifest = replace(
        small_bundle.describe(folder / "other"),
        backend=BackendRecord(name=backend, version=version(backend), device="cpu", features=()),
        components=tuple(components),
    )
    return Bundle(path=folder, manifest=manifest)


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture
def bundle(copied, backend):
    return copied(backend)


@pytest.fixture(scope="module")
def runner(templates, backend):
    """One runner for all tests that only run it."""
    with open_runner(templates(backend), threads=1) as runner:
        yield runner


def step_feeds(requests=2, timestep=(981.5, 1.0), dtype=np.float32):
    state = np.linspace(-1, 1, requests * WIDTH, dtype=np.float32).reshape(requests, WIDTH)
    return {"state": state, "timestep": np.asarray(timestep[:requests], dtype)}


def expected_step(feeds):
    return feeds["state"].astype(np.float64) @ WEIGHT + np.asarray(feeds["timestep"], np.float64)[:, None]


# Running


def test_each_component_is_evaluated(runner):
    ids = np.array([[0, 5], [63, 1]])
    latents = np.linspace(-2, 2, 4 * 6, dtype=np.float32).reshape(1, 4, 2, 3)
    image = np.ones((2, 3, 1, 2), np.float32)
    np.testing.assert_array_equal(runner.run("text_encoder", {"input_ids": ids})["last_hidden_state"], WEIGHT[ids])
    np.testing.assert_allclose(
        runner.run("vae_decoder", {"latent_sample": latents})["sample"], np.tanh(latents), atol=1e-5
    )
    np.testing.assert_array_equal(runner.run("vae_encoder", {"sample": image})["latent_parameters"], -image)
    feeds = step_feeds()
    np.testing.assert_allclose(runner.run("step", feeds)["next_state"], expected_step(feeds), rtol=1e-5, atol=1e-4)


def test_batches_of_any_size_follow_each_other(runner):
    for requests in (1, 3, 2, 1):
        feeds = step_feeds(requests, (5.0, 6.0, 7.0))
        out = runner.run("step", feeds)["next_state"]
        assert out.shape == (requests, WIDTH)
        np.testing.assert_allclose(out, expected_step(feeds), rtol=1e-5, atol=1e-4)


def test_results_belong_to_the_caller(runner):
    feeds = step_feeds()
    first = runner.run("step", feeds)["next_state"]
    copy = first.copy()
    runner.run("step", step_feeds(timestep=(0.0, 0.0)))
    np.testing.assert_array_equal(first, copy)
    assert first.flags.writeable
    first[:] = 7
    np.testing.assert_array_equal(runner.run("step", feeds)["next_state"], copy)
    assert first.dtype == np.float32


def test_feeds_are_not_changed_and_may_be_read_only(runner):
    feeds = step_feeds()
    before = {name: array.copy() for name, array in feeds.items()}
    for array in feeds.values():
        array.flags.writeable = False
    runner.run("step", feeds)
    for name, array in feeds.items():
        np.testing.assert_array_equal(array, before[name])


@pytest.mark.parametrize("declared", TYPES)
def test_the_timestep_is_cast_to_the_type_that_the_engine_declares(templates, backend, declared):
    with open_runner(templates(backend, declared), threads=1) as runner:
        for fed in (np.int32, np.int64, np.float32, np.float64, np.float16):
            feeds = step_feeds(timestep=(981, 1), dtype=fed)
            made = runner.run("step", feeds)["next_state"]
            np.testing.assert_allclose(made, expected_step(feeds), rtol=1e-5, atol=1e-4)


def test_a_fractional_timestep_reaches_the_engine(runner):
    difference = (
        runner.run("step", step_feeds(timestep=(981.375, 0.25)))["next_state"]
        - runner.run("step", step_feeds(timestep=(981.0, 0.0)))["next_state"]
    )
    np.testing.assert_allclose(difference, np.broadcast_to([[0.375], [0.25]], difference.shape), atol=1e-3)


def test_arrays_of_any_layout_are_read_right(runner):
    feeds = step_feeds()
    wanted = runner.run("step", feeds)["next_state"]
    fortran = {name: np.asfortranarray(array) for name, array in feeds.items()}
    strided = {name: np.repeat(array, 2, axis=0)[::2] for name, array in feeds.items()}
    swapped = {name: array.astype(array.dtype.newbyteorder(">")) for name, array in feeds.items()}
    for variant in (fortran, strided, swapped):
        np.testing.assert_array_equal(runner.run("step", variant)["next_state"], wanted)


def test_values_that_are_not_finite_pass_through_for_the_caller_to_find(runner):
    latents = np.full((1, 4, 1, 1), np.nan, np.float32)
    assert np.isnan(runner.run("vae_decoder", {"latent_sample": latents})["sample"]).all()


# What cannot be run


def misfed(runner, component, feeds, *said):
    with pytest.raises(BackendError) as caught:
        runner.run(component, feeds)
    for text in said:
        assert text in caught.value.message
    assert caught.value.hint


def test_an_unknown_component_is_named(runner):
    misfed(runner, "unet", {}, "'unet'", "text_encoder, step")


def test_missing_and_unknown_tensors_are_named(runner):
    feeds = step_feeds()
    misfed(runner, "step", {"state": feeds["state"]}, "step", "missing ['timestep']")
    misfed(runner, "step", feeds | {"noise": feeds["state"]}, "step", "unknown ['noise']")


@pytest.mark.parametrize(
    ("component", "name", "shape"),
    [
        ("step", "state", (2, WIDTH, 1)),
        ("step", "state", (2 * WIDTH,)),
        ("step", "state", (2, WIDTH + 1)),
        ("step", "timestep", ()),
        ("step", "timestep", (2, 1)),
        ("vae_decoder", "latent_sample", (1, 3, 2, 2)),
        ("vae_decoder", "latent_sample", (4, 2, 2)),
    ],
)
def test_a_wrong_shape_is_named_with_the_right_one(runner, component, name, shape):
    feeds = (step_feeds() if component == "step" else {}) | {name: np.zeros(shape, np.float32)}
    misfed(runner, component, feeds, component, name, str(list(shape)))


def test_sizes_that_disagree_are_not_broadcast(runner):
    feeds = step_feeds() | {"timestep": np.zeros(1, np.float32)}
    misfed(runner, "step", feeds, "state with 2 requests", "timestep with 1")


def test_after_a_failure_the_runner_goes_on(runner):
    misfed(runner, "step", {})
    feeds = step_feeds()
    np.testing.assert_allclose(runner.run("step", feeds)["next_state"], expected_step(feeds), rtol=1e-5, atol=1e-4)


def test_a_failure_inside_the_backend_names_the_component(bundle):
    """The manifest promises a dimension that the engine does not take, so only the backend can object."""
    text_encoder, step, *others = bundle.manifest.components
    lying = replace(step, inputs=(border("state", "float32", "requests", 7), step.inputs[1]))
    manifest = replace(bundle.manifest, components=(text_encoder, lying, *others))
    with open_runner(Bundle(path=bundle.path, manifest=manifest), threads=1) as runner:
        feeds = {"state": np.zeros((1, 7), np.float32), "timestep": np.zeros(1, np.float32)}
        misfed(runner, "step", feeds, "step failed in O")


def test_a_closed_runner_says_so(bundle):
    runner = open_runner(bundle, threads=1)
    runner.close()
    runner.close()
    misfed(runner, "step", step_feeds(), "closed")


def test_leaving_the_with_block_closes(bundle):
    with open_runner(bundle, threads=1) as runner:
        pass
    misfed(runner, "step", step_feeds(), "closed")


# Opening


@pytest.mark.parametrize("component", ["text_encoder", "step", "vae_decoder"])
def test_an_engine_that_every_image_needs_is_opened_at_once(bundle, component):
    path = bundle.file(bundle.component(component).files[0])
    path.write_bytes(b"not an engine")
    with pytest.raises(BackendError, match="cannot open") as caught:
        open_runner(bundle, threads=1)
    assert str(path) in caught.value.message
    assert "sdrt verify" in caught.value.hint


def test_the_vae_encoder_is_opened_on_its_first_use(bundle):
    bundle.file(bundle.component("vae_encoder").files[0]).write_bytes(b"not an engine")
    with open_runner(bundle, threads=1) as runner:
        runner.run("step", step_feeds())
        misfed(runner, "vae_encoder", {"sample": np.zeros((1, 3, 1, 1), np.float32)}, "cannot open", "vae_encoder")


def test_an_engine_is_opened_once(bundle, monkeypatch):
    with open_runner(bundle, threads=1) as runner:
        sample = {"sample": np.zeros((1, 3, 1, 1), np.float32)}
        runner.run("vae_encoder", sample)
        monkeypatch.setattr(type(bundle), "file", lambda *_: pytest.fail("an engine was opened again"))
        runner.run("vae_encoder", sample)
        runner.run("step", step_feeds())


def test_an_engine_outside_the_bundle_is_not_opened(bundle):
    text_encoder, *others = bundle.manifest.components
    outside = replace(text_encoder, files=(replace(text_encoder.files[0], path="../model.xml"),))
    manifest = replace(bundle.manifest, components=(outside, *others))
    with pytest.raises(BundleError, match="leaves"):
        open_runner(Bundle(path=bundle.path, manifest=manifest))


def test_a_bundle_without_the_step_is_refused(bundle):
    components = tuple(item for item in bundle.manifest.components if item.name != "step")
    with pytest.raises(BundleError, match="no engine 'step'"):
        open_runner(Bundle(path=bundle.path, manifest=replace(bundle.manifest, components=components)))


# What the machine must have: all of it is checked before any engine is touched, so these bundles have none.


def needs(tmp_path, **changes):
    small_bundle.write_files(tmp_path / "files")
    manifest = small_bundle.describe(tmp_path / "files")
    record = replace(manifest.backend, version=version("openvino"))
    return Bundle(path=tmp_path / "nowhere", manifest=replace(manifest, backend=replace(record, **changes)))


def test_with_all_that_it_needs_only_the_engines_are_missing(tmp_path):
    with pytest.raises(BackendError, match="cannot open"):
        open_runner(needs(tmp_path))


@pytest.mark.parametrize("wrong", ["2019.1.0", "2099.4.1", "{major}.99.0", "", "x"])
def test_another_version_of_the_backend_is_refused_with_both_versions(tmp_path, wrong):
    installed = version("openvino")
    wrong = wrong.format(major=installed.split(".")[0])
    with pytest.raises(BundleError) as caught:
        open_runner(needs(tmp_path, version=wrong))
    assert wrong in caught.value.message
    assert installed in caught.value.message
    assert "sdrt build" in caught.value.hint


@pytest.mark.parametrize("suffix", ["99", "0-12345-abc", "0.dev1"])
def test_another_patch_of_the_backend_will_do(tmp_path, suffix):
    release = ".".join(version("openvino").split(".")[:2])
    with pytest.raises(BackendError, match="cannot open"):
        open_runner(needs(tmp_path, version=f"{release}.{suffix}"))


def test_a_backend_that_is_not_installed_is_named_with_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackendError, match="needs onnxruntime, which is not installed") as caught:
        open_runner(needs(tmp_path / "onnxruntime", name="onnxruntime"))
    assert 'pip install "sdrt[onnxruntime]"' in caught.value.hint
    with pytest.raises(BackendError, match="tensorrt_rtx is not installed") as caught:
        open_runner(needs(tmp_path / "tensorrt", name="tensorrt", features=("tensorrt_rtx",)))
    assert 'pip install "sdrt[tensorrt]"' in caught.value.hint


def test_a_backend_that_is_broken_is_a_backend_error(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(BackendError, match="cannot be loaded"):
        open_runner(needs(tmp_path))


def test_a_backend_from_a_distribution_of_another_name_tells_its_version_itself(tmp_path, monkeypatch):
    def unknown(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(runners, "version", unknown)
    with pytest.raises(BackendError, match="cannot open"):
        open_runner(needs(tmp_path))
    with pytest.raises(BundleError, match=r"built with openvino 2019\.1"):
        open_runner(needs(tmp_path / "other", version="2019.1"))


def test_features_that_the_cpu_lacks_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(runners, "cpu_features", lambda: frozenset({"avx2", "avx512f"}))
    with pytest.raises(BackendError, match="a CPU with amx_bf16, avx512_bf16") as caught:
        open_runner(needs(tmp_path, features=("avx512_bf16", "avx2", "amx_bf16")))
    assert "--precision fp32" in caught.value.hint


def test_features_that_the_cpu_has_are_enough(tmp_path, monkeypatch):
    monkeypatch.setattr(runners, "cpu_features", lambda: frozenset({"avx2", "avx512_bf16"}))
    with pytest.raises(BackendError, match="cannot open"):
        open_runner(needs(tmp_path, features=("avx512_bf16",)))


@pytest.mark.parametrize("threads", [0, -1])
def test_no_threads_is_a_request_error(tmp_path, threads):
    with pytest.raises(RequestError, match=f"threads is {threads}"):
        open_runner(needs(tmp_path), threads=threads)


def test_onnxruntime_that_falls_back_is_refused_on_opening(copied, monkeypatch):
    import onnxruntime

    monkeypatch.setattr(onnxruntime.InferenceSession, "get_providers", lambda self: ["OtherExecutionProvider"])
    with pytest.raises(BackendError, match="OtherExecutionProvider"):
        open_runner(copied("onnxruntime"), threads=1)


# Precision and threads


def openvino_property(runner, component, name):
    return runner._requests[component, False][0].get_compiled_model().get_property(name)


@pytest.mark.parametrize("threads", [1, 2])
def test_openvino_uses_the_threads_that_were_asked_for(tiny_bundle, threads, all_cores):
    """In a process of its own: OpenVINO counts the cores once, and a test process may have a share of them."""
    if threads > len(all_cores):
        pytest.skip(f"this machine has {len(all_cores)} core")
    code = (
        "import sys, sdrt\n"
        "with sdrt.open(sys.argv[1], threads=int(sys.argv[2])) as pipeline:\n"
        "    compiled = pipeline.runner._requests['step', False][0].get_compiled_model()\n"
        "    print(compiled.get_property('INFERENCE_NUM_THREADS'))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tiny_bundle), str(threads)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) == threads


def test_onnxruntime_uses_the_threads_that_were_asked_for(copied):
    with open_runner(copied("onnxruntime"), threads=2) as runner:
        assert runner._sessions["step"].get_session_options().intra_op_num_threads == 2


def test_by_default_every_core_is_used(copied):
    with open_runner(copied("onnxruntime")) as runner:
        assert runner._sessions["step"].get_session_options().intra_op_num_threads == cpu.available_cores()


def step_error(runner):
    feeds = step_feeds(timestep=(0.0, 0.0))
    wanted = expected_step(feeds)
    return np.abs(runner.run("step", feeds)["next_state"] - wanted).max() / np.abs(wanted).max()


def test_float32_is_float32_also_where_the_backend_would_choose_less(runner):
    assert step_error(runner) < 1e-6


@pytest.mark.skipif(cpu.native_precision() != "bf16", reason="this CPU does not compute in bfloat16")
def test_bf16_is_for_all_but_the_text_encoder(copied):
    with open_runner(copied("openvino", precision="bf16"), threads=1) as runner:
        hints = {
            name: openvino_property(runner, name, "INFERENCE_PRECISION_HINT").to_string()
            for name, _ in runner._requests
        }
        assert hints == {"text_encoder": "f32", "step": "bf16", "vae_decoder": "bf16"}
        assert 1e-4 < step_error(runner) < 2e-2


# The CPU


def cpuinfo(folder, text):
    path = folder / "cpuinfo"
    path.write_text(text)
    return path


def test_features_are_read_from_the_first_cpu(tmp_path):
    path = cpuinfo(
        tmp_path, "model name\t: Some CPU @ 2.0GHz\nflags\t\t: fpu avx2 avx512f avx512_bf16\n\nflags\t: sse\n"
    )
    assert cpu.cpu_features(path) == {"avx2", "avx512f", "avx512_bf16"}
    assert cpu.cpu_name(path) == "Some CPU @ 2.0GHz"


@pytest.mark.parametrize("text", ["", "flags\t:\n", "Features\t: fp asimd bf16\n", "flagship: avx2\n"])
def test_a_cpu_that_tells_nothing_has_no_features_but_a_name(tmp_path, text):
    assert cpu.cpu_features(cpuinfo(tmp_path, text)) == frozenset()
    assert cpu.cpu_name(cpuinfo(tmp_path, text))


def test_elsewhere_than_on_linux_there_are_no_features(tmp_path):
    assert cpu.cpu_features(tmp_path / "nowhere") == frozenset()
    assert cpu.cpu_name(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("features", "precision"),
    [
        ((), "fp32"),
        (("avx2", "avx512f", "avx512_vnni"), "fp32"),
        (("avx512f", "avx512_bf16"), "bf16"),
        (("amx_bf16",), "bf16"),
        (("amx_int8", "avx512_fp16"), "fp32"),
    ],
)
def test_the_native_precision_follows_the_features(monkeypatch, features, precision):
    monkeypatch.setattr(cpu, "cpu_features", lambda: frozenset(features))
    assert cpu.native_precision() == precision


@pytest.mark.parametrize(("features", "lanes"), [((), 8), (("avx2",), 8), (("avx2", "avx512f"), 16)])
def test_float32_lanes_follow_the_features(monkeypatch, features, lanes):
    monkeypatch.setattr(cpu, "cpu_features", lambda: frozenset(features))
    assert cpu.float32_lanes() == lanes


@pytest.mark.parametrize(("machine", "x86"), [("x86_64", True), ("AMD64", True), ("aarch64", False), ("arm64", False)])
def test_x86_goes_by_the_machine(monkeypatch, machine, x86):
    monkeypatch.setattr("platform.machine", lambda: machine)
    assert cpu.is_x86() is x86


def topology(folder, siblings):
    for number, text in siblings.items():
        (folder / f"cpu{number}" / "topology").mkdir(parents=True)
        (folder / f"cpu{number}" / "topology" / "thread_siblings_list").write_text(f"{text}\n")
    return folder


@pytest.mark.parametrize(
    ("allowed", "cores"), [({0, 1, 2, 3}, 2), ({0, 2}, 1), ({0, 1}, 2), ({1}, 1), ({0, 1, 8, 9}, 4)]
)
def test_threads_of_one_core_count_once_and_only_where_allowed(tmp_path, monkeypatch, allowed, cores):
    folder = topology(tmp_path, {0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"})
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: allowed)
    assert cpu.available_cores(folder) == cores


def test_a_system_that_does_not_tell_counts_logical_cpus(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert cpu.available_cores(tmp_path) == 6
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert cpu.available_cores(tmp_path) == 1
