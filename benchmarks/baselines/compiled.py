"""sdrt as a contestant: python -m sdrt.benchmarks.baselines.compiled BUNDLE [--threads N] [--provider NAME]."""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np

import sdrt
from sdrt.benchmarks.baselines.protocol import Case, Drawn, serve
from sdrt.benchmarks.cases import with_pictures


def main() -> None:
    """Open the bundle and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--provider")
    parser.add_argument("--watch-gpu", action="store_true")
    options = parser.parse_args()
    described = {"version": f"sdrt {sdrt.__version__}"}
    serve(
        _imports,
        lambda: load_bundle(options.bundle, threads=options.threads, provider=options.provider),
        lambda: described,
        watch_gpu=options.watch_gpu,
    )


def _imports() -> None:
    import sdrt.pipeline  # noqa: F401  (what drawing needs, and no more)


def load_bundle(
    path: str | Path, *, threads: int | None = None, provider: str | None = None
) -> Callable[[Case], Drawn]:
    """Open the bundle; the result draws a case with it."""
    from sdrt.text import PromptEncoder
    from sdrt.tokenizer import Tokenizer

    pipeline = sdrt.open(path, threads=threads, provider=provider)
    bundle = pipeline.bundle
    tokenizer = Tokenizer.load(bundle.path / "tokenizer", max_length=bundle.manifest.model.text_length)

    def draw(case: Case) -> Drawn:
        # The peers encode each prompt anew; a prompt remembered from the round before would flatter this side.
        pipeline._prompts = PromptEncoder(tokenizer, pipeline.runner)
        result = pipeline.generate(sdrt.Request(**with_pictures(case)))
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
