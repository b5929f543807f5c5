"""Presentation of results: a table, peers ahead of glm_edge, and a figure."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.bench.peers.methods import DECODER, OURS, REFERENCE
from glm_edge.errors import require

# Field names with titles and number formats.
Columns = Mapping[str, tuple[str, str]]
COLUMNS: Columns = {
    "method": ("method", "{}"),
    "kind": ("kind", "{}"),
    "bits": ("bits", "{:.3f}"),
    "packed_bits": ("packed", "{:.3f}"),
    "perplexity": ("perplexity", "{:.3f}"),
    "increase": ("increase", "{:+.2%}"),
    "tap_in_box_image": ("taps", "{:.1%}"),
    "tap_in_box_spoken": ("taps, spoken", "{:.1%}"),
    "kl_text": ("KL text", "{:.2g}"),
    "kl_image": ("KL image", "{:.2g}"),
    "kl_spoken": ("KL spoken", "{:.2g}"),
    "flips_text": ("flips text", "{:.2%}"),
    "flips_image": ("flips image", "{:.2%}"),
    "flips_spoken": ("flips spoken", "{:.2%}"),
    "seconds": ("s", "{:.1f}"),
    "peak_rss_bytes": ("peak GB", "{:.2f}"),
}

# Position at which an increase of zero or less is drawn.
FLOOR = 1e-5
TOLERANCE = 1e-6


def titles(columns: Columns = COLUMNS) -> list[str]:
    """Return column titles."""
    return [title for title, _ in columns.values()]


def cells(row: Mapping[str, Any], columns: Columns = COLUMNS) -> list[str]:
    """Return a row as text, in the order of the columns."""
    values = {**row}
    values["peak_rss_bytes"] = row.get("peak_rss_bytes") and row["peak_rss_bytes"] / 1e9
    return [
        "-" if values[name] is None else shape.format(values[name])
        for name, (_, shape) in columns.items()
    ]


def unreached(rows: Sequence[dict[str, Any]]) -> list[str]:
    """List peers' rows that no row of glm_edge matches with at most as many packed bits.

    A training-free row is compared with training-free rows, a trained one with all. Matching means
    an equal or smaller perplexity.
    """
    compared = [row for row in rows if row["where"] == DECODER and row["peer"] != REFERENCE]
    answers = [row for row in compared if row["peer"] == OURS]

    def answered(row: dict[str, Any]) -> bool:
        return any(
            ours["kind"] in ("training-free", row["kind"])
            and ours["packed_bits"] <= row["packed_bits"] + TOLERANCE
            and ours["perplexity"] <= row["perplexity"]
            for ours in answers
        )

    return [row["method"] for row in compared if row["peer"] != OURS and not answered(row)]


def figure(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the relative increase of perplexity against bits, with one colour per peer.

    Args:
      rows: results; those of the complete model and of float32 are skipped.
      path: path of the PNG file.
    """
    matplotlib = require("matplotlib", extra="plot")
    matplotlib.use("Agg")
    pyplot = require("matplotlib.pyplot", extra="plot")
    drawing, axis = pyplot.subplots(figsize=(8, 5), layout="constrained")
    drawn = [row for row in rows if row["where"] == DECODER and row["peer"] != REFERENCE]
    for number, peer in enumerate(dict.fromkeys(row["peer"] for row in drawn)):
        for kind, marker in (("training-free", "o"), ("trained", "^")):
            series = [row for row in drawn if (row["peer"], row["kind"]) == (peer, kind)]
            if not series:
                continue
            axis.plot(
                [row["packed_bits"] for row in series],
                [max(row["increase"], FLOOR) for row in series],
                marker,
                color=f"C{number}",
                label=f"{'glm_edge' if peer == OURS else peer}, {kind}",
                alpha=0.75,
                zorder=3 if peer == OURS else 2,
            )
    for label, style, group in (
        ("best of glm_edge", "k-", [row for row in drawn if row["peer"] == OURS]),
        ("best of peers", "k:", [row for row in drawn if row["peer"] != OURS]),
    ):
        best = frontier(group)
        if best:
            axis.step(*zip(*best, strict=True), style, where="post", label=label, linewidth=1)
    axis.set(
        xlabel="bits per weight of the decoder, codes packed, scales included",
        ylabel="relative increase of perplexity",
        yscale="log",
    )
    axis.grid(alpha=0.3)
    if drawn:
        axis.legend(fontsize=8)
    drawing.savefig(path, dpi=130)
    pyplot.close(drawing)


def frontier(rows: Sequence[dict[str, Any]]) -> list[tuple[float, float]]:
    """Return `(bits, increase)` of the Pareto-optimal rows."""
    best: list[tuple[float, float]] = []
    for row in sorted(rows, key=lambda row: (row["packed_bits"], row["increase"])):
        increase = max(row["increase"], FLOOR)
        if not best or increase < best[-1][1]:
            best.append((row["packed_bits"], increase))
    return best
