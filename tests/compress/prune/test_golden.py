"""Masks equal those of torch.nn.utils.prune, which of equals it takes included."""

import json
from pathlib import Path

import numpy as np
import pytest

from glm_edge.compress import prune
from glm_edge.compress.prune.masks import ties

with np.load(Path(__file__).with_name("golden.npz")) as _file:
    GOLDEN = {name: _file[name] for name in _file.files}
CASES = json.loads(str(GOLDEN["meta"]))["cases"]


def options(case, **more):
    if case["order"] is None:
        return {"sparsity": case["amount"], **more}
    return {"sparsity": case["amount"], "score": f"l{case['order']}", "shape": "channel", **more}


@pytest.mark.parametrize("index", range(len(CASES)))
def test_masks_are_those_of_torch(index):
    weight = GOLDEN[f"weight_{index}"].astype(np.float32)
    expected, case = GOLDEN[f"mask_{index}"], CASES[index]
    _, pruned, _ = prune.mask(**options(case, ties="torch"))(None, {"weight": weight})
    np.testing.assert_array_equal(pruned["weight"].mask, expected)
    _, first, _ = prune.mask(**options(case))(None, {"weight": weight})
    assert int(first["weight"].mask.sum()) == int(expected.sum())
    if not case["ties"]:
        np.testing.assert_array_equal(first["weight"].mask, expected)


def test_a_stock_kernel_is_pruned_as_its_transpose():
    weight, case = GOLDEN["weight_11"].astype(np.float32), CASES[11]
    _, pruned, _ = prune.mask(**options(case, ties="torch"))(None, {"kernel": weight.T})
    np.testing.assert_array_equal(pruned["kernel"].mask, GOLDEN["mask_11"].T)


@pytest.mark.parametrize("count", [0, 1, 3, 40, 640, 1279, 1280])
def test_the_smallest_are_found_whatever_the_ties(count):
    for largest in (1, 50, 100000):
        values = np.random.default_rng(count).integers(0, largest, 1280).astype(np.float32)
        found = ties.smallest(values, count)
        assert len(set(found.tolist())) == count
        np.testing.assert_array_equal(np.sort(values[found]), np.sort(values)[:count])


def test_a_line_up_that_defeats_the_pivots_ends_in_a_heap(monkeypatch):
    calls, select = [], ties._heap_select
    monkeypatch.setattr(ties, "_heap_select", lambda *args: (calls.append(args), select(*args)))
    weight = GOLDEN[f"weight_{len(CASES) - 1}"].astype(np.float32)
    found = ties.smallest(weight.ravel(), weight.size // 2)
    assert calls
    np.testing.assert_array_equal(~GOLDEN[f"mask_{len(CASES) - 1}"].ravel()[found], True)
