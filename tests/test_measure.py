"""Statistics: percentiles, ratios that survive a drifting machine, distances between pictures."""

import numpy as np
import pytest

from sdrt.benchmarks.measure import parity, ratio, spread
from sdrt.parity import psnr_db


def test_percentiles_are_those_of_the_timings():
    summary = spread([0.1 * value for value in range(1, 102)])
    assert summary.median == pytest.approx(5.1)
    assert (summary.p90, summary.p95, summary.p99) == pytest.approx((9.1, 9.6, 10.0))
    assert (summary.minimum, summary.maximum, summary.count) == (0.1, pytest.approx(10.1), 101)


def test_the_interval_of_a_median_narrows_with_more_timings():
    rng = np.random.default_rng(0)
    few, many = spread(1 + 0.2 * rng.normal(size=8)), spread(1 + 0.2 * rng.normal(size=400))
    assert few.low <= few.median <= few.high
    assert many.high - many.low < few.high - few.low


def test_no_timings_are_an_error():
    with pytest.raises(ValueError, match="no timings"):
        spread([])


def test_a_ratio_is_that_of_the_medians():
    result = ratio([3.0, 30.0, 4.0], [1.0, 2.0, 2.0])
    assert result.value == pytest.approx(4.0 / 2.0)
    assert result.pairs == 3


def test_the_interval_of_a_ratio_ignores_drift_of_the_machine():
    drift = [1.0, 2.0, 4.0, 8.0]
    result = ratio([2 * seconds for seconds in drift], drift)
    assert (result.value, result.low, result.high) == (2.0, 2.0, 2.0)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    hits = 0
    for trial in range(200):
        ours, theirs = 1 + 0.1 * rng.normal(size=25), 2 + 0.2 * rng.normal(size=25)
        result = ratio(theirs, ours, seed=trial)
        hits += result.low <= 2.0 <= result.high
    assert 0.88 <= hits / 200 <= 0.995


def test_the_same_timings_give_the_same_interval():
    ours, theirs = [1.0, 1.1, 0.9, 1.3], [2.0, 2.5, 1.7, 2.2]
    assert ratio(theirs, ours) == ratio(theirs, ours)


def test_timings_that_are_not_pairs_are_an_error():
    with pytest.raises(ValueError, match="pairs"):
        ratio([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="pairs"):
        ratio([], [])


def test_parity_is_that_of_the_worst_picture():
    black, gray = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 20, np.uint8)
    worst = parity([black, gray], [black, black])
    assert worst.largest_difference == 20
    assert worst.psnr_db == pytest.approx(psnr_db(gray, black))
    assert worst.pictures == 2


def test_a_difference_does_not_wrap_around():
    assert parity([np.full((1, 1, 3), 255, np.uint8)], [np.zeros((1, 1, 3), np.uint8)]).largest_difference == 255


def test_pictures_of_another_size_are_not_compared():
    with pytest.raises(ValueError, match="shape"):
        parity([np.zeros((4, 4, 3), np.uint8)], [np.zeros((4, 5, 3), np.uint8)])
