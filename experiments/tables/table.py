"""A table of claims: what was published, what is measured here, and the ratio of the two."""

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
IMAGENET = "not reachable here: data (ImageNet)"
PHONE = "not reachable here: hardware (the claim's device)"

flags.disclaim_key_flags()


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
      quantity: what is counted or measured.
      unit: such as `ms`, `%` or `MB`; `x` for a factor.
      claim: the published number, or None.
      measured: the number here, or None.
      spread: standard deviation over seeds of what was measured, or None.
      note: how it was measured, and what of the claim cannot be had here.
    """

    quantity: str
    unit: str
    claim: float | None
    measured: float | None
    spread: float | None = None
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """Measured over claimed."""
        if self.claim is None or self.measured is None or not self.claim:
            return None
        return self.measured / self.claim

    def cells(self) -> list[str]:
        """Returns the row as text, in the order of `COLUMNS`."""
        numbers = [self.claim, self.measured, self.spread, self.ratio]
        return [self.quantity, self.unit, *map(shown, numbers), self.note]


def shown(number: float | None) -> str:
    """Formats a number in three or more significant digits; `-` for None."""
    if number is None:
        return "-"
    if not math.isfinite(number):
        return str(number)
    digits = max(0, 2 - math.floor(math.log10(abs(number)))) if number else 0
    return f"{number:,.{min(digits, 4)}f}"


def interval(rate: Rate) -> str:
    """Returns the 95 % interval of a rate, in percent."""
    return f"95 % interval {100 * rate.low:.1f} to {100 * rate.high:.1f}"


def define_flags(name: str) -> None:
    """Defines the flags that all tables share.

    Args:
      name: of the table; its results are in `out/tables/<name>` unless told otherwise.
    """
    flags.DEFINE_enum(
        "preset", "quick", PRESETS, "quick: under two minutes on two quiet cores; full: longer."
    )
    flags.DEFINE_string(
        "out_dir", f"out/tables/{name}", "Directory for CSV, Markdown, JSON and the figure."
    )
    flags.DEFINE_integer("seed", 0, "First seed of everything drawn; runs take the next ones.")
    flags.DEFINE_bool("overwrite", False, "Replace a table in --out_dir.")


def prepare(argv: Sequence[str]) -> Path:
    """Returns the directory of --out_dir, made if absent.

    Args:
      argv: the script's name, and nothing else.

    Raises:
      UsageError: there is more.
      OutputError: it holds a table already and --overwrite was not passed, or cannot be made.
    """
    refuse_arguments(argv)
    return prepare_directory(Path(FLAGS.out_dir), FLAGS.overwrite, "table.csv")


def seeds(defaults: Mapping[str, int]) -> range:
    """Returns the seeds of a table: from --seed on, as many as --seeds or the preset says."""
    return range(FLAGS.seed, FLAGS.seed + (FLAGS.seeds or defaults[FLAGS.preset]))


def by_seed(
    defaults: Mapping[str, int], run: Callable[[int], Mapping[str, float]]
) -> dict[str, list[float]]:
    """Runs everything once for each seed.

    Args:
      defaults: how many seeds, by preset.
      run: takes a seed and returns numbers by kind.

    Returns:
      Numbers by kind, in the order of seeds.
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
    """Prints a table and writes it as `table.csv`, `table.md`, `table.json` and `table.png`.

    Args:
      name: of the script in `experiments.tables`.
      title: what is claimed, in one line.
      rows: in their order.
      flag_names: flags beside the shared ones that the command must name.
      measured: further numbers for the JSON file, such as every seed's.
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
    """Returns the command, commit, machine, time, load and versions behind a table.

    `seconds` are those since the script's imports; a training that lay finished in --out_dir was
    not run again and does not count.
    """
    run = provenance_of(f"tables.{name}", ("preset", "seed", *flag_names))
    # The load stands beside the seconds that it explains.
    last = {key: run.pop(key) for key in ("load_average", "versions")}
    seconds = round(time.monotonic() - STARTED_S, 1)
    return {**run, "seed": FLAGS.seed, "seconds": seconds, **last}


def _csv(rows: Sequence[Row]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        fields = dataclasses.asdict(row) | {"ratio": row.ratio}
        writer.writerow([fields[column] for column in COLUMNS])
    return text.getvalue()


def figure(title: str, rows: Sequence[Row], path: Path) -> None:
    """Draws claims and measurements side by side, one panel for each unit.

    Args:
      title: of the figure.
      rows: those without a measured value are skipped.
      path: PNG file to write.
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
