"""What the text encoder of `shapes` is asked to read: what each caption puts where."""

import pytest

torch = pytest.importorskip("torch")

from sdrt.models.shapes.reading import (  # noqa: E402
    CLASSES,
    IGNORED,
    build_reader,
    end_of_caption,
    reading_loss,
    reading_targets,
)


def entries(caption):
    names = [f"{place} {field}" for place in ("alone", "left", "right", "above", "below") for field in range(3)]
    return dict(zip([*names, "background"], reading_targets([caption])[0].tolist(), strict=True))


def test_a_relation_and_its_opposite_read_the_same():
    one = "a large red circle left of a small blue star on a white background"
    other = "a small blue star right of a large red circle on a white background"
    assert entries(one) == entries(other)
    assert entries(one) != entries(one.replace("left", "right"))


def test_only_the_places_that_are_named_hold_something():
    held = {
        name
        for name, value in entries("a large red circle above a small blue star on a navy background").items()
        if value
    }
    assert held == {f"{place} {field}" for place in ("above", "below") for field in range(3)} | {"background"}
    assert {name for name, value in entries("a small pink ring on a white background").items() if value} == {
        "alone 0",
        "alone 1",
        "alone 2",
    }


def test_an_empty_caption_asks_nothing():
    targets = reading_targets(["", "a small pink ring on a white background"])
    assert set(targets[0].tolist()) == {IGNORED}
    answers = torch.randn(2, sum(CLASSES))
    changed = answers.clone()
    changed[0] += torch.randn(sum(CLASSES))
    assert torch.equal(reading_loss(answers, targets)[0], reading_loss(changed, targets)[0])


def test_a_reader_learns_what_the_embeddings_hold():
    torch.manual_seed(0)
    captions = [
        "a small pink ring on a white background",
        "a large red star below a small blue cross on a navy background",
    ]
    embeds, targets, reader = torch.randn(2, 16), reading_targets(captions), build_reader(16)
    optimiser = torch.optim.Adam(reader.parameters(), lr=0.1)
    first = reading_loss(reader(embeds), targets)[0].item()
    for _ in range(60):
        loss, right = reading_loss(reader(embeds), targets)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.1 * first
    assert right.item() == 1.0


def test_the_end_of_a_caption_is_its_end_token_or_padding():
    ids = torch.tensor([[1, 5, 9, 9, 9], [1, 5, 6, 7, 9]])
    embeds = torch.arange(10.0).view(2, 5, 1)
    drawn = torch.stack([end_of_caption(embeds, ids, 9).flatten() for _ in range(50)])
    assert set(drawn[:, 0].tolist()) == {2.0, 3.0, 4.0}
    assert set(drawn[:, 1].tolist()) == {9.0}
