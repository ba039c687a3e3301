"""The export stage: what it writes computes what PyTorch computes, at shapes it was not traced with."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors import safe_open

from sdrt.cache import Store
from sdrt.engines.onnx_files import load_whole
from sdrt.errors import ExportError
from sdrt.export.check import Expected, check_component
from sdrt.export.checkpoint import component_hashes, identity_of, model_record, open_checkpoint
from sdrt.export.components import COMPONENTS
from sdrt.parity import max_relative
from sdrt.plan import build_plan

ALWAYS = ("text_encoder", "unet", "vae_decoder", "vae_encoder")


def session(folder, name):
    return onnxruntime.InferenceSession(folder / name / "model.onnx", providers=["CPUExecutionProvider"])


def test_the_layout_is_the_standard_one(tiny_export):
    for name in ALWAYS:
        assert (tiny_export / name / "model.onnx").is_file()
        assert (tiny_export / name / "model.onnx.data").stat().st_size > 0
        assert (tiny_export / name / "config.json").is_file()
        assert (tiny_export / "golden" / f"{name}.npz").is_file()
    for name in ("model_index.json", "scheduler/scheduler_config.json", "tokenizer/tokenizer.json", "export.json"):
        assert (tiny_export / name).is_file()


@pytest.mark.parametrize(
    ("name", "source", "own"),
    [
        ("text_encoder", "text_encoder/model", ""),
        ("unet", "unet/diffusion_pytorch_model", ""),
        ("vae_decoder", "vae/diffusion_pytorch_model", "decoder."),
        ("vae_encoder", "vae/diffusion_pytorch_model", "encoder."),
    ],
)
def test_every_weight_is_stored_whole_under_the_checkpoints_name(name, source, own, tiny_export, tiny_checkpoint):
    graph = load_whole(tiny_export / name / "model.onnx").graph
    stored = {item.name: onnx.numpy_helper.to_array(item) for item in graph.initializer}
    with safe_open(tiny_checkpoint / f"{source}.safetensors", "np") as file:
        weights = {key: file.get_tensor(key) for key in list(file.keys()) if key.startswith(own)}
    assert weights
    for key, value in weights.items():
        np.testing.assert_array_equal(stored[key], value, err_msg=key)


def test_the_folder_has_the_usual_permissions(tiny_export, tmp_path):
    usual = tmp_path / "folder"
    usual.mkdir()
    folders = [tiny_export, *(item for item in tiny_export.rglob("*") if item.is_dir())]
    assert {item.stat().st_mode for item in folders} == {usual.stat().st_mode}


def test_no_path_of_the_building_machine_is_left_in_the_graph(tiny_export):
    for name in ALWAYS:
        assert b"site-packages" not in (tiny_export / name / "model.onnx").read_bytes()


@pytest.mark.parametrize("shape", [(1, 3, 2), (4, 1, 1), (2, 2, 4)], ids=str)
@pytest.mark.parametrize("name", ["unet", "vae_decoder", "vae_encoder"])
def test_it_equals_pytorch_at_sizes_it_never_saw(name, shape, tiny_export, tiny_checkpoint):
    checkpoint = open_checkpoint(tiny_checkpoint)
    spec = COMPONENTS[name]
    inputs = spec.examples(checkpoint, shape)
    with torch.no_grad():
        expected = spec.build(checkpoint)(**inputs).numpy()
    (actual,) = session(tiny_export, name).run([spec.output], {key: value.numpy() for key, value in inputs.items()})
    assert max_relative(actual, expected) < 1e-4


@pytest.mark.parametrize("length", [2, 9, 40, 77])
def test_the_text_encoder_takes_any_length(length, tiny_export, tiny_checkpoint):
    checkpoint = open_checkpoint(tiny_checkpoint)
    spec = COMPONENTS["text_encoder"]
    inputs = spec.examples(checkpoint, (2, length, 0))
    with torch.no_grad():
        expected = spec.build(checkpoint)(**inputs).numpy()
    (actual,) = session(tiny_export, "text_encoder").run([spec.output], {"input_ids": inputs["input_ids"].numpy()})
    assert max_relative(actual, expected) < 1e-4


def test_fractions_of_a_timestep_count(tiny_export, tiny_checkpoint):
    inputs = COMPONENTS["unet"].examples(open_checkpoint(tiny_checkpoint), (1, 1, 1))
    feeds = {key: value.numpy() for key, value in inputs.items()}
    unet = session(tiny_export, "unet")
    at = [unet.run(None, feeds | {"timestep": np.array([t], np.float32)})[0] for t in (981.0, 981.37)]
    assert np.abs(at[0] - at[1]).max() > 0


def test_a_moved_folder_still_loads(tiny_export, tmp_path):
    moved = shutil.copytree(tiny_export / "unet", tmp_path / "elsewhere")
    onnxruntime.InferenceSession(moved / "model.onnx", providers=["CPUExecutionProvider"])


def test_a_wrong_trace_is_an_error(tiny_export):
    with np.load(tiny_export / "golden" / "vae_decoder.npz") as golden:
        inputs = {"latent_sample": golden["input.latent_sample"]}
        wrong = golden["output.sample"] + np.float32(0.01)
    path = tiny_export / "vae_decoder" / "model.onnx"
    with pytest.raises(ExportError, match="differs from PyTorch"):
        check_component(path, "sample", [Expected(inputs=inputs, output=wrong)], threads=1)


def test_an_unchanged_checkpoint_is_exported_again_without_pytorch(tiny_checkpoint, tiny_export, tmp_path):
    code = (
        "import sys\nfrom pathlib import Path\nfrom sdrt.export.package import export_model\n"
        f"export_model(Path({str(tiny_checkpoint)!r}), Path({str(tmp_path / 'again')!r}))\n"
        "assert 'torch' not in sys.modules and 'diffusers' not in sys.modules, 'PyTorch was loaded'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    first = json.loads((tiny_export / "export.json").read_text())
    assert json.loads((tmp_path / "again" / "export.json").read_text()) == first


def test_only_what_changed_has_another_key(tiny_checkpoint, tmp_path):
    store = Store(tmp_path / "cache")
    changed = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    config = changed / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"scaling_factor": 0.5}))
    before, after = open_checkpoint(tiny_checkpoint), open_checkpoint(changed)
    assert component_hashes(before, "unet", store) == component_hashes(after, "unet", store)
    assert component_hashes(before, "vae", store) != component_hashes(after, "vae", store)
    assert identity_of(before, store) != identity_of(after, store)
    assert model_record(after, store).vae_scaling_factor == 0.5


@pytest.mark.parametrize(
    ("written_by", "sample", "side"),
    [("0.8.0", 32, 64), ("0.7.2", 32, 64), ("0.8.0", 96, 96), ("0.9.0", 32, 32), ("0.10.0", 32, 32), (None, 32, 32)],
)
def test_old_configs_that_tell_half_of_the_size_are_set_right_as_the_pipelines_do(
    tiny_checkpoint, tmp_path, written_by, sample, side
):
    path = Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))
    config = path / "unet" / "config.json"
    changed = json.loads(config.read_text()) | {"sample_size": sample, "_diffusers_version": written_by}
    config.write_text(json.dumps({name: value for name, value in changed.items() if value is not None}))
    assert open_checkpoint(path).default_size == (8 * side, 8 * side)


def test_a_size_that_the_config_leaves_open_is_that_of_stable_diffusion(tiny_checkpoint, tmp_path):
    path = Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))
    config = path / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sample_size": None}))
    assert open_checkpoint(path).default_size == (512, 512)


def test_the_scheduler_s_class_is_that_of_the_index_and_a_part_of_the_identity(tiny_checkpoint, tmp_path):
    path, store = Path(shutil.copytree(tiny_checkpoint, tmp_path / "model")), Store(tmp_path / "cache")
    before = model_record(open_checkpoint(path), store)
    index = path / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"scheduler": ["diffusers", "DDIMScheduler"]}))
    after = model_record(open_checkpoint(path), store)
    assert (before.scheduler_class, after.scheduler_class) == ("PNDMScheduler", "DDIMScheduler")
    assert before.identity != after.identity


def test_the_scheduler_is_what_the_pipeline_would_make_of_it(tiny_checkpoint, tmp_path):
    changed = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    config = changed / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"steps_offset": 0}))
    assert model_record(open_checkpoint(changed), Store(tmp_path / "cache")).scheduler_config["steps_offset"] == 1


def test_a_steps_offset_that_the_config_lacks_is_the_pipeline_s_for_its_own_class_alone(tiny_checkpoint, tmp_path):
    changed = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    config = changed / "scheduler" / "scheduler_config.json"
    fields = json.loads(config.read_text())
    del fields["steps_offset"]
    config.write_text(json.dumps(fields))
    record = model_record(open_checkpoint(changed), Store(tmp_path / "cache"))
    own, other = (
        build_plan(
            scheduler_class=record.scheduler_class,
            scheduler_config=record.scheduler_config,
            num_inference_steps=5,
            scheduler=name,
        )
        for name in (None, "ddim")
    )
    assert (own.timesteps[-1], other.timesteps[-1]) == (1, 0)
