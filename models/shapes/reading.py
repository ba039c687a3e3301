"""Teaches the text encoder to read: what each caption puts where, told from the end of the caption.

Diffusion alone leaves the relations unlearnt for thousands of iterations: the gradient that says "the red one is
on the left" is small, and reaches the text encoder through an untrained UNet. Asking for it directly costs
milliseconds. The head that answers is dropped after training; a checkpoint holds a plain CLIPTextModel.
"""

from collections.abc import Sequence

import torch
from torch.nn import functional

from sdrt.models.shapes.scenes import BACKGROUNDS, COLOURS, RADII, RELATIONS, SHAPES, Scene, parse_caption

FIELDS = (tuple(COLOURS), SHAPES, tuple(RADII))  # of an object, in the order of a target's entries
PLACES = ("alone", *RELATIONS)
IGNORED = -100  # the index that cross_entropy leaves out
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


CLASSES = [len(values) + 1 for _ in PLACES for values in FIELDS] + [len(BACKGROUNDS)]  # one more: nothing is there


def build_reader(width: int) -> torch.nn.Linear:
    """The head that reads a token's embedding: for every place colour, shape and size there, and the background."""
    return torch.nn.Linear(width, sum(CLASSES))


def reading_loss(answers: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean cross entropy of a reader's answers, and the share of entries read rightly; both scalars."""
    entries = list(zip(answers.split(CLASSES, dim=-1), targets.unbind(1), strict=True))
    losses = [functional.cross_entropy(answer, target, ignore_index=IGNORED) for answer, target in entries]
    right = [(answer.argmax(-1) == target)[target != IGNORED].float().mean() for answer, target in entries]
    return torch.stack(losses).mean(), torch.stack(right).mean()


def reading_targets(captions: Sequence[str]) -> torch.Tensor:
    """int64 [len(captions), 16]: for every place the classes there, then the background; all IGNORED for ""."""
    return torch.tensor([_targets(parse_caption(text)) if text else [IGNORED] * 16 for text in captions])


def _targets(scene: Scene) -> list[int]:
    there = {"alone": scene.objects[0]}
    if scene.relation is not None:
        there = {scene.relation: scene.objects[0], OPPOSITE[scene.relation]: scene.objects[1]}
    classes = []
    for place in PLACES:
        item = there.get(place)
        values = (None, None, None) if item is None else (item.colour, item.shape, item.size)
        classes += [0 if value is None else 1 + names.index(value) for names, value in zip(FIELDS, values, strict=True)]
    return [*classes, list(BACKGROUNDS).index(scene.background)]


def end_of_caption(embeds: torch.Tensor, ids: torch.Tensor, end_token: int) -> torch.Tensor:
    """One token's embedding a caption, [batch, width]: its end token or, at random, one of the padding after it.

    Padding is made of the end token too, and a UNet reads all of it, so that all of it must know.
    """
    first = (ids == end_token).int().argmax(1)
    place = first + (torch.rand(len(ids)) * (ids.shape[1] - first)).long()
    return embeds[torch.arange(len(ids)), place]
