"""The judge agrees with ground truth, and only with ground truth."""

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest

from sdrt.models.shapes.judge import judge, score
from sdrt.models.shapes.scenes import (
    BACKGROUNDS,
    COLOURS,
    RELATIONS,
    SHAPES,
    Scene,
    held_out_captions,
    is_held_out,
    parse_caption,
    scenes,
)


def fresh(count, seed=4242):
    return list(islice(scenes(seed, held_out=True), count))


def test_at_least_99_percent_of_fresh_scenes_are_judged_right():
    summary = score([judge(picture, scene.caption) for scene, picture in fresh(400)])
    assert summary.captions >= 0.99


def test_noise_and_blur_of_a_generated_picture_do_not_change_the_verdict():
    rng = np.random.default_rng(0)
    verdicts = []
    for scene, picture in fresh(100):
        soft = (picture.astype(float) + np.roll(picture, 1, 0) + np.roll(picture, 1, 1)) / 3
        noisy = np.clip(soft + rng.normal(0, 6, soft.shape), 0, 255).astype(np.uint8)
        verdicts.append(judge(noisy, scene.caption))
    assert score(verdicts).captions >= 0.97


def other(options, current):
    return next(option for option in options if option != current)


def with_first(scene: Scene, **changes: str) -> Scene:
    first = scene.objects[0]
    return replace(scene, objects=(replace(first, **changes), *scene.objects[1:]))


WRONG = {
    "colour": lambda scene: with_first(scene, colour=other(COLOURS, scene.objects[0].colour)),
    "shape": lambda scene: with_first(scene, shape=other(SHAPES, scene.objects[0].shape)),
    "size": lambda scene: with_first(scene, size=other(("small", "large"), scene.objects[0].size)),
    "background": lambda scene: replace(scene, background=other(BACKGROUNDS, scene.background)),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_caption_with_one_wrong_attribute_is_refuted(kind):
    for scene, picture in fresh(25):
        verdict = judge(picture, WRONG[kind](scene).caption)
        assert not verdict.all_correct


def test_a_wrong_relation_is_refuted():
    for scene, picture in fresh(40):
        if scene.relation is None or scene.objects[0] == scene.objects[1]:
            continue
        wrong = replace(scene, relation=other(RELATIONS, scene.relation))
        assert not judge(picture, wrong.caption).all_correct


def test_a_missing_and_a_surplus_object_are_noticed():
    two = next((scene, picture) for scene, picture in fresh(40) if scene.relation is not None)
    scene, picture = two
    single = replace(scene, objects=scene.objects[:1], relation=None)
    assert not judge(picture, single.caption).all_correct
    blank = np.full((128, 128, 3), BACKGROUNDS[scene.background], np.uint8)
    empty = judge(blank, scene.caption)
    assert not empty.all_correct
    assert sum(empty.correct.values()) == 1


def test_a_caption_outside_the_grammar_is_an_error():
    with pytest.raises(ValueError, match="grammar"):
        judge(np.zeros((128, 128, 3), np.uint8), "an astronaut riding a horse")


def test_captions_say_what_the_scene_holds_and_parse_back():
    for scene, _ in fresh(50):
        assert parse_caption(scene.caption) == scene


def test_training_and_held_out_captions_never_meet():
    training = {scene.caption for scene, _ in islice(scenes(1, held_out=False), 300)}
    held_out = held_out_captions(300)
    assert len(set(held_out)) == 300
    assert all(is_held_out(caption) for caption in held_out)
    assert training.isdisjoint(held_out)
