"""Fixtures that several test modules share: tiny checkpoints in the exact Stable Diffusion layout."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).parents[1]
MadeOnce = Callable[[str, Callable[[Path], object]], Path]
CAPTIONS = (
    "a large red circle left of a small blue star on a white background",
    "a small green triangle above a large yellow cross on a black background",
    "a large purple ring on a gray background",
)
CONDITIONING_CHANNELS = {
    "StableDiffusionPipeline": 0,
    "StableDiffusionInpaintPipeline": 5,
    "StableDiffusionUpscalePipeline": 3,
    "StableDiffusionDepth2ImgPipeline": 1,
    "StableDiffusionInstructPix2PixPipeline": 4,
}


def make_tiny_checkpoint(
    folder: Path,
    *,
    seed: int = 0,
    prediction_type: str = "epsilon",
    pipeline_class: str = "StableDiffusionPipeline",
    conditioning_channels: int = 0,
    depth: str | None = None,
    slim: bool = False,
) -> Path:
    """A random checkpoint of Stable Diffusion's layout of a few hundred kilobytes, as a diffusers folder.

    An upscaler has a VAE of factor 4 and classes. depth: the kind of depth estimator, see `make_tiny_depth_estimator`.
    slim: traced in half the time: only the UNet's middle has cross-attention, and all have one VAE, of factor 4.
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
        down_block_types=("DownBlock2D" if slim else "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D" if slim else "CrossAttnUpBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    if slim:
        torch.manual_seed(seed)  # whatever the UNet has drawn: a VAE that is the same is exported once
    widths = (8, 8, 16) if upscaling or slim else (8, 8, 16, 16)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=0.08333 if slim else 0.18215,  # the upscaler's pipeline would write its own
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
    estimator, processor = (None, None) if depth is None else make_tiny_depth_estimator(depth)
    absent = {"depth_estimator": estimator} if "Depth" in pipeline_class else {"safety_checker": None}
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
        feature_extractor=processor,
        **absent,
    )
    pipeline.save_pretrained(folder)
    return folder


def make_tiny_depth_estimator(kind: str):  # type: ignore[no-untyped-def]
    """A random DPT and its image processor: "hybrid" (BiT and ViT, 64x64), "vit" (64x64) or "dinov2" (any size)."""
    import torch
    from transformers import DPTConfig, DPTForDepthEstimation, DPTImageProcessorPil

    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 4}
    options = {"fusion_hidden_size": 16, "neck_hidden_sizes": [8, 12, 16, 24], "is_hybrid": False}
    processor = {"size": {"height": 64, "width": 64}, "resample": 3, "image_mean": [0.5, 0.4, 0.6]}
    if kind == "dinov2":
        names = [f"stage{number}" for number in range(1, 5)]
        backbone = {"model_type": "dinov2", "image_size": 56, "patch_size": 14, "out_features": names}
        options |= {"backbone": "dinov2", "backbone_config": {**backbone, **sizes, "reshape_hidden_states": False}}
        processor |= {"keep_aspect_ratio": True, "do_pad": True, "size_divisor": 14}
    else:
        options |= {**sizes, "intermediate_size": 48, "image_size": 64, "patch_size": 16}
        options["backbone_out_indices"] = [0, 1, 2, 3]
    if kind == "hybrid":
        widths = {"depths": [1, 1, 2], "hidden_sizes": [32, 64, 128], "embedding_size": 16, "num_groups": 8}
        layout = {"layer_type": "bottleneck", "global_padding": "same", "embedding_dynamic_padding": True}
        names = [f"stage{number}" for number in range(1, 4)]
        options |= {"is_hybrid": True, "neck_hidden_sizes": [32, 64, 24, 24], "reassemble_factors": [1, 1, 1, 0.5]}
        options |= {"backbone_featmap_shape": [1, 128, 4, 4]}
        options |= {"backbone_config": {"model_type": "bit", "out_features": names, **widths, **layout}}
    torch.manual_seed(5)
    model = DPTForDepthEstimation(DPTConfig(**options)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # as they are made, the depth is the same everywhere
            if parameter.ndim > 1:
                own = 1.0 if "position" in name else 1.2 * (parameter.numel() / len(parameter)) ** -0.5
                parameter.normal_(std=own)
            elif name.startswith("head") and name.endswith("bias"):
                parameter.fill_(1.0)
        model.head.head[4].weight.abs_()  # what a last ReLU does not cut off
    return model, DPTImageProcessorPil(**processor)


def make_tiny_controlnet(folder: Path, checkpoint: Path, *, seed: int, order: str = "rgb") -> Path:
    """A random ControlNet for a checkpoint's UNet, whose residuals are large enough to be seen, as a diffusers folder.

    order: of the channels that it takes.
    """
    import torch
    from diffusers import ControlNetModel, UNet2DConditionModel

    torch.manual_seed(seed)
    unet = UNet2DConditionModel.from_pretrained(checkpoint / "unet", local_files_only=True)
    widths = (4, 8, 8, 16)
    network = ControlNetModel.from_unet(
        unet, conditioning_embedding_out_channels=widths, controlnet_conditioning_channel_order=order
    )
    zero = ("controlnet_down_blocks", "controlnet_mid_block", "controlnet_cond_embedding.conv_out")  # as they are made
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.startswith(zero):
                parameter.normal_(std=0.2 if parameter.ndim > 1 else 0.05)
    network.save_pretrained(folder)
    return folder


def make_tiny_tokenizer(folder: Path):  # type: ignore[no-untyped-def]
    """A CLIP tokenizer whose vocabulary is the byte alphabet and merges learnt on a few captions."""
    from sdrt.models.shapes.train import build_tokenizer

    return build_tokenizer(CAPTIONS, folder)


def pytest_configure(config: pytest.Config) -> None:
    """Where tests run side by side, each process keeps to its share of the cores, and so do those it starts."""
    name, count = os.environ.get("PYTEST_XDIST_WORKER"), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if name is not None and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        number = int(name.removeprefix("gw"))
        os.sched_setaffinity(0, cores[number % len(cores) :: count])


@pytest.fixture
def all_cores() -> Iterator[set[int]]:
    """Every core of the machine for one test; the cores are the value."""
    if not hasattr(os, "sched_setaffinity"):
        yield set(range(os.cpu_count() or 1))
        return
    share = os.sched_getaffinity(0)
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    yield os.sched_getaffinity(0)
    os.sched_setaffinity(0, share)


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of one test run share."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def made_once(shared_folder: Path) -> MadeOnce:
    """A function that has `make` make a folder, unless a process of this test run has made it under that name."""

    def made(name: str, make: Callable[[Path], object]) -> Path:
        target = shared_folder / name
        with FileLock(f"{target}.lock"):
            if not target.exists():
                work = Path(tempfile.mkdtemp(dir=shared_folder))
                make(work / name)
                (work / name).rename(target)
        return target

    return made


@pytest.fixture(scope="session")
def tiny_checkpoint(made_once: MadeOnce) -> Path:
    """A diffusers folder with random weights."""
    return made_once("checkpoint", make_tiny_checkpoint)


@pytest.fixture(scope="session")
def tiny_export(tiny_checkpoint: Path, made_once: MadeOnce) -> Path:
    """The tiny checkpoint as an ONNX folder, with golden results."""
    from sdrt.export.package import export_model
    from sdrt.progress import silent

    return made_once("onnx", lambda target: export_model(tiny_checkpoint, target, progress=silent))


@pytest.fixture(scope="session")
def tiny_bundle(tiny_export: Path, made_once: MadeOnce) -> Path:
    """The tiny checkpoint as a float32 OpenVINO bundle, for 64 to 128 pixels a side."""
    from sdrt.engines.build import BuildOptions, build_bundle
    from sdrt.progress import silent

    options = BuildOptions(backend="openvino", precision="fp32", sizes="64..128", batch="1..4")
    return made_once("tiny.sdrt", lambda target: build_bundle(tiny_export, target, options, silent))


@pytest.fixture(scope="session")
def tiny_of(made_once: MadeOnce) -> Callable[..., tuple[Path, Path]]:
    """A function of a pipeline's class (and `depth` and `slim`): a random checkpoint of it, and its ONNX folder."""
    from sdrt.export.package import export_model
    from sdrt.progress import silent

    def make(kind: str, depth: str | None = None, slim: bool = False) -> tuple[Path, Path]:
        def checkpoint(target: Path) -> Path:
            channels = CONDITIONING_CHANNELS[kind]
            return make_tiny_checkpoint(
                target, pipeline_class=kind, conditioning_channels=channels, depth=depth, slim=slim
            )

        name = f"{kind}-{depth}-{slim}"
        made = made_once(name, checkpoint)
        return made, made_once(f"{name}-onnx", lambda target: export_model(made, target, progress=silent))

    return make


@pytest.fixture(scope="session")
def tiny_controlnets(tiny_checkpoint: Path, made_once: MadeOnce) -> tuple[Path, Path]:
    """Two ControlNets for the tiny checkpoint: one sees its picture as RGB, the other as BGR."""
    return (
        made_once("rgb", lambda target: make_tiny_controlnet(target, tiny_checkpoint, seed=1)),
        made_once("bgr", lambda target: make_tiny_controlnet(target, tiny_checkpoint, seed=2, order="bgr")),
    )


@pytest.fixture(scope="session")
def steered_export(tiny_checkpoint: Path, tiny_controlnets: tuple[Path, Path], made_once: MadeOnce) -> Path:
    """The tiny checkpoint and its two ControlNets as an ONNX folder."""
    from sdrt.export.package import export_model

    return made_once("steered", lambda target: export_model(tiny_checkpoint, target, controlnets=tiny_controlnets))


@pytest.fixture(scope="session")
def steered_bundle(steered_export: Path, made_once: MadeOnce) -> Path:
    """The tiny checkpoint and its two ControlNets as a float32 OpenVINO bundle, for 48 to 128 pixels a side."""
    from sdrt.engines.build import BuildOptions, build_bundle
    from sdrt.progress import silent

    options = BuildOptions(backend="openvino", precision="fp32", sizes="48..128", batch="1..4")
    return made_once("steered.sdrt", lambda target: build_bundle(steered_export, target, options, silent))


@pytest.fixture(autouse=True, scope="session")
def interruptible() -> None:
    """Ctrl-C works in the commands that tests start, even where the test run itself was told to ignore it."""
    import signal

    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def build_cache(shared_folder: Path) -> None:
    """Tests neither read nor fill the user's build cache."""
    os.environ["SDRT_CACHE"] = str(shared_folder / "cache")


@pytest.fixture(scope="session")
def shapes_bundle(made_once: MadeOnce, build_cache: None) -> Path:
    """The embedded model as a float32 bundle, built with the command line."""
    return made_once(
        "shapes.sdrt", lambda target: run_build("shapes", target, "--precision", "fp32", "--batch", "1..8")
    )


@pytest.fixture(scope="session")
def tensorrt_python(shared_folder: Path) -> Path:
    """The interpreter of a venv with the `tensorrt` extra; it is kept between runs."""
    from sdrt.benchmarks.builds import ensure_tensorrt

    with FileLock(shared_folder / "venv-tensorrt.lock"):
        return ensure_tensorrt(ROOT / "build" / "venv-tensorrt")


def run_build(model: str, target: Path, *options: str) -> None:
    """`sdrt build`, as a user has it; the test fails where it does."""
    command = [str(Path(sys.executable).with_name("sdrt")), "build", model, *options, "--out", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.fail(f"{model} does not build: {done.stderr}")


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
def onnx_bundle(tiny_export, made_once):  # type: ignore[no-untyped-def]
    """The tiny model as ONNX files, 64 to 128 pixels, 1 to 4 images: what the simulated GPU takes for engines."""
    from sdrt.bundle import Bundle
    from sdrt.engines.build import BuildOptions, build_bundle
    from sdrt.progress import silent

    options = BuildOptions(backend="onnxruntime", sizes="64..128", batch="1..4", threads=1)
    return Bundle.open(made_once("onnx.sdrt", lambda target: build_bundle(tiny_export, target, options, silent)))


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
