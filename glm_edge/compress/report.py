"""Reports: a table of the changes of each parameter by a transform."""

import csv
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from glm_edge import params as boxes
from glm_edge.errors import OutputError, require
from glm_edge.params.tree import Params
from glm_edge.tables import table_lines
from glm_edge.writers import write_whole

_HEADINGS = {
    "transform": "transform",
    "path": "path",
    "action": "action",
    "keep_ratio": "kept",
    "bits": "bits/weight",
    "bytes_before": "bytes before",
    "bytes_after": "bytes after",
    "relative_error": "relative error",
}
_TEXT = ("transform", "path", "action")
_PAGE_INCHES = 14.0
# Columns of the CSV file for the rows of totals, FLOPs and latency only.
_COSTS = (
    "count_before",
    "count_after",
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
    """The change of one parameter.

    Attributes:
      transform: name of the transform.
      path: path of the parameter.
      action: description of the result, such as `int4-g32`.
      keep_ratio: fraction of the weights that are not pruned.
      bits: stored bits per entry of the dense array, including scales and masks.
      bytes_before: stored bytes of the parameter before.
      bytes_after: stored bytes of the parameter after.
      relative_error: `|new - old| / |old|` in the Frobenius norm; None if shapes differ.
      output_error: `|x (new - old)|^2 / |x old|^2` over the calibration inputs `x`, for transforms
        that minimize it; None for others.
    """

    transform: str
    path: str
    action: str
    keep_ratio: float
    bits: float
    bytes_before: int
    bytes_after: int
    relative_error: float | None = None
    output_error: float | None = None

    def columns(self) -> dict[str, Any]:
        """Return the attributes by name, with the note split from the action.

        Returns:
          Attributes by name. `action` contains only the result (`int4-g32`), and `note` the text
          that follows it in parentheses, or an empty string.
        """
        action, _, note = self.action.partition(" (")
        return asdict(self) | {"action": action, "note": note.removesuffix(")")}


@dataclass(frozen=True)
class Point:
    """One training step: the loss and its soft (teacher) and hard (label) terms, in nats."""

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
      before_ms: median milliseconds of the original model.
      after_ms: median milliseconds of the compressed model.
      speedup: median over rounds of before / after.
      low: lower quartile of the speedup.
      high: upper quartile of the speedup.
      rounds: count of rounds that timed both models.
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

    Sizes and FLOPs are counted always. Latency is measured on demand:
    `report.with_latency(glm_edge.cost.measure((model, params), (smaller, shrunk)))`.

    Attributes:
      rows: one row per parameter and transform that changed it.
      bytes_before: stored bytes of all parameters before, including unchanged ones.
      bytes_after: stored bytes of all parameters after.
      count_before: count of parameters before.
      count_after: count of parameters after.
      curve: training steps, if any.
      notes: remarks, such as a modality that calibration lacked.
      flops_before: see `glm_edge.compress.cost.flops`; None if shapes did not change.
      flops_after: FLOPs after; None if shapes did not change.
      latency: measured times, if requested.
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
        """Create an empty report on unchanged parameters."""
        return cls.of((), params, params)

    @classmethod
    def of(cls, rows: Sequence[Row], before: Params, after: Params, **extra: Any) -> "Report":
        """Create a report with the totals of two parameter trees.

        Args:
          rows: rows of the report.
          before: parameters before.
          after: parameters after.
          **extra: further attributes by name.

        Returns:
          The report.
        """
        return cls(
            tuple(rows),
            boxes.stored_bytes(before),
            boxes.stored_bytes(after),
            boxes.count(before),
            boxes.count(after),
            **extra,
        )

    def __add__(self, later: "Report") -> "Report":
        """Join the report of a following transform; totals span both."""
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
        """Return the report with measured times from `glm_edge.compress.cost.measure`."""
        return replace(self, latency=tuple(latency))

    @property
    def total(self) -> Row:
        """Totals over all parameters."""
        return Row(
            transform="total",
            path="all parameters",
            action=f"{self.count_before:,} -> {self.count_after:,} parameters",
            keep_ratio=self.count_after / max(self.count_before, 1),
            bits=8 * self.bytes_after / max(self.count_after, 1),
            bytes_before=self.bytes_before,
            bytes_after=self.bytes_after,
        )

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({len(self.rows)} rows, {self.bytes_before:,} -> "
            f"{self.bytes_after:,} bytes)"
        )

    def __str__(self) -> str:
        cells = [list(_HEADINGS.values())]
        cells += [_format(row) for row in (*self.rows, self.total)]
        lines = table_lines(cells, [i for i, name in enumerate(_HEADINGS) if name not in _TEXT])
        rule = "-" * max(len(line) for line in lines)
        notes = [f"note: {note}" for note in self.notes]
        below = [*self._costs(), *self._training(), *notes]
        return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1], *below])

    def _flops(self) -> list[tuple[str, int, int]]:
        """List the kinds of work of both models, with FLOPs before and after."""
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

    def _repr_html_(self) -> str:
        """Return the table as HTML for notebooks."""
        lines = ["<table>", _html_row("th", _HEADINGS.values())]
        lines += [_html_row("td", _format(row)) for row in self.rows]
        lines += [_html_row("th", _format(self.total)), "</table>"]
        notes = [f"note: {note}" for note in self.notes]
        below = [*self._costs(), *self._training(), *notes]
        return "\n".join([*lines, *(f"<p>{html.escape(line)}</p>" for line in below)])

    def to_dict(self) -> dict[str, Any]:
        """Return the report as dicts, lists and numbers, for JSON or a data frame.

        Returns:
          `rows` and `total` in the form of `Row.columns`, so that `pandas.DataFrame(
          report.to_dict()["rows"])` has numeric columns; the other attributes by name.
        """
        fields_of = {
            "rows": [row.columns() for row in self.rows],
            "total": self.total.columns(),
            "curve": [asdict(point) for point in self.curve],
            "notes": list(self.notes),
            "latency": [asdict(latency) for latency in self.latency],
        }
        names = ("bytes", "count", "flops")
        sides = {f"{name}_{side}" for name in names for side in ("before", "after")}
        numbers = {name: getattr(self, name) for name in sorted(sides)}
        return fields_of | {
            name: dict(value) if isinstance(value, Mapping) else value
            for name, value in numbers.items()
        }

    def to_markdown(self) -> str:
        """Format rows, totals, FLOPs and latency as Markdown."""
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
        """Write rows and totals, then FLOPs, latency and notes, without rounding.

        Columns are those of `Row.columns`, with a column per number. The row of totals also fills
        `count_before` and `count_after`. Rows of `FLOPs` and `latency` name the kind of work in
        `path` (`token`, `image`) and fill the last columns, with the names of `Report` and
        `Latency`. Rows of `note` fill the column `note`.

        Args:
          path: file to write.

        Raises:
          OutputError: the file is a link or cannot be written.
        """
        text = io.StringIO()
        names = [*(field.name for field in fields(Row)), "note", *_COSTS]
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(row.columns() for row in self.rows)
        counts = {"count_before": self.count_before, "count_after": self.count_after}
        writer.writerow({**self.total.columns(), "action": "", **counts})
        for work, before, after in self._flops():
            flops = {"flops_before": before, "flops_after": after}
            writer.writerow({"transform": "FLOPs", "path": work, **flops})
        for latency in self.latency:
            times = asdict(latency)
            writer.writerow({"transform": "latency", "path": times.pop("work"), **times})
        writer.writerows({"transform": "note", "note": note} for note in self.notes)
        content = text.getvalue().encode()
        write_whole(Path(path), lambda file: file.write_bytes(content))

    def plot(self, path: str | Path) -> None:
        """Plot bytes before and after per parameter, and the training curve if any.

        Args:
          path: image file. The suffix sets the format; without a suffix, `.png` is added.

        Raises:
          MissingExtraError: matplotlib is not installed.
          OutputError: the file is a link or cannot be written, or matplotlib does not support the
            format.
        """
        figures = require("matplotlib.figure", extra="plot")
        panels = 1 + bool(self.curve)
        # Figures longer than a page show only some labels.
        size = (7.0 * panels, min(max(3.0, 0.22 * len(self.rows)), _PAGE_INCHES))
        figure = figures.Figure(figsize=size, layout="constrained")
        axes = figure.subplots(1, panels, squeeze=False)[0]
        _plot_bytes(axes[0], self.rows)
        if self.curve:
            _plot_curve(axes[1], self.curve)
        target, content = Path(path), io.BytesIO()
        if not target.suffix:
            target = target.with_name(f"{target.name}.png")
        try:
            figure.savefig(content, dpi=150, format=target.suffix[1:])
        # The format is unknown to matplotlib, or needs a missing package.
        except (ValueError, ImportError) as error:
            raise OutputError(f"{target}: cannot be drawn: {error}") from error
        write_whole(target, lambda file: file.write_bytes(content.getvalue()))


def _format(row: Row) -> list[str]:
    error = "" if row.relative_error is None else f"{row.relative_error:.2e}"
    return [
        row.transform,
        row.path,
        row.action,
        f"{row.keep_ratio:.1%}",
        f"{row.bits:.2f}",
        f"{row.bytes_before:,}",
        f"{row.bytes_after:,}",
        error,
    ]


def _html_row(tag: str, cells: Iterable[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"


def _plot_bytes(axes: Any, rows: Sequence[Row]) -> None:
    first: dict[str, Any] = {}
    for row in rows:
        first.setdefault(row.path, row.bytes_before)
    last = {row.path: row.bytes_after for row in rows}
    places = range(len(first))
    axes.barh(places, list(first.values()), color="0.8", label="before")
    axes.barh(places, [last[path] for path in first], height=0.5, label="after")
    step = -(-len(first) // int(_PAGE_INCHES / 0.15))
    axes.set_yticks(places[::step], list(first)[::step], fontsize=7)
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
