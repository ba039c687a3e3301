"""Fixtures that several test modules share: tiny checkpoints in the exact Stable Diffusion layout."""

from pathlib import Path

import pytest

CAPTIONS = (
    "a large red circle left of a small blue star on a white background",
    "a small green triangle above a large yellow cross on a black background",
    "a large purple ring on a gray background",
)


def make_tiny_checkpoint(
    folder: Path,
    *,
    seed: int = 0,
    prediction_type: str = "epsilon",
    pipeline_class: str = "StableDiffusionPipeline",
    conditioning_channels: int = 0,
) -> Path:
    """A random checkpoint of Stable Diffusion's layout of a few hundred kilobytes, as a diffusers folder.

    An upscaler has a VAE of factor 4 and classes.
    """
    import diffusers
    import torch
    from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    tokenizer = make_tiny_tokenizer(folder / "tokenizer")
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=77,
            projection_dim=32,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    upscaling = pipeline_class == "StableDiffusionUpscalePipeline"
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4 + conditioning_channels,
        out_channels=4,
        num_class_embeds=400 if upscaling else None,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    widths = (8, 8, 16) if upscaling else (8, 8, 16, 16)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=64,
    )
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        set_alpha_to_one=False,
        skip_prk_steps=True,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    absent = {"depth_estimator": None} if "Depth" in pipeline_class else {"safety_checker": None}
    if upscaling:
        absent["low_res_scheduler"] = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    elif "Depth" not in pipeline_class:
        absent["requires_safety_checker"] = False
    pipeline = getattr(diffusers, pipeline_class)(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        feature_extractor=None,
        **absent,
    )
    pipeline.save_pretrained(folder)
    return folder


def make_tiny_tokenizer(folder: Path):  # type: ignore[no-untyped-def]
    """A CLIP tokenizer whose vocabulary is the byte alphabet and merges learnt on a few captions."""
    from sdrt.models.shapes.train import build_tokenizer

    return build_tokenizer(CAPTIONS, folder)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder with random weights."""
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.fixture(scope="session")
def tiny_export(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint as an ONNX folder, with golden results."""
    from sdrt.export.package import export_model
    from sdrt.progress import silent

    target = tmp_path_factory.mktemp("exported") / "onnx"
    export_model(tiny_checkpoint, target, progress=silent)
    return target


@pytest.fixture(scope="session")
def tiny_bundle(tiny_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint as a float32 OpenVINO bundle, for 64 to 128 pixels a side."""
    from sdrt.engines.build import BuildOptions, build_bundle
    from sdrt.progress import silent

    target = tmp_path_factory.mktemp("bundles") / "tiny.sdrt"
    options = BuildOptions(backend="openvino", precision="fp32", sizes="64..128", batch="1..4")
    build_bundle(tiny_export, target, options, silent)
    return target


@pytest.fixture(autouse=True, scope="session")
def interruptible() -> None:
    """Ctrl-C works in the commands that tests start, even where the test run itself was told to ignore it."""
    import signal

    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def build_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests neither read nor fill the user's build cache."""
    import os

    os.environ["SDRT_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def shapes_bundle(tmp_path_factory: pytest.TempPathFactory, build_cache: None) -> Path:
    """The embedded model as a float32 bundle, built with the command line."""
    import subprocess
    import sys

    target = tmp_path_factory.mktemp("shapes") / "shapes.sdrt"
    command = [
        str(Path(sys.executable).with_name("sdrt")),
        "build",
        "shapes",
        "--precision",
        "fp32",
        "--batch",
        "1..8",
        "--out",
    ]
    done = subprocess.run([*command, str(target)], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.fail(f"the embedded model does not build: {done.stderr}")
    return target


@pytest.fixture
def fake(tmp_path: Path):  # type: ignore[no-untyped-def]
    """A function that makes pipelines over `FakeRunner`."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("fake_pipeline", Path(__file__).parent / "fake_pipeline.py")
    if spec is None or spec.loader is None:
        pytest.fail("tests/fake_pipeline.py is missing")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda runner=None, **manifest: module.fake_pipeline(tmp_path, runner, **manifest)


@pytest.fixture(scope="session")
def onnx_bundle(tiny_export, tmp_path_factory):  # type: ignore[no-untyped-def]
    """The tiny model as ONNX files, 64 to 128 pixels, 1 to 4 images: what the simulated GPU takes for engines."""
    from sdrt.bundle import Bundle
    from sdrt.engines.build import BuildOptions, build_bundle
    from sdrt.progress import silent

    target = tmp_path_factory.mktemp("bundles") / "onnx.sdrt"
    options = BuildOptions(backend="onnxruntime", sizes="64..128", batch="1..4", threads=1)
    build_bundle(tiny_export, target, options, silent)
    return Bundle.open(target)


@pytest.fixture(scope="session")
def onnx_profiles(onnx_bundle):  # type: ignore[no-untyped-def]
    """By component, the optimization profiles that TensorRT would be given."""
    from sdrt.engines.components import input_specs
    from sdrt.engines.onnx_files import load_graph
    from sdrt.engines.optimization import optimization_profiles
    from tests.component_source import source_of

    return {
        record.name: optimization_profiles(
            source_of(onnx_bundle, record.name), input_specs(load_graph(onnx_bundle.file(record.files[0])))
        )
        for record in onnx_bundle.manifest.components
    }
