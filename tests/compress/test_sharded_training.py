"""What `eight_devices.py` measures in one process of 8 simulated devices."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import glm_edge as ge


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    script = Path(__file__).with_name("eight_devices.py")
    run = subprocess.run(
        [sys.executable, str(script), str(tmp_path_factory.mktemp("state"))],
        capture_output=True,
        text=True,
        cwd=Path(ge.__file__).parents[1],
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


@pytest.mark.slow
def test_losses_equal_those_of_one_device(measured):
    one, eight, _ = measured["losses"]
    np.testing.assert_allclose(eight, one, rtol=1e-5)
    assert one[-1][0] < one[0][0]


@pytest.mark.slow
def test_parameters_equal_those_of_one_device_and_stay_spread(measured):
    assert measured["error"] < 1e-3 * measured["moved"]
    assert set(measured["shares"]) == {1 / 8}


@pytest.mark.slow
def test_moments_are_spread_as_parameters_are(measured):
    assert measured["moments"].count(1 / 8) >= 2 * len(measured["shares"])


@pytest.mark.slow
def test_training_goes_on_where_its_parameters_lie(measured):
    _, eight, again = measured["losses"]
    assert again == eight
    assert measured["same"] == 0.0
