"""The task variants of `shapes` are whole diffusers folders."""

import json
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

import pytest

from sdrt.cli.options import model_folder
from sdrt.errors import CheckpointError
from sdrt.models.shapes.variants import VARIANTS, variant_checkpoint

MODELS = Path(__file__).parent.parent / "models" / "shapes"
PARTS = {
    "inpaint": {"scheduler", "text_encoder", "tokenizer", "unet", "vae"},
    "depth": {"scheduler", "text_encoder", "tokenizer", "unet", "vae"},
    "upscale": {"low_res_scheduler", "scheduler", "text_encoder", "tokenizer", "unet", "vae"},
}
LIMIT_BYTES = 40_000_000


def test_all_models_together_stay_small():
    weights = [path for path in MODELS.rglob("*.safetensors") if "build" not in path.parts]
    assert sum(path.stat().st_size for path in weights) <= LIMIT_BYTES


@pytest.mark.parametrize("name", PARTS)
def test_a_variant_has_every_component_of_its_index(name, tmp_path):
    folder = variant_checkpoint(name, tmp_path)
    index = json.loads((folder / "model_index.json").read_text())
    named = {key for key, value in index.items() if isinstance(value, list) and value[0] is not None}
    assert named == PARTS[name] == {path.name for path in folder.iterdir() if path.is_dir()}
    assert index["_class_name"] == VARIANTS[name].pipeline


@pytest.mark.parametrize(("name", "channels"), [("inpaint", 9), ("depth", 5), ("upscale", 7)])
def test_a_variants_unet_is_its_own_and_the_text_encoder_the_checkpoints(name, channels, tmp_path):
    folder = variant_checkpoint(name, tmp_path)
    assert json.loads((folder / "unet" / "config.json").read_text())["in_channels"] == channels
    ours, theirs = (root / "text_encoder" / "model.safetensors" for root in (folder, MODELS / "checkpoint"))
    assert ours.read_bytes() == theirs.read_bytes()


def test_the_controlnet_is_a_plain_folder(tmp_path):
    folder = variant_checkpoint("edges", tmp_path)
    assert {path.name for path in folder.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    assert json.loads((folder / "config.json").read_text())["_class_name"] == "ControlNetModel"


def test_a_variant_replaces_what_was_there(tmp_path):
    (tmp_path / "edges").mkdir()
    (tmp_path / "edges" / "left over").touch()
    folder = variant_checkpoint("edges", tmp_path)
    assert not (folder / "left over").exists()


def test_an_unknown_variant_is_an_error_that_names_the_known_ones(tmp_path):
    with pytest.raises(CheckpointError) as caught:
        variant_checkpoint("colours", tmp_path)
    assert "inpaint" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_a_variant_that_was_not_trained_is_an_error_that_says_how_to(tmp_path, monkeypatch):
    monkeypatch.setitem(VARIANTS, "sketch", VARIANTS["inpaint"])
    with pytest.raises(CheckpointError) as caught:
        variant_checkpoint("sketch", tmp_path)
    assert "train_variants --only sketch" in caught.value.hint


def test_the_command_line_knows_them_by_name_and_puts_each_together_once(tmp_path, monkeypatch):
    monkeypatch.setenv("SDRT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    folder = model_folder("shapes-inpaint")
    made = (folder / "model_index.json").stat().st_mtime_ns
    assert model_folder("shapes-inpaint") == folder
    assert (folder / "model_index.json").stat().st_mtime_ns == made
    with pytest.raises(CheckpointError, match="no variant 'nothing'"):
        model_folder("shapes-nothing")
    (tmp_path / "shapes-mine").mkdir()
    assert model_folder("shapes-mine") == Path("shapes-mine")


@pytest.mark.parametrize("name", PARTS)
def test_diffusers_opens_a_variant_with_the_pipeline_of_its_index(name, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    pipeline_class = getattr(diffusers, VARIANTS[name].pipeline)
    absent = {"depth_estimator": None, "feature_extractor": None} if name == "depth" else {}
    pipeline = pipeline_class.from_pretrained(variant_checkpoint(name, tmp_path), **absent)
    assert pipeline.unet.config.in_channels == {"inpaint": 9, "depth": 5, "upscale": 7}[name]
    assert pipeline.vae.config.scaling_factor == (0.08333 if name == "upscale" else 1.0)


def test_new_inputs_count_for_nothing_before_training():
    torch = pytest.importorskip("torch")
    from diffusers import UNet2DConditionModel

    from sdrt.models.shapes.train_variants import with_more_inputs

    unet = UNet2DConditionModel.from_pretrained(MODELS / "checkpoint" / "unet").float()
    wider = with_more_inputs(unet, 9)
    latents, condition, embeds = torch.randn(1, 4, 16, 16), torch.randn(1, 5, 16, 16), torch.randn(1, 77, 128)
    with torch.no_grad():
        one = unet(latents, 500, embeds).sample
        other = wider(torch.cat([latents, condition], dim=1), 500, embeds).sample
    assert torch.allclose(one, other, atol=1e-5)


def test_what_is_given_to_inpaint_is_what_diffusers_gives(monkeypatch):
    torch = pytest.importorskip("torch")
    from diffusers import AutoencoderKL
    from diffusers.image_processor import VaeImageProcessor
    from PIL import Image

    from sdrt.models.shapes.task_cases import task_cases
    from sdrt.models.shapes.train_variants import Base, masked_condition, stack

    monkeypatch.setattr("sdrt.models.shapes.train.mixed_precision", nullcontext)  # bf16 on processors that have it
    vae = AutoencoderKL.from_pretrained(MODELS / "checkpoint" / "vae").float().eval()
    case = next(iter(islice(task_cases("inpaint", 3), 2, 3)))
    base = Base(vae=vae, text_encoder=None, tokenizer=None, unet=None)
    ours = masked_condition(base, stack([case.source]), torch.from_numpy(case.mask)[None, None])
    image = VaeImageProcessor(vae_scale_factor=8).preprocess(Image.fromarray(case.source))
    processor = VaeImageProcessor(vae_scale_factor=8, do_normalize=False, do_binarize=True, do_convert_grayscale=True)
    mask = processor.preprocess(Image.fromarray(case.mask))
    with torch.no_grad():
        theirs = vae.encode(image * (mask < 0.5)).latent_dist.mode()
    small = torch.nn.functional.interpolate(mask, size=(16, 16))
    assert torch.allclose(ours, torch.cat([small, theirs], dim=1), atol=1e-4)
