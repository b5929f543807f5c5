"""Files in processes of their own, and rows of the compressed model beside the whole one."""

import pytest

from experiments.bench.runtimes.random_model import random_model
from experiments.bench.time_to_action import seeing
from experiments.tables import lightweight
from glm_edge.configs import to_dict
from glm_edge.errors import DataError


@pytest.mark.slow
def test_files_are_timed_and_weighed_each_in_a_process(tmp_path, monkeypatch):
    pytest.importorskip("tensorflow")
    monkeypatch.setattr(lightweight, "PROMPT", 32)
    monkeypatch.setattr(lightweight, "DECODED", 2)
    config = to_dict(seeing("toy"))
    files = {
        kind: lightweight.write(*random_model(config, form), tmp_path / f"{kind}.tflite")
        for kind, form in zip(lightweight.KINDS, ("float32", "int4"), strict=True)
    }
    result = lightweight.timed(files, rounds=2, threads=1, answer_tokens=3)
    for kind in lightweight.KINDS:
        assert len(result[kind]["actions"]) == len(result[kind]["steps"]) == 2
        assert all(set(run) == {"image", "prefill", "decode"} for run in result[kind]["actions"])
        assert min(sum(run.values()) for run in result[kind]["actions"]) > min(
            result[kind]["steps"]
        )
        assert 0 < result[kind]["baseline_rss_bytes"] < result[kind]["peak_rss_bytes"]
    files["native"].path.write_bytes(b"nothing")
    with pytest.raises(DataError, match="LiteRT cannot run a file"):
        lightweight.timed({"native": files["native"]}, rounds=1, threads=1, answer_tokens=1)


def test_rows_set_both_models_against_the_claim():
    hits = {
        "native": {"written": [1.0] * 19 + [0.0], "spoken": [1.0, 1.0]},
        "lightweight": {"written": [1.0] * 16 + [0.0] * 4, "spoken": [1.0, 0.0]},
    }
    sizes = {
        "native": {"parameters": 4_000_000, "stored": 16_000_000, "file": 17_000_000},
        "lightweight": {"parameters": 3_000_000, "stored": 4_000_000, "file": 5_000_000},
    }
    action = {"image": 0.01, "prefill": 0.02, "decode": 0.01}
    runs = {
        "native": {
            "actions": [action] * 3, "steps": [0.004] * 3, "baseline_rss_bytes": 50_000_000,
            "peak_rss_bytes": 90_000_000,
        },
        "lightweight": {
            "actions": [{part: s / 4 for part, s in action.items()}] * 3, "steps": [0.002] * 3,
            "baseline_rss_bytes": 50_000_000, "peak_rss_bytes": 60_000_000,
        },
    }  # fmt: skip
    rows = {row.quantity: row for row in lightweight.rows_of(hits, sizes, runs)}
    native = rows["latency of a tap, native"]
    assert (native.claim, native.measured) == (210.0, pytest.approx(40.0))
    assert "a different device" in native.note
    factor = rows["latency of a tap, lightweight over native"]
    assert (factor.claim, factor.measured) == (pytest.approx(85 / 210), pytest.approx(0.25))
    assert rows["latency of a token, lightweight over native"].measured == pytest.approx(0.5)
    assert rows["taps in their box, written, lightweight"].measured == pytest.approx(80.0)
    assert rows["taps in their box, written, lightweight"].claim == 86.2
    assert rows["taps in their box, spoken, native"].claim is None
    lost = rows["taps lost, written"]
    assert (lost.claim, lost.measured) == (pytest.approx(5.5), pytest.approx(15.0))
    assert rows["taps lost, spoken"].measured == pytest.approx(50.0)
    assert rows["stored, lightweight over native"].measured == pytest.approx(0.25)
    assert rows["stored, lightweight over native"].claim == pytest.approx(5.1 / 32.4)
    assert rows["peak above an empty runtime, native"].measured == pytest.approx(40.0)
    above = rows["peak above an empty runtime, lightweight over native"]
    assert above.measured == pytest.approx(0.25)
    assert rows["memory of the claim's model, native"].measured is None


@pytest.mark.slow
def test_the_shipped_model_is_compressed_and_measured(run, tmp_path):
    pytest.importorskip("tensorflow")
    few = ("--screens=6", "--distill_steps=2", "--rounds=2", "--threads=1")
    rows, log = run(lightweight, *few)
    assert float(rows["stored, lightweight over native"]["measured"]) < 0.2
    assert float(rows["file, lightweight over native"]["measured"]) < 0.3
    assert float(rows["parameters, lightweight"]["measured"]) < 4.0
    assert len(log["measured"]["hits"]["native"]["written"]) >= 1
    assert "--screens=6 --distill_steps=2" in log["command"]
