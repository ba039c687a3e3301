"""What the tasks of `shapes` are asked with agrees with the picture it was made from."""

from itertools import islice

import numpy as np
import pytest

from sdrt.models.shapes.conditions import (
    around_object,
    blob_mask,
    border_mask,
    box_mask,
    depth_map,
    draw,
    drawings,
    edge_map,
    extend,
    foreground,
    low_resolution,
    outline_of_object,
    sample_mask,
)
from sdrt.models.shapes.scenes import BACKGROUNDS, draw_scene, draw_silhouette, scenes


def fresh(count, seed=4343):
    return list(islice(drawings(seed, held_out=True), count))


def test_drawings_are_the_scenes_of_the_same_seed():
    for drawing, (scene, picture) in zip(fresh(10), scenes(4343, held_out=True), strict=False):
        assert drawing.scene == scene
        assert np.array_equal(drawing.picture, picture)


def test_a_drawing_is_what_draw_scene_draws():
    scene = fresh(1)[0].scene
    one, other = draw(scene, np.random.default_rng(5)), draw_scene(scene, np.random.default_rng(5))
    assert np.array_equal(one.picture, other)


def test_everything_but_the_silhouettes_is_background():
    for drawing in fresh(30):
        away = np.abs(drawing.picture.astype(int) - BACKGROUNDS[drawing.scene.background]).max(-1)
        drawn = foreground(drawing.objects)
        assert (away[drawn] > 20).all()
        assert (away > 0).sum() - drawn.sum() < 0.2 * drawn.sum()  # what remains are edges covered by less than half


@pytest.mark.parametrize("mask_of", [box_mask, blob_mask, border_mask, lambda rng: sample_mask(fresh(1)[0], rng)])
def test_a_seed_names_a_mask(mask_of):
    masks = [mask_of(np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert masks[0].shape == (128, 128)
    assert masks[0].dtype == bool
    assert masks[0].any()
    assert np.array_equal(masks[0], masks[1])
    assert not np.array_equal(masks[0], masks[2])


def test_masks_of_an_object_hide_all_of_it():
    for drawing in fresh(20):
        for placed in drawing.objects:
            drawn = draw_silhouette(placed)
            assert not (drawn & ~around_object(placed, 3)).any()
            assert not (drawn & ~outline_of_object(placed, 3)).any()


def test_masks_of_an_object_leave_the_other_one():
    for drawing in fresh(40):
        if len(drawing.objects) == 2:
            first, second = drawing.objects
            assert not (outline_of_object(first, 3) & draw_silhouette(second)).any()


@pytest.mark.parametrize(("side", "shape"), [("left", (128, 160)), ("top", (160, 128))])
def test_an_extended_canvas_holds_the_picture_and_background(side, shape):
    drawing = fresh(1)[0]
    canvas, mask = extend(drawing, side, 32)
    assert canvas.shape == (*shape, 3)
    assert np.array_equal(canvas[~mask], drawing.picture.reshape(-1, 3))
    assert (canvas[mask] == BACKGROUNDS[drawing.scene.background]).all()


def test_a_canvas_grows_on_known_sides_only():
    with pytest.raises(ValueError, match="side"):
        extend(fresh(1)[0], "behind", 32)


def test_a_small_picture_is_the_mean_of_four_by_four():
    picture = np.random.default_rng(0).integers(0, 256, (128, 128, 3), np.uint8)
    small = low_resolution(picture)
    assert small.shape == (32, 32, 3)
    assert abs(small[3, 5].astype(float) - picture[12:16, 20:24].mean((0, 1))).max() <= 0.5


def test_a_depth_map_has_the_background_far_and_each_object_at_one_depth():
    drawing = next(item for item in fresh(20) if len(item.objects) == 2)
    depth = depth_map(drawing.objects, np.random.default_rng(3), softness=0)
    depths = [np.unique(depth[draw_silhouette(placed)]) for placed in drawing.objects]
    far = np.unique(depth[~foreground(drawing.objects)])
    assert [len(values) for values in (*depths, far)] == [1, 1, 1]
    assert len({float(values[0]) for values in depths}) == 2
    assert min(values[0] for values in depths) > far[0]


def test_a_soft_depth_map_has_the_same_objects():
    objects = fresh(1)[0].objects
    soft = depth_map(objects, np.random.default_rng(3), softness=3.0)
    assert len(np.unique(soft)) > 100
    assert soft[foreground(objects)].min() > np.median(soft)


def test_edges_are_the_rims_of_the_silhouettes():
    for drawing in fresh(10):
        edges, drawn = edge_map(drawing.objects), foreground(drawing.objects)
        assert edges.shape == (128, 128, 3)
        assert set(np.unique(edges)) == {0, 255}
        white = edges[..., 0] > 0
        assert not (white & ~drawn).any()
        assert 0.02 < white.sum() / drawn.sum() < 0.7
