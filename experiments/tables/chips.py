"""Table (k): claimed operations per second of phone chips.

    python -m experiments.tables.chips

A roofline says how much of a claimed rate a decoder can use: a decoded token of 4-bit weights has
four operations per byte. Rates that were achieved with prompts come from the published rows that
the package contains.
"""

from collections.abc import Sequence

from absl import flags

from experiments.tables import simulated
from experiments.tables.simulated import CONSISTENT, CONTRADICTORY, REPRODUCED, SUPPLEMENT, Row
from glm_edge.cli.console import launch
from glm_edge.device.specs import decode_rows, device

FLAGS = flags.FLAGS
NAME = "chips"
TITLE = "TOPS of chips against what a decoder uses"
TOPS = {"A17": 17.0, "8 Gen 3": 45.0, "Dimensity 9200": 36.0}
WATTS = {"A17": 6.5, "8 Gen 3": 8.0, "Dimensity 9200": 7.8}
# Published operations per second, and watts by IPMI.
SERVER = {"cpu": (18420.0, 125.6), "i/o": (9150.0, 89.3)}
# Two operations per weight of half a byte.
OPS_PER_BYTE = 4.0


def define_flags() -> None:
    """Define this script's flags."""
    simulated.define_flags(NAME)


def main(argv: Sequence[str]) -> None:
    simulated.publish(argv, NAME, TITLE, rows_of)


def rows_of() -> list[Row]:
    """Return the table's rows."""
    peak = device("sm8650").values["dram.bandwidth_bytes_s"]
    ridge = 1e12 * TOPS["8 Gen 3"] / peak
    achieved = [
        2e-12 * row.body_parameters * row.prefill_tokens_s
        for row in decode_rows()
        if row.usable and row.engine == "npu" and row.prefill_tokens_s and row.body_parameters
    ]
    rows = [
        Row(
            f"{chip}, TOPS per W",
            "1e12/J",
            tops / WATTS[chip],
            None,
            CONSISTENT,
            "published rate over published power; no public table of NPU power to simulate it",
        )
        for chip, tops in TOPS.items()
    ]
    rows += [
        Row(
            f"server, {name}, operations per joule",
            "1/J",
            None,
            rate / watts,
            CONSISTENT,
            f"{rate:,.0f} operations per second at {watts:g} W; arithmetic, no phone",
        )
        for name, (rate, watts) in SERVER.items()
    ]
    return [
        *rows,
        Row(
            "8 Gen 3, the other article's TOPS",
            "1e12/s",
            30.0,
            None,
            CONTRADICTORY,
            "the first article claims 45 for the same chip",
        ),
        Row(
            "NPUs of 15.8, 14.0 and 4.35 TOPS compared",
            "ratio",
            15.8 / 4.35,
            None,
            CONTRADICTORY,
            "chips of different years and number formats, so the ratio is not one of makers",
        ),
        Row(
            "bandwidth limits products",
            "ops/byte",
            None,
            ridge,
            REPRODUCED,
            f"45 TOPS need this many operations per byte of memory; int4 decoding has "
            f"{OPS_PER_BYTE:.0f}",
        ),
        Row(
            "8 Gen 3, rate that decoding uses",
            "%",
            None,
            100 * OPS_PER_BYTE / ridge,
            SUPPLEMENT,
            "of 45 TOPS, at all of the peak bandwidth",
        ),
        Row(
            "NPU rate achieved with prompts, lowest",
            "1e12/s",
            None,
            min(achieved),
            SUPPLEMENT,
            f"{len(achieved)} published rows of phones",
        ),
        Row(
            "NPU rate achieved with prompts, highest",
            "1e12/s",
            None,
            max(achieved),
            SUPPLEMENT,
            "grows with the width of the model",
        ),
    ]


if __name__ == "__main__":
    define_flags()
    launch(main)
