"""diffusers on PyTorch as a contestant: python -m sdrt.benchmarks.baselines.pytorch MODEL [--cuda] [--compile]."""

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from sdrt.benchmarks.baselines.protocol import Case, Drawn, serve

PRECISIONS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "euler": ("EulerDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
}


def main() -> None:
    """Load the pipeline and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--precision", choices=tuple(PRECISIONS), default="fp32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--cuda", action="store_true")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    serve(_imports, lambda: _load(options), _describe, watch_gpu=options.cuda)


def _imports() -> None:
    import torch  # noqa: F401
    from diffusers import StableDiffusionPipeline  # noqa: F401


def _load(options: argparse.Namespace) -> Callable[[Case], Drawn]:
    import torch
    from diffusers import StableDiffusionPipeline

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    kind = getattr(torch, PRECISIONS[options.precision])
    pipeline = StableDiffusionPipeline.from_pretrained(
        options.model, torch_dtype=kind, safety_checker=None, requires_safety_checker=False, local_files_only=True
    )
    pipeline.set_progress_bar_config(disable=True)
    if options.cuda:
        pipeline.to("cuda")
    if options.compile:
        # CUDA graphs, which is what "reduce-overhead" means, are for CUDA.
        mode = {"mode": "reduce-overhead", "fullgraph": True} if options.cuda else {}
        pipeline.unet = torch.compile(pipeline.unet, **mode)
    clock = _device_clocked if options.cuda else _clocked
    clocks = {
        "text_encoder": clock(pipeline.text_encoder, "forward"),
        "unet": clock(pipeline.unet, "forward"),
        "vae": clock(pipeline.vae, "decode"),
    }
    own = pipeline.scheduler

    def draw(case: Case) -> Drawn:
        import diffusers

        for reading in clocks.values():
            reading()
        arguments = dict(case)
        generator = torch.Generator("cpu").manual_seed(arguments.pop("seed"))
        name = arguments.pop("scheduler", None)
        if name is not None:
            class_name, overrides = SCHEDULERS[name]
            pipeline.scheduler = getattr(diffusers, class_name).from_config(own.config, **overrides)
        image = pipeline(generator=generator, **arguments).images[0]
        return np.asarray(image), {
            "text_encoder_seconds": sum(clocks["text_encoder"]()),
            "step_seconds": clocks["unet"](),
            "vae_decoder_seconds": sum(clocks["vae"]()),
        }

    return draw


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
