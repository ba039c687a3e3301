"""Parity: the measures of distance, and when a bound is met."""

import numpy as np
import pytest

from sdrt.bundle import ParityRecord
from sdrt.parity import LARGEST_PSNR_DB, image_parity, largest_level, max_relative, meets, psnr_db

BLACK, WHITE = np.zeros((2, 2, 3), np.uint8), np.full((2, 2, 3), 255, np.uint8)


def record(metric, measured, bound):
    return ParityRecord(metric=metric, measured=measured, bound=bound)


def test_equal_and_opposite_images():
    assert psnr_db(BLACK, BLACK) == float("inf")
    assert psnr_db(BLACK, WHITE) == pytest.approx(0.0)
    assert largest_level(BLACK, WHITE) == largest_level(WHITE, BLACK) == 255


def test_a_known_error_has_its_known_decibels():
    off = BLACK.copy()
    off[0, 0, 0] = 51  # a fifth of the range, in one value of twelve
    assert psnr_db(off, BLACK) == pytest.approx(10 * np.log10(12 * 25))


def test_each_metric_of_a_seal():
    gray = np.full_like(BLACK, 51)
    assert image_parity(gray, BLACK, metric="max_absolute", bound=1.0) == record("max_absolute", 0.2, 1.0)
    assert image_parity(BLACK, BLACK, metric="psnr_db", bound=35.0) == record("psnr_db", LARGEST_PSNR_DB, 35.0)
    assert image_parity(gray, WHITE, metric="max_relative", bound=1.0).measured == pytest.approx(0.8)


def test_values_that_are_not_finite_or_of_another_shape_are_infinitely_wrong():
    good = np.ones(3, np.float32)
    assert max_relative(np.array([1, np.nan, 1], np.float32), good) == float("inf")
    assert max_relative(good, np.array([1, np.inf, 1], np.float32)) == float("inf")
    assert max_relative(good[:2], good) == float("inf")


def test_an_error_is_relative_to_the_largest_value():
    assert max_relative(np.array([4.0, 1.5], np.float32), np.array([4.0, 1.0], np.float32)) == pytest.approx(0.125)
    nothing = np.zeros(2, np.float32)
    assert max_relative(nothing, nothing) == 0.0
    assert max_relative(nothing + 1e-9, nothing) == float("inf")


@pytest.mark.parametrize("metric", ["psnr_db", "max_absolute", "max_relative"])
def test_nothing_measured_as_nan_meets_a_bound(metric):
    assert not meets(record(metric, float("nan"), 1.0))


def test_more_decibels_are_better_and_less_error_is():
    assert meets(record("psnr_db", 35.0, 35.0))
    assert not meets(record("psnr_db", 34.9, 35.0))
    assert meets(record("max_absolute", 1 / 255, 1 / 255))
    assert not meets(record("max_absolute", 2 / 255, 1 / 255))
