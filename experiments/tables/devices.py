"""Table (m): models on a phone, a watch and microcontrollers.

    python -m experiments.tables.devices

The least time of an inference is that of reading its weights once. A model that exceeds the
memory of a device cannot run on it.
"""

from collections.abc import Sequence

import numpy as np
from absl import flags

from experiments.tables import simulated
from experiments.tables.simulated import CONSISTENT, IMPOSSIBLE, Row
from glm_edge.cli.console import launch
from glm_edge.device.machine import variations
from glm_edge.device.specs import device

FLAGS = flags.FLAGS
NAME = "devices"
TITLE = "Latency and memory on three devices and a microcontroller"
ESP32_BYTES = 0.52e6 + 8e6
M7_BYTES = 3e6


def define_flags() -> None:
    """Define this script's flags."""
    simulated.define_flags(NAME)


def main(argv: Sequence[str]) -> None:
    simulated.publish(argv, NAME, TITLE, rows_of)


def rows_of() -> list[Row]:
    """Return the table's rows."""
    values = device("sm8550").values
    peak = values["dram.bandwidth_bytes_s"]
    least_s = 98e6 / (values["cpu.bandwidth_share"] * peak)
    varied = [v["cpu.bandwidth_share"] for v in variations(device("sm8550"), 256, FLAGS.seed)]
    return [
        Row(
            "8 Gen 2, 98 MB, least time",
            "ms",
            65.0,
            1e3 * least_s,
            CONSISTENT,
            "reading takes a fraction of the claim, so products or fixed times take the other part",
            simulated.interval_of(1e3 * 98e6 / (peak * np.array(varied))),
        ),
        Row(
            "MT2601, 32 MB in 142 ms, needed bandwidth",
            "GB/s",
            None,
            32e6 / 0.142 / 1e9,
            CONSISTENT,
            "less than any memory of such a chip",
        ),
        Row(
            "ESP32, model",
            "MB",
            14.0,
            ESP32_BYTES / 1e6,
            IMPOSSIBLE,
            "0.52 MB of SRAM and at most 8 MB of PSRAM are less than the model",
        ),
        Row(
            "Cortex-M7, model",
            "MB",
            14.0,
            M7_BYTES / 1e6,
            IMPOSSIBLE,
            "2 MB of flash and 1 MB of SRAM (from memory); external memory would be needed",
        ),
    ]


if __name__ == "__main__":
    define_flags()
    launch(main)
