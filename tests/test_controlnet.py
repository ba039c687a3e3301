"""ControlNets beside a checkpoint: exported with its UNet, part of its identity, and refused where they do not fit."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors import safe_open

from sdrt.cache import Store
from sdrt.engines.onnx_files import load_whole
from sdrt.errors import CheckpointError
from sdrt.export.checkpoint import component_hashes, identity_of, model_record, open_checkpoint
from sdrt.export.components import COMPONENTS
from sdrt.parity import max_relative

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def control(tiny_controlnets, tmp_path):
    return Path(shutil.copytree(tiny_controlnets[0], tmp_path / "control"))


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal(checkpoint, control):
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(checkpoint, [control])
    assert caught.value.hint
    return caught.value.message


def test_the_model_record_names_them_in_order(tiny_checkpoint, tiny_controlnets, tmp_path):
    record = model_record(open_checkpoint(tiny_checkpoint, tiny_controlnets[::-1]), Store(tmp_path / "cache"))
    assert (record.controlnets, record.control_features) == (("bgr", "rgb"), 16)


def test_the_scheduler_is_left_as_it_is_as_the_pipelines_with_controlnets_do(
    tiny_checkpoint, tiny_controlnets, tmp_path
):
    changed = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    config = changed / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"steps_offset": 0}))
    store = Store(tmp_path / "cache")
    steered, plain = (model_record(open_checkpoint(changed, each), store) for each in (tiny_controlnets, ()))
    assert (steered.scheduler_config["steps_offset"], plain.scheduler_config["steps_offset"]) == (0, 1)


def test_another_controlnet_is_another_model_and_another_network(tiny_checkpoint, tiny_controlnets, tmp_path):
    store = Store(tmp_path / "cache")
    first, second = tiny_controlnets
    opened = [open_checkpoint(tiny_checkpoint, each) for each in ((), (first,), (second,), (first, second))]
    assert len({identity_of(each, store) for each in opened}) == 4
    for component in ("unet", "controlnet"):
        assert len({json.dumps(component_hashes(each, component, store)) for each in opened}) == 4
    assert len({json.dumps(component_hashes(each, "vae", store)) for each in opened}) == 1


@pytest.mark.parametrize("shape", [(1, 3, 2), (4, 1, 1)], ids=str)
@pytest.mark.parametrize("name", ["unet", "control_embedding"])
def test_it_equals_pytorch_at_sizes_it_never_saw(name, shape, steered_export, tiny_checkpoint, tiny_controlnets):
    checkpoint = open_checkpoint(tiny_checkpoint, tiny_controlnets)
    spec = COMPONENTS[name]
    inputs = spec.examples(checkpoint, shape)
    with torch.no_grad():
        expected = spec.build(checkpoint)(**inputs).numpy()
    session = onnxruntime.InferenceSession(steered_export / name / "model.onnx")
    (actual,) = session.run([spec.output], {key: value.numpy() for key, value in inputs.items()})
    assert max_relative(actual, expected) < 1e-4


def test_every_weight_is_stored_whole(steered_export, tiny_controlnets):
    """Under the name of its network in the graph of the step, but for the embedding's, which are in that graph."""
    graphs = {name: load_whole(steered_export / name / "model.onnx").graph for name in ("unet", "control_embedding")}
    stored = {folder: {item.name: onnx_array(item) for item in graph.initializer} for folder, graph in graphs.items()}
    for index, folder in enumerate(tiny_controlnets):
        with safe_open(folder / WEIGHTS, "np") as file:
            for key in list(file.keys()):
                embedding = key.removeprefix("controlnet_cond_embedding.")
                where, name = (
                    ("unet", f"controlnets.{index}.{key}")
                    if embedding == key
                    else ("control_embedding", f"embeddings.{index}.{embedding}")
                )
                np.testing.assert_array_equal(stored[where][name], file.get_tensor(key), err_msg=name)


def onnx_array(initializer):
    import onnx

    return onnx.numpy_helper.to_array(initializer)


UNFIT = {
    "another class": ({"_class_name": "UNet2DConditionModel"}, "is a UNet2DConditionModel, not a ControlNetModel"),
    "one for another UNet": ({"block_out_channels": [16, 64]}, "block_out_channels = [16, 64], the UNet [16, 32]"),
    "one for other prompts": ({"cross_attention_dim": 64}, "cross_attention_dim = 64, the UNet 32"),
    "one of other depth": ({"layers_per_block": 2}, "layers_per_block = 2, the UNet 1"),
    "pictures of 4 channels": ({"conditioning_channels": 4}, "conditioning_channels = 4"),
    "latents of 9 channels": ({"in_channels": 9}, "takes 9 channels, the latents have 4"),
    "classes": ({"num_class_embeds": 10}, "num_class_embeds = 10"),
    "the inputs of SDXL": ({"addition_embed_type": "text_time"}, "addition_embed_type = 'text_time'"),
    "pooled conditions": ({"global_pool_conditions": True}, "global_pool_conditions = True"),
    "an unknown order": ({"controlnet_conditioning_channel_order": "hsv"}, "channel_order = 'hsv'"),
    "another factor": ({"conditioning_embedding_out_channels": [4, 8, 16]}, "brings its picture down by 4"),
}


@pytest.mark.parametrize(("changes", "named"), UNFIT.values(), ids=UNFIT)
def test_one_that_does_not_fit_is_refused_by_name(changes, named, tiny_checkpoint, control):
    edit(control / "config.json", **changes)
    message = refusal(tiny_checkpoint, control)
    assert named in message
    assert str(control) in message


def test_a_folder_that_is_not_there(tiny_checkpoint, tmp_path):
    assert "there is no ControlNet folder at" in refusal(tiny_checkpoint, tmp_path / "nowhere")


def test_a_folder_without_weights(tiny_checkpoint, control):
    (control / WEIGHTS).unlink()
    assert "holds no safetensors weights" in refusal(tiny_checkpoint, control)
    (control / "diffusion_pytorch_model.bin").write_bytes(b"")
    assert "only pickled weights" in refusal(tiny_checkpoint, control)


@pytest.mark.parametrize("keep", [0, 100, -1])
def test_a_half_downloaded_file(keep, tiny_checkpoint, control):
    (control / WEIGHTS).write_bytes((control / WEIGHTS).read_bytes()[:keep])
    assert WEIGHTS in refusal(tiny_checkpoint, control)


def test_a_variant_is_found_where_it_is_all_there_is(tiny_checkpoint, control):
    (control / WEIGHTS).rename(control / "diffusion_pytorch_model.fp16.safetensors")
    assert open_checkpoint(tiny_checkpoint, [control]).controlnets[0].variant == "fp16"


@pytest.mark.parametrize("channels", [7, 5, 8])
def test_a_checkpoint_for_what_no_controlnet_steers_is_refused(channels, tiny_checkpoint, control, tmp_path):
    checkpoint = Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))
    pipelines = {7: "Upscale", 5: "Depth2Img", 8: "InstructPix2Pix"}
    index = {"_class_name": f"StableDiffusion{pipelines[channels]}Pipeline"}
    config = {"in_channels": channels}
    if channels == 7:
        shutil.copytree(checkpoint / "scheduler", checkpoint / "low_res_scheduler")
        index["low_res_scheduler"], config["num_class_embeds"] = ["diffusers", "DDPMScheduler"], 400
    edit(checkpoint / "model_index.json", **index)
    edit(checkpoint / "unet" / "config.json", **config)
    assert "which no ControlNet steers" in refusal(checkpoint, control)
