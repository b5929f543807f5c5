"""Table (q): tasks of a high priority beside decoding.

    python -m experiments.tables.preemption

The claim is a scheduler that interrupts tasks of lower priority. Frames of 60 Hz, 4e9 operations
each, share a phone with decoding of 3e9 weights. An accelerator finishes a unit that it began, so
the unit decides: a token, or one of its 28 layers.
"""

from collections.abc import Sequence

from absl import flags

from experiments.common import device_scenarios as scenarios
from experiments.tables import simulated
from experiments.tables.simulated import CONTRADICTORY, REPRODUCED, SUPPLEMENT, Row
from glm_edge.cli.console import launch

FLAGS = flags.FLAGS
NAME = "preemption"
TITLE = "Preemption by priority beside decoding"
REASONS = {
    "token boundaries": "a token outlasts the period of a frame, whatever its priority",
    "layer boundaries": "a layer is short enough to wait for",
    "decoding on the npu": "the frame shares memory only",
}


def define_flags() -> None:
    """Define this script's flags."""
    simulated.define_flags(NAME)


def main(argv: Sequence[str]) -> None:
    simulated.publish(argv, NAME, TITLE, rows_of)


def rows_of() -> list[Row]:
    """Return the table's rows."""
    results = scenarios.preemption(10.0)
    base = results["token boundaries"].results_s("decode")
    rows = []
    for name, result in results.items():
        late = result.late_share("frame")
        rows.append(
            Row(
                f"frames dropped, {name}",
                "%",
                0.0,
                100 * late,
                REPRODUCED if late == 0 else CONTRADICTORY,
                REASONS[name],
            )
        )
        rows.append(
            Row(
                f"tokens per second, {name}",
                "x",
                None,
                result.results_s("decode") / base,
                SUPPLEMENT,
                "relative to token boundaries",
            )
        )
    return rows


if __name__ == "__main__":
    define_flags()
    launch(main)
