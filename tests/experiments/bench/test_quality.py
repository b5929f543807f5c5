"""The table of quality: its rows as data, scores against numpy, and what is run again."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import glm_edge as ge
from experiments.bench import quality as bench_quality
from experiments.bench.peers import methods, table
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
    trained = [m for m in METHODS if m.peer == OURS and m.kind == "trained"]
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


def row(method: str, peer: str, kind: str, bits: float, perplexity: float, where=DECODER):
    return {
        "method": method, "peer": peer, "kind": kind, "packed_bits": bits, "bits": bits,
        "perplexity": perplexity, "increase": perplexity - 10, "where": where,
    }  # fmt: skip


def test_peers_that_ours_do_not_match_are_named():
    rows = [
        row("free", OURS, "training-free", 4.5, 10.2),
        row("taught", OURS, "trained", 4.5, 10.05),
        row("whole", OURS, "training-free", 2.0, 10.0, where=""),
        row("worse", "a", "training-free", 4.5, 10.2),
        row("smaller", "a", "training-free", 4.4, 10.3),
        row("better", "a", "training-free", 4.5, 10.1),
        row("better, taught", "b", "trained", 4.5, 10.1),
        row("best, taught", "b", "trained", 4.5, 10.01),
    ]
    assert table.unreached(rows) == ["smaller", "better", "best, taught"]


def test_the_frontier_falls_with_every_bit():
    points = ((4, 0.5), (2, 1.0), (3, 1.0), (8, 0.0))
    rows = [row("", "a", "trained", bits, 10 + increase) for bits, increase in points]
    assert table.frontier(rows) == [(2, 1.0), (4, 0.5), (8, table.FLOOR)]


def test_the_figure_and_the_table_take_rows_without_taps(tmp_path):
    pytest.importorskip("matplotlib")
    table.figure([], tmp_path / "empty.png")
    table.figure([row("m", OURS, "trained", 4.5, 10.0)], tmp_path / "one.png")
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")
    full = dict.fromkeys(table.COLUMNS) | row("m", "a", "trained", 4.5, 10.25)
    cells = dict(zip(table.titles(), table.cells(full), strict=True))
    assert (cells["bits"], cells["increase"], cells["taps"]) == ("4.500", "+25.00%", "-")


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


def test_text_scores_match_numpy(text_model):
    """Text scores are those of numpy and zero for the same model."""
    model, params = text_model
    tokens = np.random.default_rng(1).integers(0, 61, size=16 * 9 + 5)
    windows = corpora.windows(tokens, np.ones(61, np.int32), 16)
    scorer = Scorer(model, params, None, windows, {"image": [], "spoken": []})
    same = scorer.score(model, params)
    assert (same["kl_text"], same["flips_text"]) == (0.0, 0.0)
    assert same["tap_in_box_image"] is None

    other = jax.tree.map(lambda leaf: leaf * 1.1, params)
    scores = []
    for leaves in (params, other):
        logits = model.apply({"params": leaves}, windows.tokens)[0][:, :-1]
        logits = np.asarray(logits, np.float64)
        scores.append(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
    expected, actual = (s[windows.scored] for s in scores)
    targets = windows.tokens[:, 1:][windows.scored]
    kl = np.mean(np.sum(np.exp(expected) * (expected - actual), axis=-1))
    perplexity = np.exp(-np.mean(actual[np.arange(len(targets)), targets]))
    measured = scorer.score(model, other)
    assert measured["perplexity"] == pytest.approx(perplexity, rel=1e-5)
    assert measured["kl_text"] == pytest.approx(kl, rel=1e-3)
    assert measured["flips_text"] == np.mean(expected.argmax(-1) != actual.argmax(-1)) > 0


@pytest.mark.slow
def test_question_scores_match_the_tap_evaluation():
    """Questions are scored as the exam does and not at all changed by the same model."""
    model, params = ge.load(ge.shipped("nano"), dtype="float32")
    tokenizer = ge.load_tokenizer(ge.shipped("nano"))
    items = tap_items.draw_items(5, seed=11)
    windows = corpora.windows(np.arange(64), np.ones(model.config.decoder.vocab_size), 32)
    scorer = Scorer(model, params, tokenizer, windows, {"image": items, "spoken": []})
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
