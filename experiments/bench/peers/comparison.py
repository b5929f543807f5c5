"""Intervals of text scores, and verdicts between two rows on the same windows.

An interval is `[low, value, high]`, at 95 %, by the bootstrap over windows.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.bench.peers.methods import ANSWERS, OURS, REFERENCE, grouping
from experiments.nano.phone_screens import metrics

TOLERANCE = 1e-6
PER_WINDOW = ("window_nats", "window_kl")


def with_intervals(text: Mapping[str, Any], reference: Mapping[str, Any]) -> dict[str, Any]:
    """Add intervals to the text scores of a row.

    Args:
      text: scores per domain from `Scorer.score`.
      reference: those of the reference on the same windows.

    Returns:
      The scores, with `kl` and `increase`, the relative increase of perplexity, as intervals.
    """
    rows = {}
    for domain, scores in text.items():
        kl = metrics.bootstrap(scores["window_kl"])
        before, after = reference[domain]["window_nats"], scores["window_nats"]
        change = metrics.paired_difference(before, after)
        increase = np.expm1([change.low, change.value, change.high]).tolist()
        rows[domain] = {**scores, "kl": [kl.low, kl.value, kl.high], "increase": increase}
    return rows


def answer_of(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Mapping | None:
    """Return glm_edge's row to compare a peer's row with, or None.

    The rule was fixed before measuring: of the rows in `ANSWERS` with at most as many packed bits,
    the one with the most, of the peer's grouping if there is one. A row without training is
    compared with rows without training.

    Args:
      row: row of a peer.
      rows: all rows.
    """
    names = ANSWERS["training-free"] + (ANSWERS["trained"] if row["kind"] == "trained" else ())
    fitting = [
        ours
        for ours in rows
        if ours["method"] in names and ours["packed_bits"] <= row["packed_bits"] + TOLERANCE
    ]
    alike = [ours for ours in fitting if grouping(ours["method"]) == grouping(row["method"])]
    # Trained rows come last in `ANSWERS`, and precede others of equal bits.
    return max(
        alike or fitting,
        key=lambda ours: (ours["packed_bits"], names.index(ours["method"])),
        default=None,
    )


def verdicts(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Compare each peer's row with glm_edge's by KL, per domain.

    Args:
      rows: rows whose text scores have values per window.

    Returns:
      Per peer's row and domain: `peer`, `ours` (None without a row), `domain`, `difference` of KL
      in nats, ours minus the peer's, as an interval, and `verdict`: `better` or `worse` if the
      interval excludes zero, otherwise `undecided`.
    """
    table: list[dict[str, Any]] = []
    for row in rows:
        if row["peer"] in (OURS, REFERENCE):
            continue
        ours = answer_of(row, rows)
        for domain, scores in row["text"].items():
            entry: dict[str, Any] = {"peer": row["method"], "ours": None, "domain": domain}
            if ours is not None:
                kl = ours["text"][domain]["window_kl"]
                change = metrics.paired_difference(scores["window_kl"], kl)
                verdict = (
                    "better" if change.high < 0 else "worse" if change.low > 0 else "undecided"
                )
                difference = [change.low, change.value, change.high]
                entry |= {"ours": ours["method"], "difference": difference, "verdict": verdict}
            table.append(entry)
    return table


def without_windows(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row without its values per window, which would fill most of a report."""
    text = {
        domain: {name: value for name, value in scores.items() if name not in PER_WINDOW}
        for domain, scores in row["text"].items()
    }
    return {**row, "text": text}
