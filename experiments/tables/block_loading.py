"""Table (p): loading of blocks by thresholds of memory.

    python -m experiments.tables.block_loading

The claim is an algorithm: below 70 % of memory the next block is prefetched, above 85 % cold
blocks are freed, and referenced blocks stay. As written, references are only added; here each use
releases its reference. Forty layers are read in order for 60 tokens; hit rates are exact.
"""

from collections.abc import Sequence

from absl import flags

from experiments.tables import simulated
from experiments.tables.simulated import CONTRADICTORY, SUPPLEMENT, Row
from glm_edge.cli.console import launch
from glm_edge.device import loader

FLAGS = flags.FLAGS
NAME = "block_loading"
TITLE = "Blocks of weights by 70 and 85 % of memory"
LAYERS, TOKENS = 40, 60
LABELS = {
    "oldest_first": "70/85, oldest freed first (claimed)",
    "newest_first": "70/85, newest freed first",
    "lru": "least recently used",
    "two_lists": "two lists, as Linux",
    "pin": "pinned layers",
    "belady": "Belady",
}


def define_flags() -> None:
    """Define this script's flags."""
    simulated.define_flags(NAME)


def main(argv: Sequence[str]) -> None:
    simulated.publish(argv, NAME, TITLE, rows_of)


def rows_of() -> list[Row]:
    """Return the table's rows."""
    rows = []
    accesses = loader.layers_in_order(LAYERS, TOKENS)
    for capacity in (20, 30, 36, 40):
        rates = {
            policy: loader.simulate_loading([1] * LAYERS, accesses, capacity, 1.0, 1.0, policy)
            for policy in loader.POLICIES
        }
        best = rates["belady"].hit_rate
        for policy, label in LABELS.items():
            claimed = policy == "oldest_first"
            rate = rates[policy].hit_rate
            rows.append(
                Row(
                    f"{capacity} of {LAYERS} layers fit, {label}",
                    "% hits",
                    None,
                    100 * rate,
                    CONTRADICTORY if claimed else SUPPLEMENT,
                    f"the best policy hits {100 * best:.1f} %: the oldest layer is the next one"
                    if claimed
                    else f"bound {100 * loader.hit_rate_bound(LAYERS, capacity):.1f} %",
                )
            )
    return rows


if __name__ == "__main__":
    define_flags()
    launch(main)
