"""Draws the figures of the scripts.

    python -m experiments.common.figures

Draws README's picture, `experiments/results/headline.png`, from the committed logs, in seconds.
"""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from experiments.bench.peers.methods import ANSWERS
from glm_edge.cli.console import launch, refuse_arguments
from glm_edge.errors import require

FLAGS = flags.FLAGS
RESULTS = Path(__file__).parents[1] / "results"
PEERS = {"llama.cpp": "^", "gptqmodel": "s", "qwix": "D", "torchao": "v", "ai-edge": "x"}
# Engines of README's picture: glm_edge's, and llama.cpp's with a similar format.
DECODED = {
    "int8": ("LiteRT int8", "llama.cpp Q8_0"),
    "int4,\nper channel": ("LiteRT int4", None),
    "int4,\ngroups of 32": ("LiteRT int4-g32", "llama.cpp Q4_0"),
    "2 bits": ("LiteRT int2", "llama.cpp TQ2_0"),
}


def pareto(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the quality of each compression stage against its size.

    Args:
      rows: rows of the quickstart's report.
      path: path of the PNG file.
    """
    matplotlib = require("matplotlib", extra="plot")
    matplotlib.use("Agg")
    pyplot = require("matplotlib.pyplot", extra="plot")
    taps = [name for name in TAPS if any(row[name] is not None for row in rows)]
    figure, axes = pyplot.subplots(
        1,
        1 + bool(taps),
        figsize=(5.2 * (1 + bool(taps)), 3.8),
        squeeze=False,
        layout="constrained",
    )
    loss_axis = axes[0, 0]
    _stages(loss_axis, rows, {"bits_per_byte": "loss on text"}, lower_is_better=True)
    loss_axis.set_ylabel("bits per byte of text (lower is better)")
    if taps:
        _stages(axes[0, 1], rows, {name: TAPS[name] for name in taps}, lower_is_better=False)
        axes[0, 1].set_ylabel("taps in the box (higher is better)")
        axes[0, 1].legend(loc="lower left", fontsize=8)
    for axis in axes.flat:
        axis.set_xlabel("stored megabytes")
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def training_curve(stages: Sequence[Path], path: Path) -> None:
    """Draw the training curves on held-out data, with one panel per stage.

    Args:
      stages: CSV files of the stages with step, minutes, name, value.
      path: path of the PNG file.
    """
    matplotlib = require("matplotlib", extra="plot")
    matplotlib.use("Agg")
    pyplot = require("matplotlib.pyplot", extra="plot")
    width = 3.6 * len(stages)
    figure, axes = pyplot.subplots(
        1, len(stages), figsize=(width, 3.2), squeeze=False, layout="constrained"
    )
    for axis, stage in zip(axes.flat, stages, strict=True):
        with stage.open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["name"].startswith("eval.")]
        for name in sorted({row["name"] for row in rows}):
            points = [(float(r["minutes"]), float(r["value"])) for r in rows if r["name"] == name]
            axis.plot(*zip(*points, strict=True), "o-", label=name.removeprefix("eval."))
        axis.set(title=stage.stem, xlabel="minutes")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def skipping_figure(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw accuracy and tokens per second of each skipping method against its threshold.

    Args:
      rows: rows of `experiments.bench.skipping`; the first is without skipping.
      path: path of the PNG file.
    """
    matplotlib = require("matplotlib", extra="plot")
    matplotlib.use("Agg")
    pyplot = require("matplotlib.pyplot", extra="plot")
    figure, axes = pyplot.subplots(1, 2, figsize=(10.4, 3.8), layout="constrained")
    dense, kinds = rows[0], {row["name"].split()[0]: [] for row in rows[1:]}
    for row in rows[1:]:
        kinds[row["name"].split()[0]].append(row)
    for kind, points in kinds.items():
        points = sorted(points, key=lambda row: row["value"])
        axes[0].plot(
            [p["value"] for p in points], [p["accuracy"] for p in points], "o-", label=kind
        )
        speed, accuracy = ([p[name] for p in points] for name in ("tokens_per_second", "accuracy"))
        axes[1].plot(speed, accuracy, "o-", label=kind)
    axes[0].axhline(dense["accuracy"], color="0.6", linestyle="--", label=dense["name"])
    axes[1].plot([dense["tokens_per_second"]], [dense["accuracy"]], "k*", label=dense["name"])
    axes[0].set(xlabel="threshold, or fraction of neurons", ylabel="accuracy")
    axes[1].set(xlabel="decoded tokens per second", ylabel="accuracy")
    for axis in axes:
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


TAPS = {"tap_in_box_text": "written instructions", "tap_in_box_speech": "spoken instructions"}
MARKERS = {"tap_in_box_text": "o", "tap_in_box_speech": "s"}


def _stages(
    axis: Any, rows: Sequence[dict[str, Any]], names: dict[str, str], lower_is_better: bool
) -> None:
    """Draw one point per stage, the Pareto front, and separated labels."""
    points: list[tuple[float, float, str]] = []
    for name, label in names.items():
        scored = [row for row in rows if row[name] is not None]
        measured = [(row["bytes"] / 1e6, row[name]) for row in scored]
        drawn = axis.plot(*zip(*measured, strict=True), MARKERS.get(name, "o"), label=label)
        edge = front(measured, lower_is_better)
        axis.plot(*zip(*edge, strict=True), "-", color=drawn[0].get_color(), alpha=0.4)
        points += [(*at, row["stage"]) for at, row in zip(measured, scored, strict=True)]
    widest = max(size for size, _, _ in points)
    # Space for labels to the right of the largest model.
    axis.set_xlim(0, 1.35 * widest)
    axis.margins(y=0.2)
    low, high = axis.get_ylim()
    for (size, value, stage), height in zip(
        points, label_heights(points, 1.35 * widest, high - low), strict=True
    ):
        axis.annotate(
            stage,
            (size, value),
            xytext=(size + 0.02 * widest, height),
            fontsize=8,
            verticalalignment="center",
        )


def front(
    points: Sequence[tuple[float, float]], lower_is_better: bool
) -> list[tuple[float, float]]:
    """Find the Pareto front: points for which no smaller or equal one has a better value.

    Args:
      points: pairs `(size, value)`.
      lower_is_better: whether a lower value is better.

    Returns:
      The points of the front in ascending order of size.
    """
    sign = 1 if lower_is_better else -1
    edge: list[tuple[float, float]] = []
    for size, value in sorted(points, key=lambda point: (point[0], sign * point[1])):
        if not edge or sign * value < sign * edge[-1][1]:
            edge.append((size, value))
    return edge


def label_heights(
    points: Sequence[tuple[float, float, str]], width: float, height: float
) -> list[float]:
    """Find heights at which the labels of points do not overlap.

    Args:
      points: triples `(x, y, label)`; a label is to the right of its point.
      width: width of the axis, in units of x.
      height: height of the axis, in units of y.

    Returns:
      One height per label, that of its point if it is free.
    """
    letter, line = width / 50, height / 16
    taken: list[tuple[float, float, float]] = []
    heights = [0.0] * len(points)
    for index in sorted(range(len(points)), key=lambda i: points[i][1]):
        start, at, label = points[index]
        right = start + letter * (len(label) + 2)
        while any(begin < right and start < end and abs(at - y) < line for begin, end, y in taken):
            at += line / 4
        taken.append((start, right, at))
        heights[index] = at
    return heights


def headline(quality: dict[str, Any], speed: dict[str, Any], path: Path) -> None:
    """Draw README's picture: KL against bits, and tokens per second.

    Args:
      quality: log of `experiments.bench.quality`; of glm_edge's rows, those that the rule selects
        beforehand (`ANSWERS`), and of others' rows, the best.
      speed: log of `experiments.bench.export`.
      path: path of the PNG file.
    """
    figure = require("matplotlib.figure", extra="plot").Figure((9.0, 3.2), layout="constrained")
    accuracy, speeds = figure.subplots(1, 2)
    for prefix, marker in {"glm_edge": "o", **PEERS}.items():
        points = [
            (row["packed_bits"], _divergence(row))
            for row in quality["rows"]
            if row["method"].startswith(prefix)
            and row["kind"] == "training-free"
            and (prefix != "glm_edge" or row["method"] in ANSWERS["training-free"])
        ]
        edge = front(points, lower_is_better=True)
        if prefix == "glm_edge":
            accuracy.plot(*zip(*edge, strict=True), marker, color="C0", linestyle="-", label=prefix)
        else:
            accuracy.plot(*zip(*edge, strict=True), marker, markersize=5, label=prefix)
    accuracy.set_yscale("log")
    accuracy.set_xlabel("bits per weight, scales included")
    accuracy.set_ylabel("KL from float32, nats")
    accuracy.set_title("Quantized without training", fontsize=10)
    accuracy.legend(fontsize=7)
    rates = {row["engine"]: row["tokens_per_second"][1] for row in speed["results"]["decode 128"]}
    for index, engine in enumerate(("glm_edge in LiteRT", "llama.cpp")):
        names = [row[index] for row in DECODED.values()]
        heights = [rates[name] if name else 0.0 for name in names]
        at = [position + 0.38 * (index - 0.5) for position in range(len(names))]
        bars = speeds.bar(at, heights, width=0.36, label=engine)
        speeds.bar_label(bars, [f"{h:.0f}" if h else "" for h in heights], fontsize=7)
    speeds.set_xticks(range(len(DECODED)), list(DECODED))
    speeds.margins(y=0.25)
    speeds.set_ylabel("tokens per second")
    speeds.set_title("Decoding 0.25 B parameters on two CPU cores", fontsize=10)
    speeds.legend(fontsize=7, loc="upper left")
    figure.savefig(path, dpi=100)


def _divergence(row: dict[str, Any]) -> float:
    """Return KL in the first domain; logs of one domain have `kl_text`."""
    return row["kl_text"] if "kl_text" in row else next(iter(row["text"].values()))["kl"][1]


def define_flags() -> None:
    """Define this script's flags."""
    flags.DEFINE_string("out", str(RESULTS / "headline.png"), "PNG file for the figure.")


def main(argv: Sequence[str]) -> None:
    refuse_arguments(argv)
    logs = [
        json.loads((RESULTS / f"bench_{name}.json").read_text()) for name in ("quality", "export")
    ]
    headline(*logs, Path(FLAGS.out))


if __name__ == "__main__":
    define_flags()
    launch(main)
