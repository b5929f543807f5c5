"""Table (r): one model on two engines.

    python -m experiments.tables.pareto_engines

The claim is 12 ms at 3.8 W on the GPU, and 18 ms at 1.2 W quantized on the NPU. Both engines get
these values. The phone then works for 30 minutes at 25 and at 35 C, with its skin held at 43 C.
"""

from collections.abc import Sequence

import jax
import numpy as np
from absl import flags

from experiments.tables import simulated
from experiments.tables.simulated import IN_A_WINDOW, REPRODUCED, SUPPLEMENT, Row
from glm_edge.cli.console import launch
from glm_edge.device import governors
from glm_edge.device.machine import machine, stacked, variations
from glm_edge.device.schedule import Task, arrays_of
from glm_edge.device.specs import ENGINES, device
from glm_edge.device.ticks import run

FLAGS = flags.FLAGS
NAME = "pareto_engines"
TITLE = "GPU at 12 ms and 3.8 W, NPU at 18 ms and 1.2 W"
CLAIMED = {"gpu": (0.012, 3.8), "npu": (0.018, 1.2)}
OPS, CHUNK, TICK_S, MINUTES, DRAWS = 24e9, 25, 0.2, 30, 32
SKIN_C, SUSTAINABLE_W = 43.0, 2.5


def define_flags() -> None:
    """Define this script's flags."""
    simulated.define_flags(NAME)


def main(argv: Sequence[str]) -> None:
    simulated.publish(argv, NAME, TITLE, rows_of)


def rows_of() -> list[Row]:
    """Return the table's rows."""
    rows = [
        Row(
            f"{engine}, energy per inference",
            "mJ",
            1e3 * watts * seconds,
            1e3 * watts * seconds,
            REPRODUCED,
            "arithmetic of the claim; neither engine is better in both, so both are on the front",
        )
        for engine, (seconds, watts) in CLAIMED.items()
    ]
    for ambient_c in (25.0, 35.0):
        speeds = {engine: sustained(engine, ambient_c) for engine in CLAIMED}
        for engine, values in speeds.items():
            rows.append(
                Row(
                    f"{engine}, inferences per second after 30 min at {ambient_c:g} C",
                    "1/s",
                    1 / CLAIMED[engine][0],
                    float(values[0]),
                    REPRODUCED if values[0] * CLAIMED[engine][0] > 0.98 else IN_A_WINDOW,
                    "not throttled"
                    if values[0] * CLAIMED[engine][0] > 0.98
                    else "throttled: the claim is that of a cool phone",
                    simulated.interval_of(values[1:]),
                )
            )
        slower = speeds["npu"][1:] > speeds["gpu"][1:]
        rows.append(
            Row(
                f"phones on which the NPU is faster after 30 min at {ambient_c:g} C",
                "%",
                None,
                100 * float(slower.mean()),
                SUPPLEMENT,
                f"of {DRAWS} phones with varied assumptions",
            )
        )
    return rows


def sustained(engine: str, ambient_c: float) -> np.ndarray:
    """Simulate the inferences per second of the last five minutes, of varied phones."""
    seconds, watts = CLAIMED[engine]
    phone = device("sm8550")
    index = ENGINES.index(engine)
    machines = []
    for varied in [{}, *variations(phone, DRAWS, FLAGS.seed)]:
        values = varied | {f"{engine}.top_power_w": watts, f"{engine}.leakage_w_v": 0.0}
        arrays = machine(phone, values, TICK_S, ambient_c)
        rates = np.array(arrays.ops_s)
        rates[index] = OPS / seconds
        machines.append(arrays._replace(ops_s=rates, dram_j_byte=np.zeros(())))
    task = arrays_of([Task("inference", engine, CHUNK * OPS)])
    limit = governors.policy(
        "performance", skin=governors.allocator(SKIN_C, SUSTAINABLE_W, SKIN_C - 5.0)
    )
    ticks = round(MINUTES * 60 / TICK_S)
    every = round(60 / TICK_S)
    _, trace = jax.vmap(lambda m: run(m, limit, task, steps=1, ticks=ticks, every=every))(
        stacked(machines)
    )
    return CHUNK * np.asarray(trace.units_s, float)[:, -5:, 0].mean(axis=1)


if __name__ == "__main__":
    define_flags()
    launch(main)
