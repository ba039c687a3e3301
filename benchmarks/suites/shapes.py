"""The `shapes` suite: the embedded model at its own size, captions it was never trained on."""

from sdrt.benchmarks.run import Case
from sdrt.models.shapes.scenes import held_out_captions

STEPS = 30
GUIDANCE_SCALE = 4.0


def cases(count: int = 8) -> list[Case]:
    """The first held-out captions, caption i with seed i."""
    return [
        Case(
            prompt=caption,
            height=128,
            width=128,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE_SCALE,
            seed=seed,
            scheduler="ddim",
        )
        for seed, caption in enumerate(held_out_captions(count))
    ]
