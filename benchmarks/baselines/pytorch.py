"""diffusers on PyTorch as a contestant: python -m sdrt.benchmarks.baselines.pytorch MODEL [--precision bf16]."""

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from sdrt.benchmarks.baselines.protocol import Case, Drawn, serve

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
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    serve(_imports, lambda: _load(options), _describe)


def _imports() -> None:
    import torch  # noqa: F401
    from diffusers import StableDiffusionPipeline  # noqa: F401


def _load(options: argparse.Namespace) -> Callable[[Case], Drawn]:
    import torch
    from diffusers import StableDiffusionPipeline

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    kind = torch.float32 if options.precision == "fp32" else torch.bfloat16
    pipeline = StableDiffusionPipeline.from_pretrained(
        options.model, torch_dtype=kind, safety_checker=None, requires_safety_checker=False, local_files_only=True
    )
    pipeline.set_progress_bar_config(disable=True)
    if options.compile:
        pipeline.unet = torch.compile(pipeline.unet)
    clocks = {
        "text_encoder": _clocked(pipeline.text_encoder, "forward"),
        "unet": _clocked(pipeline.unet, "forward"),
        "vae": _clocked(pipeline.vae, "decode"),
    }
    own = pipeline.scheduler

    def draw(case: Case) -> Drawn:
        import diffusers

        for times in clocks.values():
            times.clear()
        arguments = dict(case)
        generator = torch.Generator("cpu").manual_seed(arguments.pop("seed"))
        name = arguments.pop("scheduler", None)
        if name is not None:
            class_name, overrides = SCHEDULERS[name]
            pipeline.scheduler = getattr(diffusers, class_name).from_config(own.config, **overrides)
        image = pipeline(generator=generator, **arguments).images[0]
        return np.asarray(image), {
            "text_encoder_seconds": sum(clocks["text_encoder"]),
            "step_seconds": list(clocks["unet"]),
            "vae_decoder_seconds": sum(clocks["vae"]),
        }

    return draw


def _clocked(module: Any, method: str) -> list[float]:
    """Time every call of `module.method` without changing what it does; the list grows by one a call."""
    times: list[float] = []
    original = getattr(module, method)

    def timed(*arguments: Any, **options: Any) -> Any:
        began = time.perf_counter()
        result = original(*arguments, **options)
        times.append(time.perf_counter() - began)
        return result

    setattr(module, method, timed)
    return times


def _describe() -> dict[str, Any]:
    import diffusers
    import torch

    return {"version": f"PyTorch {torch.__version__}, diffusers {diffusers.__version__}"}


if __name__ == "__main__":
    main()
