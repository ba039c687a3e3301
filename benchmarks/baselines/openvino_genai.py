"""OpenVINO GenAI as a contestant, under its own interpreter: python openvino_genai.py MODEL_IR --runtime FOLDER.

FOLDER holds the package `sdrt`, of which only the noise is used: the peer starts from the same numbers as everyone
else, and does not have to load PyTorch for them.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

# Run by path: the folder of this file would shadow the package of the same name.
_HERE = str(Path(__file__).resolve().parent)
sys.path[:] = [entry for entry in sys.path if entry not in (_HERE, "")]

SCHEDULERS = {"ddim": "DDIM", "pndm": "PNDM", "euler": "EULER_DISCRETE"}


def main() -> None:
    """Load the pipeline and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--runtime", required=True)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    _protocol().serve(_imports, lambda: _load(options), _describe)


def _protocol() -> Any:
    import importlib.util

    spec = importlib.util.spec_from_file_location("protocol", Path(_HERE) / "protocol.py")
    if spec is None or spec.loader is None:
        raise ImportError("protocol.py is not beside this file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _imports() -> None:
    import openvino_genai  # noqa: F401  (what drawing needs)


def _load(options: argparse.Namespace) -> Callable[[Any], Any]:
    import openvino_genai

    properties = {} if options.threads is None else {"INFERENCE_NUM_THREADS": options.threads}
    pipeline = openvino_genai.Text2ImagePipeline(options.model, "CPU", **properties)
    generator_of = _generator_class(options.runtime)
    chosen: list[str | None] = [None]

    def draw(case: Any) -> Any:
        arguments = dict(case)
        name = arguments.pop("scheduler", None)
        if name is not None and chosen[0] != name:
            pipeline.set_scheduler(_scheduler(options.model, name))
            chosen[0] = name
        generator = generator_of(arguments.pop("seed"))
        tensor = pipeline.generate(arguments.pop("prompt"), generator=generator, num_images_per_prompt=1, **arguments)
        metrics = pipeline.get_performance_metrics()
        return np.array(tensor.data)[0], {
            "text_encoder_seconds": sum(metrics.get_text_encoder_infer_duration().values()) / 1e3,
            "step_seconds": [microseconds / 1e6 for microseconds in metrics.raw_metrics.unet_inference_durations],
            "vae_decoder_seconds": metrics.get_vae_decoder_infer_duration() / 1e3,
        }

    return draw


def _generator_class(runtime: str) -> Any:
    """Its interface for random numbers over the runtime's stream, which is PyTorch's."""
    import openvino
    import openvino_genai

    sys.path.append(runtime)
    try:
        from sdrt.noise import TorchGenerator
    finally:
        sys.path.remove(runtime)

    class Noise(openvino_genai.Generator):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self._stream = TorchGenerator(seed)
            self._kept: list[Any] = []  # a Tensor borrows the array's memory

        def randn_tensor(self, shape: Any) -> Any:
            self._kept.append(self._stream.randn(tuple(shape)))
            return openvino.Tensor(self._kept[-1])

    return Noise


def _scheduler(model: Path, name: str) -> Any:
    """The scheduler of a case over the checkpoint's own config."""
    import openvino_genai

    if name not in SCHEDULERS:
        raise ValueError(f"OpenVINO GenAI has no scheduler {name!r}; it has {', '.join(SCHEDULERS)}")
    config = json.loads((model / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scheduler_config.json"
        path.write_text(json.dumps(config | {"clip_sample": False}), encoding="utf-8")
        return openvino_genai.Scheduler.from_config(path, getattr(openvino_genai.Scheduler.Type, SCHEDULERS[name]))


def _describe() -> dict[str, Any]:
    import openvino_genai

    return {"version": f"OpenVINO GenAI {openvino_genai.__version__}"}


if __name__ == "__main__":
    main()
