"""Figures of the scripts."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from glm_edge.errors import require


def pareto(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws what each stage of compression kept against what it weighs.

    Args:
      rows: of the main job's report.
      path: PNG file to write.
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
    _steps(loss_axis, rows, "bits_per_byte", "loss on text", "o-", "tab:blue")
    loss_axis.set_ylabel("bits per byte of text (lower is better)")
    for name in taps:
        _steps(axes[0, 1], rows, name, TAPS[name], MARKERS[name], None)
    if taps:
        axes[0, 1].set_ylabel("taps in the box (higher is better)")
        axes[0, 1].margins(y=0.15)
        axes[0, 1].legend(loc="lower left")
    for axis in axes.flat:
        axis.set_xlim(left=0)
        axis.margins(x=0.15)
        axis.set_xlabel("stored megabytes")
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def training_curve(stages: Sequence[Path], path: Path) -> None:
    """Draws what training measured on held-out data, one panel a stage.

    Args:
      stages: CSV files of the stages: step, minutes, name, value.
      path: PNG file to write.
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
    """Draws accuracy and tokens per second of each way of skipping against its threshold.

    Args:
      rows: of `experiments.bench_skipping`; the first skips nothing.
      path: PNG file to write.
    """
    matplotlib = require("matplotlib", extra="plot")
    matplotlib.use("Agg")
    pyplot = require("matplotlib.pyplot", extra="plot")
    figure, axes = pyplot.subplots(1, 2, figsize=(10.4, 3.8), layout="constrained")
    whole, kinds = rows[0], {row["name"].split()[0]: [] for row in rows[1:]}
    for row in rows[1:]:
        kinds[row["name"].split()[0]].append(row)
    for kind, points in kinds.items():
        points = sorted(points, key=lambda row: row["value"])
        axes[0].plot(
            [p["value"] for p in points], [p["accuracy"] for p in points], "o-", label=kind
        )
        speed, accuracy = ([p[name] for p in points] for name in ("tokens_per_second", "accuracy"))
        axes[1].plot(speed, accuracy, "o-", label=kind)
    axes[0].axhline(whole["accuracy"], color="0.6", linestyle="--", label=whole["name"])
    axes[1].plot([whole["tokens_per_second"]], [whole["accuracy"]], "k*", label=whole["name"])
    axes[0].set(xlabel="threshold, or fraction of neurons", ylabel="accuracy")
    axes[1].set(xlabel="decoded tokens per second", ylabel="accuracy")
    for axis in axes:
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


TAPS = {"tap_in_box_text": "written instructions", "tap_in_box_speech": "spoken instructions"}
MARKERS = {"tap_in_box_text": "o-", "tap_in_box_speech": "s--"}


def _steps(axis: Any, rows: Sequence[dict[str, Any]], name: str, label: str, style, color) -> None:
    kept = [row for row in rows if row[name] is not None]
    sizes = [row["bytes"] / 1e6 for row in kept]
    axis.plot(sizes, [row[name] for row in kept], style, label=label, color=color)
    labels: dict[tuple[float, float], list[str]] = {}
    for size, row in zip(sizes, kept, strict=True):
        labels.setdefault((size, round(row[name], 2)), []).append(row["stage"])
    for place, stages in labels.items():
        axis.annotate(
            ", ".join(stages), place, textcoords="offset points", xytext=(5, 5), fontsize=8
        )
