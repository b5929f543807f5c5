"""Time to action: the arithmetic on paper, and a small measured run."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from experiments.bench import forced_passes, time_to_action
from experiments.bench.time_to_action import Device, features_of, paper
from glm_edge.configs import preset
from glm_edge.errors import DataError

ROOT = Path(__file__).resolve().parents[3]
PHONE = Device("phone", 50e9, 20e12, 1.0)


def test_the_9b_model_on_paper():
    """Against counts of the published shape, written out."""
    result = paper(preset("phone_9b"), "int4", 96, 40, PHONE)
    assert features_of(preset("phone_9b").vision) == (48 * 24, 12 * 24)
    assert result["prompt_tokens"] == 288 + 96
    layer = 4096 * (4096 + 2 * 256 + 4096) + 3 * 4096 * 13696
    read = 40 * layer + 151552 * 4096
    prefill, decode = result["parts"]["prefill"], result["parts"]["decode"]
    # Half a byte a weight, and a float32 scale a row.
    assert prefill["bytes"] == pytest.approx(read / 2, rel=2e-3)
    products = 2 * 40 * layer * 384
    assert products < prefill["operations"] < 1.05 * products
    cached = 40 * 2 * 2 * 128 * 4 * 384
    assert decode["bytes"] == pytest.approx(40 * (read / 2 + cached), rel=2e-3)
    assert decode["seconds"] == decode["memory_s"] == decode["bytes"] / 50e9
    assert prefill["seconds"] == prefill["arithmetic_s"] == prefill["operations"] / 20e12
    assert result["seconds"] == sum(part["seconds"] for part in result["parts"].values())


def test_half_of_the_peaks_takes_twice_as_long():
    complete = paper(preset("mobile"), "int8", 96, 40, PHONE)
    half = paper(preset("mobile"), "int8", 96, 40, dataclasses.replace(PHONE, share=0.5))
    assert half["seconds"] == pytest.approx(2 * complete["seconds"])


def test_total_time_counts_preparation(capsys, monkeypatch):
    """The total counts preparation and mnn says what it leaves out."""
    monkeypatch.setattr(time_to_action, "FLAGS", SimpleNamespace(shape="toy", action_tokens=4))
    run = dict.fromkeys(("image", "prefill", "decode"), 0.1)
    form = {"runs": [run] * 3, "file_bytes": 1, "peak_rss_bytes": 1}
    results = {"features": 8, "prompt_tokens": 16, "prepare_s": [0.2, 0.2, 0.2]}
    time_to_action.show_measured(results | {"forms": {"int8": form}})
    header, _, row = (
        [cell.strip() for cell in line.split("|")] for line in capsys.readouterr().out.splitlines()
    )
    cells = dict(zip(header, row, strict=True))
    assert cells["prepare s"].startswith("0.2 ")
    assert cells["total s"].startswith("0.5 ")
    assert (cells["claimed 3 s"], cells["claimed 0.45 s"]) == ("reached", "missed")
    facts = {"start_s": [0.1], "step_s": [0.1], "size_bytes": 1}
    noted = facts | {"note": time_to_action.MNN_NOTE}
    time_to_action.show_runtimes({"LiteRT": facts, "MNN": noted})
    assert capsys.readouterr().out.strip().endswith(time_to_action.MNN_NOTE)


def test_forced_passes_are_compared_with_single_tokens(capsys):
    plans = forced_passes.plans_of(6, ["2", "3"])
    assert plans == {"one by one": [1] * 6, "forced": [2, 3]}
    seconds = {"one by one": [0.6, 0.8], "forced": [0.3, 0.2]}
    forced_passes.show({"int8": seconds}, plans)
    header, _, row = (
        [cell.strip() for cell in line.split("|")]
        for line in capsys.readouterr().out.strip().splitlines()
    )
    assert header[1] == "an action of 6 tokens, in passes of 2 3"
    # The median of the ratios of each round, 0.5 and 0.25.
    assert row[-2] == "0.375"


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        (["x"], "use numbers such as 4,3,4,2"),
        (["0"], "must be 1 to 8 tokens each"),
        (["9"], "must be 1 to 8 tokens each"),
        ([], "must be 1 to 8 tokens each"),
        (["4", "4"], "8 tokens, --forced_tokens has 6"),
    ],
)
def test_passes_that_do_not_fit_are_refused(passes, message):
    with pytest.raises(DataError, match=message):
        forced_passes.plans_of(6, passes)


@pytest.mark.slow
def test_a_small_run(tmp_path):
    out = tmp_path / "action.json"
    command = [
        sys.executable,
        "-m",
        "experiments.bench.time_to_action",
        "--shape=toy",
        "--forms=int8",
    ]
    command += ["--text_tokens=14", "--action_tokens=4", "--rounds=2", f"--out={out}"]
    command += ["--screen=240,108", "--tops=30", "--forced_tokens=6", "--passes=2,3"]
    command += [f"--work_dir={tmp_path / 'models'}", f"--mnn_python={tmp_path / 'none'}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    log = json.loads(out.read_text())
    runs = log["measured"]["forms"]["int8"]["runs"]
    assert len(runs) == 2
    assert all(run.keys() == {"image", "prefill", "decode"} for run in runs)
    assert min(min(run.values()) for run in runs) > 0
    passes = log["measured"]["forms"]["int8"]["passes"]
    assert passes.keys() == {"one by one", "forced"}
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in passes.values())
    assert "an action of 6 tokens, in passes of 2 3" in done.stdout
    assert len(log["measured"]["prepare_s"]) == 2
    assert min(log["measured"]["prepare_s"]) > 0
    assert log["measured"]["prepared_tokens"] >= log["measured"]["prompt_tokens"]
    assert log["sources"] == "as set by --tops"
    assert "sources: as set by --tops" in done.stdout
    assert log["runtimes"]["LiteRT"]["size_bytes"] > 1e6
    assert "none" in log["runtimes"]["MNN"]["left_out"]
    assert "450 ms" in done.stdout or "0.45 s" in done.stdout
