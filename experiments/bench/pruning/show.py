"""Results of pruning: intervals against the dense model, goals, and a figure."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.bench.peers.methods import ALONE, OURS, REFERENCE
from experiments.bench.peers.table import FLOOR, Columns
from experiments.bench.pruning.rows import DISTILLED, HALF, SMALLER, TWO_OF_FOUR
from experiments.nano.phone_screens import metrics
from glm_edge.errors import require

COLUMNS: Columns = {
    "method": ("method", "{}"),
    "kind": ("kind", "{}"),
    "removed": ("removed", "{:.1%}"),
    "zeros": ("zeros", "{:.1%}"),
    "stored": ("bytes", "{:.1%}"),
    "perplexity": ("perplexity", "{:.3f}"),
    "increase": ("increase", "{:+.2%}"),
    "increase_low": ("from", "{:+.2%}"),
    "increase_high": ("to", "{:+.2%}"),
    "tap_in_box_image": ("taps", "{:.1%}"),
    "tap_in_box_spoken": ("taps, spoken", "{:.1%}"),
    "kl_text": ("KL text", "{:.3g}"),
    "kl_image": ("KL image", "{:.2g}"),
    "kl_spoken": ("KL spoken", "{:.2g}"),
    "flips_text": ("flips text", "{:.1%}"),
    "flips_image": ("flips image", "{:.1%}"),
    "flips_spoken": ("flips spoken", "{:.1%}"),
    "seconds": ("s", "{:.0f}"),
}
KINDS = ("image", "spoken")
# Largest increase of perplexity, largest loss of taps, smallest speed-up of decoding.
MOST = {TWO_OF_FOUR: 0.10, SMALLER: 0.03}
MOST_TAPS, LEAST_SPEED = 0.01, 1.3
FOOTNOTE = (
    "bytes: stored bytes of the decoder including masks, as a fraction of the dense decoder's. "
    "Zeros of masks, unstructured or 2:4, save none by themselves: values are kept and a mask is "
    "added."
)


def beside_dense(measured: Mapping[str, Any], dense: Mapping[str, Any]) -> dict[str, Any]:
    """Compare with the dense model on the same windows and questions.

    Args:
      measured: result of `Scorer.score` for a row.
      dense: result of `Scorer.score` for the dense model.

    Returns:
      `increase` of perplexity with the ends of its 95 % interval (bootstrap over windows), and
      `taps_lost_<kind>` as `[low, value, high]` (bootstrap over questions), or None.
    """
    window = sum(dense["window_nats"]) / len(dense["window_nats"])
    tokens = window / math.log(dense["perplexity"])
    change = metrics.paired_difference(dense["window_nats"], measured["window_nats"])
    observed = {
        "increase": measured["perplexity"] / dense["perplexity"] - 1,
        "increase_low": math.expm1(change.low / tokens),
        "increase_high": math.expm1(change.high / tokens),
    }
    for kind in KINDS:
        hits = [[int(hit) for hit in row[f"hits_{kind}"] or ""] for row in (measured, dense)]
        lost = metrics.paired_difference(*hits) if hits[0] else None
        observed[f"taps_lost_{kind}"] = lost and [lost.low, lost.value, lost.high]
    return observed


def goals(rows: Sequence[Mapping[str, Any]], speed: Mapping[str, Any] | None) -> list[dict]:
    """Compare the measured values with the targets.

    Args:
      rows: results.
      speed: result of `speed.measure`, or None.

    Returns:
      Rows with `goal`, `row`, `wanted`, `found`, `reached`; goals without a row are skipped.
    """
    table: list[dict] = []

    def add(goal: str, row: str, wanted: float, observed: float, reached: bool) -> None:
        table.append(
            {"goal": goal, "row": row, "wanted": wanted, "found": observed, "reached": reached}
        )

    free = [r for r in rows if r["peer"] == OURS and r["kind"] == "training-free"]
    ours = _best([row for row in free if HALF in row["method"]])
    theirs = _best([row for row in rows if row["method"] == f"SparseGPT {HALF}"])
    if ours and theirs:
        wanted, observed = theirs["increase"], ours["increase"]
        add(
            f"{HALF} unstructured, SparseGPT's",
            ours["method"],
            wanted,
            observed,
            observed <= wanted,
        )
    trained = [row for row in rows if row["peer"] == OURS and row["kind"] == "trained"]
    trained = [row for row in trained if not row["method"].endswith(ALONE)]
    best = {part: _best([row for row in trained if part in row["method"]]) for part in MOST}
    for part, row in best.items():
        if row:
            observed = row["increase"]
            add(
                f"{part}, distilled: perplexity",
                row["method"],
                MOST[part],
                observed,
                observed <= MOST[part],
            )
    for kind in KINDS:
        row = best[SMALLER]
        if row and row[f"taps_lost_{kind}"]:
            observed = row[f"taps_lost_{kind}"][1]
            goal = f"{SMALLER}, distilled: taps, {kind}"
            add(goal, row["method"], MOST_TAPS, observed, observed <= MOST_TAPS)
    if speed:
        observed = speed["speedup"][1]
        add(f"{SMALLER}: speed", speed["shape"], LEAST_SPEED, observed, observed >= LEAST_SPEED)
    return table


def gains(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Compare each distilled row with the row of labels alone, on the same windows.

    Args:
      rows: results.

    Returns:
      `row`, and the relative change of perplexity by distillation, `change`, with the ends `low`
      and `high` of its 95 % interval (bootstrap over windows); negative values favour distillation.
      Rows without a partner are skipped.
    """
    by_name = {row["method"]: row for row in rows}
    table = []
    for row in rows:
        alone = by_name.get(f"{row['method'].removesuffix(f', {DISTILLED}')}, {ALONE}")
        if alone is None or alone is row:
            continue
        nats = alone["window_nats"], row["window_nats"]
        tokens = sum(nats[0]) / len(nats[0]) / math.log(alone["perplexity"])
        change = metrics.paired_difference(*nats)
        ends = {name: getattr(change, name) for name in ("value", "low", "high")}
        change, low, high = (math.expm1(end / tokens) for end in ends.values())
        table.append({"row": row["method"], "change": change, "low": low, "high": high})
    return table


def _best(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    return min(rows, key=lambda row: row["increase"], default=None)


def figure(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the relative increase of perplexity of each row with its interval.

    Args:
      rows: results except the dense model's.
      path: path of the PNG file.
    """
    matplotlib = require("matplotlib", extra="plot")
    matplotlib.use("Agg")
    pyplot = require("matplotlib.pyplot", extra="plot")
    drawn = [row for row in rows if row["peer"] != REFERENCE][::-1]
    drawing, axis = pyplot.subplots(
        figsize=(8, 0.32 * len(drawn) + 1.2), layout="constrained", squeeze=True
    )
    for position, row in enumerate(drawn):
        value = max(row["increase"], FLOOR)
        ends = [max(row[f"increase_{end}"], FLOOR) for end in ("low", "high")]
        color = "C3" if row["kind"] == "trained" else "C0" if row["peer"] == OURS else "C7"
        axis.plot(ends, [position, position], "-", color=color)
        axis.plot([value], [position], "o", color=color)
    axis.set_yticks(range(len(drawn)), [row["method"] for row in drawn], fontsize=8)
    axis.set(xlabel="relative increase of perplexity, 95 % interval", xscale="log")
    axis.grid(axis="x", alpha=0.3)
    drawing.savefig(path, dpi=130)
    pyplot.close(drawing)
