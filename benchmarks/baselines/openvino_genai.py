"""OpenVINO GenAI as a contestant, under its own interpreter: python openvino_genai.py MODEL_IR [--threads N]."""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

# Run by path: the folder of this file would shadow the package of the same name.
_HERE = str(Path(__file__).resolve().parent)
sys.path[:] = [entry for entry in sys.path if entry not in (_HERE, "")]


def _protocol() -> Any:
    import importlib.util

    spec = importlib.util.spec_from_file_location("protocol", Path(_HERE) / "protocol.py")
    if spec is None or spec.loader is None:
        raise ImportError("protocol.py is not beside this file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    """Load the pipeline and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    _protocol().serve(lambda: _load(options), _describe)


def _load(options: argparse.Namespace) -> Callable[[Any], Any]:
    import openvino_genai

    properties = {} if options.threads is None else {"INFERENCE_NUM_THREADS": options.threads}
    pipeline = openvino_genai.Text2ImagePipeline(options.model, "CPU", **properties)

    def draw(case: Any) -> Any:
        arguments = dict(case)
        arguments.pop("scheduler", None)
        seed = arguments.pop("seed")
        ticks: list[float] = []

        def tick(step: int, steps: int, latents: Any) -> bool:
            ticks.append(time.perf_counter())
            return False

        began = time.perf_counter()
        tensor = pipeline.generate(
            arguments.pop("prompt"),
            generator=openvino_genai.TorchGenerator(seed),
            callback=tick,
            num_images_per_prompt=1,
            **arguments,
        )
        ended = time.perf_counter()
        metrics = pipeline.get_performance_metrics()
        text_seconds = sum(metrics.get_text_encoder_infer_duration().values()) / 1000
        vae_seconds = metrics.get_vae_decoder_infer_duration() / 1000
        starts = [began + text_seconds, *ticks[:-1]]
        return np.asarray(tensor.data)[0], {
            "text_encoder_seconds": text_seconds,
            "step_seconds": [end - start for start, end in zip(starts, ticks, strict=True)],
            "vae_decoder_seconds": vae_seconds,
            "generate_seconds": ended - began,
        }

    return draw


def _describe() -> dict[str, Any]:
    import openvino_genai

    return {"version": f"OpenVINO GenAI {openvino_genai.__version__}"}


if __name__ == "__main__":
    main()
