"""Statistics: percentiles and ratios that survive a drifting machine."""

import numpy as np
import pytest

from sdrt.benchmarks.measure import psnr, ratio, spread


def test_percentiles_are_those_of_the_timings():
    summary = spread([0.1 * value for value in range(1, 102)])
    assert summary.median == pytest.approx(5.1)
    assert summary.p90 == pytest.approx(9.1)
    assert (summary.minimum, summary.maximum, summary.count) == (0.1, pytest.approx(10.1), 101)


def test_no_timings_are_an_error():
    with pytest.raises(ValueError, match="no timings"):
        spread([])


def test_a_ratio_of_pairs_ignores_drift_of_the_machine():
    ours = [1.0, 2.0, 4.0, 8.0]
    result = ratio([2.0, 4.0, 8.0, 16.0], ours)
    assert (result.median, result.low, result.high, result.pairs) == (2.0, 2.0, 2.0, 4)


def test_the_interval_holds_the_median_and_widens_with_noise():
    rng = np.random.default_rng(0)
    ours = np.ones(30)
    quiet, noisy = ratio(2 + 0.01 * rng.normal(size=30), ours), ratio(2 + 0.5 * rng.normal(size=30), ours)
    assert quiet.low <= quiet.median <= quiet.high
    assert noisy.high - noisy.low > quiet.high - quiet.low


def test_timings_that_are_not_pairs_are_an_error():
    with pytest.raises(ValueError, match="pairs"):
        ratio([1.0], [1.0, 2.0])


def test_psnr_of_equal_and_of_opposite_images():
    black, white = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 255, np.uint8)
    assert psnr(black, black) == float("inf")
    assert psnr(black, white) == pytest.approx(0.0)
