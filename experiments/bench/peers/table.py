"""Presentation of results: a table, and a figure."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.bench.peers.methods import DECODER, OURS, REFERENCE
from glm_edge.errors import require

# Field names with titles and number formats; a slash separates the names of nested fields.
Columns = Mapping[str, tuple[str, str]]
INTERVAL = "{0[1]:.2g} ({0[0]:.2g} to {0[2]:.2g})"
PERCENT_INTERVAL = "{0[1]:+.2%} ({0[0]:+.2%} to {0[2]:+.2%})"
METHOD: Columns = {
    "method": ("method", "{}"),
    "kind": ("kind", "{}"),
    "bits": ("bits", "{:.3f}"),
    "packed_bits": ("packed", "{:.3f}"),
}
QUESTIONS: Columns = {
    "tap_in_box_image": ("taps", "{:.1%}"),
    "tap_in_box_spoken": ("taps, spoken", "{:.1%}"),
    "kl_image": ("KL image", "{:.2g}"),
    "kl_spoken": ("KL spoken", "{:.2g}"),
    "flips_image": ("flips image", "{:.2%}"),
    "flips_spoken": ("flips spoken", "{:.2%}"),
    "seconds": ("s", "{:.1f}"),
    "peak_rss_bytes": ("peak GB", "{:.2f}"),
}

# Position at which a divergence or an increase of zero or less is drawn.
FLOOR = 1e-5


def text_columns(domains: Sequence[str]) -> Columns:
    """Return the columns of text scores: KL and the increase of perplexity per domain."""
    columns = {f"text/{domain}/kl": (f"KL {domain}", INTERVAL) for domain in domains}
    return columns | {
        f"text/{domain}/increase": (f"perplexity {domain}", PERCENT_INTERVAL) for domain in domains
    }


def columns_of(domains: Sequence[str]) -> Columns:
    """Return the columns of the table of quality."""
    return {**METHOD, **text_columns(domains), **QUESTIONS}


def titles(columns: Columns) -> list[str]:
    """Return column titles."""
    return [title for title, _ in columns.values()]


def cells(row: Mapping[str, Any], columns: Columns) -> list[str]:
    """Return a row as text, in the order of the columns."""
    values = {**row}
    values["peak_rss_bytes"] = row.get("peak_rss_bytes") and row["peak_rss_bytes"] / 1e9
    return [_cell(values, name.split("/"), shape) for name, (_, shape) in columns.items()]


def _cell(row: Mapping[str, Any], names: Sequence[str], shape: str) -> str:
    value: Any = row
    for name in names:
        value = value[name]
    return "-" if value is None else shape.format(value)


def figure(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw KL against bits, one panel per domain, with one colour per peer.

    Args:
      rows: results; those of the complete model and of float32 are skipped.
      path: path of the PNG file.
    """
    matplotlib = require("matplotlib", extra="plot")
    matplotlib.use("Agg")
    pyplot = require("matplotlib.pyplot", extra="plot")
    drawn = [row for row in rows if row["where"] == DECODER and row["peer"] != REFERENCE]
    domains = list(drawn[0]["text"]) if drawn else ["text"]
    drawing, axes = pyplot.subplots(
        1,
        len(domains),
        figsize=(1 + 6 * len(domains), 5),
        layout="constrained",
        sharey=True,
        squeeze=False,
    )
    for axis, domain in zip(axes[0], domains, strict=True):
        _draw(axis, drawn, domain)
        axis.set(title=domain, xlabel="bits per weight, codes packed, scales included")
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("KL from float32 in nats, 95 % interval")
    if drawn:
        axes[0, -1].legend(fontsize=8)
    drawing.savefig(path, dpi=130)
    pyplot.close(drawing)


def _draw(axis: Any, rows: Sequence[dict[str, Any]], domain: str) -> None:
    for number, peer in enumerate(dict.fromkeys(row["peer"] for row in rows)):
        for kind, marker in (("training-free", "o"), ("trained", "^")):
            series = [row for row in rows if (row["peer"], row["kind"]) == (peer, kind)]
            if not series:
                continue
            ends = [[max(value, FLOOR) for value in row["text"][domain]["kl"]] for row in series]
            axis.errorbar(
                [row["packed_bits"] for row in series],
                [middle for _, middle, _ in ends],
                [[mid - low for low, mid, _ in ends], [high - mid for _, mid, high in ends]],
                fmt=marker,
                color=f"C{number}",
                label=f"{'glm_edge' if peer == OURS else peer}, {kind}",
                alpha=0.75,
                zorder=3 if peer == OURS else 2,
            )
    for label, style, ours in (("best of glm_edge", "k-", True), ("best of peers", "k:", False)):
        best = frontier([row for row in rows if (row["peer"] == OURS) == ours], domain)
        if best:
            axis.step(*zip(*best, strict=True), style, where="post", label=label, linewidth=1)


def frontier(rows: Sequence[dict[str, Any]], domain: str) -> list[tuple[float, float]]:
    """Return `(bits, KL)` of the Pareto-optimal rows in a domain."""
    best: list[tuple[float, float]] = []
    points = [(row["packed_bits"], row["text"][domain]["kl"][1]) for row in rows]
    for bits, kl in sorted(points):
        if not best or max(kl, FLOOR) < best[-1][1]:
            best.append((bits, max(kl, FLOOR)))
    return best
