"""What --sizes and --batch mean."""

import pytest

from sdrt.engines.profile import describe_profile, parse_profile
from sdrt.errors import RequestError


def parse(sizes, batch="1..4", *, default=(512, 512), multiple_of=64):
    return parse_profile(sizes, batch, default=default, multiple_of=multiple_of, text_length=77)


def test_a_list_of_sizes_is_width_by_height_and_accepts_nothing_else():
    profile = parse("512x512, 512x768")
    assert profile.sizes == ((512, 512), (768, 512))
    assert profile.accepts(768, 512)
    assert not profile.accepts(512, 768)
    assert not profile.accepts(576, 512)
    assert (profile.minimum, profile.maximum) == ((512, 512), (768, 512))


def test_a_range_of_both_sides_accepts_every_multiple_inside():
    profile = parse("256..1024")
    assert profile.sizes == ()
    assert all(profile.accepts(*size) for size in [(256, 1024), (1024, 256), (320, 704)])
    assert not any(profile.accepts(*size) for size in [(192, 512), (512, 1088), (512, 520)])


def test_a_range_of_sizes_bounds_each_side_on_its_own():
    profile = parse("256x320..1024x768")
    assert profile.minimum == (320, 256)
    assert profile.maximum == (768, 1024)


def test_without_sizes_the_profile_lies_around_the_models_own_size():
    profile = parse(None)
    assert (profile.minimum, profile.maximum) == ((256, 256), (768, 768))
    assert profile.accepts(512, 512)


@pytest.mark.parametrize(("default", "multiple_of"), [((64, 64), 64), ((96, 160), 32), ((8, 8), 8)])
def test_the_profile_around_a_small_models_size_is_on_its_grid_and_accepts_it(default, multiple_of):
    profile = parse(None, default=default, multiple_of=multiple_of)
    assert profile.accepts(*default)
    assert all(side % multiple_of == 0 and side > 0 for side in (*profile.minimum, *profile.maximum))


def test_a_size_given_twice_counts_once():
    assert parse("512x512,512X512").sizes == ((512, 512),)


NOT_A_SIZE = [
    "",
    "512",
    "512x",
    "x512",
    "512x512,",
    "512*512",
    "-512x512",
    "512x512x3",
    "512.5x512",
    "²56..512",
    "a..b",
]
NOT_A_RANGE = ["1024..256", "256..512..768", "..", "256.."]
IMPOSSIBLE = ["0x0", "512x500", "63..512", "64x64..100x100", "9999999x9999999", "99999999999x64"]


@pytest.mark.parametrize("sizes", [*NOT_A_SIZE, *NOT_A_RANGE, *IMPOSSIBLE])
def test_sizes_that_mean_nothing_are_refused_with_a_hint(sizes):
    with pytest.raises(RequestError) as refusal:
        parse(sizes)
    assert refusal.value.hint


def test_a_size_off_the_grid_names_the_nearest_one():
    with pytest.raises(RequestError, match="500x512") as refusal:
        parse("500x512")
    assert "512x512" in refusal.value.hint


@pytest.mark.parametrize(("batch", "most"), [("1..4", 4), ("1", 1), ("8", 8), (" 1 .. 2 ", 2), ("1..1", 1)])
def test_batch_is_counted_in_images(batch, most):
    assert parse("512x512", batch).max_batch == most


@pytest.mark.parametrize(
    "batch", ["", "0", "1..0", "2..4", "4..1", "1..4..8", "-1", "1..x", "1.5", "1..1000000", "many"]
)
def test_a_batch_that_means_nothing_is_refused(batch):
    with pytest.raises(RequestError):
        parse("512x512", batch)


def test_a_profile_is_described_in_the_words_of_its_options():
    assert describe_profile(parse("512x768", "1")) == "512x768, one image at a time"
    assert describe_profile(parse("256..1024")) == "256x256..1024x1024 in multiples of 64, up to 4 images at a time"
