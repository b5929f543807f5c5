"""Table (s): dynamic voltage and frequency scaling.

    python -m experiments.tables.dvfs

The claims are three points of a CPU, a saving of 20 % or more at 60 % of the frequency, and a
saving of 60 % in idle periods. The measured cores of Snapdragon 8 Gen 2 answer the second; a
simulated CPU at 20 % load the third.
"""

from collections.abc import Sequence

import jax
import numpy as np
from absl import flags

from experiments.tables import simulated
from experiments.tables.simulated import CONSISTENT, CONTRADICTORY, REPRODUCED, SUPPLEMENT, Row
from glm_edge.cli.console import launch
from glm_edge.device import governors
from glm_edge.device.machine import machine, stacked, variations
from glm_edge.device.schedule import Task, arrays_of
from glm_edge.device.specs import device, opp_tables
from glm_edge.device.ticks import run

FLAGS = flags.FLAGS
NAME = "dvfs"
TITLE = "Operating points and governors of a CPU"
# Frequency in Hz, voltage in V, power in W.
POINTS = ((2.0e9, 1.2, 1.5), (1.5e9, 1.0, 0.9), (1.0e9, 0.8, 0.4))
BURST = Task("burst", "cpu", 0.35e9, period_s=0.005)
DECODE = Task("decode", "cpu", 6e9, 1.25e9, 1e-3)
DRAWS, TICKS = 32, 500
CLAIMED_IDLE = 60.0


def define_flags() -> None:
    """Define this script's flags."""
    simulated.define_flags(NAME)


def main(argv: Sequence[str]) -> None:
    simulated.publish(argv, NAME, TITLE, rows_of)


def rows_of() -> list[Row]:
    """Return the table's rows."""
    capacitance = [watts / (hertz * volt**2) for hertz, volt, watts in POINTS]
    rows = [
        Row(
            f"P{index}, switched capacitance",
            "uW/MHz/V^2",
            None,
            1e12 * value,
            CONSISTENT,
            "the three points agree within 20 % of P0, as C f V^2 requires",
        )
        for index, value in enumerate(capacitance)
    ]
    for core in ("cortex-x3", "cortex-a715"):
        table = opp_tables("sm8550")[core]
        watts = table.power_at(np.array([0.6, 1.0]))
        rows.append(
            Row(
                f"{core}, power at 60 % of the frequency",
                "% saved",
                20.0,
                100 * (1 - watts[0] / watts[1]),
                CONTRADICTORY,
                "understated: voltage falls too; measured cores, interpolated",
            )
        )
    idle = saving(BURST, "schedutil")
    low, high = simulated.interval_of(idle[1:])
    rows.append(
        Row(
            "power at 20 % load, schedutil over performance",
            "% saved",
            CLAIMED_IDLE,
            float(idle[0]),
            REPRODUCED
            if low <= CLAIMED_IDLE <= high
            else CONSISTENT
            if low > CLAIMED_IDLE
            else CONTRADICTORY,
            "energy of the CPU, a burst of 1 ms per 5 ms; the claim states no load",
            (low, high),
        )
    )
    decode = saving(DECODE, "fixed")
    rows.append(
        Row(
            "energy per token, 0.6 of the top speed",
            "% saved",
            None,
            float(decode[0]),
            SUPPLEMENT,
            "decoding waits for memory, so a slower clock costs little speed",
            simulated.interval_of(decode[1:]),
        )
    )
    return rows


def saving(task: Task, governor: str) -> np.ndarray:
    """Simulate the CPU's energy per unit saved against the top speed, in percent, per phone."""
    phone = device("sm8550")
    draws = [{}, *variations(phone, DRAWS, FLAGS.seed)]
    phones = stacked([machine(phone, values) for values in draws])
    tasks = arrays_of([task])

    def energy_j(policy: governors.Policy) -> np.ndarray:
        state, _ = jax.vmap(lambda m: run(m, policy, tasks, steps=20, ticks=TICKS, every=TICKS))(
            phones
        )
        return np.asarray(state.totals[:, 0], float) / np.asarray(state.done[:, 0], float)

    fast = energy_j(governors.policy("performance"))
    return 100 * (1 - energy_j(governors.policy(governor, fixed_speed=0.6)) / fast)


if __name__ == "__main__":
    define_flags()
    launch(main)
