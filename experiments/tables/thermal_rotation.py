"""Table (t): rotation of work over the cores of a chip.

    python -m experiments.tables.thermal_rotation

The claim: static placement 89.2 C and 68 % of performance, rotation 76.5 C and 84 %. Two of four
cores are busy; a core above 85 C runs at 60 % until it is below 70 C. Parameters and the window
were fitted to the four values and are printed; the last rows show the same phone after 30
minutes.
"""

from collections.abc import Sequence

from absl import flags

from experiments.common import device_scenarios as scenarios
from experiments.tables import simulated
from experiments.tables.simulated import CONTRADICTORY, IN_A_WINDOW, REPRODUCED, Row
from glm_edge.cli.console import launch

FLAGS = flags.FLAGS
NAME = "thermal_rotation"
TITLE = "Rotation of work over cores at 85 and 70 C"
# Temperature in C and performance in percent.
CLAIMED = {"static": (89.2, 68.0), "rotation": (76.5, 84.0)}
QUANTITIES, UNITS = ("hottest core", "performance"), ("C", "%")
# In K and in points.
TOLERANCE = 3.0


def define_flags() -> None:
    """Define this script's flags."""
    simulated.define_flags(NAME)


def main(argv: Sequence[str]) -> None:
    parameters = {**scenarios.ROTATION, "window_s": scenarios.ROTATION_WINDOW_S}
    simulated.publish(argv, NAME, TITLE, rows_of, parameters)


def rows_of() -> list[Row]:
    """Return the table's rows."""
    rows = []
    results = {
        name: scenarios.rotation(scenarios.ROTATION, rotate)
        for name, rotate in (("static", False), ("rotation", True))
    }
    for seconds, fitting in ((scenarios.ROTATION_WINDOW_S, IN_A_WINDOW), (1800.0, REPRODUCED)):
        index = round(seconds / scenarios.CORE_TICK_S) - 1
        for name, claims in CLAIMED.items():
            means = results[name]
            values = (means.mean_c[index], means.performance[index] * 100)
            for quantity, unit, claim, value in zip(QUANTITIES, UNITS, claims, values, strict=True):
                near = abs(value - claim) <= TOLERANCE
                rows.append(
                    Row(
                        f"{name}, first {seconds:.0f} s, {quantity}",
                        unit,
                        claim,
                        float(value),
                        fitting if near else CONTRADICTORY,
                        "parameters and window fitted to the claims"
                        if near
                        else "a core above 85 C runs at 60 % until it is below 70 C",
                    )
                )
    return rows


if __name__ == "__main__":
    define_flags()
    launch(main)
