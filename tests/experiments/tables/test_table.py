"""Rows with their ratio, and the files of a table."""

import time

import pytest
from absl import app, flags

from experiments.nano.phone_screens import metrics
from experiments.tables import (
    bits,
    distillation,
    dynamic,
    early_exit,
    healing,
    int8_pruned,
    intent,
    lightweight,
    precision_memory,
    precision_speed,
    repvgg,
    sparsity,
    table,
)
from experiments.tables.table import Row
from glm_edge.errors import OutputError

SCRIPTS = (
    bits,
    distillation,
    dynamic,
    early_exit,
    healing,
    int8_pruned,
    intent,
    lightweight,
    precision_memory,
    precision_speed,
    repvgg,
    sparsity,
)


class Small:
    """A script of one row."""

    NAME = "small"
    rows = (
        Row("latency", "ms", 4.0, 3.0, 0.5, "here"),
        Row("elsewhere", "ms", 4.0, None, note=table.PHONE),
    )

    def define_flags(self):
        table.define_flags(self.NAME)
        flags.DEFINE_list("kinds", ["a", "b"], "Of them.")

    def main(self, argv):
        table.prepare(argv)
        table.publish(self.NAME, "A claim", self.rows, ["kinds"], {"seconds": [1, 2]})


class Seeded(Small):
    """A script that runs once for each seed."""

    def define_flags(self):
        table.define_flags(self.NAME)
        flags.DEFINE_integer("seeds", None, "Of them.", 1)

    def main(self, argv):
        table.prepare(argv)
        result = table.by_seed({"quick": 3, "full": 9}, lambda seed: {"a": seed, "b": -seed})
        table.publish(self.NAME, "A claim", self.rows, ["seeds"], result)


def test_a_ratio_is_measured_over_claimed():
    assert Row("x", "ms", 4.0, 3.0).ratio == 0.75
    assert Row("x", "ms", None, 3.0).ratio is None
    assert Row("x", "ms", 4.0, None).ratio is None
    assert Row("x", "ms", 0.0, 3.0).ratio is None


@pytest.mark.parametrize(
    ("number", "text"),
    [(None, "-"), (0.0, "0"), (0.01234, "0.0123"), (3.14159, "3.14"), (25557032, "25,557,032")],
)
def test_numbers_are_shown_in_three_digits(number, text):
    assert table.shown(number) == text


def test_an_interval_is_in_percent():
    assert table.interval(metrics.wilson(9, 10)) == "95 % interval 59.6 to 98.2"


def test_a_table_is_four_files_with_the_command(run, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(table, "STARTED_S", time.monotonic() - 75)
    rows, log = run(Small(), "--kinds=b", "--seed=3")
    printed = capsys.readouterr().out
    assert rows["latency"] == {
        "quantity": "latency", "unit": "ms", "claim": "4.0", "measured": "3.0", "spread": "0.5",
        "ratio": "0.75", "note": "here",
    }  # fmt: skip
    assert rows["elsewhere"]["measured"] == ""
    command = "python -m experiments.tables.small --preset=quick --seed=3 --kinds=b"
    assert log["command"] == command
    assert command in printed
    assert "not available: hardware" in printed
    assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")
    assert 75 <= log["seconds"] < 75 + 60
    assert f"{log['seconds']:.0f} s, load average" in printed
    written = (tmp_path / "table.md").read_text()
    assert command in written
    assert f"- seconds: {log['seconds']}\n- load_average: " in written
    with pytest.raises(OutputError, match="already contains a table"):
        run(Small())
    run(Small(), "--overwrite")


def test_a_table_runs_once_for_each_seed(run):
    pytest.importorskip("matplotlib")
    assert run(Seeded(), "--seed=4")[1]["measured"] == {"a": [4, 5, 6], "b": [-4, -5, -6]}
    assert run(Seeded(), "--seeds=1", "--overwrite")[1]["measured"] == {"a": [0], "b": [0]}


def test_a_table_takes_flags_alone():
    with pytest.raises(app.UsageError, match="unexpected argument 'quick'"):
        table.prepare(["small", "quick"])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.NAME)
def test_help_names_the_claim_and_a_command(script):
    assert script.__name__ == f"experiments.tables.{script.NAME}"
    assert f"python -m experiments.tables.{script.NAME} --preset=quick" in script.__doc__
    assert "claim" in script.__doc__
