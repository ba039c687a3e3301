"""Sigma spacings: what lies between the ends of a grid."""

import numpy as np
import pytest
import scipy.stats

from sdrt.errors import RequestError
from sdrt.plan.spacing import SPACING_FIELDS, beta_quantiles, respaced_sigmas, sigma_bounds

SIGMAS = np.array([14.6, 3.0, 1.0, 0.4, 0.03])


@pytest.mark.parametrize("count", [1, 2, 3, 50, 999])
def test_beta_quantiles_are_scipys(count):
    shares = 1 - np.linspace(0, 1, count)
    np.testing.assert_allclose(beta_quantiles(shares), scipy.stats.beta.ppf(shares, 0.6, 0.6), rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", SPACING_FIELDS)
def test_each_goes_down_between_the_ends_of_the_grid(name):
    found = respaced_sigmas({name: True}, SIGMAS)
    assert len(found) == len(SIGMAS)
    np.testing.assert_allclose(found[[0, -1]], SIGMAS[[0, -1]])
    assert (np.diff(found) < 0).all()


@pytest.mark.parametrize("name", SPACING_FIELDS)
def test_a_config_may_have_ends_of_its_own(name):
    found = respaced_sigmas({name: True, "sigma_min": 0.1, "sigma_max": 5.0}, SIGMAS)
    np.testing.assert_allclose(found[[0, -1]], [5.0, 0.1])


def test_none_is_asked_for_by_default():
    assert respaced_sigmas(SPACING_FIELDS, SIGMAS) is None
    assert respaced_sigmas({}, SIGMAS) is None


def test_two_at_a_time_are_refused():
    with pytest.raises(RequestError, match="use_karras_sigmas and use_beta_sigmas"):
        respaced_sigmas({**SPACING_FIELDS, "use_karras_sigmas": True, "use_beta_sigmas": True}, SIGMAS)


@pytest.mark.parametrize("bounds", [{"sigma_min": 0.0}, {"sigma_min": -1.0}, {"sigma_min": 20.0}, {"sigma_max": 0.001}])
def test_bounds_that_are_none_are_refused(bounds):
    with pytest.raises(RequestError, match="sigma_min"):
        sigma_bounds(bounds, 0.03, 14.6)
