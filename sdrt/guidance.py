"""Lanes: which network evaluations a request needs in each row, and with which weights they are combined."""

from collections.abc import Sequence
from dataclasses import dataclass

from sdrt.resolution import ResolvedRequest
from sdrt.runners.base import FloatArray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Lane:
    """One evaluation of the UNet: its prompt_embeds float32 [L, d] and its weight in the model output.

    rescale_weight: its weight in the output whose deviation `guidance_rescale` aims at. conditioning: how much it sees
    of what conditions the request.
    """

    prompt_embeds: FloatArray
    weight: float
    rescale_weight: float = 0.0
    conditioning: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Guidance:
    """The lanes of a request's rows: `inside` an interval of rows, and `outside` of it.

    rescale: how far the output inside is brought to the deviation of the positive prompt's own, 0 to 1.
    """

    inside: tuple[Lane, ...]
    outside: tuple[Lane, ...]
    interval: range
    rescale: float = 0.0

    def rescale_at(self, row: int) -> float:
        """The rescaling of one row."""
        return self.rescale if row in self.interval else 0.0

    def lanes(self, row: int) -> tuple[Lane, ...]:
        """The lanes of one row."""
        return self.inside if row in self.interval else self.outside

    def last_alike(self, row: int, rows: int) -> int:
        """The end of the rows from `row` on that have the same lanes, of `rows` in all."""
        ends = [end for end in (self.interval.start, self.interval.stop) if row < end < rows]
        return min(ends, default=rows)


def guidance_of(
    request: ResolvedRequest,
    prompt_embeds: FloatArray,
    negative_embeds: FloatArray | None,
    composed_embeds: Sequence[FloatArray] = (),
) -> Guidance:
    """Classifier-free guidance is uncond + s · (cond - uncond), that is weights 1 - s and s (Ho and Salimans 2022).

    Outside the request's interval, and without guidance anywhere, a row owns one lane (Kynkäänniemi et al. 2024);
    `negative_embeds` is not used by a request without guidance. Editing has a third lane, which does not see the image
    (Brooks et al. 2023, eq. 3). Composed prompts have one each: uncond + s · Σ wᵢ · (condᵢ - uncond) (Liu et al. 2022,
    eq. 11), and where nothing is guided the prompts' own mean by their weights.
    """
    weights = [1.0, *(weight for _, weight in request.composed_prompts)]
    embeds, total = [prompt_embeds, *composed_embeds], sum(weights)
    plain = tuple(Lane(prompt_embeds=each, weight=weight / total) for each, weight in zip(embeds, weights, strict=True))
    if not request.guided:
        return Guidance(inside=plain, outside=plain, interval=range(0))
    if negative_embeds is None:
        raise ValueError("a guided request needs the embedding of its negative prompt")
    scale, image_scale = request.guidance_scale, request.image_guidance_scale
    positives = tuple(
        Lane(prompt_embeds=each, weight=scale * weight, rescale_weight=weight / total)
        for each, weight in zip(embeds, weights, strict=True)
    )
    guided: tuple[Lane, ...] = (Lane(prompt_embeds=negative_embeds, weight=1.0 - scale * total), *positives)
    if image_scale is not None:
        guided = (
            *positives,
            Lane(prompt_embeds=negative_embeds, weight=image_scale - scale),
            Lane(prompt_embeds=negative_embeds, weight=1.0 - image_scale, conditioning=0.0),
        )
    return Guidance(inside=guided, outside=plain, interval=request.guided_rows, rescale=request.guidance_rescale)
