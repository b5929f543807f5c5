"""The table of pruning: restated algorithms against definitions and ours, rows, goals, speed."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import glm_edge as ge
from experiments.bench import gathered
from experiments.bench import quality as bench_quality
from experiments.bench.export import TOY
from experiments.bench.peers import sparsity
from experiments.bench.peers.methods import ALONE, DECODER, OURS, REFERENCE, Method
from experiments.bench.peers.table import cells, titles
from experiments.bench.pruning import rows, show, speed, work
from experiments.bench.runtimes.random_model import random_model
from glm_edge import configs
from glm_edge import params as boxes
from glm_edge.compress.prune.masks import sparse_columns
from glm_edge.models.multimodal import MultimodalGLM

METHODS = rows.methods(30, 20)
RNG = np.random.default_rng(5)
PATH = "decoder/layers/0/mlp/down_proj/weight"


def inputs_of(columns: int, count: int = 200) -> np.ndarray:
    """Rows whose columns are correlated and of unlike sizes."""
    mixed = RNG.normal(size=(count, columns)) @ RNG.normal(size=(columns, columns))
    return mixed * np.exp(RNG.normal(size=columns))


def test_rows_have_names_and_files_of_their_own():
    assert len({method.name for method in METHODS}) == len(METHODS)
    assert len({bench_quality.slug(method) for method in METHODS}) == len(METHODS)
    assert {m.peer for m in METHODS} == {REFERENCE, rows.RESTATED, OURS}


@pytest.mark.parametrize("method", [m for m in METHODS if m.peer == OURS], ids=lambda m: m.name)
def test_recipes_of_ours_are_recipes(method):
    options = method.options
    if options["prune"] is not None:
        assert ge.recipe_from_json(json.dumps(options["prune"])).name == options["prune"]["name"]
    if options["heal"] is not None:
        recipe = {"name": "distill", "options": options["heal"]}
        assert ge.recipe_from_json(json.dumps(recipe)).train.steps in (30, 20)
    assert (method.kind == "trained") == (options["heal"] is not None)


def test_every_distilled_row_has_one_of_labels_alone():
    by_name = {method.name: method for method in METHODS}
    pairs = 0
    for method in METHODS:
        if method.kind != "trained" or method.name.endswith(ALONE):
            continue
        alone = by_name[f"{method.name.removesuffix(', distilled')}, {ALONE}"]
        assert method.options["heal"]["alpha"] == 0.9
        # Nothing else differs: steps, rate, batches and what trains.
        healing = {**method.options["heal"], "alpha": 0.0}
        assert alone.options == {**method.options, "heal": healing}
        pairs += 1
    assert pairs == 4
    assert by_name[f"glm_edge {rows.NOTHING}"].options["prune"] is None


def test_rows_without_structure_ask_for_half_of_the_weights():
    for method in (m for m in METHODS if m.peer == rows.RESTATED):
        retained = method.options.get("n_m")
        assert method.options["sparsity"] == 0.5 if retained is None else retained == [2, 4]


def eliminated(weight: np.ndarray, hessian: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """Optimal brain surgeon column by column, by inverses of what is left of the Hessian."""
    weight = weight.copy()
    for column in range(weight.shape[1]):
        inverse = np.linalg.inv(hessian[column:, column:])
        for row in np.flatnonzero(~keep[:, column]):
            weight[row, column:] -= weight[row, column] / inverse[0, 0] * inverse[0]
            weight[row, column] = 0.0
    return weight


@pytest.mark.parametrize("n_m", [None, (2, 4)])
def test_sparsegpt_is_optimal_brain_surgery_in_columns(n_m):
    weight, inputs = RNG.normal(size=(6, 16)), inputs_of(16)
    actual = sparsity.sparsegpt(weight, inputs, 0.5, n_m, block=8)
    hessian = inputs.T @ inputs
    hessian += 0.01 * np.mean(np.diag(hessian)) * np.eye(16)
    np.testing.assert_allclose(actual, eliminated(weight, hessian, actual != 0), atol=1e-9)
    assert (actual == 0).sum() == weight.size // 2
    # What is chosen within the first columns is what costs least there.
    inverse = np.linalg.cholesky(np.linalg.inv(hessian)).T
    worth = np.square(weight / np.diag(inverse))
    if n_m is None:
        assert worth[:, :8][actual[:, :8] == 0].max() < worth[:, :8][actual[:, :8] != 0].min()
    else:
        first = np.sort(np.argsort(worth[:, :4], axis=1)[:, :2], axis=1)
        np.testing.assert_array_equal(
            np.sort(np.argsort(actual[:, :4] != 0, axis=1)[:, :2], axis=1), first
        )


@pytest.mark.parametrize("n_m", [None, (2, 4)])
def test_sparsegpt_of_ours_as_published_is_the_restated_one(n_m):
    weight, inputs = RNG.normal(size=(12, 32)), inputs_of(32)
    restated = sparsity.sparsegpt(weight, inputs, 0.5, n_m, block=16)
    actual, keep, _ = sparse_columns.solve(
        jnp.asarray(weight, jnp.float32),
        jnp.asarray(inputs.T @ inputs, jnp.float32),
        0.5,
        n_m,
        block=16,
    )
    np.testing.assert_array_equal(np.asarray(keep), restated != 0)
    np.testing.assert_allclose(np.asarray(actual), restated, atol=2e-3)


def test_an_input_that_is_always_zero_loses_its_weights():
    inputs = inputs_of(8)
    inputs[:, 3] = 0.0
    actual = sparsity.sparsegpt(RNG.normal(size=(4, 8)), inputs, 0.5, None)
    assert np.isfinite(actual).all()
    assert (actual[:, 3] == 0).all()


def test_wanda_keeps_of_each_row_what_meets_most():
    weight, inputs = RNG.normal(size=(5, 8)), inputs_of(8)
    score = np.abs(weight) * np.linalg.norm(inputs, axis=0)
    stays = sparsity.wanda(weight, inputs, 0.5, None)
    np.testing.assert_array_equal(stays, score >= np.sort(score, axis=1)[:, 4:5])
    pairs = sparsity.wanda(weight, inputs, None, (2, 4)).reshape(5, 2, 4)
    groups = score.reshape(5, 2, 4)
    np.testing.assert_array_equal(pairs, groups >= np.sort(groups, axis=2)[:, :, 2:3])


def test_erdos_renyi_shares_meet_the_budget():
    """Shares by erdos renyi are the budget and leave small matrices whole."""
    shapes = {"small": (4, 8), "square": (64, 64), "wide": (256, 64)}
    actual = sparsity.erdos_renyi(shapes, 0.5)
    assert actual["small"] == 0.0
    removed = sum(actual[name] * math.prod(shape) for name, shape in shapes.items())
    assert removed == pytest.approx(0.5 * sum(map(math.prod, shapes.values())))
    density = {name: 1 - actual[name] for name in ("square", "wide")}
    expected = (128 / 64**2) / (320 / (256 * 64))
    assert density["square"] / density["wide"] == pytest.approx(expected)


def test_layers_see_what_the_pruned_layers_before_them_give():
    names = [f"decoder/layers/{index}/q/weight" for index in (1, 0)]
    weights = {name: RNG.normal(size=(4, 8)) for name in names}
    observed = []

    def inputs(actual, paths):
        observed.append((paths, {path: (weight == 0).mean() for path, weight in actual.items()}))
        return {path: inputs_of(8) for path in paths}

    sparsity.prune(weights, inputs, {"algorithm": "wanda", "sparsity": 0.5})
    assert [paths for paths, _ in observed] == [[names[1]], [names[0]]]
    assert observed[0][1] == dict.fromkeys(names, 0.0)
    assert observed[1][1] == {names[1]: 0.5, names[0]: 0.0}


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    config = configs.GLMConfig(
        name="text_only",
        decoder=configs.DecoderConfig(
            vocab_size=61, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
            intermediate_size=48, max_position_embeddings=64,
        ),
        eos_token_ids=(2,),
        pad_token_id=2,
    )  # fmt: skip
    model = MultimodalGLM(config)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    data = gathered.Gathered(None, model, params, None, None, None, {}, ())
    batches = [{"tokens": RNG.integers(3, 61, (2, 16)).astype(np.int32)} for _ in range(4)]
    directory = tmp_path_factory.mktemp("states")
    return work.Worker(data, batches, lambda: batches, directory, 0)


@pytest.mark.parametrize(
    ("scope", "transform"),
    [
        ("uniform", ge.prune.magnitude(0.5, where=DECODER)),
        ("global", ge.prune.magnitude(0.5, where=DECODER, scope="global")),
    ],
)
def test_restated_magnitude_leaves_the_weights_that_ours_leaves(worker, scope, transform):
    options = {"algorithm": "magnitude", "sparsity": 0.5, "scope": scope}
    restated = worker.run(Method("x", rows.RESTATED, options), "x")
    _, ours, _ = transform(*worker.dense)
    for path in boxes.select(ours, DECODER):
        pair = [dict(boxes.path_items(tree))[path].unbox() for tree in (restated.params, ours)]
        np.testing.assert_array_equal(*map(np.asarray, pair))


def test_restated_wanda_equals_ours_in_the_first_layer(worker):
    """Restated wanda leaves the weights that ours leaves in the first layer."""
    options = {"algorithm": "wanda", "sparsity": 0.5}
    restated = worker.run(Method("x", rows.RESTATED, options), "x")
    _, ours, _ = ge.prune.mask(0.5, score="wanda", where="layers/0/attention/(q|k|v)_proj")(
        *worker.dense, worker.calibration
    )
    for path, leaf in boxes.path_items(ours):
        if isinstance(leaf, boxes.Masked):
            results = dict(boxes.path_items(restated.params))[path]
            np.testing.assert_array_equal(np.asarray(results.mask), np.asarray(leaf.mask))


def test_masks_are_counted_and_save_nothing(worker):
    options = {"algorithm": "magnitude", "n_m": [2, 4]}
    pruned = worker.run(Method("x", rows.RESTATED, options), "x")
    sizes = work.sizes(worker.data.params, pruned.params)
    matrices = sum(
        leaf.size for path, leaf in boxes.path_items(worker.data.params) if path.startswith("deco")
        and leaf.ndim == 2
    )  # fmt: skip
    assert sizes["mask_bytes"] == matrices
    assert sizes["removed"] == 0.0
    assert sizes["stored"] == pytest.approx(1.25, abs=0.01)
    assert sizes["zeros"] == pytest.approx(0.5, abs=0.01)


def test_healed_row_resumes_to_the_same_bytes(worker):
    """A healed row shrinks arrays and resumes to the same bytes."""
    prune = rows.structured(heads=0.5, neurons=0.25)
    heal = {"steps": 4, "where": rows.TRAINS, "alpha": 0.9, "mixture": rows.MIXTURE}
    method = Method("x", OURS, {"prune": prune, "heal": heal}, "trained", "training")
    first = worker.run(method, "healed")
    states = list(worker.directory.glob("healed-*/state.safetensors"))
    assert len(states) == 1
    decoder = first.model.config.decoder
    assert (decoder.num_heads, decoder.intermediate_size) == (2, 36)
    sizes = work.sizes(worker.data.params, first.params)
    assert sizes["mask_bytes"] == 0
    assert 1 - sizes["removed"] == pytest.approx(sizes["stored"])
    assert sizes["removed"] > 0.2
    assert set(first.curve) == {"loss", "soft", "hard"}
    again = worker.run(method, "healed")
    for a, b in zip(jax.tree.leaves(first.params), jax.tree.leaves(again.params), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert list(worker.directory.glob("healed-*/state.safetensors")) == states


def test_taps_lost_counts_up():
    dense, worse = ({"hits_image": hits, "hits_spoken": None} for hits in ("1111", "1011"))
    actual = show.taps_lost(worse, dense)
    assert actual["taps_lost_image"][1] == 0.25
    assert actual["taps_lost_spoken"] is None


def result(name: str, peer: str, kind: str, increase: float, lost: float = 0.0) -> dict:
    domains = {"books": increase, "help": increase / 2}
    text = {name: {"increase": [v / 2, v, v * 2], "kl": [v] * 3} for name, v in domains.items()}
    return {
        "method": name, "peer": peer, "kind": kind, "text": text,
        "taps_lost_image": [lost, lost, lost], "taps_lost_spoken": None,
    }  # fmt: skip


def test_goals_use_our_best_row():
    """Goals are judged by the best row of ours and missing rows are left out."""
    results = [
        result("SparseGPT 50 %", rows.RESTATED, "training-free", 0.20),
        result("Wanda 50 %", rows.RESTATED, "training-free", 0.10),
        result("glm_edge a 50 %", OURS, "training-free", 0.21),
        result("glm_edge b 50 %", OURS, "training-free", 0.19),
        result("glm_edge 50 %, distilled", OURS, "trained", 0.01),
        result("glm_edge 2:4", OURS, "training-free", 0.05),
        result("glm_edge 2:4, distilled", OURS, "trained", 0.11),
        result(f"glm_edge 2:4, {ALONE}", OURS, "trained", 0.01),
        result("glm_edge 30 %, distilled", OURS, "trained", 0.02, lost=0.02),
    ]
    goals = show.goals(results, {"speedup": [1.2, 1.31, 1.4], "shape": "mobile"})
    assert [(goal["row"], goal["reached"]) for goal in goals] == [
        ("glm_edge b 50 %", True),
        ("glm_edge 2:4, distilled", False),
        ("glm_edge 30 %, distilled", True),
        ("glm_edge 30 %, distilled", False),
        ("mobile", True),
    ]
    assert show.goals(results[:2], None) == []


def test_a_row_of_labels_alone_has_no_teacher(worker, monkeypatch):
    teachers = []
    apply = type(ge.distill()).apply

    def recorded(self, *arguments):
        teachers.append(self.teacher)
        return apply(self, *arguments)

    monkeypatch.setattr(type(ge.distill()), "apply", recorded)
    for alpha in (0.0, 0.9):
        # Without a removal, the model would otherwise be its own teacher.
        heal = {"steps": 1, "where": "^decoder/norm", "alpha": alpha}
        method = Method("x", OURS, {"prune": None, "heal": heal}, "trained", "training")
        pruned = worker.run(method, "alone")
    assert teachers[0] is None
    assert teachers[1] is not None
    assert pruned.model is worker.data.model


def test_gains_compare_with_labels_alone_on_the_same_windows():
    def text(*nats):
        return {"text": {"books": {"window_nats": list(nats), "window_kl": [0.0] * len(nats)}}}

    alone, better = text(4.0, 4.4, 4.2, 3.8), text(3.9, 4.2, 4.1, 3.6)
    named = {
        "a 2:4, distilled": better,
        f"a 2:4, {ALONE}": alone,
        "a 30 %, distilled": better,
        rows.NOTHING: alone,
        f"{rows.NOTHING}, {ALONE}": better,
    }
    gains = show.gains([{"method": name, **values} for name, values in named.items()])
    assert [gain["row"] for gain in gains] == ["a 2:4, distilled", rows.NOTHING]
    low, change, high = gains[0]["change"]
    assert change == pytest.approx(math.expm1(-0.15))
    assert low < change < high < 0.0
    assert gains[1]["change"][1] == pytest.approx(math.expm1(0.15))


def test_the_table_and_the_figure_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    columns = show.columns_of(["books", "help"])
    row = dict.fromkeys(columns) | result("m", OURS, "trained", 0.25) | {"stored": 1.25}
    shown = dict(zip(titles(columns), cells(row, columns), strict=True))
    assert shown["perplexity books"] == "+25.00% (+12.50% to +50.00%)"
    assert (shown["bytes"], shown["taps"]) == ("125.0%", "-")
    show.figure([row], tmp_path / "one.png")
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")


def test_the_timed_shape_is_the_one_that_removal_leaves():
    model, params = random_model(configs.to_dict(TOY), "float32")
    assert speed.decoder_parameters(TOY) == boxes.count(params["decoder"])
    shrink = ge.prune.structured(heads=0.25, neurons=rows.NEURONS, score="magnitude")
    remaining, pruned, _ = shrink(model, params)
    actual = speed.smaller(TOY)
    assert actual == remaining.config
    assert speed.decoder_parameters(actual) == boxes.count(pruned["decoder"])


def test_at_least_three_tenths_go_on_both_shapes():
    for name in ("nano", "mobile"):
        config = configs.preset(name)
        actual = speed.decoder_parameters(speed.smaller(config))
        assert actual <= 0.7 * speed.decoder_parameters(config)


@pytest.mark.slow
def test_both_files_take_turns_in_litert(tmp_path):
    pytest.importorskip("ai_edge_litert")
    pytest.importorskip("tensorflow")
    actual = speed.measure("toy", tmp_path, rounds=2, steps=2, context=4, slots=16, threads=1)
    assert actual["file_bytes"]["pruned"] < actual["file_bytes"]["dense"]
    assert 0 < actual["removed"] < 1
    low, middle, high = actual["speedup"]
    assert 0 < low <= middle <= high
    ratios = np.divide(actual["bursts"]["dense"], actual["bursts"]["pruned"])
    assert middle == pytest.approx(np.median(ratios))
    assert not list(tmp_path.glob("*.tflite"))


def test_row_of_other_settings_is_refused(tmp_path):
    """A row of other settings is refused and of other steps is run again."""
    method = next(m for m in METHODS if m.kind == "trained")
    row = {"options": json.loads(json.dumps(method.options)), "settings": {"training_windows": 8}}
    (tmp_path / f"{bench_quality.slug(method)}.json").write_text(json.dumps(row))
    assert bench_quality.finished(tmp_path, method, {"training_windows": 8})
    longer = {**method.options, "heal": {**method.options["heal"], "steps": 31}}
    other = dataclasses.replace(method, options=longer)
    assert not bench_quality.finished(tmp_path, other, {"training_windows": 8})
