"""Compares models with reference outputs stored beside their checkpoints, one row per case.

    python -m experiments.golden.check_golden --dir=DIR

DIR contains one folder per case: a Hugging Face directory with inputs.npz, outputs.npz and
meta.json (or only these three, for a processor). Logits, hidden states and encoder features must
agree within 1e-4 plus ten times the reference's rounding noise, which meta.json states per output.
Greedy tokens must be equal, both in complete forward passes and in the cached `generate`. The
default of --dir is the environment variable GLM_EDGE_GOLDEN. A case takes seconds.

Exit status: 0 if every case passes, 1 if an output differs, 2 without a case.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from absl import flags

import glm_edge as ge
from experiments.golden.cases import Arrays, Case, find_cases, read_case
from experiments.golden.outputs import compute
from experiments.golden.processing import process
from glm_edge.cli.console import launch
from glm_edge.errors import DataError, GlmEdgeError

DIR = flags.DEFINE_string(
    "dir",
    os.environ.get("GLM_EDGE_GOLDEN") or "../shared/golden",
    "Folder with one folder per case, or folder of one case.",
)
CASES = flags.DEFINE_list("cases", None, "Names of the cases to run; default: all.")
VERBOSE = flags.DEFINE_bool("verbose", False, "Also print one row per output.")


@dataclass(frozen=True)
class Row:
    """One compared output.

    Attributes:
      name: `<subcase>.<output>`.
      error: largest absolute difference, or number of different integers.
      tolerance: largest allowed error.
    """

    name: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """True if the error is within the tolerance; a NaN fails."""
        return self.error <= self.tolerance


@dataclass(frozen=True)
class Report:
    """The comparison of a case.

    Attributes:
      case: name of the folder.
      rows: compared outputs.
      unclear: outputs of the case whose names no model of glm_edge has.
    """

    case: str
    rows: list[Row]
    unclear: list[str]

    @property
    def passed(self) -> bool:
        """True if at least one output was compared and all are within their tolerances."""
        return bool(self.rows) and all(row.passed for row in self.rows)

    def of(self, *outputs: str, others: bool = False) -> list[Row]:
        """Return the rows of the named outputs, or of all others."""
        return [row for row in self.rows if (row.name.partition(".")[2] in outputs) != others]


def compare(folder: Path) -> Report:
    """Run one case.

    Args:
      folder: folder of the case.

    Returns:
      The comparison of its outputs.

    Raises:
      DataError: the folder is not a case.
      GlmEdgeError: its checkpoint cannot be loaded.
    """
    case = read_case(folder)
    rows, unclear = [], []
    model, params = ge.load(folder) if case.has_model else (None, None)
    for subcase, expected in case.outputs.items():
        inputs = case.inputs[subcase]
        if model is None:
            computed = process(case, subcase)
        else:
            steps = expected["greedy_ids"].shape[1] if "greedy_ids" in expected else 0
            computed = compute(model, params, inputs, steps)
        wanted = dict(expected)
        for name in ("greedy_ids", "greedy_logits"):
            if name in expected:
                wanted[f"plain_{name}"] = expected[name]
        for name, value in wanted.items():
            if name not in computed:
                unclear.append(f"{subcase}.{name}")
                continue
            rows.append(_row(case, subcase, name, computed[name], value, inputs))
    return Report(folder.name, rows, unclear)


def _row(
    case: Case, subcase: str, name: str, computed: np.ndarray, expected: np.ndarray, inputs: Arrays
) -> Row:
    label = f"{subcase}.{name}"
    if computed.shape != expected.shape:
        raise DataError(
            f"{case.folder}: {label} has shape {expected.shape}, but the model returns "
            f"{computed.shape}"
        )
    valid = inputs.get("attention_mask")
    if valid is not None and "greedy" not in name:
        if name == "position_ids" and computed.ndim == 3:
            computed, expected = computed[:, valid == 1], expected[:, valid == 1]
        elif computed.shape[:2] == valid.shape:
            computed, expected = computed[valid == 1], expected[valid == 1]
    if np.issubdtype(expected.dtype, np.integer):
        return Row(label, float((computed != expected).sum()), 0.0)
    tolerance = case.tolerance(name.removeprefix("plain_"))
    error = np.abs(computed.astype(np.float64) - expected).max(initial=0.0)
    return Row(label, float(error), tolerance)


def _worst(rows: list[Row]) -> str:
    if not rows:
        return "-"
    row = max(rows, key=lambda row: row.error / row.tolerance)
    return f"{row.error:.1e} of {row.tolerance:.1e}"


def _equal(rows: list[Row]) -> str:
    wrong = int(sum(row.error for row in rows))
    return "-" if not rows else "equal" if not wrong else f"{wrong} differ"


def _print(report: Report) -> None:
    exact = ("greedy_ids", "plain_greedy_ids", "position_ids", "rope_delta")
    logits = ("logits", "greedy_logits", "plain_greedy_logits")
    features = [row for row in report.of(*exact, *logits, others=True) if row.tolerance]
    print(
        f"{report.case:<18} {_worst(report.of(*logits)):<19} {_worst(features):<19} "
        f"{_equal(report.of('plain_greedy_ids')):<13} {_equal(report.of('greedy_ids')):<13} "
        f"{'ok' if report.passed else 'FAILS'}"
    )
    for row in report.rows:
        if VERBOSE.value or not row.passed:
            verdict = "ok" if row.passed else "OFF"
            print(f"  {row.name:<40} {row.error:>10.3e} {row.tolerance:>10.3e}  {verdict}")
    if report.unclear:
        print(
            f"  not compared, as glm_edge has no output with this name: {', '.join(report.unclear)}"
        )


def main(_: list[str]) -> None:
    """Print the table; exit with 1 if an output differs, with 2 without a case."""
    try:
        folders = find_cases(Path(DIR.value))
        if CASES.value:
            folders = [find_cases(Path(DIR.value) / name)[0] for name in CASES.value]
    except GlmEdgeError as error:
        print(f"check_golden: {error}", file=sys.stderr)
        sys.exit(2)
    print(
        f"{'case':<18} {'logits: max |err|':<19} {'features':<19} {'plain greedy':<13} "
        f"{'cached greedy':<13}"
    )
    failed = []
    for folder in folders:
        try:
            report = compare(folder)
        except GlmEdgeError as error:
            print(f"{folder.name:<18} cannot run: {error}")
            failed.append(folder.name)
            continue
        _print(report)
        if not report.passed:
            failed.append(report.case)
    print(f"{len(folders) - len(failed)} of {len(folders)} cases pass")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    launch(main)
