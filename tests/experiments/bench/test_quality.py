"""The table of quality: its rows as data, scores against numpy, and what is run again."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import glm_edge as ge
from experiments.bench import gathered
from experiments.bench import quality as bench_quality
from experiments.bench.peers import comparison, methods, scoring, table
from experiments.bench.peers.methods import DECODER, METHODS, OURS, Method
from experiments.bench.peers.scoring import Scorer
from experiments.common import tap_eval, tap_items
from glm_edge import configs
from glm_edge.cli import corpora
from glm_edge.errors import DataError, OutputError
from glm_edge.models.multimodal import MultimodalGLM


def test_rows_have_names_and_files_of_their_own():
    assert len({method.name for method in METHODS}) == len(METHODS)
    assert len({bench_quality.slug(method) for method in METHODS}) == len(METHODS)
    assert {m.peer for m in METHODS} == {*bench_quality.PEERS, OURS, methods.REFERENCE}
    assert {m.kind for m in METHODS} <= {"none", "training-free", "trained"}


@pytest.mark.parametrize("method", [m for m in METHODS if m.peer == OURS], ids=lambda m: m.name)
def test_recipes_of_ours_are_recipes(method):
    transform = ge.recipe_from_json(methods.as_json(method))
    assert json.loads(ge.to_json(transform))["name"] == method.options["name"]


def test_every_trained_row_of_ours_has_one_of_labels_alone():
    by_name = {method.name: method for method in METHODS}
    # CAT-Q reconstructs the outputs of layers, which have no labels.
    trained = [
        m for m in METHODS if m.peer == OURS and m.kind == "trained" and "catq" not in m.name
    ]
    alone = [method for method in trained if method.name.endswith(methods.ALONE)]
    likewise = f"glm_edge nothing quantized, trained likewise, {methods.ALONE}"
    assert len(alone) == len(trained) - len(alone) + 1

    def steps_of(method):
        options = method.options["options"]
        return [step["options"] for step in options.get("transforms", [method.options])]

    for method in alone:
        if method.name == likewise:
            continue
        other = by_name[method.name.removesuffix(f", {methods.ALONE}")]
        assert method.calibration == other.calibration
        *before, last = steps_of(method)
        assert last["alpha"] == 0.0
        assert [*before, {k: v for k, v in last.items() if k != "alpha"}] == steps_of(other)
    recipe = ge.recipe_from_json(methods.as_json(by_name[likewise]))
    qat = ge.recipe_from_json(methods.as_json(by_name["glm_edge qat int4-g32"]))
    assert (recipe.alpha, recipe.where) == (0.0, DECODER)
    assert (recipe.train.steps, recipe.train.learning_rate) == (1000, qat.train.learning_rate)


def test_a_chain_of_ours_gives_every_step_the_same_matrices():
    steps = [{"name": "quantize.rtn", "options": {"bits": 8}}, {"name": "quantize.rtn"}]
    recipe = methods.ours("x", *steps).options
    assert [t["options"]["where"] for t in recipe["options"]["transforms"]] == [DECODER] * 2
    ge.recipe_from_json(json.dumps(recipe))


def test_methods_are_chosen_by_name():
    names = [method.name for method in bench_quality.chosen_methods("^llama.cpp Q8_0$")]
    assert names == ["fp32", "fp32 again", "llama.cpp Q8_0"]
    with pytest.raises(DataError, match="not a regular expression"):
        bench_quality.chosen_methods("(")
    with pytest.raises(DataError, match="matches none of fp32"):
        bench_quality.chosen_methods("magic")


def test_a_finished_row_is_kept_unless_its_options_changed(tmp_path):
    method, settings = Method("one", "qwix", {"tile": 32}), {"screens": 3, "seed": 0}
    assert not bench_quality.finished(tmp_path, method, settings)
    row = {"options": {"tile": 32}, "settings": settings}
    (tmp_path / "one.json").write_text(json.dumps(row))
    assert bench_quality.finished(tmp_path, method, settings)
    other = dataclasses.replace(method, options={"tile": 64})
    assert not bench_quality.finished(tmp_path, other, settings)
    with pytest.raises(OutputError, match=r"screens 3, requested 4; use a different --out_dir"):
        bench_quality.finished(tmp_path, method, {**settings, "screens": 4})
    with pytest.raises(OutputError, match="checkpoint None, requested 'smollm2'"):
        bench_quality.finished(tmp_path, method, {**settings, "checkpoint": "smollm2"})
    (tmp_path / "one.json").write_text(json.dumps({**row, "settings": {**settings, "x": 1}}))
    with pytest.raises(OutputError, match="measured with x 1, requested None"):
        bench_quality.finished(tmp_path, method, settings)


def row(method: str, peer: str, kind: str, bits: float, kl: list[float], where=DECODER):
    mean = sum(kl) / len(kl)
    text = {"window_kl": kl, "window_nats": kl, "kl": [mean, mean, mean], "increase": [mean] * 3}
    return {
        "method": method, "peer": peer, "kind": kind, "packed_bits": bits, "bits": bits,
        "where": where, "text": {"books": text},
    }  # fmt: skip


def test_answer_of_follows_the_fixed_rule():
    """The answer has the grouping of the peer, the most bits that fit, and training if it has."""
    rows = [
        row("glm_edge gptq int4-channel", OURS, "training-free", 4.1, [0.1]),
        row("glm_edge gptq int4-g32", OURS, "training-free", 4.5, [0.1]),
        row("glm_edge gptq int3-g32", OURS, "training-free", 3.5, [0.1]),
        row("glm_edge qat int4-g32", OURS, "trained", 4.5, [0.1]),
        row("glm_edge awq int4-g32", OURS, "training-free", 4.5, [0.0]),
    ]
    cases = [
        ("Q4_0", "training-free", 4.5, "glm_edge gptq int4-g32"),
        ("Q4_0", "training-free", 4.4, "glm_edge gptq int3-g32"),
        ("int4-channel", "training-free", 4.5, "glm_edge gptq int4-channel"),
        ("int3-channel", "training-free", 3.6, "glm_edge gptq int3-g32"),
        ("taught", "trained", 5.0, "glm_edge qat int4-g32"),
        ("tiny", "training-free", 1.0, None),
    ]
    for name, kind, bits, expected in cases:
        answer = comparison.answer_of(row(name, "a", kind, bits, [0.1]), rows)
        assert (answer and answer["method"]) == expected, name


def test_every_answer_is_a_row():
    names = {method.name for method in METHODS}
    assert {name for group in methods.ANSWERS.values() for name in group} <= names


def test_verdicts_need_an_interval_without_zero():
    noise = np.random.default_rng(0).normal(0, 0.02, 50)
    ours = row("glm_edge gptq int4-g32", OURS, "training-free", 4.5, [0.1] * 50)
    rows = [
        ours,
        row("worse", "a", "training-free", 4.5, (0.2 + noise).tolist()),
        row("better", "a", "training-free", 4.5, (0.05 + noise).tolist()),
        row("like", "a", "training-free", 4.5, (0.1 + noise - noise.mean()).tolist()),
        row("tiny", "a", "training-free", 1.0, [0.1] * 50),
    ]
    actual = comparison.verdicts(rows)
    assert [(v["peer"], v.get("verdict")) for v in actual] == [
        ("worse", "better"), ("better", "worse"), ("like", "undecided"), ("tiny", None)
    ]  # fmt: skip
    low, value, high = actual[0]["difference"]
    assert low < value < high < 0
    assert value == pytest.approx(-0.1 - noise.mean())


def test_with_intervals_pairs_windows():
    """The increase is that of perplexity, and its interval lies within the windows' changes."""
    before, after = np.array([1.0, 3.0, 2.0, 4.0]), np.array([1.1, 3.3, 2.2, 4.2])
    scores = [{"d": {"window_nats": nats.tolist(), "window_kl": [0.1, 0.2, 0.3, 0.4]}}
              for nats in (after, before)]  # fmt: skip
    actual = comparison.with_intervals(*scores)["d"]
    low, value, high = actual["increase"]
    assert value == pytest.approx(np.exp((after - before).mean()) - 1)
    assert np.expm1(0.1) <= low < value < high <= np.expm1(0.3)
    assert actual["kl"][1] == pytest.approx(0.25)
    shown = comparison.without_windows({"text": {"d": actual}, "bits": 4})
    assert (list(shown["text"]["d"]), shown["bits"]) == (["kl", "increase"], 4)


def test_the_frontier_falls_with_every_bit():
    points = ((4, 0.5), (2, 1.0), (3, 1.0), (8, 0.0))
    rows = [row("", "a", "trained", bits, [kl]) for bits, kl in points]
    assert table.frontier(rows, "books") == [(2, 1.0), (4, 0.5), (8, table.FLOOR)]


def test_the_figure_and_the_table_take_rows_without_taps(tmp_path):
    pytest.importorskip("matplotlib")
    table.figure([], tmp_path / "empty.png")
    table.figure([row("m", OURS, "trained", 4.5, [0.25])], tmp_path / "one.png")
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")
    columns = table.columns_of(["books"])
    full = dict.fromkeys(columns) | row("m", "a", "trained", 4.5, [0.25])
    cells = dict(zip(table.titles(columns), table.cells(full, columns), strict=True))
    assert (cells["bits"], cells["taps"]) == ("4.500", "-")
    assert cells["KL books"] == "0.25 (0.25 to 0.25)"
    assert cells["perplexity books"] == "+25.00% (+25.00% to +25.00%)"


@pytest.fixture(scope="module")
def text_model():
    config = configs.GLMConfig(
        name="text_only",
        decoder=configs.DecoderConfig(
            vocab_size=61, hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16,
            intermediate_size=48, max_position_embeddings=64,
        ),
        eos_token_ids=(2,),
        pad_token_id=2,
    )  # fmt: skip
    model = MultimodalGLM(config)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    # Larger than at the start, so that predictions differ from the uniform one.
    return model, jax.tree.map(lambda leaf: 3 * leaf, params)


def test_a_model_without_vision_calibrates_on_text_only(text_model):
    model, params = text_model
    learned = {"books": np.arange(512, dtype=np.int32) % 61}
    data = gathered.Gathered(None, model, params, None, learned, None, {}, [])
    assert data.screens(4) == []
    assert [batch["tokens"].shape for batch in data.texts(1, 2)] == [(2, 256)]


@pytest.mark.parametrize("stored", [0, 1 << 30])
def test_text_scores_match_numpy(text_model, monkeypatch, stored):
    """Text scores are those of numpy, zero for the same model, and equal if recomputed."""
    monkeypatch.setattr(scoring, "MOST_STORED_BYTES", stored)
    model, params = text_model
    tokens = np.random.default_rng(1).integers(0, 61, size=16 * 9)
    windows = corpora.windows(tokens, np.ones(61, np.int32), 16)
    scorer = Scorer(model, params, None, {"books": windows}, {"image": [], "spoken": []})
    assert bool(scorer.expected) == bool(stored)
    same = scorer.score(model, params)
    assert (same["text"]["books"]["kl"], same["text"]["books"]["flips"]) == (0.0, 0.0)
    assert same["tap_in_box_image"] is None

    other = jax.tree.map(lambda leaf: leaf * 1.1, params)
    scores = []
    for leaves in (params, other):
        logits = model.apply({"params": leaves}, windows.tokens)[0][:, :-1]
        logits = np.asarray(logits, np.float64)
        scores.append(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
    expected, actual = scores
    kl = np.sum(np.exp(expected) * (expected - actual), axis=-1)
    nats = -np.take_along_axis(actual, windows.tokens[:, 1:, None], axis=-1)[..., 0]
    measured = scorer.score(model, other)["text"]["books"]
    assert measured["perplexity"] == pytest.approx(np.exp(nats.mean()), rel=1e-5)
    assert measured["kl"] == pytest.approx(kl.mean(), rel=1e-3)
    assert measured["flips"] == pytest.approx((expected.argmax(-1) != actual.argmax(-1)).mean())
    np.testing.assert_allclose(measured["window_nats"], nats.mean(axis=1), rtol=1e-5)
    np.testing.assert_allclose(measured["window_kl"], kl.mean(axis=1), rtol=1e-3)


@pytest.mark.slow
def test_question_scores_match_the_tap_evaluation():
    """Questions are scored as the exam does and not at all changed by the same model."""
    model, params = ge.load(ge.shipped("nano"), dtype="float32")
    tokenizer = ge.load_tokenizer(ge.shipped("nano"))
    items = tap_items.draw_items(5, seed=11)
    windows = corpora.windows(np.arange(64), np.ones(model.config.decoder.vocab_size), 32)
    scorer = Scorer(model, params, tokenizer, {"books": windows}, {"image": items, "spoken": []})
    same = scorer.score(model, params)
    assert (same["kl_image"], same["flips_image"]) == (0.0, 0.0)
    texts = tap_eval.answers(model, params, tokenizer, items)
    assert [float(hit) for hit in same["hits_image"]] == tap_eval.hits(items, texts)
    # The reference's answers are its likeliest tokens, so scores along them must say the same.
    likeliest = scorer.expected_answers["image"].argmax(-1)
    counted = scorer._counted(model.config, "image")
    assert counted[: len(items)].any(axis=1).all()
    assert not counted[len(items) :].any()
    np.testing.assert_array_equal(likeliest[counted], scorer.answered["image"][counted])
    noise = jax.tree.map(lambda leaf: leaf * 1.3, params["decoder"])
    changed = scorer.score(model, {**params, "decoder": noise})
    assert changed["kl_image"] > 1e-4
