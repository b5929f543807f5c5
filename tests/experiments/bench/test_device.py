"""Validation of the simulated phone: its checks, its log, and its exit status."""

import json

import numpy as np
import pytest
from absl import flags

from experiments.bench import device
from glm_edge.device.specs import decode_rows


@pytest.fixture
def run(tmp_path):
    """Runs the script with flags; returns its log."""

    def go(*arguments):
        known = set(flags.FLAGS)
        try:
            device.define_flags()
            flags.FLAGS(["device", f"--out={tmp_path}/log.json", *arguments])
            device.main(["device"])
        finally:
            for name in set(flags.FLAGS) - known:
                delattr(flags.FLAGS, name)
            flags.FLAGS.unparse_flags()
        return json.loads((tmp_path / "log.json").read_text())

    return go


def test_rows_are_printed_worst_first_and_checked(run, capsys):
    log = run("--only=decoding,power,loading")
    errors = [abs(row["error"]) for row in log["decoding"]["rows"]]
    assert errors == sorted(errors, reverse=True)
    assert len(errors) == sum(row.usable for row in decode_rows()) == 29
    values = {check["name"].strip(): check for check in log["checks"]}
    median = values["decoding, median error"]
    assert median["value"] == pytest.approx(np.median(errors))
    assert median["passed"] is True
    low = values["90 % bootstrap interval over phones, low"]["value"]
    high = values["90 % bootstrap interval over phones, high"]["value"]
    assert low < median["value"] < high
    text = capsys.readouterr().out
    assert text.count("llama.cpp") >= 8
    assert "not fitted, laptops, boards and guessed bytes: 15 rows" in text
    assert all(check["passed"] is not False for check in log["checks"])


def test_a_failed_check_is_the_exit_status(run, monkeypatch):
    failing = device.at_most("error", 0.5, 0.2)
    monkeypatch.setitem(device.PARTS, "power", lambda: ([failing], {}))
    with pytest.raises(SystemExit) as ended:
        run("--only=power")
    assert ended.value.code == 1


def test_mean_shares_are_of_other_phones():
    rows = [row for row in decode_rows() if row.usable]
    errors = device.factor_errors(rows, lambda row: row.engine)
    # Published reference of this predictor: 29.8 %.
    assert np.median(errors) == pytest.approx(0.298, abs=0.005)
