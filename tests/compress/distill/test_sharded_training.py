"""What `eight_devices.py` measures in one process of 8 simulated devices."""

import numpy as np
import pytest


@pytest.mark.slow
def test_losses_equal_those_of_one_device(eight_devices):
    one, eight, _ = eight_devices["losses"]
    np.testing.assert_allclose(eight, one, rtol=1e-5)
    assert one[-1][0] < one[0][0]


@pytest.mark.slow
def test_parameters_equal_those_of_one_device_and_stay_spread(eight_devices):
    assert eight_devices["error"] < 1e-3 * eight_devices["moved"]
    assert set(eight_devices["shares"]) == {1 / 8}


@pytest.mark.slow
def test_moments_are_spread_as_parameters_are(eight_devices):
    assert eight_devices["moments"].count(1 / 8) >= 2 * len(eight_devices["shares"])


@pytest.mark.slow
def test_training_goes_on_where_its_parameters_lie(eight_devices):
    _, eight, again = eight_devices["losses"]
    assert again == eight
    assert eight_devices["same"] == 0.0
