"""Masks equal those of torch.nn.utils.prune, but for which of equal scores go."""

import json
from pathlib import Path

import numpy as np
import pytest

from glm_edge.compress import prune

with np.load(Path(__file__).with_name("golden.npz")) as _file:
    GOLDEN = {name: _file[name] for name in _file.files}
CASES = json.loads(str(GOLDEN["meta"]))["cases"]


def options(case, **more):
    if case["order"] is None:
        return {"sparsity": case["amount"], **more}
    return {"sparsity": case["amount"], "score": f"l{case['order']}", "shape": "channel", **more}


def scores_of(case, weight):
    """Scores of torch: magnitudes of weights, norms of rows."""
    if case["order"] is None:
        return np.abs(weight)
    return np.linalg.norm(weight.astype(np.float64), ord=float(case["order"]), axis=1)


@pytest.mark.parametrize("index", range(len(CASES)))
def test_masks_are_those_of_torch_up_to_ties(index):
    weight = GOLDEN[f"weight_{index}"].astype(np.float32)
    expected, case = GOLDEN[f"mask_{index}"], CASES[index]
    _, pruned, _ = prune.mask(**options(case))(None, {"weight": weight})
    mask = np.asarray(pruned["weight"].mask)
    assert int(mask.sum()) == int(expected.sum())
    scores = scores_of(case, weight)
    gone, gone_in_torch = (~m if scores.ndim == 2 else ~m.all(axis=1) for m in (mask, expected))
    # Where scores are equal, another of them goes, so that what goes scores the same.
    np.testing.assert_array_equal(np.sort(scores[gone]), np.sort(scores[gone_in_torch]))
    if not case["ties"]:
        np.testing.assert_array_equal(mask, expected)


def test_a_stock_kernel_is_pruned_as_its_transpose():
    weight, case = GOLDEN["weight_11"].astype(np.float32), CASES[11]
    assert not case["ties"]
    _, pruned, _ = prune.mask(**options(case))(None, {"kernel": weight.T})
    np.testing.assert_array_equal(pruned["kernel"].mask, GOLDEN["mask_11"].T)
