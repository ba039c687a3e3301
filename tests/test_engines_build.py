"""Building: what is sealed and why, what a rebuild reuses, and what is refused."""

import json
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from sdrt.bundle import Bundle, verify_files
from sdrt.engines import build, components, evidence
from sdrt.engines.build import BuildOptions, build_bundle
from sdrt.engines.openvino import OpenVinoBuilder
from sdrt.errors import BuildError, Cancelled, CheckpointError, OutputError, ParityError, RequestError
from sdrt.pipeline import Pipeline
from sdrt.progress import silent
from sdrt.runners.base import VAE_DECODER_FLOAT32
from sdrt.runners.cpu import native_precision

OPTIONS = BuildOptions(backend="openvino", precision="fp32", sizes="64..128", threads=1)
COMPONENTS = ["text_encoder", "step", "vae_decoder", "vae_encoder"]


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """A build cache that this test alone fills."""
    monkeypatch.setenv("SDRT_CACHE", str(tmp_path / "own cache"))


@pytest.fixture
def onnx_folder(tiny_export, tmp_path):
    """A copy of the exported model that a test may damage."""
    return shutil.copytree(tiny_export, tmp_path / "model")


@pytest.fixture
def count_builds(monkeypatch):
    """The names of the components that are built, not fetched."""
    built = []
    original = OpenVinoBuilder.build

    def counted(self, source, precision, folder, **options):
        built.append(source.name)
        return original(self, source, precision, folder, **options)

    monkeypatch.setattr(OpenVinoBuilder, "build", counted)
    return built


def leftovers(out):
    return sorted(path.name for path in out.parent.iterdir() if path.name.startswith((".", out.name)))


def build_with(onnx_folder, out, **changes):
    from dataclasses import replace

    return build_bundle(onnx_folder, out, replace(OPTIONS, **changes), silent)


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_a_sealed_bundle_holds_its_evidence(tiny_export, tmp_path, backend):
    out = tmp_path / "a.sdrt"
    manifest = build_with(tiny_export, out, backend=backend)
    bundle = Bundle.open(out)
    assert bundle.manifest == manifest
    verify_files(bundle)
    assert [component.name for component in manifest.components] == COMPONENTS
    for component in manifest.components:
        assert component.parity.metric == "max_relative"
        assert 0 <= component.parity.measured <= component.parity.bound <= 2e-4
    assert manifest.golden.parity.metric == "max_absolute"
    assert manifest.golden.parity.measured <= manifest.golden.parity.bound <= 1 / 255
    assert manifest.golden.reference.startswith("PyTorch")
    assert manifest.backend.name == backend
    assert leftovers(out) == ["a.sdrt"]
    assert not any(path.is_symlink() for path in out.rglob("*"))


def test_the_manifest_names_the_steps_border(tiny_bundle):
    step = Bundle.open(tiny_bundle).component("step")
    border = {spec.name: (spec.dtype, spec.shape) for spec in (*step.inputs, *step.outputs)}
    assert border == {
        "state": ("float32", ("requests", 6, 4, "height", "width")),
        "input_scale": ("float32", ("requests",)),
        "lane_request": ("int64", ("lanes",)),
        "timestep": ("float32", ("lanes",)),
        "prompt_embeds": ("float32", ("lanes", "length", 32)),
        "guidance": ("float32", ("requests", "lanes")),
        "rescale_lanes": ("float32", ("requests", "lanes")),
        "guidance_rescale": ("float32", ("requests",)),
        "clamp": ("float32", ("requests", 3)),
        "transition": ("float32", ("requests", 6, 9)),
        "noise": ("float32", ("requests", 4, "height", "width")),
        "mask": ("float32", ("requests", 1, "height", "width")),
        "known": ("float32", ("requests", 2, 4, "height", "width")),
        "known_weights": ("float32", ("requests", 2)),
        "next_state": ("float32", ("requests", 6, 4, "height", "width")),
    }


@pytest.mark.skipif(native_precision() != "bf16", reason="this CPU does not compute in bf16")
def test_auto_is_openvino_in_bf16_where_the_cpu_has_it_and_states_what_it_needs(tiny_export, tmp_path):
    manifest = build_with(tiny_export, tmp_path / "a.sdrt", backend="auto", precision="auto")
    assert (manifest.backend.name, manifest.precision) == ("openvino", "bf16")
    assert manifest.backend.features in [("avx512_bf16",), ("amx_bf16",)]
    assert manifest.golden.parity.metric == "psnr_db"
    assert manifest.golden.parity.measured >= manifest.golden.parity.bound == 35


def test_auto_is_float32_where_the_cpu_has_no_bf16(monkeypatch):
    from sdrt.engines.precision import choose_builder, choose_precision
    from sdrt.runners import cpu

    monkeypatch.setattr(cpu, "cpu_features", frozenset)
    builder = choose_builder("auto")
    assert choose_precision("auto", builder) == "fp32"
    with pytest.raises(BuildError, match="bf16"):
        choose_precision("bf16", builder)


@pytest.mark.parametrize(
    ("backend", "precision"), [("onnxruntime", "bf16"), ("openvino", "int8"), ("openvino", "fp16")]
)
def test_an_unsupported_pair_is_a_build_error_that_names_the_choices(tiny_export, tmp_path, backend, precision):
    with pytest.raises(BuildError, match=precision) as refusal:
        build_with(tiny_export, tmp_path / "a.sdrt", backend=backend, precision=precision)
    assert "fp32" in refusal.value.hint


def test_onnxruntime_in_fp16_is_the_mixed_graph_and_nothing_beside_it(tiny_export, tmp_path):
    manifest = build_with(tiny_export, tmp_path / "a.sdrt", backend="onnxruntime", precision="fp16")
    assert (manifest.precision, manifest.backend.device, manifest.device_verified) == ("fp16", "cpu", True)
    assert manifest.golden.parity.measured >= manifest.golden.parity.bound == 35
    for component in manifest.components:
        graph = onnx.load(tmp_path / "a.sdrt" / component.files[0].path, load_external_data=False).graph
        assert {spec.dtype for spec in component.outputs} == {"float32"}
        halves = onnx.TensorProto.FLOAT16 in {weight.data_type for weight in graph.initializer}
        assert halves is (component.name != VAE_DECODER_FLOAT32)
        if halves:
            assert component.islands.by_rule["statistics"] > 0
        else:
            assert component.islands is None
            assert component.parity.measured <= component.parity.bound == 2e-4
    verify_files(Bundle.open(tmp_path / "a.sdrt"))
    assert not list((tmp_path / "a.sdrt").rglob("emulated*"))


def test_a_network_with_controlnets_and_what_they_see_are_mixed_graphs_too(steered_export, tmp_path):
    manifest = build_with(steered_export, tmp_path / "a.sdrt", backend="onnxruntime", precision="fp16", sizes="64x64")
    assert manifest.golden.parity.measured >= manifest.golden.parity.bound == 35
    found = {component.name: component for component in manifest.components}
    for name in ("step", "control_embedding"):
        assert 0 < found[name].parity.measured <= found[name].parity.bound == 1e-2
        graph = onnx.load(tmp_path / "a.sdrt" / found[name].files[0].path, load_external_data=False).graph
        halves = {weight.name for weight in graph.initializer if weight.data_type == onnx.TensorProto.FLOAT16}
        assert any(weight.startswith(("controlnets.1.", "embeddings.1.")) for weight in halves)
    borders = {spec.name: (spec.dtype, spec.shape) for spec in found["step"].inputs}
    assert borders["control"] == ("float32", ("requests", 2, 16, "height", "width"))
    assert borders["control_scales"] == ("float32", ("requests", 2))


@pytest.mark.parametrize("changes", [{"backend": "cuda"}, {"precision": "fp8"}, {"sizes": "65x64"}, {"batch": "0"}])
def test_impossible_options_are_refused_before_anything_is_written(tiny_export, tmp_path, changes):
    with pytest.raises(RequestError):
        build_with(tiny_export, tmp_path / "a.sdrt", **changes)
    assert list(tmp_path.iterdir()) == []


def test_a_rebuild_builds_nothing_and_measures_nothing(tiny_export, tmp_path, own_cache, count_builds, monkeypatch):
    first = build_with(tiny_export, tmp_path / "a.sdrt")
    assert count_builds == COMPONENTS
    monkeypatch.setattr(evidence, "_measure", lambda *_: pytest.fail("measured again"))
    started = time.monotonic()
    second = build_with(tiny_export, tmp_path / "b.sdrt")
    assert time.monotonic() - started < 3
    assert count_builds == COMPONENTS
    assert second == first
    verify_files(Bundle.open(tmp_path / "b.sdrt"))


def test_other_sizes_need_no_engine_to_be_built_again(tiny_export, tmp_path, own_cache, count_builds):
    build_with(tiny_export, tmp_path / "a.sdrt")
    build_with(tiny_export, tmp_path / "b.sdrt", sizes="64x64", batch="1..2")
    assert count_builds == COMPONENTS


def test_a_change_of_one_component_rebuilds_only_that_one(onnx_folder, tmp_path, own_cache, count_builds):
    build_with(onnx_folder, tmp_path / "a.sdrt")
    model = onnx.load(onnx_folder / "vae_decoder" / "model.onnx", load_external_data=False)
    model.doc_string = "another one"
    onnx.save(model, onnx_folder / "vae_decoder" / "model.onnx")
    build_with(onnx_folder, tmp_path / "b.sdrt")
    assert count_builds == [*COMPONENTS, "vae_decoder"]


def test_a_change_of_the_weights_alone_is_noticed(onnx_folder, tmp_path, own_cache, count_builds):
    build_with(onnx_folder, tmp_path / "a.sdrt")
    weights = onnx_folder / "unet" / "model.onnx.data"
    scaled = np.fromfile(weights, np.float32) * np.float32(1.5)
    scaled.tofile(weights)
    with pytest.raises(ParityError, match="step"):
        build_with(onnx_folder, tmp_path / "b.sdrt")
    assert count_builds == [*COMPONENTS, "step"]
    assert leftovers(tmp_path / "b.sdrt") == []


@pytest.mark.parametrize("name", ["text_encoder", "unet", "vae_decoder", "vae_encoder"])
def test_a_component_that_disagrees_with_its_reference_is_not_sealed(onnx_folder, tmp_path, name):
    golden = onnx_folder / "golden" / f"{name}.npz"
    arrays = dict(np.load(golden))
    output = next(key for key in arrays if key.startswith("output."))
    arrays[output] = arrays[output] * np.float32(1.001)
    np.savez(golden, **arrays)
    with pytest.raises(ParityError) as refusal:
        build_with(onnx_folder, tmp_path / "a.sdrt")
    assert refusal.value.hint
    assert leftovers(tmp_path / "a.sdrt") == []


def test_an_image_that_is_two_levels_off_is_not_sealed(onnx_folder, tmp_path):
    golden = onnx_folder / "golden" / "image.npz"
    image = np.load(golden)["image"]
    image[3, 5, 1] = image[3, 5, 1] - 2 if image[3, 5, 1] > 100 else image[3, 5, 1] + 2
    np.savez(golden, image=image)
    with pytest.raises(ParityError, match="golden image"):
        build_with(onnx_folder, tmp_path / "a.sdrt")
    assert leftovers(tmp_path / "a.sdrt") == []


def test_a_failed_seal_is_not_remembered_as_evidence(onnx_folder, tmp_path, own_cache):
    golden = onnx_folder / "golden" / "image.npz"
    good = golden.read_bytes()
    np.savez(golden, image=255 - np.load(golden)["image"])
    for _ in range(2):
        with pytest.raises(ParityError):
            build_with(onnx_folder, tmp_path / "a.sdrt")
    golden.write_bytes(good)
    build_with(onnx_folder, tmp_path / "a.sdrt")


def test_golden_results_that_are_not_finite_are_not_met(onnx_folder, tmp_path):
    golden = onnx_folder / "golden" / "vae_decoder.npz"
    arrays = dict(np.load(golden))
    arrays["output.sample"][0, 0, 0, 0] = np.nan
    np.savez(golden, **arrays)
    with pytest.raises(ParityError, match="vae_decoder"):
        build_with(onnx_folder, tmp_path / "a.sdrt")


@pytest.mark.parametrize("damage", [b"", b"not a zip", None])
def test_damaged_golden_results_are_a_build_error(onnx_folder, tmp_path, damage):
    golden = onnx_folder / "golden" / "text_encoder.npz"
    golden.write_bytes(golden.read_bytes()[:-200]) if damage is None else golden.write_bytes(damage)
    with pytest.raises(BuildError, match="text_encoder"):
        build_with(onnx_folder, tmp_path / "a.sdrt")
    assert leftovers(tmp_path / "a.sdrt") == []


def test_a_profile_without_the_golden_size_is_sealed_by_onnx_runtime_and_says_so(tiny_export, tmp_path):
    manifest = build_with(tiny_export, tmp_path / "a.sdrt", sizes="96x128")
    assert (manifest.golden.height, manifest.golden.width) == (128, 96)
    assert "PyTorch" in manifest.golden.reference
    assert "the image: ONNX Runtime" in manifest.golden.reference
    assert manifest.golden.parity.measured <= 1 / 255


def make_foreign(folder):
    """What Hugging Face Optimum writes: no golden results, an int64 timestep, sizes and channels all symbolic."""
    shutil.rmtree(folder / "golden")
    (folder / "export.json").unlink()
    path = folder / "unet" / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        node.input[:] = ["t_float" if name == "timestep" else name for name in node.input]
    nodes = [helper.make_node("Cast", ["timestep"], ["t_float"], to=TensorProto.FLOAT), *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    for value in model.graph.input:
        if value.name == "timestep":
            value.type.tensor_type.elem_type = TensorProto.INT64
            value.type.tensor_type.shape.dim[0].dim_param = "steps"
        if value.name == "sample":
            value.type.tensor_type.shape.dim[1].dim_param = "num_channels"
    onnx.save(model, path)
    return folder


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_a_folder_of_another_exporter_is_sealed_against_onnx_runtime(onnx_folder, tmp_path, tiny_bundle, backend):
    manifest = build_with(make_foreign(onnx_folder), tmp_path / "a.sdrt", backend=backend)
    assert manifest.golden.reference.startswith("ONNX Runtime")
    assert "given ONNX" in manifest.golden.reference
    own = Bundle.open(tiny_bundle).manifest.model
    assert manifest.model.size_multiple == 16  # another exporter's UNet may know no size off its grid
    for name in ("latent_channels", "vae_downsample", "vae_scaling_factor", "prompt_embeds_dim"):
        assert getattr(manifest.model, name) == getattr(own, name)
    options = {"seed": 3, "num_inference_steps": 2, "height": 64, "width": 96}
    with Pipeline.open(tmp_path / "a.sdrt", threads=1) as foreign, Pipeline.open(tiny_bundle, threads=1) as exported:
        one, other = (pipeline.generate("a red circle", **options) for pipeline in (foreign, exported))
    assert np.abs(np.asarray(one.images[0], int) - np.asarray(other.images[0], int)).max() <= 1


@pytest.mark.parametrize(
    "missing", ["unet/model.onnx", "vae_decoder/model.onnx", "tokenizer", "text_encoder/model.onnx"]
)
def test_an_incomplete_folder_says_what_it_lacks(onnx_folder, tmp_path, missing):
    path = onnx_folder / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(CheckpointError, match=missing):
        build_with(onnx_folder, tmp_path / "a.sdrt")


def test_a_folder_that_is_none_is_refused(tmp_path):
    with pytest.raises(CheckpointError):
        build_with(tmp_path / "nowhere", tmp_path / "a.sdrt")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format_version": 1}', '{"format_version": "one"}', "\xff"])
def test_a_damaged_export_record_is_refused(onnx_folder, tmp_path, content):
    (onnx_folder / "export.json").write_text(content, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"export\.json"):
        build_with(onnx_folder, tmp_path / "a.sdrt")


@pytest.mark.parametrize("content", [b"", b"\x00" * 100, b"<html>", None])
@pytest.mark.parametrize("name", ["unet", "vae_encoder"])
def test_a_damaged_graph_is_refused(onnx_folder, tmp_path, name, content):
    path = onnx_folder / name / "model.onnx"
    path.write_bytes(path.read_bytes()[:5000] if content is None else content)
    with pytest.raises(BuildError, match=r"model\.onnx"):
        build_with(onnx_folder, tmp_path / "a.sdrt")
    assert leftovers(tmp_path / "a.sdrt") == []


def test_weights_cut_short_are_refused(onnx_folder, tmp_path):
    weights = onnx_folder / "unet" / "model.onnx.data"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(BuildError, match="its model needs"):
        build_with(onnx_folder, tmp_path / "a.sdrt")


def test_weights_that_are_gone_are_refused(onnx_folder, tmp_path):
    (onnx_folder / "vae_decoder" / "model.onnx.data").unlink()
    with pytest.raises(BuildError, match="does not exist"):
        build_with(onnx_folder, tmp_path / "a.sdrt")


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "a/../../secret", "C:\\secret", "..\\secret", ""])
def test_weights_outside_their_folder_are_refused(onnx_folder, tmp_path, location):
    (onnx_folder / "secret").write_bytes(b"\0" * 10_000_000)
    path = onnx_folder / "unet" / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    weight = next(weight for weight in model.graph.initializer if weight.external_data)
    next(entry for entry in weight.external_data if entry.key == "location").value = location
    onnx.save(model, path)
    with pytest.raises(BuildError, match="outside"):
        build_with(onnx_folder, tmp_path / "a.sdrt")


def test_weights_linked_from_outside_their_folder_are_refused(onnx_folder, tmp_path):
    weights = onnx_folder / "unet" / "model.onnx.data"
    weights.rename(tmp_path / "elsewhere")
    weights.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BuildError, match="link"):
        build_with(onnx_folder, tmp_path / "a.sdrt")


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_the_links_of_a_hugging_face_cache_become_files(tiny_export, tmp_path, backend):
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "0123", tmp_path / "models--x" / "blobs"
    shutil.copytree(tiny_export, snapshot)
    blobs.mkdir()
    for number, path in enumerate(sorted(path for path in snapshot.rglob("*") if path.is_file())):
        path.rename(blobs / str(number))
        path.symlink_to(blobs / str(number))
    build_with(snapshot, tmp_path / "a.sdrt", backend=backend)
    shutil.rmtree(tmp_path / "models--x")
    assert not any(path.is_symlink() for path in (tmp_path / "a.sdrt").rglob("*"))
    verify_files(Bundle.open(tmp_path / "a.sdrt"))
    shutil.move(tmp_path / "a.sdrt", tmp_path / "moved.sdrt")
    with Pipeline.open(tmp_path / "moved.sdrt", threads=1) as pipeline:
        pipeline.generate("a red circle", seed=0, num_inference_steps=1, height=64, width=64)


def test_a_bundle_that_exists_is_not_touched(tiny_export, tmp_path):
    out = tmp_path / "a.sdrt"
    out.mkdir()
    (out / "precious").write_text("mine")
    with pytest.raises(OutputError):
        build_with(tiny_export, out)
    with pytest.raises(OutputError, match="did not make"):
        build_with(tiny_export, out, overwrite=True)
    assert (out / "precious").read_text() == "mine"


def test_a_bundle_is_replaced_on_request(tiny_export, tmp_path):
    out = tmp_path / "a.sdrt"
    build_with(tiny_export, out)
    (out / "note").write_text("old")
    build_with(tiny_export, out, overwrite=True)
    assert not (out / "note").exists()


def test_a_failed_overwrite_keeps_the_old_bundle(onnx_folder, tmp_path):
    out = tmp_path / "a.sdrt"
    build_with(onnx_folder, out)
    np.savez(onnx_folder / "golden" / "image.npz", image=np.zeros((64, 64, 3), np.uint8))
    with pytest.raises(ParityError):
        build_with(onnx_folder, out, overwrite=True)
    verify_files(Bundle.open(out))


def test_a_target_that_cannot_be_written_is_refused_before_anything_is_built(tiny_export, tmp_path, count_builds):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "no folder" / "a.sdrt", tmp_path / "file" / "a.sdrt"):
        with pytest.raises(OutputError):
            build_with(tiny_export, out)
    assert count_builds == []


def test_ctrl_c_is_cancelled_and_leaves_nothing_but_finished_engines(
    tiny_export, tmp_path, own_cache, count_builds, monkeypatch
):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(build, "gather_evidence", interrupt)
        with pytest.raises(Cancelled):
            build_with(tiny_export, tmp_path / "a.sdrt")
    assert leftovers(tmp_path / "a.sdrt") == []
    build_with(tiny_export, tmp_path / "a.sdrt")
    assert count_builds == COMPONENTS


def test_a_full_disk_is_an_output_error(tiny_export, tmp_path, own_cache, monkeypatch):
    import errno

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(components.Store, "keep", full)
    with pytest.raises(OutputError, match="full"):
        build_with(tiny_export, tmp_path / "a.sdrt")
    assert leftovers(tmp_path / "a.sdrt") == []


def test_progress_counts_up_to_the_end_of_every_stage(tiny_export, tmp_path, own_cache):
    seen = []
    build_bundle(tiny_export, tmp_path / "a.sdrt", OPTIONS, lambda *report: seen.append(report))
    stages = list(dict.fromkeys(stage for stage, _, _ in seen))
    assert stages == ["engines", "reference", "parity"]
    for stage in stages:
        counts = [(done, total) for name, done, total in seen if name == stage]
        assert counts == sorted(counts)
        assert counts[-1][0] == counts[-1][1]


def test_the_stage_speaks_the_child_protocol(tiny_export, tmp_path):
    command = [sys.executable, "-m", "sdrt.engines", str(tiny_export), str(tmp_path / "a.sdrt")]
    options = ["--precision", "fp32", "--sizes", "64..128", "--threads", "1"]
    done = subprocess.run([*command, *options], capture_output=True, text=True)
    messages = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0
    assert any("progress" in message for message in messages)
    assert messages[-1]["result"]["manifest"]["precision"] == "fp32"
    again = subprocess.run([*command, *options], capture_output=True, text=True)
    assert again.returncode == 1
    assert json.loads(again.stdout.splitlines()[-1])["error"]["kind"] == "OutputError"
