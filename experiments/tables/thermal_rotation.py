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
from experiments.tables.simulated import CONTRADICTORY, IN_A_WINDOW, Row
from glm_edge.cli.console import launch

FLAGS = flags.FLAGS
NAME = "thermal_rotation"
TITLE = "Rotation of work over cores at 85 and 70 C"
CLAIMED = {"static": (89.2, 68.0), "rotation": (76.5, 84.0)}


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
    tick_s = scenarios.CORE_TICK_S
    for seconds in (scenarios.ROTATION_WINDOW_S, 1800.0):
        index = round(seconds / tick_s) - 1
        fits = seconds < 1800.0
        for name, (celsius, percent) in CLAIMED.items():
            verdict = IN_A_WINDOW if fits else CONTRADICTORY
            reason = (
                f"mean of the first {seconds:.0f} s, with parameters fitted to these values"
                if fits
                else "mean of 30 min: a mean above the trip would be slow all the time"
            )
            result = results[name]
            label = f"{name}, {seconds:.0f} s"
            rows.append(
                Row(f"{label}, hottest core", "C", celsius, result.mean_c[index], verdict, reason)
            )
            speed = 100 * result.performance[index]
            rows.append(Row(f"{label}, performance", "%", percent, speed, verdict, reason))
    return rows


if __name__ == "__main__":
    define_flags()
    launch(main)
