"""Checkpoints that cannot be exported are refused by name, before PyTorch is loaded where files alone can tell."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from sdrt.errors import CheckpointError
from sdrt.export.checkpoint import open_checkpoint
from sdrt.export.golden import golden_request

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def checkpoint(tiny_checkpoint, tmp_path):
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))


def refusal(path):
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert caught.value.hint
    return caught.value.message


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_whole_checkpoint_is_accepted(checkpoint):
    assert open_checkpoint(checkpoint).default_size == (64, 64)


def test_a_missing_folder(tmp_path):
    assert "no checkpoint at" in refusal(tmp_path / "absent")


def test_a_single_file(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert "is a file" in refusal(tmp_path / "model.safetensors")


@pytest.mark.parametrize("name", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
def test_a_missing_or_malformed_config(checkpoint, name):
    (checkpoint / name).write_text("{")
    assert "not valid JSON" in refusal(checkpoint)
    (checkpoint / name).unlink()
    assert "missing" in refusal(checkpoint)


@pytest.mark.parametrize("name", ["text_encoder", "unet", "vae", "tokenizer", "scheduler"])
def test_a_missing_component(checkpoint, name):
    shutil.rmtree(checkpoint / name)
    assert name in refusal(checkpoint)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_half_downloaded_file(checkpoint, keep):
    content = (checkpoint / UNET).read_bytes()
    (checkpoint / UNET).write_bytes(content[:keep])
    assert "diffusion_pytorch_model.safetensors" in refusal(checkpoint)


def test_a_download_that_goes_on(checkpoint):
    (checkpoint / "unet" / "weights.safetensors.incomplete").write_bytes(b"")
    assert "half-finished download" in refusal(checkpoint)


def test_pickled_weights_are_not_loaded(checkpoint):
    (checkpoint / UNET).unlink()
    (checkpoint / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"")
    assert "pickled" in refusal(checkpoint)


@pytest.mark.parametrize(
    ("pipeline", "kind"),
    [
        ("StableDiffusionXLPipeline", "Stable Diffusion XL"),
        ("StableDiffusionUpscalePipeline", "its UNet is one for text-to-image"),
        ("FluxPipeline", "Flux"),
        ("AnotherPipeline", "AnotherPipeline"),
    ],
)
def test_another_architecture_is_named(checkpoint, pipeline, kind):
    edit(checkpoint / "model_index.json", _class_name=pipeline)
    assert kind in refusal(checkpoint)


@pytest.mark.parametrize(
    ("channels", "kind"), [(9, "inpainting"), (7, "upscaling"), (5, "depth-to-image"), (6, "takes 2 channels")]
)
def test_a_unet_with_other_channels_is_named_by_its_task(checkpoint, channels, kind):
    edit(checkpoint / "unet" / "config.json", in_channels=channels)
    assert kind in refusal(checkpoint)


@pytest.mark.parametrize("option", ["num_class_embeds", "addition_embed_type", "time_cond_proj_dim"])
def test_a_unet_with_other_inputs_is_refused(checkpoint, option):
    edit(checkpoint / "unet" / "config.json", **{option: 4})
    assert option in refusal(checkpoint)


@pytest.mark.parametrize("shard", ["../vae/x.safetensors", "/etc/passwd", "a\\b", "a\0b"])
def test_a_shard_outside_its_folder_is_refused(checkpoint, shard):
    (checkpoint / UNET).unlink()
    index = checkpoint / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": shard}}))
    assert "outside" in refusal(checkpoint)


def test_a_missing_shard_is_named(checkpoint):
    (checkpoint / UNET).unlink()
    index = checkpoint / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": "diffusion_pytorch_model-1.safetensors"}}))
    assert "diffusion_pytorch_model-1.safetensors is missing" in refusal(checkpoint)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": {}}', '{"weight_map": [1]}', '{"weight_map": {"a": 1}}'])
def test_an_index_without_files_is_refused(checkpoint, content):
    (checkpoint / UNET).unlink()
    (checkpoint / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(content)
    assert "names no files" in refusal(checkpoint)


def test_an_old_index_beside_a_single_file_is_named_because_diffusers_would_follow_it(checkpoint):
    index = checkpoint / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": "diffusion_pytorch_model-1.safetensors"}}))
    with pytest.raises(CheckpointError, match="which the weight index names") as caught:
        open_checkpoint(checkpoint)
    assert "beside a single file, delete the index" in caught.value.hint


def test_weights_under_another_name_are_named(checkpoint):
    (checkpoint / UNET).rename(checkpoint / "unet" / "my_unet.safetensors")
    assert "holds my_unet.safetensors alone, under no name that is loaded" in refusal(checkpoint)


def test_a_pipeline_with_a_controlnet_in_it_says_how_to_build_it(checkpoint):
    edit(checkpoint / "model_index.json", _class_name="StableDiffusionControlNetPipeline")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(checkpoint)
    assert "--controlnet FOLDER/controlnet" in caught.value.hint


def test_an_inpainting_network_under_another_pipelines_name_says_which_name_it_needs(checkpoint):
    edit(checkpoint / "unet" / "config.json", in_channels=9)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(checkpoint)
    assert "name StableDiffusionInpaintPipeline as _class_name in model_index.json" in caught.value.hint


@pytest.mark.parametrize(
    ("scheduler", "changes", "reason"),
    [
        ("ImaginaryScheduler", {}, "ImaginaryScheduler"),
        ("PNDMScheduler", {"beta_schedule": "wavy"}, "wavy"),
        ("PNDMScheduler", {"skip_prk_steps": False, "num_train_timesteps": 2}, "cannot be planned"),
    ],
)
def test_a_scheduler_that_cannot_be_planned_is_refused_before_anything_is_exported(
    checkpoint, scheduler, changes, reason
):
    index = json.loads((checkpoint / "model_index.json").read_text())
    edit(checkpoint / "model_index.json", scheduler=[index["scheduler"][0], scheduler])
    edit(checkpoint / "scheduler" / "scheduler_config.json", **changes)
    with pytest.raises(CheckpointError, match=reason) as caught:
        golden_request(open_checkpoint(checkpoint), None)
    assert "cannot be planned" in caught.value.message


def test_a_scheduler_that_needs_four_steps_is_given_four(checkpoint, monkeypatch):
    monkeypatch.setattr("sdrt.export.golden.LARGE_BYTES", 0)
    assert golden_request(open_checkpoint(checkpoint), None).num_inference_steps == 2
    edit(checkpoint / "scheduler" / "scheduler_config.json", skip_prk_steps=False)
    assert golden_request(open_checkpoint(checkpoint), None).num_inference_steps == 4


@pytest.mark.parametrize(
    ("component", "weight"),
    [
        ("unet", "conv_out.weight"),
        ("vae", "decoder.conv_in.bias"),
        ("text_encoder", "encoder.layers.0.layer_norm1.weight"),
    ],
)
def test_a_weight_that_is_not_there_is_named_and_not_invented(checkpoint, component, weight):
    change_weights(checkpoint, component, lambda weights: weights.pop(weight))
    assert f"lacks weights: {weight}" in loading(checkpoint, component)


def test_a_weight_of_another_shape_is_named(checkpoint):
    change_weights(checkpoint, "unet", lambda weights: weights.update({"conv_out.bias": np.zeros(7, np.float32)}))
    assert "conv_out.bias" in loading(checkpoint, "unet")


def test_an_adapter_that_was_saved_with_it_is_named(checkpoint):
    def wrapped(weights):
        names = [name for name in weights if name.endswith("to_q.weight")]
        for name in names:
            weights[name.replace("to_q.weight", "to_q.base_layer.weight")] = weights.pop(name)

    change_weights(checkpoint, "unet", wrapped)
    with pytest.raises(CheckpointError, match=r"to_q\.weight and") as caught:
        load(checkpoint, "unet")
    assert "unload_lora_weights()" in caught.value.hint


def test_weights_under_their_old_names_are_loaded(checkpoint):
    """As the first checkpoints have them: the VAE's attention, and the text encoder's prefix and positions."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename_attention(weights):
        for name in [name for name in weights if "attentions" in name]:
            renamed = name
            for new, before in old.items():
                renamed = renamed.replace(new, before)
            weights[renamed] = weights.pop(name)

    def prefix(weights):
        for name in [*weights]:
            weights[f"text_model.{name.removeprefix('text_model.')}"] = weights.pop(name)
        weights["text_model.embeddings.position_ids"] = np.arange(77)[None]

    change_weights(checkpoint, "vae", rename_attention)
    change_weights(checkpoint, "text_encoder", prefix)
    for component in ("vae", "text_encoder"):
        load(checkpoint, component)


def change_weights(checkpoint, component, change):
    from safetensors.numpy import load_file, save_file

    (path,) = (checkpoint / component).glob("*.safetensors")
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def load(checkpoint, component):
    from sdrt.export.components import load_component, load_text_encoder

    opened = open_checkpoint(checkpoint)
    return load_text_encoder(opened) if component == "text_encoder" else load_component(opened, component)


def loading(checkpoint, component):
    with pytest.raises(CheckpointError) as caught:
        load(checkpoint, component)
    assert caught.value.hint
    return caught.value.message


def test_a_variant_is_found_where_it_is_all_there_is(checkpoint):
    (checkpoint / UNET).rename(checkpoint / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    assert open_checkpoint(checkpoint).variant["unet"] == "fp16"
