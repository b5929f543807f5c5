"""Table (n): large models in a phone's memory.

    python -m experiments.tables.precision_offload

Claimed sizes are compared with their bits per weight. Speed-ups of narrower weights are bounded
by the bytes that a token reads; the simulated ones include the fixed time per layer that was
fitted to published speeds. A model that exceeds memory streams layers from flash.
"""

from collections.abc import Sequence

import numpy as np
from absl import flags

from experiments.tables import simulated
from experiments.tables.simulated import CONSISTENT, IMPOSSIBLE, REPRODUCED, SUPPLEMENT, Row
from glm_edge.cli.console import launch
from glm_edge.compress.allocate.knapsack import format_everything
from glm_edge.configs import preset
from glm_edge.device import roofline
from glm_edge.device.loader import loaded_token_s
from glm_edge.device.machine import variations
from glm_edge.device.specs import Device, decode_rows, device
from glm_edge.device.workload import abstract_params, bytes_by_path, decode_ops, total
from glm_edge.params import Format

FLAGS = flags.FLAGS
NAME = "precision_offload"
TITLE = "Precision, memory and offloading of large models"
CONTEXT, RUNTIME = 128, "LiteRT-LM"
# Weights, claimed bytes, and bits of the narrowest claimed format.
SIZES = {
    "175 B in 32.4 GB": (175e9, 32.4e9, 8),
    "9 B, int8, below 1.8 GB": (9e9, 1.8e9, 8),
}
CLAIMED_SPEEDUPS = {"int8": (2.5, 3.5, 4.0), "int4-g32": (3.8, 5.0, 8.0)}
# GLM-4-9B's text model at 4.5 bits per weight.
WEIGHTS, LAYERS = 5.3e9, 40


def define_flags() -> None:
    """Define this script's flags."""
    simulated.define_flags(NAME)


def main(argv: Sequence[str]) -> None:
    simulated.publish(argv, NAME, TITLE, rows_of)


def rows_of() -> list[Row]:
    """Return the table's rows."""
    rows = [
        Row(
            f"{name}, bits per weight",
            "bits",
            float(claimed_bits),
            8 * size / weights,
            IMPOSSIBLE,
            f"{size / 1e9:g} GB for {weights / 1e9:g}e9 weights; the claimed format needs "
            f"{claimed_bits * weights / 8e9:,.1f} GB",
        )
        for name, (weights, size, claimed_bits) in SIZES.items()
    ]
    return [*rows, *speedups(), *offloading()]


def speedups() -> list[Row]:
    """Simulate decoding speeds of int8 and int4 relative to float32."""
    config = preset("mobile")
    params = abstract_params(config)
    fitted = roofline.fit_efficiency([row for row in decode_rows() if row.usable])
    phone = device("sm8650")
    wide = {path: 2 * size for path, size in bytes_by_path(params).items()}
    slowest = roofline.decode_tokens_s(
        phone, total(decode_ops(config, wide, CONTEXT)), fitted, "cpu", RUNTIME
    )
    rows = []
    for name, (low, high, bound) in CLAIMED_SPEEDUPS.items():
        formats = format_everything(params, Format.parse(name), Format("int8"))
        sizes = bytes_by_path(params, formats)
        speed = roofline.decode_tokens_s(
            phone, total(decode_ops(config, sizes, CONTEXT)), fitted, "cpu", RUNTIME
        )
        ratio = speed / slowest
        reproduced = low <= ratio <= high
        rows.append(
            Row(
                f"{name} over float32, decoding",
                "x",
                low,
                ratio,
                REPRODUCED if reproduced else CONSISTENT,
                f"claimed {low:g} to {high:g}; at most {bound:g} by bytes; 8 Gen 3, preset mobile",
            )
        )
    return rows


def offloading() -> list[Row]:
    """Simulate tokens per second of a model of 5.3 GB that streams from flash."""
    phone = device("sm8650")
    storage = phone.values["storage.sequential_bytes_s"]
    memory = phone.values["dram.bandwidth_bytes_s"] * phone.values["cpu.bandwidth_share"]
    draws = variations(phone, 256, FLAGS.seed)
    rows = [
        Row(
            "share in memory that hides flash",
            "%",
            None,
            100 * (1 - storage / memory),
            SUPPLEMENT,
            "with less, reading from flash takes longer than reading from memory",
        )
    ]
    for gigabytes in (2.0, 3.0, 4.0, 4.8, 5.3):
        speeds = [
            1 / loaded_token_s(WEIGHTS, 1e9 * gigabytes, s, bandwidth, LAYERS)
            for s, bandwidth in [(storage, memory)]
            + [(_storage(v, storage), _memory(v, phone)) for v in draws]
        ]
        rows.append(
            Row(
                f"5.3 GB of weights in {gigabytes:g} GB",
                "tokens/s",
                None,
                speeds[0],
                SUPPLEMENT,
                "pinned layers, the others read ahead",
                simulated.interval_of(np.array(speeds[1:])),
            )
        )
    return rows


def _storage(values: dict[str, float], otherwise: float) -> float:
    return values.get("storage.sequential_bytes_s", otherwise)


def _memory(values: dict[str, float], phone: Device) -> float:
    share = values.get("cpu.bandwidth_share", phone.values["cpu.bandwidth_share"])
    return share * phone.values["dram.bandwidth_bytes_s"]


if __name__ == "__main__":
    define_flags()
    launch(main)
