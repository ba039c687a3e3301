"""Checkpoints that cannot be exported are refused before PyTorch is loaded, each by its own name."""

import json
import shutil
from pathlib import Path

import pytest

from sdrt.errors import CheckpointError
from sdrt.export.checkpoint import open_checkpoint

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


def test_a_variant_is_found_where_it_is_all_there_is(checkpoint):
    (checkpoint / UNET).rename(checkpoint / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    assert open_checkpoint(checkpoint).variant["unet"] == "fp16"
