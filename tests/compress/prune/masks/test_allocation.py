"""How much goes where: uniform, by one threshold, and by measurement under a budget."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from glm_edge import params as boxes
from glm_edge.compress import prune
from glm_edge.compress.allocate import divergence
from glm_edge.compress.prune.masks import allocation, shapes
from glm_edge.errors import DataError, RecipeError


@pytest.mark.parametrize("seed", range(4))
def test_the_lowest_of_each_group_go_the_first_of_equals(seed):
    rng = np.random.default_rng(seed)
    for groups in (1, 5):
        scores = rng.integers(0, 6, (groups, 40)).astype(np.float32)
        scores[0, rng.integers(0, 40, 3)] = -np.inf
        for count in (0, 1, 17, 39, 40):
            keep = allocation.mark_kept(scores, count)
            for row, local in zip(scores, keep, strict=True):
                order = sorted(range(40), key=lambda position, row=row: (row[position], position))
                assert set(np.flatnonzero(~local)) == set(order[:count])


def test_one_threshold_over_all_matrices():
    rng = np.random.default_rng(0)
    params = {
        name: {"weight": scale * rng.normal(size=(6, 8))}
        for name, scale in zip("abc", (1, 2, 9), strict=True)
    }
    params = {name: {"weight": jnp.float32(local["weight"])} for name, local in params.items()}
    _, pruned, _ = prune.mask(0.4, allocation="global")(None, params)
    flat = np.concatenate([np.abs(params[name]["weight"]).ravel() for name in "abc"])
    edge = np.sort(flat)[round(0.4 * flat.size)]
    keep = np.concatenate([np.asarray(pruned[name]["weight"].mask).ravel() for name in "abc"])
    np.testing.assert_array_equal(keep, flat >= edge)
    _, same, _ = prune.magnitude(0.4, scope="global")(None, params)
    for name in "abc":
        np.testing.assert_array_equal(same[name]["weight"].mask, pruned[name]["weight"].mask)


def test_global_threshold_weighs_units_and_leaves_some():
    """One threshold counts the weights of units and leaves some."""
    sizes = {"a": (4, 2), "b": (4, 30)}
    pools = shapes.matrix_pools(shapes.Shape("channel"), sizes)
    scores = [np.float32([[1, 2, 3, 4]]), np.float32([[10, 20, 30, 40]])]
    # Of 128 weights 64 may go: all of `a` but its best, then 2 channels of 30.
    assert allocation.over_all(pools, scores, 0.5) == [3, 1]
    assert allocation.over_all(pools, scores, 0.6) == [3, 2]
    assert allocation.over_all(pools, scores, 0.0) == [0, 0]


def test_groups_of_heads_lose_alike_under_one_threshold(small):
    model, params = small
    _, pruned, report = prune.mask(0.5, shape="head", allocation="global")(model, params)
    gone = 0
    for layer in pruned["decoder"]["layers"].values():
        units = np.asarray(layer["attention"]["o_proj"]["weight"].mask).reshape(32, 2, 4, 8)
        counts = (~units.any((0, 3))).sum(1)
        assert counts[0] == counts[1] < 4
        gone += counts.sum()
    assert gone == 8
    assert len(report.rows) == 4


class Additive:
    """A stand-in whose divergence is known: a price for each weight that is zero, by path."""

    kinds = ("text",)

    def __init__(self, model, params, held_out):
        paths = [path for path, _ in boxes.path_items(params)]
        self.prices = dict(zip(paths, np.random.default_rng(1).random(len(paths)), strict=True))

    def __call__(self, leaves):
        zeros = {
            path: float((~leaf.mask).sum()) for path, leaf in leaves.items() if boxes.is_box(leaf)
        }
        return {"text": sum(self.prices[path] * count**1.5 for path, count in zeros.items())}


def test_measured_sparsities_are_the_best_there_are(monkeypatch, small, calibration):
    model, params = small
    monkeypatch.setattr(divergence, "Divergence", Additive)
    levels = (0.0, 0.25, 0.5, 0.75)
    transform = prune.mask(0.4, allocation="measured", where="layers/", levels=levels)
    _, pruned, report = transform(model, params, calibration)
    leaves = {path: leaf for path, leaf in boxes.path_items(pruned) if boxes.is_box(leaf)}
    groups = {}
    for path in leaves:
        groups.setdefault("/".join(path.split("/")[:4]), []).append(path)
    total = sum(leaf.mask.size for leaf in leaves.values())
    measure, best = Additive(model, params, None), np.inf

    def cost(chosen):
        return sum(
            measure.prices[path] * round(level * leaves[path].mask.size) ** 1.5
            for paths, level in zip(groups.values(), chosen, strict=True)
            for path in paths
        )

    for chosen in itertools.product(levels, repeat=len(groups)):
        zeros = sum(
            round(level * leaves[path].mask.size)
            for paths, level in zip(groups.values(), chosen, strict=True)
            for path in paths
        )
        if zeros >= 0.4 * total:
            best = min(best, cost(chosen))
    zeros = sum(int((~leaf.mask).sum()) for leaf in leaves.values())
    assert zeros >= 0.4 * total
    assert measure(leaves)["text"] == pytest.approx(best)
    assert len({float(leaf.mask.mean()) for leaf in leaves.values()}) > 1
    assert any("nats a token predicted" in note for note in report.notes)


def test_a_budget_of_bytes_is_that_of_the_shrunk_model(monkeypatch, small, calibration):
    model, params = small
    monkeypatch.setattr(divergence, "Divergence", Additive)
    dense = boxes.stored_bytes(params)
    transform = prune.mask(
        shape="neuron",
        allocation="measured",
        budget_bytes=int(0.7 * dense),
        levels=(0.0, 0.5, 0.75),
    )
    _, pruned, _ = transform(model, params, calibration)
    keep = {}
    for index, layer in pruned["decoder"]["layers"].items():
        units = np.asarray(layer["mlp"]["down_proj"]["weight"].mask).any(0)
        keep[int(index)] = {"neurons": np.flatnonzero(units)}
    _, shrunk = prune.shrink(model, params, keep)
    assert 0.5 * dense < boxes.stored_bytes(shrunk) <= 0.7 * dense
    with pytest.raises(RecipeError, match="budget_bytes leaves 1,000 and the highest of levels"):
        prune.mask(shape="neuron", allocation="measured", budget_bytes=1000)(
            model, params, calibration
        )


def test_a_budget_of_operations_counts_two_a_weight(monkeypatch, small, calibration):
    model, params = small
    monkeypatch.setattr(divergence, "Divergence", Additive)
    total = 2 * sum(
        leaf.size for path, leaf in boxes.path_items(params) if "q_proj" in path or "o_proj" in path
    )
    transform = prune.mask(
        shape="head", allocation="measured", budget_flops=total // 2, levels=(0.0, 0.25, 0.5, 0.75)
    )
    _, pruned, _ = transform(model, params, calibration)
    leaves = [leaf for _, leaf in boxes.path_items(pruned) if boxes.is_box(leaf)]
    remaining = 2 * sum(int(leaf.mask.sum()) for leaf in leaves)
    assert total // 4 < remaining <= total // 2


def test_divergence_is_measured_on_batches_held_out(small, calibration):
    model, params = small
    transform = prune.mask(
        0.5, allocation="measured", where="layers/1/", levels=(0.25, 0.5, 0.75), score="wanda"
    )
    _, pruned, report = transform(model, params, calibration)
    zeros = [
        float((~leaf.mask).mean()) for _, leaf in boxes.path_items(pruned) if boxes.is_box(leaf)
    ]
    assert len(zeros) == 6
    note = next(note for note in report.notes if "predicted" in note)
    measured = divergence.Divergence(model, params, {"text": calibration[1::2]})
    result = measured(dict(boxes.path_items(pruned)))["text"]
    assert f"{result:.4g} measured" in note
    with pytest.raises(DataError, match=r"prune\.mask: calibration holds one batch of text"):
        transform(model, params, calibration[:1])
    with pytest.raises(DataError, match="calibration"):
        prune.mask(0.5, allocation="measured", where="layers/1/")(model, params)
    with pytest.raises(RecipeError, match=r"sparsity leaves .* and the highest of levels"):
        prune.mask(0.8, allocation="measured", where="layers/1/", levels=(0.1, 0.5))(
            model, params, calibration
        )
