"""sdrt as a contestant: python -m sdrt.benchmarks.baselines.compiled BUNDLE [--threads N]."""

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
    options = parser.parse_args()

    def load() -> Callable[[Case], Drawn]:
        pipeline = sdrt.open(options.bundle, threads=options.threads)

        def draw(case: Case) -> Drawn:
            result = pipeline.generate(sdrt.Request(**case))
            timings = result.timings
            return np.asarray(result.images[0]), {
                "text_encoder_seconds": timings.text_encoder_seconds,
                "step_seconds": list(timings.step_seconds),
                "vae_decoder_seconds": timings.vae_decoder_seconds,
            }

        return draw

    serve(load, lambda: {"version": f"sdrt {sdrt.__version__}"})


if __name__ == "__main__":
    main()
