"""Plans: what is measured, what is chosen, what is refused."""

import functools
import itertools
import json

import jax
import numpy as np
import pytest

from glm_edge import checkpoint
from glm_edge import params as boxes
from glm_edge.compress import batches, recipe_from_json
from glm_edge.compress.allocate.divergence import kind_of, split
from glm_edge.compress.allocate.plan import group_paths, pattern_of, plan
from glm_edge.compress.quantize.rtn import rtn
from glm_edge.errors import DataError, RecipeError

FORMATS = ("int8", "int4-g8", "keep")


@functools.partial(jax.jit, static_argnums=0)
def logits(model, params, batch):
    return batches.apply_batch(model, params, batch)


def divergence_loop(model, before, after, batch):
    expected, actual = (np.float64(logits(model, tree, batch)) for tree in (before, after))
    weights = np.asarray(batches.loss_weights(model, batches.to_device(model, batch)))
    total = 0.0
    for row, position in zip(*np.nonzero(weights), strict=True):
        p, q = (
            x[row, position] - np.log(np.exp(x[row, position]).sum()) for x in (expected, actual)
        )
        total += weights[row, position] * (np.exp(p) * (p - q)).sum()
    return total / weights.sum()


@pytest.fixture(scope="module")
def planned(make_shallow, batch_of):
    model, params = make_shallow("edge")
    calibration = [batch_of(model, seed=seed) for seed in (1, 2)]
    budget = 7000
    return model, params, calibration, plan(model, params, budget, FORMATS, calibration)


def test_prediction_is_right_to_the_byte(planned, tmp_path):
    model, params, _, result = planned
    assert result.predicted_bytes <= result.budget_bytes
    made_model, made, _ = result.recipe(model, params)
    assert boxes.stored_bytes(made) == result.predicted_bytes == result.measured_bytes
    checkpoint.save(made_model, made, tmp_path / "small")
    size = (tmp_path / "small" / "model.safetensors").read_bytes()
    header = int.from_bytes(size[:8], "little")
    ends = [
        entry["data_offsets"][1]
        for name, entry in json.loads(size[8 : 8 + header]).items()
        if name != "__metadata__"
    ]
    assert max(ends) == result.predicted_bytes


def test_losses_are_those_of_each_group_alone(planned):
    model, params, calibration, actual = planned
    row = next(row for row in actual.rows if row.group == "decoder/layers/0/mlp")
    alone = rtn(row.format, where="^decoder/layers/0/mlp/", scale="mse")(model, params)[1]
    expected = np.mean([divergence_loop(model, params, alone, batch) for batch in calibration])
    assert row.loss["text"] == pytest.approx(expected, rel=1e-3)
    made = actual.recipe(model, params)[1]
    expected = np.mean([divergence_loop(model, params, made, batch) for batch in calibration])
    assert actual.measured["text"] == pytest.approx(expected, rel=1e-3)
    assert actual.predicted["text"] == pytest.approx(sum(row.loss["text"] for row in actual.rows))


def test_more_budget_never_predicts_more_loss(planned):
    points = planned[3].points
    assert all(a[0] < b[0] and a[1] > b[1] for a, b in itertools.pairwise(points))
    assert len(points) > 10


def test_prints_and_is_json(planned):
    result = planned[3]
    text = str(result)
    for word in ("decoder/layers/0/attention", "predicted", "measured", "budget 7,000 bytes"):
        assert word in text
    fields = json.loads(result.to_json())
    assert fields["predicted_bytes"] == result.predicted_bytes
    assert recipe_from_json(json.dumps(fields["recipe"])) == result.recipe
    total = sum(row["bytes"] for row in fields["groups"]) + fields["fixed_bytes"]
    assert total == result.predicted_bytes


@pytest.mark.parametrize("name", ["ocr", pytest.param("nano", marks=pytest.mark.slow)])
def test_each_kind_of_batch_is_measured_apart(make_shallow, batch_of, name):
    model, params = make_shallow(name)
    complete = batch_of(model)
    kinds = [kind for kind in ("images", "audio") if kind in complete]
    calibration = [{"tokens": complete["tokens"], kind: complete[kind]} for kind in kinds]
    calibration.append({"tokens": np.clip(complete["tokens"], 10, None)})
    parts = {"vision": "layers/0/mlp", "speech": "layers/0/fc2", "decoder": "layers/0/mlp"}
    if "audio" not in kinds:
        del parts["speech"]
    where = [f"^{name}/{part}" for name, part in parts.items()]
    small = plan(model, params, 10**6, ("int2",), calibration, where)
    assert {row.format for row in small.rows} == {"int2"}
    losses = {row.group.split("/")[0]: row.loss for row in small.rows}
    assert set(losses) == set(parts)
    assert set(small.predicted) == {*kinds, "text"}
    assert losses["vision"]["images"] > 0 == losses["vision"]["text"]
    if "audio" in kinds:
        assert losses["vision"]["audio"] == 0
        assert losses["speech"]["audio"] > 0 == losses["speech"]["images"]
    assert losses["decoder"]["text"] > 0
    with pytest.raises(DataError, match="images"):
        plan(model, params, 10**6, ("int8",), calibration[1:], where)


def test_a_transform_that_reads_never_sees_what_is_held_out(make_shallow, batch_of):
    model, params = make_shallow("edge")
    calibration = [batch_of(model, seed=seed) for seed in range(4)]
    observed, held_out = split(calibration, reads=True)
    assert [id(batch) for batch in observed] == [id(calibration[0]), id(calibration[2])]
    assert [id(batch) for batch in held_out["text"]] == [id(calibration[1]), id(calibration[3])]
    with pytest.raises(DataError, match="one batch of text"):
        split(calibration[:1], reads=True)
    assert split(calibration, reads=False) == (None, {"text": calibration})
    # No factor is searched for a part of the matrices that read one input.
    groups = (r"^decoder/layers/0/attention/q_proj",)
    budget = boxes.stored_bytes(params) - 2000
    result = plan(model, params, budget, ("int4", "keep"), calibration, groups, transform="awq")
    assert result.held_out == {"text": 2}
    made = result.recipe(model, params, calibration=observed)[1]
    assert boxes.stored_bytes(made) == result.predicted_bytes


def test_refuses(make_member, batch_of):
    model, params = make_member("edge")
    calibration = [batch_of(model)]
    with pytest.raises(RecipeError, match="the smallest size"):
        plan(model, params, 100, FORMATS, calibration)
    for formats in (("int7",), ()):
        with pytest.raises(RecipeError, match="plan: format"):
            plan(model, params, 9000, formats, calibration)
    with pytest.raises(RecipeError, match="match no matrix"):
        plan(model, params, 9000, FORMATS, calibration, groups=("nothing",))
    with pytest.raises(RecipeError, match="budget_bytes"):
        plan(model, params, 9e3, FORMATS, calibration)
    with pytest.raises(RecipeError, match="has no option format="):
        plan(model, params, 9000, FORMATS, calibration, transform="rotate")
    with pytest.raises(DataError, match="calibration"):
        plan(model, params, 9000, FORMATS)


def test_groups_and_patterns(make_member):
    _, params = make_member("nano")
    leaves = dict(boxes.path_items(params))
    groups = group_paths(params, (r"^decoder/layers/\d+/(?:attention|mlp)", r"^[^/]+"))
    assert {"decoder/layers/0/attention", "decoder/layers/1/mlp", "vision", "embed"} <= set(groups)
    everything = [path for paths in groups.values() for path in paths]
    assert sorted(everything) == sorted(boxes.select(params, None))
    for paths in (*groups.values(), everything[::2], everything):
        pattern = pattern_of(paths, leaves)
        assert sorted(boxes.select(params, pattern)) == sorted(paths)
    assert len(pattern_of(groups["vision"], leaves)) < 20
    assert kind_of({"tokens": 1, "images": None, "audio": 2}) == "audio"
