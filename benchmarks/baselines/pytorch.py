"""diffusers on PyTorch as a contestant: python -m sdrt.benchmarks.baselines.pytorch MODEL [--cuda] [--compile]."""

import argparse
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sdrt.benchmarks.baselines.protocol import Case, Drawn, serve
from sdrt.benchmarks.cases import with_pictures

PRECISIONS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "euler": ("EulerDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskPipeline:
    """The pipeline that does a task. without: what it is loaded with in place of components that are left out.

    sized: it takes height and width; the others work in the size of the image that they are given.
    controlled: it has a ControlNet, which is in the checkpoint's folder, and calls what that sees its image.
    """

    class_name: str
    without: Mapping[str, object]
    sized: bool = False
    controlled: bool = False


_UNFILTERED = {"safety_checker": None, "requires_safety_checker": False}
PIPELINES = {
    "text-to-image": TaskPipeline(class_name="StableDiffusionPipeline", without=_UNFILTERED, sized=True),
    "image-to-image": TaskPipeline(class_name="StableDiffusionImg2ImgPipeline", without=_UNFILTERED),
    "inpainting": TaskPipeline(class_name="StableDiffusionInpaintPipeline", without=_UNFILTERED, sized=True),
    "depth-to-image": TaskPipeline(
        class_name="StableDiffusionDepth2ImgPipeline", without={"depth_estimator": None, "feature_extractor": None}
    ),
    "upscaling": TaskPipeline(class_name="StableDiffusionUpscalePipeline", without={"safety_checker": None}),
    "editing": TaskPipeline(class_name="StableDiffusionInstructPix2PixPipeline", without=_UNFILTERED),
    "controlnet": TaskPipeline(
        class_name="StableDiffusionControlNetPipeline", without=_UNFILTERED, sized=True, controlled=True
    ),
}


def main() -> None:
    """Load the pipeline and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--task", choices=tuple(PIPELINES), default="text-to-image")
    parser.add_argument("--precision", choices=tuple(PRECISIONS), default="fp32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--cuda", action="store_true")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()

    def load() -> Callable[[Case], Drawn]:
        return load_pipeline(
            options.model,
            PIPELINES[options.task],
            precision=options.precision,
            threads=options.threads,
            compiles=options.compile,
            cuda=options.cuda,
        )

    serve(lambda: _imports(PIPELINES[options.task]), load, _describe, watch_gpu=options.cuda)


def _imports(kind: TaskPipeline) -> None:
    import diffusers
    import torch  # noqa: F401

    getattr(diffusers, kind.class_name)


def load_pipeline(
    model: str,
    kind: TaskPipeline,
    *,
    precision: str = "fp32",
    threads: int | None = None,
    compiles: bool = False,
    cuda: bool = False,
) -> Callable[[Case], Drawn]:
    """Load the checkpoint into its pipeline; the result draws a case with it."""
    import diffusers
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    dtype = getattr(torch, PRECISIONS[precision])
    more: dict[str, Any] = {}
    if kind.controlled:
        more["controlnet"] = diffusers.ControlNetModel.from_pretrained(
            model, subfolder="controlnet", torch_dtype=dtype, local_files_only=True
        )
    pipeline = getattr(diffusers, kind.class_name).from_pretrained(
        model, torch_dtype=dtype, local_files_only=True, **kind.without, **more
    )
    pipeline.set_progress_bar_config(disable=True)
    if cuda:
        pipeline.to("cuda")
    if compiles:
        # CUDA graphs, which is what "reduce-overhead" means, are for CUDA.
        mode = {"mode": "reduce-overhead", "fullgraph": True} if cuda else {}
        pipeline.unet = torch.compile(pipeline.unet, **mode)
    clock = _device_clocked if cuda else _clocked
    clocks = {
        "text_encoder": clock(pipeline.text_encoder, "forward"),
        "unet": clock(pipeline.unet, "forward"),
        "vae": clock(pipeline.vae, "decode"),
        **({"controlnet": clock(pipeline.controlnet, "forward")} if kind.controlled else {}),
    }
    own = pipeline.scheduler

    def draw(case: Case) -> Drawn:
        for reading in clocks.values():
            reading()
        arguments = _arguments(case, kind)
        generator = torch.Generator("cpu").manual_seed(arguments.pop("seed"))
        name = arguments.pop("scheduler", None)
        if name is not None:
            class_name, overrides = SCHEDULERS[name]
            pipeline.scheduler = getattr(diffusers, class_name).from_config(own.config, **overrides)
        image = pipeline(generator=generator, **arguments).images[0]
        networks = [clocks[name]() for name in ("unet", "controlnet") if name in clocks]
        return np.asarray(image), {
            "text_encoder_seconds": sum(clocks["text_encoder"]()),
            "step_seconds": [sum(seconds) for seconds in zip(*networks, strict=True)],
            "vae_decoder_seconds": sum(clocks["vae"]()),
        }

    return draw


def _arguments(case: Case, kind: TaskPipeline) -> dict[str, Any]:
    """The case as this pipeline takes it."""
    import torch

    arguments = with_pictures(case)
    if not kind.sized:
        del arguments["height"], arguments["width"]
    if kind.controlled:
        arguments["image"] = arguments.pop("control_image").convert("RGB")
    if "depth_map" in arguments:
        arguments["depth_map"] = torch.from_numpy(np.asarray(arguments["depth_map"], np.float32))[None]
    return arguments


def _clocked(module: Any, method: str) -> Callable[[], list[float]]:
    """Time every call of `module.method` without changing what it does; the result gives the seconds, once."""
    times: list[float] = []
    original = getattr(module, method)

    def timed(*arguments: Any, **options: Any) -> Any:
        began = time.perf_counter()
        result = original(*arguments, **options)
        times.append(time.perf_counter() - began)
        return result

    setattr(module, method, timed)
    return lambda: _emptied(times)


def _device_clocked(module: Any, method: str) -> Callable[[], list[float]]:
    """The same by the GPU's own clock: the host returns before the work is done, and must not wait for it."""
    import torch

    pairs: list[tuple[Any, Any]] = []
    original = getattr(module, method)

    def timed(*arguments: Any, **options: Any) -> Any:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        result = original(*arguments, **options)
        end.record()
        pairs.append((start, end))
        return result

    def read() -> list[float]:
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1000 for start, end in _emptied(pairs)]

    setattr(module, method, timed)
    return read


def _emptied(items: list[Any]) -> list[Any]:
    taken = list(items)
    items.clear()
    return taken


def _describe() -> dict[str, Any]:
    import diffusers
    import torch

    return {"version": f"PyTorch {torch.__version__}, diffusers {diffusers.__version__}"}


if __name__ == "__main__":
    main()
