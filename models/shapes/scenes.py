"""Procedural captioned scenes: the data that the `shapes` model is trained and judged on.

A scene is one or two flat shapes on a plain background, 128x128, and a caption that says exactly
what is in it. Everything is a pure function of a numpy Generator, so a seed names a data set.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

CANVAS = 128
SUPERSAMPLING = 4
MARGIN = 4
GAP = 8

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "orange": (250, 140, 30),
    "yellow": (250, 222, 60),
    "green": (50, 165, 70),
    "cyan": (70, 205, 220),
    "blue": (50, 90, 220),
    "purple": (140, 60, 185),
    "pink": (250, 135, 195),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (250, 250, 250),
    "black": (15, 15, 15),
    "gray": (128, 128, 128),
    "navy": (20, 30, 85),
    "brown": (110, 72, 42),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
RADII = {"small": 15.0, "large": 25.0}  # pixels; drawn with one pixel of jitter
RELATIONS = ("left of", "right of", "above", "below")
HELD_OUT_FRACTION = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class SceneObject:
    """What a caption says of one object."""

    size: str
    colour: str
    shape: str

    @property
    def phrase(self) -> str:
        return f"a {self.size} {self.colour} {self.shape}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """What a whole caption says: one object, or two in a relation (the first is `relation` the second)."""

    objects: tuple[SceneObject, ...]
    relation: str | None
    background: str

    @property
    def caption(self) -> str:
        phrase = f" {self.relation} ".join(item.phrase for item in self.objects)
        return f"{phrase} on a {self.background} background"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedObject:
    """An object and where it is drawn, in pixels."""

    item: SceneObject
    centre: tuple[float, float]  # (x, y)
    radius: float


def parse_caption(caption: str) -> Scene:
    """The scene that a caption of this grammar describes. Raises ValueError for any other text."""
    body, _, background_part = caption.rpartition(" on a ")
    background = background_part.removesuffix(" background")
    relation = next((name for name in RELATIONS if f" {name} a " in body), None)
    phrases = body.split(f" {relation} ") if relation is not None else [body]
    scene = Scene(
        objects=tuple(_parse_object(phrase) for phrase in phrases),
        relation=relation,
        background=background,
    )
    if background not in BACKGROUNDS or scene.caption != caption:
        raise ValueError(f"not a caption of the shapes grammar: {caption!r}")
    return scene


def _parse_object(phrase: str) -> SceneObject:
    words = phrase.split(" ")
    if len(words) != 4 or words[1] not in RADII or words[2] not in COLOURS or words[3] not in SHAPES:
        raise ValueError(f"not an object of the shapes grammar: {phrase!r}")
    return SceneObject(size=words[1], colour=words[2], shape=words[3])


def is_held_out(caption: str) -> bool:
    """Whether a caption is reserved for evaluation: decided by its hash, so no list has to be kept."""
    digest = hashlib.sha256(caption.encode()).digest()
    return int.from_bytes(digest[:4], "big") < HELD_OUT_FRACTION * 2**32


def sample_scene(rng: np.random.Generator) -> Scene:
    """A random scene: three in four have two objects."""
    count = 2 if rng.random() < 0.75 else 1
    objects = tuple(
        SceneObject(
            size=str(rng.choice(list(RADII))),
            colour=str(rng.choice(list(COLOURS))),
            shape=str(rng.choice(SHAPES)),
        )
        for _ in range(count)
    )
    relation = str(rng.choice(RELATIONS)) if count == 2 else None
    return Scene(objects=objects, relation=relation, background=str(rng.choice(list(BACKGROUNDS))))


def draw_scene(scene: Scene, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """The scene as uint8 [128, 128, 3], with random places that satisfy the caption."""
    return draw_objects(place_objects(scene, rng), scene.background)


def place_objects(scene: Scene, rng: np.random.Generator) -> tuple[PlacedObject, ...]:
    """Random places and radii that satisfy the caption."""
    radii = [RADII[item.size] + rng.uniform(-1.0, 1.0) for item in scene.objects]
    centres = _place(scene, radii, rng)
    return tuple(
        PlacedObject(item=item, centre=centre, radius=radius)
        for item, centre, radius in zip(scene.objects, centres, radii, strict=True)
    )


def draw_objects(objects: Sequence[PlacedObject], background: str) -> npt.NDArray[np.uint8]:
    """Objects in their places on a background, uint8 [128, 128, 3]."""
    side = CANVAS * SUPERSAMPLING
    picture = Image.new("RGB", (side, side), BACKGROUNDS[background])
    canvas = ImageDraw.Draw(picture)
    for placed in objects:
        colour = COLOURS[placed.item.colour]
        _draw_shape(canvas, placed.item.shape, placed.centre, placed.radius, colour, BACKGROUNDS[background])
    return np.asarray(picture.resize((CANVAS, CANVAS), Image.Resampling.BOX))


def draw_silhouette(placed: PlacedObject) -> npt.NDArray[np.bool_]:
    """The pixels that an object covers by half or more, bool [128, 128]; the hole of a ring is not among them."""
    side = CANVAS * SUPERSAMPLING
    picture = Image.new("RGB", (side, side))
    _draw_shape(ImageDraw.Draw(picture), placed.item.shape, placed.centre, placed.radius, (255, 255, 255), (0, 0, 0))
    return np.asarray(picture.convert("L").resize((CANVAS, CANVAS), Image.Resampling.BOX)) > 127


def _place(scene: Scene, radii: list[float], rng: np.random.Generator) -> list[tuple[float, float]]:
    lowest = [radius + MARGIN for radius in radii]
    highest = [CANVAS - radius - MARGIN for radius in radii]
    if scene.relation is None:
        return [(rng.uniform(lowest[0], highest[0]), rng.uniform(lowest[0], highest[0]))]
    first_is_lower = scene.relation in ("left of", "above")
    near, far = (0, 1) if first_is_lower else (1, 0)
    apart = radii[0] + radii[1] + GAP
    along = [0.0, 0.0]
    along[near] = rng.uniform(lowest[near], highest[far] - apart)
    along[far] = rng.uniform(along[near] + apart, highest[far])
    # The offset across stays below the distance along, so the caption's relation is the true one.
    reach = 0.5 * (along[far] - along[near])
    across = [0.0, 0.0]
    across[0] = rng.uniform(lowest[0], highest[0])
    across[1] = rng.uniform(max(lowest[1], across[0] - reach), min(highest[1], across[0] + reach))
    vertical = scene.relation in ("above", "below")
    return [(across[i], along[i]) if vertical else (along[i], across[i]) for i in range(2)]


def _draw_shape(
    canvas: ImageDraw.ImageDraw,
    shape: str,
    centre: tuple[float, float],
    radius: float,
    colour: tuple[int, int, int],
    background: tuple[int, int, int],
) -> None:
    x, y = centre[0] * SUPERSAMPLING, centre[1] * SUPERSAMPLING
    r = radius * SUPERSAMPLING
    if shape == "circle":
        canvas.ellipse((x - r, y - r, x + r, y + r), fill=colour)
    elif shape == "ring":
        hole = 0.55 * r
        canvas.ellipse((x - r, y - r, x + r, y + r), fill=colour)
        canvas.ellipse((x - hole, y - hole, x + hole, y + hole), fill=background)
    elif shape == "square":
        half = 0.86 * r
        canvas.rectangle((x - half, y - half, x + half, y + half), fill=colour)
    elif shape == "cross":
        arm = 0.34 * r
        canvas.rectangle((x - r, y - arm, x + r, y + arm), fill=colour)
        canvas.rectangle((x - arm, y - r, x + arm, y + r), fill=colour)
    else:
        canvas.polygon(_outline(shape, x, y, r), fill=colour)


def draw_template(shape: str, *, radius: int) -> npt.NDArray[np.bool_]:
    """The filled pixels of one shape, bool, centred on a square a little larger than it."""
    side = 2 * radius + 4
    picture = Image.new("RGB", (side * SUPERSAMPLING, side * SUPERSAMPLING))
    _draw_shape(ImageDraw.Draw(picture), shape, (side / 2, side / 2), radius, (255, 255, 255), (0, 0, 0))
    return np.asarray(picture.convert("L").resize((side, side), Image.Resampling.BOX)) > 127


def _outline(shape: str, x: float, y: float, r: float) -> list[tuple[float, float]]:
    if shape == "triangle":
        return [(x, y - r), (x + r, y + 0.8 * r), (x - r, y + 0.8 * r)]
    if shape == "star":
        spokes = [(r if i % 2 == 0 else 0.45 * r, math.pi * i / 5 - math.pi / 2) for i in range(10)]
        return [(x + length * math.cos(angle), y + length * math.sin(angle)) for length, angle in spokes]
    raise ValueError(f"no outline is known for the shape {shape!r}")


def scenes(seed: int, *, held_out: bool) -> Iterator[tuple[Scene, npt.NDArray[np.uint8]]]:
    """An endless stream of (scene, picture) of the training or of the held-out captions."""
    rng = np.random.default_rng(seed)
    while True:
        scene = sample_scene(rng)
        if is_held_out(scene.caption) == held_out:
            yield scene, draw_scene(scene, rng)


def held_out_captions(count: int, seed: int = 500) -> list[str]:
    """`count` different held-out captions, always the same for a seed."""
    rng = np.random.default_rng(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        caption = sample_scene(rng).caption
        if is_held_out(caption):
            found[caption] = None
    return list(found)
