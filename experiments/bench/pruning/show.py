"""Results of pruning: taps lost against the dense model, goals, and a figure."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.bench.peers.comparison import with_intervals
from experiments.bench.peers.methods import ALONE, OURS, REFERENCE
from experiments.bench.peers.table import FLOOR, Columns, text_columns
from experiments.bench.pruning.rows import DISTILLED, HALF, SMALLER, TWO_OF_FOUR
from experiments.nano.phone_screens import metrics
from glm_edge.errors import require

QUESTIONS: Columns = {
    "tap_in_box_image": ("taps", "{:.1%}"),
    "tap_in_box_spoken": ("taps, spoken", "{:.1%}"),
    "kl_image": ("KL image", "{:.2g}"),
    "kl_spoken": ("KL spoken", "{:.2g}"),
    "flips_image": ("flips image", "{:.1%}"),
    "flips_spoken": ("flips spoken", "{:.1%}"),
    "seconds": ("s", "{:.0f}"),
}
METHOD: Columns = {
    "method": ("method", "{}"),
    "kind": ("kind", "{}"),
    "removed": ("removed", "{:.1%}"),
    "zeros": ("zeros", "{:.1%}"),
    "stored": ("bytes", "{:.1%}"),
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


def columns_of(domains: Sequence[str]) -> Columns:
    """Return the columns of the table of pruning."""
    return {**METHOD, **text_columns(domains), **QUESTIONS}


def taps_lost(measured: Mapping[str, Any], dense: Mapping[str, Any]) -> dict[str, Any]:
    """Compare taps with the dense model's on the same questions.

    Args:
      measured: result of `Scorer.score` for a row.
      dense: result of `Scorer.score` for the dense model.

    Returns:
      `taps_lost_<kind>` as `[low, value, high]` (95 %, bootstrap over questions), or None.
    """
    lost: dict[str, Any] = {}
    for kind in KINDS:
        hits = [[int(hit) for hit in row[f"hits_{kind}"] or ""] for row in (measured, dense)]
        change = metrics.paired_difference(*hits) if hits[0] else None
        lost[f"taps_lost_{kind}"] = change and [change.low, change.value, change.high]
    return lost


def increase_of(row: Mapping[str, Any]) -> float:
    """Return the increase of perplexity in the domain where it is largest."""
    return max(scores["increase"][1] for scores in row["text"].values())


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
        wanted, observed = increase_of(theirs), increase_of(ours)
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
            observed = increase_of(row)
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
      rows: results with values per window.

    Returns:
      `row`, `domain`, and the relative change of perplexity by distillation, `change`, as an
      interval `[low, value, high]` (95 %, bootstrap over windows); negative values favour
      distillation. Rows without a partner are skipped.
    """
    by_name = {row["method"]: row for row in rows}
    table = []
    for row in rows:
        alone = by_name.get(f"{row['method'].removesuffix(f', {DISTILLED}')}, {ALONE}")
        if alone is None or alone is row:
            continue
        for domain, scores in with_intervals(row["text"], alone["text"]).items():
            table.append({"row": row["method"], "domain": domain, "change": scores["increase"]})
    return table


def _best(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    return min(rows, key=increase_of, default=None)


def figure(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the relative increase of perplexity in the first domain with its interval.

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
        increase = next(iter(row["text"].values()))["increase"]
        low, value, high = (max(end, FLOOR) for end in increase)
        color = "C3" if row["kind"] == "trained" else "C0" if row["peer"] == OURS else "C7"
        axis.plot([low, high], [position, position], "-", color=color)
        axis.plot([value], [position], "o", color=color)
    axis.set_yticks(range(len(drawn)), [row["method"] for row in drawn], fontsize=8)
    domain = next(iter(drawn[0]["text"])) if drawn else "text"
    axis.set(xlabel=f"relative increase of perplexity, {domain}, 95 % interval", xscale="log")
    axis.grid(axis="x", alpha=0.3)
    drawing.savefig(path, dpi=130)
    pyplot.close(drawing)
