"""Table (o): power of sensors by their rate.

    python -m experiments.tables.sensors

The claim is a share of power of 85 % at 100 Hz and of 12 % at 10 Hz. A sensor draws a base power
and an energy per sample.
"""

from collections.abc import Sequence

from absl import flags

from experiments.tables import simulated
from experiments.tables.simulated import CONTRADICTORY, REPRODUCED, SUPPLEMENT, Row
from glm_edge.cli.console import launch
from glm_edge.device.sensors import MOVING_HZ, RESTING_HZ, fit_sensor

FLAGS = flags.FLAGS
NAME = "sensors"
TITLE = "Sensors at 100 Hz in motion and 10 Hz at rest"
SHARES = (85.0, 12.0)


def define_flags() -> None:
    """Define this script's flags."""
    simulated.define_flags(NAME)


def main(argv: Sequence[str]) -> None:
    simulated.publish(argv, NAME, TITLE, rows_of)


def rows_of() -> list[Row]:
    """Return the table's rows."""
    sensor = fit_sensor((MOVING_HZ, SHARES[0]), (RESTING_HZ, SHARES[1]))
    rows = [
        Row(
            f"share of power at {rate:g} Hz",
            "%",
            share,
            sensor.power_w(rate),
            REPRODUCED,
            f"base {sensor.base_w:.1f}, {sensor.sample_j:.2f} per Hz, fitted to both values",
        )
        for rate, share in zip((MOVING_HZ, RESTING_HZ), SHARES, strict=True)
    ]
    rows.append(
        Row(
            "both as shares of one total",
            "%",
            100.0,
            sum(SHARES),
            CONTRADICTORY,
            "they do not add up to 100, so they are two states, not two parts",
        )
    )
    return rows + [
        Row(
            f"mean power, {100 * moving:g} % of the time in motion",
            "%",
            None,
            100 * sensor.mean_power_w(moving, 0.1) / sensor.power_w(MOVING_HZ),
            SUPPLEMENT,
            "of the power at 100 Hz, below 30 % load",
        )
        for moving in (0.1, 0.5)
    ]


if __name__ == "__main__":
    define_flags()
    launch(main)
