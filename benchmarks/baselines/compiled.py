"""sdrt as a contestant: python -m sdrt.benchmarks.baselines.compiled BUNDLE [--threads N] [--provider NAME]."""

import argparse
from collections.abc import Callable

import numpy as np

import sdrt
from sdrt.benchmarks.baselines.protocol import Case, Drawn, serve


def main() -> None:
    """Open the bundle and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--provider")
    parser.add_argument("--watch-gpu", action="store_true")
    options = parser.parse_args()
    described = {"version": f"sdrt {sdrt.__version__}"}
    serve(_imports, lambda: _load(options), lambda: described, watch_gpu=options.watch_gpu)


def _imports() -> None:
    import sdrt.pipeline  # noqa: F401  (what drawing needs, and no more)


def _load(options: argparse.Namespace) -> Callable[[Case], Drawn]:
    from sdrt.text import PromptEncoder
    from sdrt.tokenizer import Tokenizer

    pipeline = sdrt.open(options.bundle, threads=options.threads, provider=options.provider)
    bundle = pipeline.bundle
    tokenizer = Tokenizer.load(bundle.path / "tokenizer", max_length=bundle.manifest.model.text_length)

    def draw(case: Case) -> Drawn:
        # The peers encode each prompt anew; a prompt remembered from the round before would flatter this side.
        pipeline._prompts = PromptEncoder(tokenizer, pipeline.runner)
        result = pipeline.generate(sdrt.Request(**case))
        timings = result.timings
        return np.asarray(result.images[0]), {
            "text_encoder_seconds": timings.text_encoder_seconds,
            "step_seconds": list(timings.step_seconds),
            "vae_decoder_seconds": timings.vae_decoder_seconds,
            "gap_seconds": timings.gap_seconds,
        }

    return draw


if __name__ == "__main__":
    main()
