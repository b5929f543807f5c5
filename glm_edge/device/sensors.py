"""Sensors that run at a lower rate while the phone rests.

A sensor draws a base power and an energy per sample, so its power is linear in its rate.
"""

from typing import NamedTuple

from glm_edge.errors import DataError

MOVING_HZ, RESTING_HZ = 100.0, 10.0
LOW_LOAD = 0.3


class Sensor(NamedTuple):
    """Power of a sensor.

    Attributes:
      base_w: power without samples.
      sample_j: energy per sample.
    """

    base_w: float
    sample_j: float

    def power_w(self, rate_hz: float) -> float:
        """Compute the power at a rate in samples per second."""
        return self.base_w + self.sample_j * rate_hz

    def mean_power_w(self, moving_share: float, load: float) -> float:
        """Compute the mean power if the phone moves for a share of the time.

        Args:
          moving_share: share of the time in motion, 0 to 1.
          load: load of the phone, 0 to 1.

        Returns:
          Watts.
        """
        moving = self.power_w(downrate(load, moving=True))
        resting = self.power_w(downrate(load, moving=False))
        return moving_share * moving + (1.0 - moving_share) * resting


def fit_sensor(first: tuple[float, float], second: tuple[float, float]) -> Sensor:
    """Fit a sensor to two pairs of rate and power.

    Args:
      first: rate in Hz and power.
      second: another rate and its power.

    Returns:
      The sensor.

    Raises:
      DataError: rates are equal, or the fit has a negative power.
    """
    (low_hz, low_w), (high_hz, high_w) = sorted((first, second))
    if low_hz == high_hz:
        raise DataError("fit_sensor: the two rates must differ")
    sample_j = (high_w - low_w) / (high_hz - low_hz)
    base_w = low_w - sample_j * low_hz
    if sample_j < 0 or base_w < 0:
        raise DataError(
            f"fit_sensor: {low_w:g} at {low_hz:g} Hz and {high_w:g} at {high_hz:g} Hz need a "
            "negative base power or energy per sample"
        )
    return Sensor(base_w, sample_j)


def downrate(load: float, moving: bool) -> float:
    """Choose the rate of a sensor.

    Args:
      load: load of the phone, 0 to 1.
      moving: whether the phone moves.

    Returns:
      10 Hz at rest and below 30 % load, else 100 Hz.
    """
    return MOVING_HZ if moving or load >= LOW_LOAD else RESTING_HZ
