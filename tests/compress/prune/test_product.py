"""Every score with every shape and allocation: what goes is whole units, and as many as asked."""

import itertools

import jax
import numpy as np
import pytest

from glm_edge import params as boxes
from glm_edge.compress import batches, prune
from glm_edge.compress.prune.scores import from_inputs
from glm_edge.errors import RecipeError

SCORES = (
    "magnitude",
    "l1",
    "sensitivity",
    "taylor",
    "taylor2",
    "wanda",
    "activation",
    "random",
)
SHAPES = ("unstructured", "2:4", "block:4x4", "channel", "head", "neuron", "layer", "vocab")
ALLOCATIONS = ("uniform", "global", "measured")
HEADS, NEURONS, LAYERS = 8, 128, 2
STORED = {"vocab": "embed", "layer": "layers"}
NEEDED = [0, 5]


def refusal(score, shape, allocation):
    """What the documented error says of a combination that means nothing, else None."""
    if shape == "vocab" and score in ("wanda", "activation"):
        return "is not for shape='vocab'"
    if (score, shape) == ("activation", "layer"):
        return "is not for shape='layer'"
    if shape == "2:4" and allocation != "uniform":
        return "shape='2:4' is uniform"
    return None


def units_of(shape, path, mask):
    """A mask as its units, [units, weights of each]."""
    rows, columns = mask.shape
    if shape == "block:4x4":
        return mask.reshape(rows // 4, 4, columns // 4, 4).swapaxes(1, 2).reshape(-1, 16)
    if shape == "head":
        return (mask.T if "o_proj" in path else mask).reshape(HEADS, -1)
    if shape == "neuron":
        if "down_proj" in path:
            return mask.T
        return mask.reshape(2, NEURONS, columns).swapaxes(0, 1).reshape(NEURONS, -1)
    if shape == "layer":
        return mask.reshape(1, -1)
    return mask.reshape(-1, 1) if shape in ("unstructured", "2:4") else mask


@pytest.fixture(scope="module")
def cached():
    """Sums over the inputs of calibration, computed once for each set of weights."""
    result, patch = {}, pytest.MonkeyPatch()
    compute = from_inputs.statistics

    def statistics(model, params, calibration, statistic, paths):
        key = (statistic, len(calibration), *sorted(paths))
        if key not in result:
            result[key] = compute(model, params, calibration, statistic, paths)
        return result[key]

    patch.setattr(from_inputs, "statistics", statistics)
    yield
    patch.undo()


logits = jax.jit(batches.apply_batch, static_argnums=0)


def products():
    """All combinations; each gradient of a score and a shape compiles the model anew.

    Weights, gates and layers are branches, which a shape of some score shows by default.
    """
    shown = {
        "taylor": ("unstructured", "head", "layer"),
        "sensitivity": ("unstructured",),
        "taylor2": ("head",),
    }
    for shape, score, allocation in itertools.product(SHAPES, SCORES, ALLOCATIONS):
        another = shape not in shown.get(score, SHAPES)
        yield pytest.param(
            shape,
            score,
            allocation,
            marks=pytest.mark.slow if another else (),
        )


@pytest.mark.usefixtures("cached")
@pytest.mark.parametrize(("shape", "score", "allocation"), products())
def test_any_score_masks_any_shape_under_any_allocation(
    small, calibration, shape, score, allocation
):
    model, params = small
    options = {"score": score, "shape": shape, "allocation": allocation, "where": STORED.get(shape)}
    if shape not in ("head", "neuron", *STORED):
        options["where"] = r"layers/1/.*(q_proj|down_proj)"
    if shape != "2:4":
        options["sparsity"] = 0.5
    if allocation == "measured":
        options["levels"] = (0.0, 0.25, 0.5, 0.75)
    refused = refusal(score, shape, allocation)
    if refused is not None:
        with pytest.raises(RecipeError, match=refused):
            prune.mask(**options)
        return
    transform = prune.mask(**options)
    _, pruned, report = transform(model, params, calibration, rng=jax.random.key(0))
    masks = {
        path: np.asarray(leaf.mask)
        for path, leaf in boxes.path_items(pruned)
        if isinstance(leaf, boxes.Masked)
    }
    assert {row.path for row in report.rows} == set(masks)
    total = sum(mask.size for mask in masks.values())
    zeros = sum(int((~mask).sum()) for mask in masks.values())
    owners, largest = {}, 1
    for path, mask in masks.items():
        units = units_of(shape, path, mask)
        assert bool((units.all(1) | ~units.any(1)).all())
        owner = "/".join(path.split("/")[:3]) if shape in ("head", "neuron", "layer") else path
        retained = owners.setdefault(owner, units[:, 0])
        np.testing.assert_array_equal(units[:, 0], retained)
        largest = max(largest, units.shape[1])
    for retained in owners.values():
        if shape == "2:4":
            assert set(retained.reshape(-1, 4).sum(1).tolist()) == {2}
        elif shape == "head":
            # Query heads 0 to 3 share one key/value head and 4 to 7 the other.
            counts = retained.reshape(2, 4).sum(1)
            assert counts[0] == counts[1] > 0
        elif shape == "vocab":
            assert retained[NEEDED].all()
        if allocation == "uniform" and shape != "layer":
            assert (~retained).sum() == retained.size / 2
    if shape == "layer":
        assert len(owners) == LAYERS
        assert sum(int(retained[0]) for retained in owners.values()) == 1
    # Heads go from both groups at once, and a unit may be of several matrices.
    step = largest * 2 * LAYERS * 3
    if allocation == "global":
        assert total / 2 - step < zeros <= total / 2
    elif allocation == "measured":
        assert zeros >= total / 2
        assert sum("measured on held-out batches" in note for note in report.notes) == 1
    else:
        assert zeros == total / 2
    dense = jax.tree.map(boxes.dense, pruned, is_leaf=boxes.is_box)
    result = np.asarray(logits(model, dense, calibration[0]))
    assert np.isfinite(result).all()
    assert np.abs(result - np.asarray(logits(model, params, calibration[0]))).max() > 1e-3
