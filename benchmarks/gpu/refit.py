"""The stage on refitting: an engine that was built for it takes other weights, and the old ones again."""

from importlib.resources import files
from pathlib import Path

import numpy as np

from sdrt.benchmarks.builds import run_timed, sdrt_command
from sdrt.benchmarks.gpu.results import Bound, Findings
from sdrt.bundle import Bundle
from sdrt.errors import BackendError
from sdrt.parity import max_relative
from sdrt.runners import open_runner
from sdrt.runners.base import VAE_DECODER, FloatArray
from sdrt.runners.nvidia import require_device
from sdrt.runners.tensorrt import TensorRtRunner

WEIGHT, BIAS = "decoder.conv_out.weight", "decoder.conv_out.bias"
FACTOR = 2.0
LINEARITY = 1e-2  # of FP16 results


def check_refit(folder: Path, cache: Path, *, threads: int | None) -> Findings:
    """Build the embedded model refittable; double the VAE's last weights; undo it.

    The last convolution is linear, so what the result must be is known without another engine.
    """
    from safetensors.numpy import load_file

    require_device()  # such engines are built on one only
    path = folder / "refit.sdrt"
    if not path.is_dir():
        command = [*sdrt_command(), "build", "shapes", "--out", str(path), "--backend", "tensorrt", "--refit"]
        command += ["--batch", "1", *([] if threads is None else ["--threads", str(threads)])]
        run_timed(command, environment={"SDRT_CACHE": str(cache)})
    weights = load_file(str(files("sdrt.models.shapes") / "checkpoint" / "vae" / "diffusion_pytorch_model.safetensors"))
    bundle = Bundle.open(path)
    model = bundle.manifest.model
    side = model.default_height // model.vae_downsample
    latents = np.random.default_rng(0).standard_normal((1, model.latent_channels, side, side)).astype(np.float32)
    with open_runner(bundle) as runner:
        if not isinstance(runner, TensorRtRunner):
            raise BackendError(f"{path} is not for TensorRT", hint=f"remove {path}")

        def decoded() -> FloatArray:
            return runner.run(VAE_DECODER, {"latent_sample": latents})["sample"]

        before = decoded()
        runner.refit(VAE_DECODER, {WEIGHT: (weights[WEIGHT] * FACTOR).astype(np.float16)})
        doubled = decoded()
        runner.refit(VAE_DECODER, {WEIGHT: weights[WEIGHT].astype(np.float16)})
        after = decoded()
    bias = weights[BIAS].reshape(1, -1, 1, 1).astype(np.float32)
    expected = (before - bias) * np.float32(FACTOR) + bias
    return Findings(
        bounds=[
            Bound(
                name="doubled weights, relative error",
                measured=max_relative(doubled, expected),
                bound=LINEARITY,
                kind="at most",
            ),
            Bound(name="the old weights' result to the bit", measured=int(np.array_equal(before, after)), bound=1),
        ]
    )
