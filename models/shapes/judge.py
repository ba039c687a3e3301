"""The judge: says from the pixels alone whether a picture shows what its caption says.

Palette segmentation finds the objects, template matching their shapes. Deterministic, no network.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage

from sdrt.models.shapes.scenes import (
    BACKGROUNDS,
    COLOURS,
    RADII,
    SHAPES,
    Scene,
    SceneObject,
    draw_template,
    parse_caption,
)

Mask = npt.NDArray[np.bool_]

FOREGROUND_DISTANCE = 48.0  # RGB units from the background; the palette's closest pair is 90 apart
SMALLEST_AREA = 110  # pixels; the smallest shape drawn, a small star, covers about 270
SIZE_BORDER = sum(RADII.values()) / len(RADII)


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundObject:
    """What the pixels of one object say."""

    size: str
    colour: str
    shape: str
    centre: tuple[float, float]  # (x, y) in pixels


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Attribute by attribute, what the caption asks for and whether the picture has it."""

    correct: dict[str, bool]
    found: tuple[FoundObject, ...]
    objects_expected: int

    @property
    def all_correct(self) -> bool:
        """Whether the picture shows the whole caption and nothing more."""
        return len(self.found) == self.objects_expected and all(self.correct.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Shares in [0, 1] over many pictures."""

    captions: float
    attributes: float
    by_kind: dict[str, float]  # colour, shape, size, relation, background
    count: int


def judge(image: npt.NDArray[np.uint8], caption: str) -> Verdict:
    """Compare a picture, uint8 [128, 128, 3], with its caption. Raises ValueError for a foreign caption."""
    scene = parse_caption(caption)
    background, backdrop = find_background(image)
    found = find_objects(image, backdrop, expected=len(scene.objects))
    verdicts = [_compare(scene, background, order) for order in _orders(found, len(scene.objects))]
    best = max(verdicts, key=lambda correct: sum(correct.values()))
    return Verdict(correct=best, found=found, objects_expected=len(scene.objects))


def score(verdicts: Sequence[Verdict]) -> Score:
    """Summarise verdicts: the share of whole captions, of attributes, and of each kind of attribute."""
    kinds: dict[str, list[bool]] = {}
    for verdict in verdicts:
        for name, correct in verdict.correct.items():
            kinds.setdefault(name.split(" ")[0], []).append(correct)
    return Score(
        captions=float(np.mean([verdict.all_correct for verdict in verdicts])),
        attributes=float(np.mean([correct for marks in kinds.values() for correct in marks])),
        by_kind={kind: float(np.mean(marks)) for kind, marks in kinds.items()},
        count=len(verdicts),
    )


def find_background(image: npt.NDArray[np.uint8]) -> tuple[str, npt.NDArray[np.float64]]:
    """The background's name, and its actual colour in this picture (the median of the rim)."""
    rim = np.concatenate([image[:3].reshape(-1, 3), image[-3:].reshape(-1, 3), image[:, :3].reshape(-1, 3)])
    colour = np.median(np.concatenate([rim, image[:, -3:].reshape(-1, 3)]), axis=0)
    return _nearest(colour, BACKGROUNDS), colour


def find_objects(
    image: npt.NDArray[np.uint8], backdrop: npt.NDArray[np.float64], *, expected: int
) -> tuple[FoundObject, ...]:
    """The objects on the backdrop, largest first."""
    pixels = image.astype(np.float64)
    foreground: Mask = np.linalg.norm(pixels - backdrop, axis=-1) > FOREGROUND_DISTANCE
    masks = _components(foreground)
    if len(masks) < expected:  # objects that touch are told apart by colour
        masks = [part for mask in masks for part in _split_by_colour(pixels, mask)]
    masks.sort(key=lambda mask: -int(mask.sum()))
    return tuple(_describe(pixels, mask) for mask in masks)


def _components(mask: Mask) -> list[Mask]:
    labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
    parts = [labels == index for index in range(1, count + 1)]
    return [part for part in parts if part.sum() >= SMALLEST_AREA]


def _split_by_colour(pixels: npt.NDArray[np.float64], mask: Mask) -> list[Mask]:
    palette = np.array(list(COLOURS.values()), np.float64)
    nearest = np.linalg.norm(pixels[:, :, None] - palette, axis=-1).argmin(-1)
    parts = []
    for index in range(len(palette)):
        own = ndimage.binary_opening(mask & (nearest == index), structure=np.ones((3, 3), np.bool_))
        parts += _components(own)
    return parts


def _describe(pixels: npt.NDArray[np.float64], mask: Mask) -> FoundObject:
    inside = ndimage.binary_erosion(mask, iterations=2)
    core = inside if inside.sum() >= 12 else mask
    rows, columns = np.nonzero(mask)
    top, bottom, left, right = rows.min(), rows.max() + 1, columns.min(), columns.max() + 1
    crop = mask[top:bottom, left:right]
    overlaps = {shape: _overlap(crop, shape) for shape in SHAPES}
    shape = max(overlaps, key=lambda name: overlaps[name])
    radius = (bottom - top + right - left) / sum(_unit_extent(shape))
    return FoundObject(
        size="large" if radius > SIZE_BORDER else "small",
        colour=_nearest(np.median(pixels[core], axis=0), COLOURS),
        shape=shape,
        centre=((left + right) / 2, (top + bottom) / 2),
    )


@lru_cache
def _template(shape: str) -> Mask:
    """The shape's filled pixels at radius 64, cropped to its own box."""
    drawn = draw_template(shape, radius=64)
    rows, columns = np.nonzero(drawn)
    cropped: Mask = drawn[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    return cropped


def _unit_extent(shape: str) -> tuple[float, float]:
    height, width = _template(shape).shape
    return height / 64, width / 64


def _overlap(crop: Mask, shape: str) -> float:
    """Intersection over union of a component and the shape stretched to the same box."""
    size = (crop.shape[1], crop.shape[0])
    stretched = np.asarray(Image.fromarray(_template(shape)).convert("L").resize(size, Image.Resampling.BOX)) > 127
    return float((crop & stretched).sum() / (crop | stretched).sum())


def _nearest(colour: npt.NDArray[np.float64], palette: dict[str, tuple[int, int, int]]) -> str:
    return min(palette, key=lambda name: float(np.linalg.norm(colour - np.array(palette[name]))))


def _orders(found: tuple[FoundObject, ...], expected: int) -> list[tuple[FoundObject | None, ...]]:
    """Every way to read the found objects as the expected ones; None where one is missing."""
    candidates: list[FoundObject | None] = [*found[: expected + 1]]
    candidates += [None] * (expected - len(candidates))
    return list(permutations(candidates, expected))


def _compare(scene: Scene, background: str, objects: tuple[FoundObject | None, ...]) -> dict[str, bool]:
    correct = {"background": background == scene.background}
    for number, (asked, found) in enumerate(zip(scene.objects, objects, strict=True), start=1):
        correct |= _compare_object(number, asked, found)
    if scene.relation is not None:
        correct["relation"] = _holds(scene.relation, objects)
    return correct


def _compare_object(number: int, asked: SceneObject, found: FoundObject | None) -> dict[str, bool]:
    return {
        f"colour {number}": found is not None and found.colour == asked.colour,
        f"shape {number}": found is not None and found.shape == asked.shape,
        f"size {number}": found is not None and found.size == asked.size,
    }


def _holds(relation: str, objects: tuple[FoundObject | None, ...]) -> bool:
    first, second = objects
    if first is None or second is None:
        return False
    across, down = second.centre[0] - first.centre[0], second.centre[1] - first.centre[1]
    amount = {"left of": across, "right of": -across, "above": down, "below": -down}[relation]
    other = abs(down) if relation in ("left of", "right of") else abs(across)
    return amount > other
