"""A small run of the benchmark of GPTQ's time."""

import pytest

from experiments.bench import gptq

SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 256}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}


@pytest.mark.slow
def test_stages_of_a_run_add_up_to_its_seconds(tmp_path, monkeypatch):
    config = gptq.MOBILE | SMALL | HEADS
    gptq.make_checkpoint.write(config, str(tmp_path / "source"), 2e9, seed=0)
    gptq.np.savez(tmp_path / gptq.TOKENS, tokens=gptq.np.arange(2, 130, dtype="int32")[None])
    monkeypatch.setattr(gptq, "FLAGS", type("Flags", (), {"compute": "float32"}))
    run = gptq.ours(tmp_path, tmp_path / "source", "gptq")
    assert tuple(run["stages"]) == gptq.STAGES
    assert sum(run["stages"].values()) == pytest.approx(run["seconds"])
    assert all(seconds > 0 for seconds in run["stages"].values())
