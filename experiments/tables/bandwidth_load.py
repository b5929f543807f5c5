"""Table (l): loading times of BERT-large on two server GPUs.

    python -m experiments.tables.bandwidth_load

The claim explains 210 and 380 ms by 1,555 and 900 GB/s. Reading the weights once at these rates
is the least time.
"""

from collections.abc import Sequence

from absl import flags

from experiments.tables import simulated
from experiments.tables.simulated import CONTRADICTORY, REPRODUCED, Row
from glm_edge.cli.console import launch

FLAGS = flags.FLAGS
NAME = "bandwidth_load"
TITLE = "Time to load BERT-large by memory bandwidth"
# 335e6 float32 weights.
BYTES = 1.34e9
BANDWIDTH = {"A100": 1555e9, "V100": 900e9}
CLAIMED_S = {"A100": 0.210, "V100": 0.380}


def define_flags() -> None:
    """Define this script's flags."""
    simulated.define_flags(NAME)


def main(argv: Sequence[str]) -> None:
    simulated.publish(argv, NAME, TITLE, rows_of)


def rows_of() -> list[Row]:
    """Return the table's rows."""
    least = {name: BYTES / rate for name, rate in BANDWIDTH.items()}
    rows = [
        Row(
            f"{name}, loading",
            "ms",
            1e3 * CLAIMED_S[name],
            1e3 * seconds,
            CONTRADICTORY,
            f"{CLAIMED_S[name] / seconds:.0f} times the time of its memory: "
            f"{BYTES / CLAIMED_S[name] / 1e9:.1f} GB/s is the rate of a bus or a disk",
        )
        for name, seconds in least.items()
    ]
    claimed, simulated_ratio = (t["V100"] / t["A100"] for t in (CLAIMED_S, least))
    rows.append(
        Row(
            "V100 over A100",
            "x",
            claimed,
            simulated_ratio,
            REPRODUCED,
            "the ratio is that of the bandwidths, although the times are not",
        )
    )
    return rows


if __name__ == "__main__":
    define_flags()
    launch(main)
