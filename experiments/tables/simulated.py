"""A table of claims about devices: the published value, the simulated value, and a verdict.

Nothing in these tables is measured. Rows that use assumed numbers have an interval, from phones
whose assumed numbers vary by 30 %.
"""

import csv
import dataclasses
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from experiments.common.outputs import prepare_directory
from experiments.common.provenance import provenance_of
from experiments.tables.table import shown
from glm_edge.cli.console import print_table, refuse_arguments
from glm_edge.cli.corpora import write_text
from glm_edge.tables import text_table

FLAGS = flags.FLAGS
COLUMNS = ("quantity", "unit", "claim", "simulated", "interval", "verdict", "reason")
REPRODUCED, IN_A_WINDOW = "reproduced", "reproduced in a window"
CONSISTENT, CONTRADICTORY, IMPOSSIBLE = "consistent", "contradictory", "impossible"
SUPPLEMENT = "-"
VERDICTS = (REPRODUCED, IN_A_WINDOW, CONSISTENT, CONTRADICTORY, IMPOSSIBLE, SUPPLEMENT)

flags.disclaim_key_flags()


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
      quantity: name of the quantity.
      unit: unit, such as `ms` or `%`.
      claim: published value, or None.
      simulated: simulated or calculated value, or None.
      verdict: one of `VERDICTS`. `consistent` is a claim that a bound allows; `-` has no claim.
      reason: reason of the verdict.
      interval: 5 and 95 % over varied assumptions, None for arithmetic.
    """

    quantity: str
    unit: str
    claim: float | None
    simulated: float | None
    verdict: str
    reason: str
    interval: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.verdict not in VERDICTS:
            raise ValueError(f"{self.quantity}: {self.verdict!r} is not a verdict")

    def cells(self) -> list[str]:
        """Return the row as text, in the order of `COLUMNS`."""
        span = "-" if self.interval is None else " to ".join(map(shown, self.interval))
        values = [shown(self.claim), shown(self.simulated), span]
        return [self.quantity, self.unit, *values, self.verdict, self.reason]


def interval_of(values: np.ndarray) -> tuple[float, float]:
    """Return the 5 and 95 % quantiles."""
    low, high = np.quantile(values, [0.05, 0.95])
    return float(low), float(high)


def define_flags(name: str) -> None:
    """Define the flags that the simulated tables share.

    Args:
      name: name of the table; its default output directory is `out/tables/<name>`.
    """
    flags.DEFINE_string("out_dir", f"out/tables/{name}", "Directory for CSV, Markdown, JSON.")
    flags.DEFINE_integer("seed", 0, "Seed of the varied assumptions.")
    flags.DEFINE_bool("overwrite", False, "Replace an existing table in --out_dir.")


def publish(
    argv: Sequence[str],
    name: str,
    title: str,
    make: Callable[[], Sequence[Row]],
    parameters: dict[str, Any] | None = None,
) -> None:
    """Make a table, print it, and write it as `table.csv`, `table.md` and `table.json`.

    Args:
      argv: name of the script, without further arguments.
      name: name of the script in `experiments.tables`.
      title: the claim in one line.
      make: function that simulates the rows.
      parameters: parameters that were fitted to a row or assumed for the table.

    Raises:
      UsageError: there are further arguments.
      OutputError: the directory contains a table and --overwrite is not set.
    """
    refuse_arguments(argv)
    directory = prepare_directory(Path(FLAGS.out_dir), FLAGS.overwrite, "table.csv")
    rows = make()
    where = provenance_of(f"tables.{name}", ("seed",))
    heading = f"{title}: simulated, not measured"
    print(heading)
    print_table(COLUMNS, [row.cells() for row in rows])
    lines = [f"# {heading}", "", text_table(COLUMNS, [row.cells() for row in rows]), ""]
    for key, value in (parameters or {}).items():
        print(f"{key}: {value}")
        lines.append(f"- {key}: {value}")
    lines += [f"- {key}: {value}" for key, value in where.items()]
    write_text(directory / "table.md", "\n".join(lines) + "\n", overwrite=True)
    write_text(directory / "table.csv", _csv(rows), overwrite=True)
    log = {
        "title": heading,
        **where,
        "parameters": parameters or {},
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    write_text(directory / "table.json", json.dumps(log, indent=1) + "\n", overwrite=True)


def _csv(rows: Sequence[Row]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        span = "" if row.interval is None else f"{row.interval[0]} to {row.interval[1]}"
        fields = dataclasses.asdict(row) | {"interval": span}
        writer.writerow([fields[column] for column in COLUMNS])
    return text.getvalue()
