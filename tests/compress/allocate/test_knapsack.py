"""Sizes from shapes and the choice within a budget, against counting and trying everything."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm_edge import params as boxes
from glm_edge.compress.allocate import knapsack as plan_table
from glm_edge.compress.allocate.knapsack import Option
from glm_edge.compress.quantize.rtn import rtn
from glm_edge.errors import BoxError, RecipeError
from glm_edge.params import Format
from tests.marks import slow_unless

NAMES = [
    "int8",
    "int6-g16",
    "int4-g32",
    "int4-g16-affine",
    "int3",
    "int2-g16",
    "ternary-g32",
    "ternary34",
]
NAMES += ["nf4-g16", "int4-tensor", "bfloat16"]


@pytest.mark.parametrize(
    "name",
    slow_unless(
        lambda name: name not in ("int4-g32", "int2-g16", "int6-g16", "ternary-g32"), NAMES
    ),
)
def test_bytes_of_are_those_of_the_box(name):
    format = Format.parse(name)
    weight = jax.random.normal(jax.random.key(0), (5, 96))
    recipe = rtn(format)
    _, params, _ = recipe(nn.Dense(5), {"weight": weight, "bias": jnp.zeros(5)})
    assert plan_table.bytes_of((5, 96), format) == boxes.stored_bytes(params["weight"])
    before = {"weight": weight, "bias": jnp.zeros(5)}
    assert plan_table.bytes_with(before, {"weight": format}) == boxes.stored_bytes(params)


def test_columns_that_are_not_whole_groups():
    with pytest.raises(BoxError, match="40 columns do not divide into groups of 32"):
        plan_table.bytes_of((4, 40), Format.parse("int4-g32"))
    tree = {"a": {"weight": jnp.zeros((4, 40))}, "b": {"weight": jnp.zeros((4, 64))}}
    wanted, fallback = Format.parse("int4-g32"), Format("int8")
    actual = plan_table.format_everything(tree, wanted, fallback)
    assert actual == {"a/weight": fallback, "b/weight": wanted}


option = st.builds(
    lambda size, cost: Option("f", size, {"text": cost}),
    st.integers(1, 40),
    st.sampled_from([0.0, 0.1, 0.2, 0.5, 0.7, 1.3]),
)
groups_of_options = st.lists(st.lists(option, min_size=1, max_size=4), min_size=1, max_size=5)


@given(groups_of_options, st.integers(0, 20))
def test_the_frontier_is_that_of_trying_everything(groups, fixed):
    points = plan_table.frontier(groups, fixed)
    tried = [
        (fixed + sum(o.bytes for o in row), sum(o.cost for o in row))
        for row in itertools.product(*groups)
    ]
    for budget in range(min(size for size, _ in tried), max(size for size, _ in tried) + 1):
        result = plan_table.best_within(points, budget)
        best = min(cost for size, cost in tried if size <= budget)
        assert result.cost == pytest.approx(best)
        assert result.bytes <= budget
    for point in points:
        chosen = [options[i] for options, i in zip(groups, point.choice, strict=True)]
        assert point.bytes == fixed + sum(o.bytes for o in chosen)
        assert point.cost == pytest.approx(sum(o.cost for o in chosen))


@given(groups_of_options)
def test_more_bytes_never_lose_more(groups):
    points = plan_table.frontier(groups)
    assert all(a.bytes < b.bytes and a.cost > b.cost for a, b in itertools.pairwise(points))


def test_a_budget_below_the_smallest_is_refused_by_its_size():
    points = plan_table.frontier([[Option("a", 70, {"text": 1.0})], [Option("b", 5, {})]], 1000)
    with pytest.raises(RecipeError, match="below 1,075"):
        plan_table.best_within(points, 1074)
    assert plan_table.best_within(points, 1075).bytes == 1075


def test_many_states_are_thinned_and_still_add_up(monkeypatch):
    rng = np.random.default_rng(0)
    groups = [
        [Option("f", int(rng.integers(1, 10**9)), {"text": float(rng.random())}) for _ in range(4)]
        for _ in range(8)
    ]
    exact = plan_table.frontier(groups)
    monkeypatch.setattr(plan_table, "_STATES", 64)
    points = plan_table.frontier(groups)
    assert len(points) <= 66
    assert points[0].bytes == exact[0].bytes
    for point in points:
        chosen = [options[i] for options, i in zip(groups, point.choice, strict=True)]
        assert point.bytes == sum(o.bytes for o in chosen)
    assert all(a.bytes < b.bytes and a.cost > b.cost for a, b in itertools.pairwise(points))
    middle = (exact[0].bytes + exact[-1].bytes) // 2
    reached, best = (plan_table.best_within(result, middle).cost for result in (points, exact))
    assert reached <= 1.1 * best + 0.05
