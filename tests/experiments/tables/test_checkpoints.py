"""Tables of a checkpoint: skipped neurons, early exit, bits; on a small model of text."""

import jax
import jax.numpy as jnp
import pytest

import glm_edge as ge
from experiments.tables import bits, dynamic, early_exit
from glm_edge.configs import DecoderConfig, GLMConfig
from glm_edge.errors import RecipeError
from glm_edge.generate import SweepRow
from glm_edge.models.multimodal import MultimodalGLM


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Two layers with random weights, and the shipped tokenizer."""
    model = MultimodalGLM(GLMConfig("small", DecoderConfig(2304, 64, 2, 2, 1, 32, 96)))
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    path = tmp_path_factory.mktemp("small") / "model"
    tokenizer = {"tokenizer.json": ge.shipped("nano") / "tokenizer.json"}
    return ge.save(model, params, path, extras=tokenizer)


def numbers(rows):
    return {name: float(row["measured"]) for name, row in rows.items() if row["measured"]}


@pytest.mark.slow
def test_skipping_none_or_half_of_the_neurons(run, checkpoint):
    """Skipping nothing loses nothing and half reads two thirds."""
    few = ["--screens=4", "--rounds=2", "--text_tokens=600", "--shape="]
    rows, log = run(dynamic, f"--checkpoint={checkpoint}", "--skip=0,50", *few)
    result = numbers(rows)
    assert result["0 % skipped: tokens as without skipping"] == 0.0
    assert result["0 % skipped: perplexity grows"] == pytest.approx(0.0, abs=1e-3)
    assert result["50 % skipped: perplexity grows"] != pytest.approx(0.0, abs=1e-3)
    assert result["50 % skipped: FFN weights read"] == pytest.approx(100 * 2 / 3)
    assert result["50 % skipped: speed-up"] > 0.0
    assert rows["50 % skipped: speed-up"]["claim"] == "1.42"
    assert rows["0 % skipped: speed-up"]["claim"] == ""
    assert log["measured"]["perplexity"]["all"] == result["perplexity"]
    assert "--skip=0,50" in log["command"]


def test_fractions_of_neurons_that_mean_nothing_are_refused(run, checkpoint):
    with pytest.raises(RecipeError, match="must not be empty"):
        run(dynamic, f"--checkpoint={checkpoint}", "--skip=")
    with pytest.raises(RecipeError, match="keep must be above 0"):
        run(dynamic, f"--checkpoint={checkpoint}", "--skip=100")


def row(name, value, accuracy, tokens_per_second=100.0, layers=4.0):
    return SweepRow(name, value, accuracy, 0.9, layers, tokens_per_second, 1.25, 1.0, 1.6)


def test_losses_are_relative_to_the_whole_model():
    results = [row("all", None, 0.8), row("keep 0.8", 0.8, 0.6)]
    perplexity = {"all": 20.0, "keep 0.8": 25.0}
    rows = {r.quantity: r for r in dynamic.rows_of(results, perplexity, "taps", 40)}
    assert rows["20 % skipped: taps"].measured == pytest.approx(25.0)
    assert rows["20 % skipped: perplexity grows"].ratio == pytest.approx(25.0)
    assert rows["20 % skipped: speed-up"].ratio == pytest.approx(1.25 / 1.15)
    (timed,) = dynamic.shape_rows(results, "mobile")
    assert (timed.quantity, timed.claim) == ("20 % skipped, mobile: speed-up", 1.15)


def test_an_exit_that_is_always_or_never_sure(run, checkpoint):
    few = ["--screens=4", "--rounds=2", "--exits=1", "--thresholds=0,1", "--shape="]
    rows, _ = run(early_exit, f"--checkpoint={checkpoint}", *few)
    result = numbers(rows)
    for kind in ("exit", "exit+map"):
        assert result[f"{kind} 0: layers"] == 1.0
        assert result[f"{kind} 1: layers"] == 2.0
        assert result[f"{kind} 1: lost"] == 0.0
    assert result["exit 0: lost"] > 0.0
    assert "not available" in rows["all layers: time"]["note"]


def test_the_claim_of_early_exit_stands_at_its_threshold():
    results = [
        row("all", None, 0.9),
        row("exit 0.95", 0.95, 0.85, 125.0),
        row("exit 0.5", 0.5, 0.1),
    ]
    rows = {r.quantity: r for r in early_exit.rows_of(results, "taps", 40)}
    assert rows["exit 0.95: lost"].measured == pytest.approx(5.0)
    assert rows["exit 0.95: lost"].claim == pytest.approx(0.4)
    assert rows["exit 0.95: time per token"].measured == pytest.approx(8.0)
    assert rows["exit 0.95: time over all layers"].measured == pytest.approx(0.8)
    assert rows["exit 0.95: time over all layers"].claim == pytest.approx(76 / 120)
    assert rows["all layers: taps"].claim == 98.2
    assert rows["exit 0.5: taps"].claim is None
    assert "exit 0.5: time" not in rows


@pytest.mark.slow
def test_bits_are_stored_and_lose(run, checkpoint):
    where = "layers/0/attention"
    few = ["--bits=8,2", "--groups=32", "--text_tokens=600", f"--where={where}"]
    rows, log = run(bits, f"--checkpoint={checkpoint}", *few)
    result = numbers(rows)
    methods = ("rtn", "gptq")
    for way in methods:
        names = [f"{width} bits, {way}, groups of 32" for width in (8, 2)]
        # A bfloat16 scale for 32 weights.
        assert [result[f"{name}: stored"] for name in names] == [8.5, 2.5]
        moved = [abs(result[f"{name}: perplexity grows"]) for name in names]
        assert 0.0 < moved[0] < moved[1]
    nearest, calibrated = (result[f"2 bits, {w}, groups of 32: perplexity grows"] for w in methods)
    assert nearest != calibrated
    assert log["measured"]["settings"]["float32"]["bits stored"] == 32.0
    assert f"--where={where} --bits=8,2 --groups=32" in log["command"]


def test_losses_of_bits_are_set_against_the_claim():
    base = {"perplexity": 20.0, "taps, written": 80.0, "bits stored": 32.0}
    now = {"perplexity": 22.0, "taps, written": 72.0, "bits stored": 4.5}
    results = {"float32": base, "4 bits, rtn, per channel": now, "3 bits, rtn, per channel": now}
    rows = {r.quantity: r for r in bits.rows_of(results)}
    assert rows["4 bits, rtn, per channel: perplexity grows"].measured == pytest.approx(10.0)
    assert rows["4 bits, rtn, per channel: taps, written"].ratio == pytest.approx(1.0)
    assert rows["3 bits, rtn, per channel: taps, written"].claim is None
