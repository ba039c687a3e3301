"""Lanes: which network evaluations a request needs in a step, and with which weights they are combined."""

from dataclasses import dataclass

from sdrt.request import ResolvedRequest
from sdrt.runners.base import FloatArray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Lane:
    """One evaluation of the UNet: its prompt_embeds float32 [L, d] and its weight in the model output."""

    prompt_embeds: FloatArray
    weight: float


def lanes_of(
    request: ResolvedRequest, prompt_embeds: FloatArray, negative_embeds: FloatArray | None
) -> tuple[Lane, ...]:
    """Classifier-free guidance is uncond + s · (cond - uncond), that is weights 1 - s and s (Ho and Salimans 2022).

    A request without guidance owns one lane; `negative_embeds` is then not used.
    """
    if not request.guided:
        return (Lane(prompt_embeds=prompt_embeds, weight=1.0),)
    if negative_embeds is None:
        raise ValueError("a guided request needs the embedding of its negative prompt")
    scale = request.guidance_scale
    return (
        Lane(prompt_embeds=negative_embeds, weight=1.0 - scale),
        Lane(prompt_embeds=prompt_embeds, weight=scale),
    )
