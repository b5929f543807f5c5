"""A pass in segments: the rows and states of complete passes, and each product once."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_edge import params as boxes
from glm_edge.compress.layerwise import stages, walk
from glm_edge.compress.layerwise.runner import StageInputs
from tests.tiny_models import init

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def view(make_shallow, batch_of):
    """The first decoder layer on two batches, one of them with padding."""
    model, params = make_shallow("tied")
    leaves = dict(boxes.path_items(params))
    batches = [batch_of(model, seed=seed) for seed in (0, 1)]
    valid = np.ones(batches[1]["tokens"].shape, bool)
    valid[:, -1] = False
    batches[1] = {**batches[1], "valid": valid}
    states = stages.first_states(model, batches)
    for stage in stages.stages(model):
        needed = {p: x for p, x in leaves.items() if stage.holds(p) or p in stage.borrows}
        if stage.name == "decoder/layers/0":
            return StageInputs(stage, needed, states)
        states = stage.run(needed, states)
    raise AssertionError("no decoder layer")


def halved(leaves, group):
    return {path: leaves[path] * 0.5 for path in group}


@pytest.mark.parametrize("fixed", [False, True])
def test_walk_gives_the_rows_and_states_of_complete_passes(view, fixed):
    groups, leaves = tuple(view.readers()), dict(view.leaves)
    assert len(groups) == 4
    walked = walk.Walk(view.stage, view.states, groups, fixed)
    for group in groups:
        parts = list(walked.rows(leaves, group[-1]))
        for part, state in zip(parts, view.states, strict=True):
            complete = view.stage.collect(leaves, [state], stages.ROWS, [group[-1]])
            np.testing.assert_allclose(part[group[-1]], complete[group[-1]], **CLOSE)
        if not fixed:
            leaves |= halved(leaves, group)
    after, expected = walked.finish(leaves), view.stage.run(leaves, view.states)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), after, expected)


def test_walk_restarts_where_a_weight_changed(view):
    groups, leaves = tuple(view.readers()), dict(view.leaves)
    walked = walk.Walk(view.stage, view.states, groups)
    list(walked.rows(leaves, groups[1][0]))
    changed = leaves | halved(leaves, groups[0])
    (last,) = groups[3]
    for parts in (walked.rows(changed, last), walked.rows(changed, groups[2][0])):
        for part, state in zip(parts, view.states, strict=True):
            complete = view.stage.collect(changed, [state], stages.ROWS, list(part))
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), part, complete)
    after, expected = walked.finish(leaves), view.stage.run(leaves, view.states)
    np.testing.assert_allclose(after[0]["x"], expected[0]["x"], **CLOSE)


def products_in(function, *arguments):
    text = str(jax.make_jaxpr(function)(*arguments))
    return text.count("dot_general")


def test_walk_runs_each_product_once(view):
    groups, state = tuple(view.readers()), view.states[0]
    segments, _ = walk._traced(view.stage, view.leaves, state, groups)
    counted = []
    walked = walk.Walk(view.stage, [state], groups)
    with pytest.MonkeyPatch.context() as patch:

        def counts(step, function, *arguments):
            counted.append(products_in(function, *arguments))
            return function(*arguments)

        patch.setattr(walk, "timed", counts)
        for group in groups:
            list(walked.rows(view.leaves, group[0]))
        walked.finish(view.leaves)
    assert len(counted) == len(segments) == len(groups) + 1
    complete = products_in(lambda: view.stage.run(view.leaves, [state]))
    assert counted[0] == 0
    assert sum(counted) == complete


class Twice(nn.Module):
    """A layer that runs twice."""

    compute: str = "float32"

    @nn.compact
    def __call__(self, tokens):
        layer = nn.Dense(8)
        return layer(nn.relu(layer(nn.Embed(9, 8)(tokens))))


def test_walk_reads_a_layer_that_runs_twice_again():
    """The first product of such a layer is not final before its group is compressed."""
    tokens = jnp.arange(8).reshape(2, 4)
    leaves = dict(boxes.path_items(init(Twice(), tokens)["params"]))
    (stage,) = stages.stages(Twice())
    view = StageInputs(stage, leaves, stages.first_states(Twice(), [{"tokens": tokens}]))
    ((path,),) = groups = tuple(view.readers())
    walked = walk.Walk(stage, view.states, groups)
    (part,) = walked.rows(leaves, path)
    np.testing.assert_allclose(part[path], view.collect(stages.ROWS)[path], **CLOSE)
    leaves = leaves | halved(leaves, [path])
    (after,), (expected,) = walked.finish(leaves), stage.run(leaves, view.states)
    np.testing.assert_allclose(after["x"], expected["x"], **CLOSE)


def test_supports_walk_refuses_a_weight_of_two_groups(view):
    (first, *_) = groups = tuple(view.readers())
    assert walk.supports_walk(view.stage, groups)
    assert not walk.supports_walk(view.stage, (*groups, first[:1]))
