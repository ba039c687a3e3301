"""The depth estimator on its way into a bundle: exported, built, measured, shown, and asked by a request."""

import json
import shutil
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image

import sdrt
from sdrt.bundle import read_manifest, write_manifest
from sdrt.cache import Store
from sdrt.cli import run_command
from sdrt.engines.build import BuildOptions, build_bundle
from sdrt.engines.onnx_folder import read_onnx_folder
from sdrt.engines.optimization import optimization_profiles
from sdrt.errors import BuildError, CheckpointError
from sdrt.export.checkpoint import component_hashes, identity_of, open_checkpoint
from sdrt.export.produce import export_component
from sdrt.progress import silent
from sdrt.verify import verify_bundle
from tests.component_source import source_of
from tests.conftest import make_tiny_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")


def picture(width=88, height=72):
    return Image.fromarray(np.random.default_rng(3).integers(0, 256, (height, width, 3), np.uint8))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A depth-to-image checkpoint with a DPT-hybrid, as stable-diffusion-2-depth has it."""
    folder = tmp_path_factory.mktemp("depth") / "model"
    pipeline = "StableDiffusionDepth2ImgPipeline"
    return make_tiny_checkpoint(folder, pipeline_class=pipeline, conditioning_channels=1, depth="hybrid")


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory):
    """Its depth estimator in ONNX, with golden results."""
    folder = tmp_path_factory.mktemp("depth_exported")
    export_component(open_checkpoint(checkpoint), "depth_estimator", folder, threads=1)
    return folder


@pytest.fixture(scope="module")
def onnx_folder(checkpoint, exported, tiny_export, tmp_path_factory):
    """An ONNX folder as another exporter leaves it: the tiny model with the estimator, and a UNet that sees depth."""
    folder = shutil.copytree(tiny_export, tmp_path_factory.mktemp("depth_onnx") / "onnx")
    shutil.rmtree(folder / "golden")
    (folder / "export.json").unlink()
    shutil.copytree(exported / "depth_estimator", folder / "depth_estimator")
    shutil.copytree(checkpoint / "feature_extractor", folder / "feature_extractor")
    let_see_depth(folder / "unet")
    return folder


def let_see_depth(unet):
    """Make the text-to-image UNet one of five channels, the fifth of which shifts the other four."""
    config = json.loads((unet / "config.json").read_text())
    (unet / "config.json").write_text(json.dumps(config | {"in_channels": 5}))
    model = onnx.load(unet / "model.onnx", load_external_data=False)
    for node in model.graph.node:
        node.input[:] = ["mixed" if name == "sample" else name for name in node.input]
    split = helper.make_tensor("split", TensorProto.INT64, [2], [4, 1])
    model.graph.initializer.append(split)
    nodes = [
        helper.make_node("Split", ["sample", "split"], ["latents", "depth"], axis=1),
        helper.make_node("Add", ["latents", "depth"], ["mixed"]),
        *model.graph.node,
    ]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    (sample,) = (value for value in model.graph.input if value.name == "sample")
    sample.type.tensor_type.shape.dim[1].dim_value = 5
    onnx.save(model, unet / "model.onnx")


@pytest.fixture(scope="module")
def bundle(onnx_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("depth_bundle") / "depth.sdrt"
    options = BuildOptions(backend="openvino", precision="fp32", sizes="64..128", batch="1..2", threads=1)
    build_bundle(onnx_folder, out, options, silent)
    return out


def reference_depth(checkpoint, image):
    """What transformers says of the image."""
    import torch
    from transformers import DPTForDepthEstimation, DPTImageProcessorPil

    model = DPTForDepthEstimation.from_pretrained(checkpoint / "depth_estimator").eval()
    processor = DPTImageProcessorPil.from_pretrained(checkpoint / "feature_extractor")
    with torch.no_grad():
        return model(processor(images=image, return_tensors="pt").pixel_values).predicted_depth[0].numpy()


def test_the_export_has_a_fixed_size_and_nothing_that_engines_do_not_build(exported):
    graph = onnx.load(exported / "depth_estimator" / "model.onnx", load_external_data=False).graph
    sides = [dim.dim_value for dim in graph.input[0].type.tensor_type.shape.dim]
    assert sides == [1, 3, 64, 64]
    assert graph.output[0].name == "predicted_depth"
    assert "BatchNormalization" not in {node.op_type for node in graph.node}  # BiT's weights are standardised already
    assert (exported / "golden" / "depth_estimator.npz").is_file()


def test_the_bundles_estimator_says_what_transformers_says(bundle, checkpoint):
    from sdrt.depth import estimate_depth

    with sdrt.open(bundle, threads=1) as pipeline:
        ours = estimate_depth(pipeline.runner, picture(), pipeline.bundle.manifest.model.depth_estimation)
    theirs = reference_depth(checkpoint, picture())
    assert np.ptp(theirs) > 0.1 * theirs.max()
    assert np.abs(ours - theirs).max() <= 1e-3 * theirs.max()


def test_a_request_without_a_depth_map_draws_what_one_with_the_estimated_map_draws(bundle, checkpoint):
    image = picture(80, 80)
    depth = reference_depth(checkpoint, image)
    asked = {"prompt": "a red circle", "image": image, "num_inference_steps": 3, "seed": [4, 9]}
    with sdrt.open(bundle, threads=1) as pipeline:
        estimated, given, turned = (
            pipeline.generate(sdrt.Request(**asked, **brought)).images
            for brought in ({}, {"depth_map": depth}, {"depth_map": depth[::-1]})
        )
    for one, same, other in zip(estimated, given, turned, strict=True):
        assert np.abs(np.asarray(one, int) - np.asarray(same, int)).max() <= 1
        assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() > 4


def test_inspect_shows_it(bundle, capsys):
    assert run_command(["inspect", str(bundle)]) == 0
    said = capsys.readouterr().out
    assert "estimated from the image (64x64)" in said
    assert "depth_estimator" in said


def test_verify_draws_the_golden_image_of_its_own_picture_and_depth(bundle):
    found = verify_bundle(sdrt.Bundle.open(bundle), threads=1)
    assert found.parity.measured <= found.parity.bound


def test_run_needs_no_depth(bundle, tmp_path):
    picture(96, 80).save(tmp_path / "x.png")
    options = ["--image", str(tmp_path / "x.png"), "--steps", "2", "--out", str(tmp_path / "out.png")]
    assert run_command(["run", str(bundle), "a red circle", *options]) == 0
    assert Image.open(tmp_path / "out.png").size == (96, 80)


def test_a_foreign_folder_without_it_takes_maps_as_before(onnx_folder, tmp_path):
    plain = shutil.copytree(onnx_folder, tmp_path / "onnx")
    shutil.rmtree(plain / "depth_estimator")
    folder = read_onnx_folder(plain)
    assert folder.model.depth_estimation is None
    assert "depth_estimator" not in folder.components
    assert "depth_estimator" in read_onnx_folder(onnx_folder).components


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        ("feature_extractor/preprocessor_config.json", "preprocessor_config.json"),
        ("depth_estimator/config.json", "config"),
    ],
)
def test_a_foreign_folder_with_half_of_it_is_refused(onnx_folder, tmp_path, lost, said):
    half = shutil.copytree(onnx_folder, tmp_path / "onnx")
    (half / lost).unlink()
    with pytest.raises(CheckpointError, match=said):
        read_onnx_folder(half)


def test_another_image_processor_is_another_model_and_another_export(checkpoint, tmp_path):
    changed = shutil.copytree(checkpoint, tmp_path / "model")
    file = changed / "feature_extractor" / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"resample": 2}))
    store = Store(tmp_path / "cache")
    one, other = open_checkpoint(checkpoint), open_checkpoint(changed)
    assert identity_of(one, store) != identity_of(other, store)
    differs = {
        name for name in one.weights if component_hashes(one, name, store) != component_hashes(other, name, store)
    }
    assert differs == {"depth_estimator"}


def test_a_field_of_the_processor_that_is_not_honoured_stops_the_build(checkpoint, tmp_path):
    changed = shutil.copytree(checkpoint, tmp_path / "model")
    file = changed / "feature_extractor" / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"do_center_crop": True}))
    with pytest.raises(CheckpointError, match="do_center_crop is True"):
        open_checkpoint(changed)


@pytest.mark.parametrize(
    ("entry", "expected"),
    [([None, None], None), (["transformers", "GLPNForDepthEstimation"], "GLPNForDepthEstimation")],
)
def test_the_index_says_whether_there_is_one(checkpoint, tmp_path, entry, expected):
    changed = shutil.copytree(checkpoint, tmp_path / "model")
    index = json.loads((changed / "model_index.json").read_text())
    (changed / "model_index.json").write_text(json.dumps(index | {"depth_estimator": entry}))
    if expected is None:
        opened = open_checkpoint(changed)
        assert opened.depth_estimation is None
        assert "depth_estimator" not in opened.weights
        return
    with pytest.raises(CheckpointError, match=expected):
        open_checkpoint(changed)


def test_a_manifest_that_tells_of_an_estimator_and_has_none_is_not_written(bundle, tmp_path):
    manifest = read_manifest(bundle)
    others = tuple(component for component in manifest.components if component.name != "depth_estimator")
    with pytest.raises(BuildError, match="no engine depth_estimator"):
        write_manifest(tmp_path, replace(manifest, components=others))


def test_tensorrt_gets_a_profile_of_all_that_images_become(bundle):
    opened = sdrt.Bundle.open(bundle)
    record = opened.component("depth_estimator")
    estimation = opened.manifest.model.depth_estimation
    source = replace(source_of(opened, "depth_estimator"), depth_estimation=estimation)
    (fixed,) = optimization_profiles(source, record.inputs)
    assert fixed.shapes == {"pixel_values": ((1, 3, 64, 64),) * 3}
    free = replace(source, depth_estimation=replace(estimation, keep_aspect_ratio=True, takes=None))
    (spec,) = record.inputs
    (ranged,) = optimization_profiles(free, [replace(spec, shape=(1, 3, "height", "width"))])
    assert ranged.shapes == {"pixel_values": ((1, 3, 32, 32), (1, 3, 64, 64), (1, 3, 128, 128))}
