"""Held-out cases of every task: what is asked and given, and the truth that the judge of tasks compares with."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import count as numbers

import numpy as np
import numpy.typing as npt

from sdrt.models.shapes.conditions import (
    SIDES,
    Drawing,
    Mask,
    Picture,
    around_object,
    depth_map,
    draw,
    edge_map,
    extend,
    foreground,
    low_resolution,
)
from sdrt.models.shapes.scenes import COLOURS, SHAPES, Scene, SceneObject, draw_objects, is_held_out, sample_scene

TASKS = ("inpaint", "outpaint", "upscale", "depth", "image-to-image", "edges")
STRENGTHS = (0.2, 0.4, 0.6, 0.8)
EXTENSION = 32  # pixels, of an outpainted canvas
SOFTNESS = 3.0  # pixels, of a depth map's edges


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskCase:
    """One request and, in `truth` and `silhouette`, what its picture is compared with.

    in_windows: the canvas is to be larger than what the engines take at once.
    """

    caption: str
    seed: int
    source: Picture | None = None  # uint8 [height, width, 3]: begun with, repainted or continued
    mask: Mask | None = None  # bool [height, width] of the result; True is to be repainted, or what `outpaint` adds
    outpaint: Mapping[str, int] | None = None  # by how many pixels the source grows on which sides
    in_windows: bool = False
    small: Picture | None = None  # uint8 [32, 32, 3]
    depth: npt.NDArray[np.float32] | None = None  # [128, 128], larger is nearer
    edges: Picture | None = None  # uint8 [128, 128, 3], white on black
    strength: float = 1.0
    truth: Picture | None = None  # uint8 [height, width, 3]
    silhouette: Mask | None = None  # bool [128, 128]: where something has to be drawn


def task_cases(task: str, count: int, seed: int = 700) -> list[TaskCase]:
    """`count` cases of a task, always the same for a seed. Raises ValueError for a task that is not in TASKS.

    Image-to-image has a case for each of STRENGTHS: `count` of them are `count` / 4 sources.
    """
    if task not in TASKS:
        raise ValueError(f"not a task: {task!r}")
    makers = {
        "inpaint": _inpaint,
        "outpaint": _outpaint,
        "upscale": _upscale,
        "depth": _depth,
        "edges": _edges,
    }
    rng = np.random.default_rng(seed)
    if task == "image-to-image":
        return [case for number in range(count // len(STRENGTHS)) for case in _image_to_image(rng, number)]
    return [makers[task](rng, number) for number in range(count)]


def _scenes(rng: np.random.Generator) -> Iterator[Scene]:
    drawn = (sample_scene(rng) for _ in numbers())
    return (scene for scene in drawn if is_held_out(scene.caption))


def _held_out_drawing(rng: np.random.Generator) -> Drawing:
    return draw(next(_scenes(rng)), rng)


def _other_look(item: SceneObject, rng: np.random.Generator, *, shape: bool) -> SceneObject:
    """The same size in another colour and, if `shape`, of another shape."""
    colour = str(rng.choice([name for name in COLOURS if name != item.colour]))
    shapes = [name for name in SHAPES if name != item.shape] if shape else [item.shape]
    return replace(item, colour=colour, shape=str(rng.choice(shapes)))


def _inpaint(rng: np.random.Generator, number: int) -> TaskCase:
    """An object is hidden, and something else of its size asked for in its place."""
    while True:
        drawing = draw(sample_scene(rng), rng)
        hidden = int(rng.integers(len(drawing.objects)))
        placed = list(drawing.objects)
        placed[hidden] = replace(placed[hidden], item=_other_look(placed[hidden].item, rng, shape=True))
        caption = replace(drawing.scene, objects=tuple(one.item for one in placed)).caption
        if is_held_out(caption):
            return TaskCase(
                caption=caption,
                seed=number,
                source=drawing.picture,
                mask=around_object(placed[hidden], rng.uniform(5, 10)),
                truth=draw_objects(placed, drawing.scene.background),
            )


def _outpaint(rng: np.random.Generator, number: int) -> TaskCase:
    """A picture that is to grow on one side. Of two cases for a side, one is whole and one in windows."""
    drawing = _held_out_drawing(rng)
    side = SIDES[number // 2 % len(SIDES)]
    canvas, mask = extend(drawing, side, EXTENSION)
    return TaskCase(
        caption=drawing.scene.caption,
        seed=number,
        source=drawing.picture,
        mask=mask,
        outpaint={side: EXTENSION},
        in_windows=number % 2 == 1,
        truth=canvas,
    )


def _upscale(rng: np.random.Generator, number: int) -> TaskCase:
    drawing = _held_out_drawing(rng)
    small = low_resolution(drawing.picture)
    return TaskCase(caption=drawing.scene.caption, seed=number, small=small, truth=drawing.picture)


def _depth(rng: np.random.Generator, number: int) -> TaskCase:
    """The source shows the same objects in other colours, and the map where they are."""
    drawing = _held_out_drawing(rng)
    recoloured = [replace(placed, item=_other_look(placed.item, rng, shape=False)) for placed in drawing.objects]
    return TaskCase(
        caption=drawing.scene.caption,
        seed=number,
        source=draw_objects(recoloured, drawing.scene.background),
        depth=depth_map(drawing.objects, rng, softness=SOFTNESS),
        truth=drawing.picture,
        silhouette=foreground(drawing.objects),
    )


def _edges(rng: np.random.Generator, number: int) -> TaskCase:
    drawing = _held_out_drawing(rng)
    return TaskCase(
        caption=drawing.scene.caption,
        seed=number,
        edges=edge_map(drawing.objects),
        truth=drawing.picture,
        silhouette=foreground(drawing.objects),
    )


def _image_to_image(rng: np.random.Generator, number: int) -> list[TaskCase]:
    """One source and a caption that gives its objects another colour, at every strength."""
    while True:
        drawing = draw(sample_scene(rng), rng)
        objects = tuple(_other_look(item, rng, shape=False) for item in drawing.scene.objects)
        caption = replace(drawing.scene, objects=objects).caption
        if is_held_out(caption):
            break
    return [TaskCase(caption=caption, seed=number, source=drawing.picture, strength=strength) for strength in STRENGTHS]
