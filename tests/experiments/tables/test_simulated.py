"""Tables of claims about devices: verdicts that follow from the values, and their files."""

import json

import pytest

from experiments.tables import (
    bandwidth_load,
    block_loading,
    chips,
    devices,
    dvfs,
    pareto_engines,
    precision_offload,
    preemption,
    sensors,
    simulated,
    thermal_rotation,
)
from glm_edge.errors import OutputError

QUICK = (chips, bandwidth_load, devices, sensors, block_loading, precision_offload)


@pytest.mark.parametrize("script", QUICK)
def test_every_row_says_simulated_and_has_a_verdict_with_a_reason(run, tmp_path, script):
    rows, log = run(script, "--seed=3")
    assert log["title"].endswith(": simulated, not measured")
    assert log["command"] == f"python -m experiments.tables.{script.NAME} --seed=3"
    assert log["commit"]
    for row in rows.values():
        assert row["verdict"] in simulated.VERDICTS
        assert row["reason"]
        # Every claim has a verdict.
        assert row["verdict"] != simulated.SUPPLEMENT or not row["claim"]
    text = (tmp_path / "table.md").read_text()
    assert text.startswith(f"# {script.TITLE}: simulated, not measured")
    with pytest.raises(OutputError, match="already contains a table"):
        run(script)


def verdict_of(rows, name):
    return rows[name]["verdict"], float(rows[name]["simulated"])


def test_impossible_claims_are_arithmetic(run):
    rows, _ = run(devices)
    assert verdict_of(rows, "ESP32, model") == ("impossible", pytest.approx(8.52))
    least = rows["8 Gen 2, 98 MB, least time"]
    low, high = map(float, least["interval"].split(" to "))
    assert low < float(least["simulated"]) < high < float(least["claim"])


def test_sizes_are_compared_in_bits(run):
    rows, _ = run(precision_offload)
    name = "9 B, int8, below 1.8 GB, bits per weight"
    assert verdict_of(rows, name) == ("impossible", pytest.approx(1.6))
    streamed = [float(rows[f"5.3 GB of weights in {gb} GB"]["simulated"]) for gb in (2, 4.8, 5.3)]
    assert streamed == sorted(streamed)
    assert streamed[0] == pytest.approx(1.13, abs=0.01)
    assert 2 < float(rows["int8 over float32, decoding"]["simulated"]) < 4


def test_a_true_ratio_of_false_times(run):
    rows, _ = run(bandwidth_load)
    assert verdict_of(rows, "A100, loading") == ("contradictory", pytest.approx(0.862, abs=1e-3))
    assert verdict_of(rows, "V100 over A100") == ("reproduced", pytest.approx(1555 / 900))


def test_claimed_thresholds_miss(run):
    rows, _ = run(block_loading)
    verdict, rate = verdict_of(rows, "40 of 40 layers fit, 70/85, oldest freed first (claimed)")
    assert (verdict, round(rate, 1)) == ("contradictory", 1.1)
    assert float(rows["40 of 40 layers fit, Belady"]["simulated"]) > 98


def test_verdicts_are_from_the_list():
    with pytest.raises(ValueError, match="'true' is not a verdict"):
        simulated.Row("speed", "1/s", 1.0, 1.0, "true", "by hand")


@pytest.mark.slow
def test_rotation_fits_in_a_window_only(run):
    rows, log = run(thermal_rotation)
    assert log["parameters"]["window_s"] == 180.0
    verdict, celsius = verdict_of(rows, "static, first 180 s, hottest core")
    assert (verdict, celsius) == ("reproduced in a window", pytest.approx(89.2, abs=1.5))
    assert rows["static, first 1800 s, performance"]["verdict"] == "contradictory"
    assert float(rows["static, first 1800 s, performance"]["simulated"]) < 64


@pytest.mark.slow
def test_layers_protect_frames(run):
    rows, _ = run(preemption)
    assert verdict_of(rows, "frames dropped, layer boundaries") == ("reproduced", 0.0)
    assert float(rows["frames dropped, token boundaries"]["simulated"]) > 50
    assert float(rows["tokens per second, decoding on the npu"]["simulated"]) > 1.1


@pytest.mark.slow
def test_voltage_makes_a_slow_clock_save_more_than_claimed(run):
    rows, log = run(dvfs)
    x3 = rows["cortex-x3, power at 60 % of the frequency"]
    assert x3["verdict"] == "contradictory"
    assert float(x3["simulated"]) == pytest.approx(70, abs=1)
    idle = rows["power at 20 % load, schedutil over performance"]
    low, high = map(float, idle["interval"].split(" to "))
    assert low <= float(idle["simulated"]) <= high
    assert json.dumps(log)


@pytest.mark.slow
def test_heat_turns_the_order_of_two_engines(run):
    rows, _ = run(pareto_engines)
    assert float(rows["gpu, energy per inference"]["simulated"]) == pytest.approx(45.6)
    speeds = {
        (engine, ambient): float(
            rows[f"{engine}, inferences per second after 30 min at {ambient} C"]["simulated"]
        )
        for engine in ("gpu", "npu")
        for ambient in (25, 35)
    }
    assert speeds["gpu", 25] > speeds["npu", 25]
    assert speeds["gpu", 35] < speeds["gpu", 25]
