"""A table of claims: the published value, the measured value, and their ratio."""

import csv
import dataclasses
import io
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from experiments.common.outputs import prepare_directory
from experiments.common.provenance import provenance_of
from experiments.nano.phone_screens.metrics import Rate
from glm_edge.cli.console import bar, print_table, refuse_arguments
from glm_edge.cli.corpora import write_text
from glm_edge.errors import require
from glm_edge.tables import text_table

FLAGS = flags.FLAGS
STARTED_S = time.monotonic()
PRESETS = ("quick", "full")
COLUMNS = ("quantity", "unit", "claim", "measured", "spread", "ratio", "note")
IMAGENET = "not available: data (ImageNet)"
PHONE = "not available: hardware (the claim's device)"

flags.disclaim_key_flags()


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
      quantity: name of the measured quantity.
      unit: unit, such as `ms`, `%` or `MB`; `x` for a factor.
      claim: published value, or None.
      measured: measured value, or None.
      spread: standard deviation of the measured value over seeds, or None.
      note: method of the measurement, and unavailable parts of the claim.
    """

    quantity: str
    unit: str
    claim: float | None
    measured: float | None
    spread: float | None = None
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """Measured value divided by the claim."""
        if self.claim is None or self.measured is None or not self.claim:
            return None
        return self.measured / self.claim

    def cells(self) -> list[str]:
        """Return the row as text, in the order of `COLUMNS`."""
        numbers = [self.claim, self.measured, self.spread, self.ratio]
        return [self.quantity, self.unit, *map(shown, numbers), self.note]


def shown(number: float | None) -> str:
    """Format a number with three or more significant digits; `-` for None."""
    if number is None:
        return "-"
    if not math.isfinite(number):
        return str(number)
    digits = max(0, 2 - math.floor(math.log10(abs(number)))) if number else 0
    return f"{number:,.{min(digits, 4)}f}"


def interval(rate: Rate) -> str:
    """Format the 95 % interval of a rate in percent."""
    return f"95 % interval {100 * rate.low:.1f} to {100 * rate.high:.1f}"


def define_flags(name: str) -> None:
    """Define the flags that all tables share.

    Args:
      name: name of the table; its default output directory is `out/tables/<name>`.
    """
    flags.DEFINE_enum(
        "preset", "quick", PRESETS, "quick: under two minutes on two idle cores; full: longer."
    )
    flags.DEFINE_string(
        "out_dir", f"out/tables/{name}", "Output directory for CSV, Markdown, JSON and the figure."
    )
    flags.DEFINE_integer(
        "seed", 0, "First seed of all random values; repetitions use the next ones."
    )
    flags.DEFINE_bool("overwrite", False, "Replace an existing table in --out_dir.")


def prepare(argv: Sequence[str]) -> Path:
    """Return the directory of --out_dir, creating it if missing.

    Args:
      argv: name of the script, without further arguments.

    Raises:
      UsageError: there are further arguments.
      OutputError: the directory contains a table and --overwrite is not set, or it cannot be
        created.
    """
    refuse_arguments(argv)
    return prepare_directory(Path(FLAGS.out_dir), FLAGS.overwrite, "table.csv")


def seeds(defaults: Mapping[str, int]) -> range:
    """Return the seeds of a table, starting at --seed; --seeds or the preset sets their number."""
    return range(FLAGS.seed, FLAGS.seed + (FLAGS.seeds or defaults[FLAGS.preset]))


def by_seed(
    defaults: Mapping[str, int], run: Callable[[int], Mapping[str, float]]
) -> dict[str, list[float]]:
    """Run a function once per seed.

    Args:
      defaults: number of seeds by preset.
      run: function from a seed to values by kind.

    Returns:
      Values by kind, in the order of seeds.
    """
    values: dict[str, list[float]] = {}
    for seed in bar("seeds")(seeds(defaults)):
        for kind, value in run(seed).items():
            values.setdefault(kind, []).append(value)
    return values


def publish(
    name: str,
    title: str,
    rows: Sequence[Row],
    flag_names: Sequence[str] = (),
    measured: dict[str, Any] | None = None,
) -> None:
    """Print a table and write it as `table.csv`, `table.md`, `table.json` and `table.png`.

    Args:
      name: name of the script in `experiments.tables`.
      title: the claim in one line.
      rows: rows in order.
      flag_names: further flags, besides the shared ones, for the recorded command.
      measured: further values for the JSON file, such as those of every seed.
    """
    directory = Path(FLAGS.out_dir)
    where = table_provenance(name, flag_names)
    print(title)
    print_table(COLUMNS, [row.cells() for row in rows])
    print(f"command: {where['command']}")
    print(f"{where['seconds']:.0f} s, load average {where['load_average']:.1f}")
    lines = [f"# {title}", "", text_table(COLUMNS, [row.cells() for row in rows]), ""]
    lines += [f"- {key}: {value}" for key, value in where.items()]
    write_text(directory / "table.md", "\n".join(lines) + "\n", overwrite=True)
    write_text(directory / "table.csv", _csv(rows), overwrite=True)
    log = {
        "title": title,
        **where,
        "rows": [{**dataclasses.asdict(row), "ratio": row.ratio} for row in rows],
        "measured": measured or {},
    }
    write_text(directory / "table.json", json.dumps(log, indent=1) + "\n", overwrite=True)
    figure(title, rows, directory / "table.png")


def table_provenance(name: str, flag_names: Sequence[str] = ()) -> dict[str, Any]:
    """Return the command, commit, machine, time, load and versions of a table.

    `seconds` counts from the script's imports, without trainings whose results were already in
    --out_dir.
    """
    run = provenance_of(f"tables.{name}", ("preset", "seed", *flag_names))
    # The load is stored beside the seconds that it explains.
    last = {key: run.pop(key) for key in ("load_average", "versions")}
    seconds = round(time.monotonic() - STARTED_S, 1)
    return {**run, "seconds": seconds, **last}


def _csv(rows: Sequence[Row]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        fields = dataclasses.asdict(row) | {"ratio": row.ratio}
        writer.writerow([fields[column] for column in COLUMNS])
    return text.getvalue()


def figure(title: str, rows: Sequence[Row], path: Path) -> None:
    """Draw claims and measured values side by side, with one panel per unit.

    Args:
      title: title of the figure.
      rows: rows; those without a measured value are skipped.
      path: path of the PNG file.
    """
    figures = require("matplotlib.figure", extra="plot")
    drawn = [row for row in rows if row.measured is not None]
    units = list(dict.fromkeys(row.unit for row in drawn))
    heights = [sum(row.unit == unit for row in drawn) for unit in units]
    size = (8.0, 1.2 + sum(0.55 * height + 0.5 for height in heights))
    drawing = figures.Figure(figsize=size, layout="constrained")
    panels = drawing.subplots(len(units) or 1, 1, squeeze=False, height_ratios=heights or [1])
    for axis, unit in zip(panels[:, 0], units, strict=False):
        chosen = [row for row in drawn if row.unit == unit]
        places = range(len(chosen))
        claims = [row.claim if row.claim is not None else math.nan for row in chosen]
        axis.barh([p - 0.2 for p in places], claims, height=0.35, color="0.75", label="claim")
        axis.barh(
            [p + 0.2 for p in places],
            [row.measured for row in chosen],
            xerr=[row.spread or 0.0 for row in chosen],
            height=0.35,
            label="measured",
        )
        axis.set_yticks(places, [row.quantity for row in chosen], fontsize=8)
        axis.invert_yaxis()
        axis.set_xlabel(unit)
    panels[0, 0].legend(fontsize=8)
    drawing.suptitle(title, fontsize=9)
    drawing.savefig(path, dpi=130)
