"""What a transform did to each parameter, as a table."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from glm_edge import params as boxes
from glm_edge.errors import OutputError, require
from glm_edge.params.tree import Params

_HEADINGS = {
    "transform": "transform",
    "path": "path",
    "action": "action",
    "kept": "kept",
    "bits": "bits/weight",
    "bytes_before": "bytes before",
    "bytes_after": "bytes after",
    "relative_error": "relative error",
}
_TEXT = ("transform", "path", "action")
# Columns of the CSV file that only its rows of FLOPs and latency fill.
_COSTS = (
    "flops_before",
    "flops_after",
    "before_ms",
    "after_ms",
    "speedup",
    "low",
    "high",
    "rounds",
)


@dataclass(frozen=True)
class Row:
    """What happened to one parameter.

    Attributes:
      transform: name of what acted.
      path: of the parameter.
      action: in words, such as `int4-g32`.
      kept: fraction of the weights that remain (not pruned).
      bits: stored bits per remaining place of the dense array, scales and masks included.
      bytes_before: stored bytes of the parameter before.
      bytes_after: and after.
      relative_error: `|new - old| / |old|` in the Frobenius norm; None where shapes differ.
    """

    transform: str
    path: str
    action: str
    kept: float
    bits: float
    bytes_before: int
    bytes_after: int
    relative_error: float | None = None


@dataclass(frozen=True)
class Point:
    """One training step: the loss and its soft (teacher) and hard (label) parts, in nats."""

    step: int
    loss: float
    soft: float
    hard: float
    learning_rate: float


@dataclass(frozen=True)
class Latency:
    """Measured time of one kind of work, before and after, from `glm_edge.compress.cost.measure`.

    Attributes:
      work: `token`, `image`, `clip` or `sentence`.
      before_ms: median milliseconds.
      after_ms: likewise.
      speedup: median over rounds of before / after.
      low: its lower quartile.
      high: its upper quartile.
      rounds: in which both took turns.
    """

    work: str
    before_ms: float
    after_ms: float
    speedup: float
    low: float
    high: float
    rounds: int

    def __str__(self) -> str:
        return (
            f"latency per {self.work}: {self.before_ms:.3f} -> {self.after_ms:.3f} ms "
            f"({self.speedup:.2f} x, quartiles {self.low:.2f} to {self.high:.2f} of {self.rounds})"
        )


@dataclass(frozen=True)
class Report:
    """A table of rows, totals over all parameters, and training curves.

    What is counted is there at once; time is measured on demand, and the report then shows it:
    `report.with_latency(glm_edge.cost.measure((model, params), (smaller, shrunk)))`.

    Attributes:
      rows: one for each parameter and transform that acted on it.
      bytes_before: stored bytes of all parameters before, untouched ones included.
      bytes_after: and after.
      count_before: parameters before.
      count_after: and after.
      curve: steps of training, where there were any.
      notes: what the reader should know, such as a modality that calibration lacked.
      flops_before: see `glm_edge.compress.cost.flops`; None where shapes did not change.
      flops_after: and after.
      latency: measured times, where they were asked for.
    """

    rows: tuple[Row, ...]
    bytes_before: int
    bytes_after: int
    count_before: int
    count_after: int
    curve: tuple[Point, ...] = ()
    notes: tuple[str, ...] = ()
    flops_before: Mapping[str, int] | None = None
    flops_after: Mapping[str, int] | None = None
    latency: tuple[Latency, ...] = ()

    @classmethod
    def start(cls, params: Params) -> "Report":
        """An empty report on unchanged parameters."""
        return cls.of((), params, params)

    @classmethod
    def of(cls, rows: Sequence[Row], before: Params, after: Params, **extra: Any) -> "Report":
        """A report whose totals are those of two parameter trees."""
        return cls(
            tuple(rows),
            boxes.stored_bytes(before),
            boxes.stored_bytes(after),
            boxes.count(before),
            boxes.count(after),
            **extra,
        )

    def __add__(self, later: "Report") -> "Report":
        """Joins the report of what came next; totals run from the first to the last."""
        return Report(
            self.rows + later.rows,
            self.bytes_before,
            later.bytes_after,
            self.count_before,
            later.count_after,
            self.curve + later.curve,
            self.notes + later.notes,
            later.flops_before if self.flops_before is None else self.flops_before,
            self.flops_after if later.flops_after is None else later.flops_after,
            self.latency + later.latency,
        )

    def with_latency(self, latency: Sequence[Latency]) -> "Report":
        """The same report with measured times, from `glm_edge.compress.cost.measure`."""
        return replace(self, latency=tuple(latency))

    @property
    def total(self) -> Row:
        """The totals line."""
        return Row(
            transform="total",
            path="all parameters",
            action=f"{self.count_before:,} -> {self.count_after:,} parameters",
            kept=self.count_after / max(self.count_before, 1),
            bits=8 * self.bytes_after / max(self.count_after, 1),
            bytes_before=self.bytes_before,
            bytes_after=self.bytes_after,
        )

    def __str__(self) -> str:
        cells = [list(_HEADINGS.values())]
        cells += [_format(row) for row in (*self.rows, self.total)]
        widths = [max(len(line[i]) for line in cells) for i in range(len(_HEADINGS))]
        lines = [
            "  ".join(
                cell.ljust(width) if name in _TEXT else cell.rjust(width)
                for name, cell, width in zip(_HEADINGS, line, widths, strict=True)
            ).rstrip()
            for line in cells
        ]
        rule = "-" * max(len(line) for line in lines)
        notes = [f"note: {note}" for note in self.notes]
        below = [*self._costs(), *self._training(), *notes]
        return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1], *below])

    def _flops(self) -> list[tuple[str, int, int]]:
        """Kinds of work that both models do, with their counts before and after."""
        before, after = self.flops_before or {}, self.flops_after or {}
        return [(work, before[work], count) for work, count in after.items() if work in before]

    def _costs(self) -> list[str]:
        return [
            f"FLOPs per {work}: {before:,} -> {after:,} ({after / before:.1%})"
            for work, before, after in self._flops()
        ] + [str(latency) for latency in self.latency]

    def _training(self) -> list[str]:
        if not self.curve:
            return []
        first, last = self.curve[0], self.curve[-1]
        return [f"training: {len(self.curve)} steps, loss {first.loss:.4f} -> {last.loss:.4f}"]

    def to_markdown(self) -> str:
        """The table in Markdown, with its totals line, and what is known of FLOPs and latency."""
        lines = [
            "| " + " | ".join(_HEADINGS.values()) + " |",
            "|" + "|".join(" --- " if name in _TEXT else " ---: " for name in _HEADINGS) + "|",
        ]
        for row in (*self.rows, self.total):
            lines.append("| " + " | ".join(_format(row)) + " |")
        if self._costs():
            lines += ["", *(f"- {line}" for line in self._costs())]
        return "\n".join(lines) + "\n"

    def to_csv(self, path: str | Path) -> None:
        """Writes rows and totals, then FLOPs, latency and notes; numbers unrounded.

        A row of `FLOPs` or `latency` names in `path` what is done once (`token`, `image`) and fills
        the last columns, whose names are those of `Report` and `Latency`. A row of `note` holds the
        note in `action`.

        Raises:
          OutputError: the file cannot be written.
        """
        text = io.StringIO()
        names = [*(field.name for field in fields(Row)), *_COSTS]
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in (*self.rows, self.total))
        for work, before, after in self._flops():
            counts = {"flops_before": before, "flops_after": after}
            writer.writerow({"transform": "FLOPs", "path": work, **counts})
        for latency in self.latency:
            times = asdict(latency)
            writer.writerow({"transform": "latency", "path": times.pop("work"), **times})
        writer.writerows({"transform": "note", "action": note} for note in self.notes)
        try:
            Path(path).write_text(text.getvalue(), encoding="utf-8")
        except OSError as error:
            raise OutputError(f"{path}: cannot write the report ({error.strerror})") from error

    def plot(self, path: str | Path) -> None:
        """Draws bytes before and after for each parameter, and the training curve if there is one.

        Args:
          path: of the picture; its suffix names the format.

        Raises:
          MissingExtraError: matplotlib is not installed.
          OutputError: the file cannot be written.
        """
        figures = require("matplotlib.figure", extra="plot")
        panels = 1 + bool(self.curve)
        size = (7.0 * panels, max(3.0, 0.22 * len(self.rows)))
        figure = figures.Figure(figsize=size, layout="constrained")
        axes = figure.subplots(1, panels, squeeze=False)[0]
        _plot_bytes(axes[0], self.rows)
        if self.curve:
            _plot_curve(axes[1], self.curve)
        try:
            figure.savefig(path, dpi=150)
        except OSError as error:
            raise OutputError(f"{path}: cannot write the figure ({error.strerror})") from error


def _format(row: Row) -> list[str]:
    error = "" if row.relative_error is None else f"{row.relative_error:.2e}"
    return [
        row.transform,
        row.path,
        row.action,
        f"{row.kept:.1%}",
        f"{row.bits:.2f}",
        f"{row.bytes_before:,}",
        f"{row.bytes_after:,}",
        error,
    ]


def _plot_bytes(axes: Any, rows: Sequence[Row]) -> None:
    first = {}
    for row in rows:
        first.setdefault(row.path, row.bytes_before)
    last = {row.path: row.bytes_after for row in rows}
    places = range(len(first))
    axes.barh(places, list(first.values()), color="0.8", label="before")
    axes.barh(places, [last[path] for path in first], height=0.5, label="after")
    axes.set_yticks(places, list(first), fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("stored bytes")
    axes.legend()


def _plot_curve(axes: Any, curve: Sequence[Point]) -> None:
    places = range(1, len(curve) + 1)
    for name in ("loss", "soft", "hard"):
        axes.plot(places, [getattr(point, name) for point in curve], label=name)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats)")
    axes.legend()
