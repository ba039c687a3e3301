"""What the tasks are asked with, made from a drawn scene: masks, small pictures, depth maps, edge maps, canvases.

Everything is a pure function of a drawing and a numpy Generator, so a seed names a data set here too.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from sdrt.models.shapes.scenes import (
    BACKGROUNDS,
    CANVAS,
    PlacedObject,
    Scene,
    draw_objects,
    draw_silhouette,
    is_held_out,
    place_objects,
    sample_scene,
)

Mask = npt.NDArray[np.bool_]
Picture = npt.NDArray[np.uint8]

SIDES = ("left", "right", "top", "bottom")
LOW_RESOLUTION = CANVAS // 4
FAR = 0.1  # the background's depth; larger is nearer
NEAREST = (0.4, 1.0)  # the range of the objects' depths


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """A scene, its picture (uint8 [128, 128, 3]) and where its objects are."""

    scene: Scene
    objects: tuple[PlacedObject, ...]
    picture: Picture


def draw(scene: Scene, rng: np.random.Generator) -> Drawing:
    """The picture that `draw_scene` would draw from the same generator, and its objects' places."""
    objects = place_objects(scene, rng)
    return Drawing(scene=scene, objects=objects, picture=draw_objects(objects, scene.background))


def drawings(seed: int, *, held_out: bool) -> Iterator[Drawing]:
    """The endless stream of `scenes`, with the objects' places."""
    rng = np.random.default_rng(seed)
    while True:
        scene = sample_scene(rng)
        if is_held_out(scene.caption) == held_out:
            yield draw(scene, rng)


def foreground(objects: Sequence[PlacedObject]) -> Mask:
    """The pixels that any of the objects covers, bool [128, 128]."""
    return np.asarray(np.logical_or.reduce([draw_silhouette(placed) for placed in objects]))


def box_mask(rng: np.random.Generator) -> Mask:
    """A box anywhere, its sides a fifth to four fifths of the canvas, bool [128, 128]; True is to be repainted."""
    height, width = rng.integers(CANVAS // 5, 4 * CANVAS // 5, size=2)
    top, left = rng.integers(0, CANVAS - height + 1), rng.integers(0, CANVAS - width + 1)
    mask = np.zeros((CANVAS, CANVAS), np.bool_)
    mask[top : top + height, left : left + width] = True
    return mask


def blob_mask(rng: np.random.Generator) -> Mask:
    """Smooth blobs over a tenth to a half of the canvas, bool [128, 128]."""
    field = ndimage.gaussian_filter(rng.standard_normal((CANVAS, CANVAS)), sigma=rng.uniform(8, 14))
    return np.asarray(field > np.quantile(field, 1 - rng.uniform(0.1, 0.5)))


def border_mask(rng: np.random.Generator) -> Mask:
    """A strip along one side, up to half of the canvas deep, bool [128, 128]."""
    mask = np.zeros((CANVAS, CANVAS), np.bool_)
    mask[: rng.integers(CANVAS // 8, CANVAS // 2)] = True
    return np.ascontiguousarray(np.rot90(mask, int(rng.integers(4))))


def around_object(placed: PlacedObject, margin: float) -> Mask:
    """The square that holds an object and `margin` pixels around it, bool [128, 128]."""
    rows, columns = np.mgrid[:CANVAS, :CANVAS]
    reach = placed.radius + margin
    across, down = np.abs(columns + 0.5 - placed.centre[0]), np.abs(rows + 0.5 - placed.centre[1])
    return np.asarray((across <= reach) & (down <= reach))


def outline_of_object(placed: PlacedObject, margin: int) -> Mask:
    """An object's own pixels, grown by `margin`, bool [128, 128]."""
    return np.asarray(ndimage.binary_dilation(draw_silhouette(placed), iterations=margin))


def sample_mask(drawing: Drawing, rng: np.random.Generator) -> Mask:
    """A mask to learn inpainting with, bool [128, 128]: objects most often, else boxes, blobs, borders, everything."""
    placed = drawing.objects[rng.integers(len(drawing.objects))]
    draws = rng.random()
    if draws < 0.4:
        return around_object(placed, rng.uniform(3, 14))
    if draws < 0.5:
        return outline_of_object(placed, int(rng.integers(3, 9)))
    if draws < 0.65:
        return box_mask(rng)
    if draws < 0.8:
        return blob_mask(rng)
    if draws < 0.95:
        return border_mask(rng)
    return np.ones((CANVAS, CANVAS), np.bool_)


def extend(drawing: Drawing, side: str, amount: int) -> tuple[Picture, Mask]:
    """The picture on a canvas that is `amount` pixels larger on one side, and the mask of what is new there.

    The new part shows the background, which is what the caption says of it. Raises ValueError for another side.
    """
    if side not in SIDES:
        raise ValueError(f"not a side of a picture: {side!r}")
    before, after = (amount, 0) if side in ("left", "top") else (0, amount)
    widths = ((0, 0), (before, after)) if side in ("left", "right") else ((before, after), (0, 0))
    mask = np.pad(np.zeros((CANVAS, CANVAS), np.bool_), widths, constant_values=True)
    canvas = np.pad(drawing.picture, (*widths, (0, 0)))
    canvas[mask] = BACKGROUNDS[drawing.scene.background]
    return canvas, mask


def low_resolution(picture: Picture) -> Picture:
    """The mean of every 4x4 pixels, uint8 [32, 32, 3] for a picture of [128, 128, 3]."""
    height, width, channels = picture.shape
    blocks = picture.reshape(height // 4, 4, width // 4, 4, channels)
    return np.asarray(blocks.mean((1, 3)).round(), np.uint8)


def depth_map(objects: Sequence[PlacedObject], rng: np.random.Generator, *, softness: float) -> npt.NDArray[np.float32]:
    """How near everything is, float32 [128, 128]: the background far, every object at a depth of its own.

    softness: pixels over which an edge is blurred, as in an estimator's map; 0 for sharp edges.
    """
    depth = np.full((CANVAS, CANVAS), FAR)
    for placed in objects:
        depth[draw_silhouette(placed)] = rng.uniform(*NEAREST)
    return ndimage.gaussian_filter(depth, softness).astype(np.float32)


def edge_map(objects: Sequence[PlacedObject]) -> Picture:
    """The objects' outermost pixels in white on black, uint8 [128, 128, 3]."""
    silhouettes = [draw_silhouette(placed) for placed in objects]
    edges = [silhouette & ~ndimage.binary_erosion(silhouette) for silhouette in silhouettes]
    return np.repeat(np.logical_or.reduce(edges)[..., None], 3, axis=-1).astype(np.uint8) * 255
