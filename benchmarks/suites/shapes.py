"""The `shapes` suite: the embedded model at its own size, captions it was never trained on."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from sdrt.benchmarks.cases import Case
from sdrt.models.shapes.scenes import held_out_captions

SIZE = (128, 128)
STEPS = 30
GUIDANCE_SCALE = 4.0


def cases(count: int = 8) -> list[Case]:
    """The first held-out captions, caption i with seed i."""
    return [
        Case(
            prompt=caption,
            height=SIZE[0],
            width=SIZE[1],
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE_SCALE,
            seed=seed,
            scheduler="ddim",
        )
        for seed, caption in enumerate(held_out_captions(count))
    ]


def wanted_share(pictures: Sequence[npt.NDArray[np.uint8]], captions: Sequence[str]) -> float:
    """The share of the captions' attributes that the pictures show, in [0, 1]. Picture i shows captions[i % n]."""
    from sdrt.models.shapes.judge import judge, score

    verdicts = [judge(picture, captions[index % len(captions)]) for index, picture in enumerate(pictures)]
    return score(verdicts).attributes
