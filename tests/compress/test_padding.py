"""Padding of calibration: the same bytes with it on either side as without."""

import jax
import numpy as np
import pytest

from glm_edge import params as boxes
from glm_edge.checkpoint import save
from glm_edge.compress import (
    IntermediateLosses,
    OnPolicy,
    TrainOptions,
    batches,
    chain,
    distill,
    prune,
    quantize,
)
from glm_edge.compress.allocate.plan import plan
from glm_edge.compress.layerwise import stages
from glm_edge.compress.layerwise.stream import compress_checkpoint
from glm_edge.compress.padding import valid_tokens
from glm_edge.errors import DataError
from glm_edge.models.text import TextEncoder
from tests.marks import slow_unless
from tests.tiny_models import init

PAD = 0  # Of the small model.


class Config:
    """What the rule for padding reads of a model's configuration."""

    pad_token_id, eos_token_ids, image_token_id, audio_token_id = PAD, (), None, None

    def __init__(self, **fields):
        vars(self).update(fields)


def rows(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(10, 40, length).astype(np.int32) for length in lengths]


def padded(parts, first, right):
    """Rows as a batch that their longest fills but for `left` and `right` positions of padding."""
    length = first + max(map(len, parts)) + right
    tokens, valid = (
        np.full((len(parts), length), PAD, np.int32),
        np.zeros((len(parts), length), bool),
    )
    for index, part in enumerate(parts):
        start = length - right - len(part) if first else 0
        tokens[index, start : start + len(part)] = part
        valid[index, start : start + len(part)] = True
    return tokens, valid


def layouts():
    """The same rows: one batch of equal lengths and one of different ones, padded in all ways."""
    equal, ragged = rows((10, 10, 10)), rows((10, 7, 9), seed=1)
    results = {}
    for name, first, right in (("none", 0, 0), ("left", 5, 0), ("right", 0, 6), ("both", 3, 2)):
        results[name] = []
        for part in (equal, ragged, equal, ragged):
            tokens, valid = padded(part, first, right)
            results[name].append({"tokens": tokens})
            # By its own mark, and else by the model's pad token.
            if name in ("none", "right"):
                results[name][-1]["valid"] = valid
            if name == "left":
                results[name][-1]["loss_mask"] = valid.astype(np.float32)
    return results


LAYOUTS = layouts()
# Of attention and of the MLP; padding does not tell their other matrices apart.
WHERE = "layers/0/.*(q_proj|down_proj)"
TRANSFORMS = {
    "gptq": lambda: quantize.gptq("int3", where=WHERE),
    "awq": lambda: quantize.awq("int3", where=WHERE, steps=4),
    "smoothquant": lambda: quantize.smoothquant(where=WHERE),
    "activations": lambda: chain(quantize.rtn("int8"), quantize.activations(method="mse")),
    "adaround": lambda: quantize.adaround("int3", where=WHERE, method="descent"),
    "blockwise": lambda: quantize.blockwise(
        "int3", where=f"{WHERE}|head", train=TrainOptions(steps=3)
    ),
    "qat": lambda: quantize.qat("int3", where=WHERE, train=TrainOptions(steps=3, warmup=0.05)),
    "distill_scales": lambda: chain(
        quantize.rtn("int4"), quantize.distill_scales(train=TrainOptions(steps=3))
    ),
    "sparsegpt": lambda: prune.sparsegpt(0.5, where=WHERE),
    "sparsegpt_quantize": lambda: prune.sparsegpt(0.5, format="int4", where=WHERE),
    "wanda": lambda: prune.mask(0.5, score="wanda", where=WHERE),
    "activation": lambda: prune.mask(0.5, score="activation", shape="neuron"),
    "taylor": lambda: prune.mask(0.5, score="taylor2", where=WHERE),
    "measured": lambda: prune.mask(0.5, allocation="measured", where=WHERE, levels=(0.3, 0.7)),
    "structured": lambda: prune.structured(heads=0.25, neurons=0.3),
    "depth": lambda: prune.depth(1, score="influence"),
    "depth_loss": lambda: prune.depth(1, score="loss"),
    "distill": lambda: chain(
        prune.magnitude(0.5),
        distill(
            intermediates=IntermediateLosses(hidden=1.0, attention=1.0),
            alpha=0.5,
            train=TrainOptions(steps=3),
        ),
    ),
    "on_policy": lambda: chain(
        prune.magnitude(0.5), distill(on_policy=OnPolicy(prompt=4), train=TrainOptions(steps=2))
    ),
}


@pytest.fixture(scope="module")
def tiny(make_model):
    return make_model(num_layers=2, num_heads=4, intermediate_size=32)


@pytest.fixture(scope="module")
def alone(make_model):
    """A single layer, for programs of a whole model; its matrices have few shapes."""
    return make_model(num_layers=1, num_heads=4, intermediate_size=32)


def bytes_of(params):
    arrays, _ = boxes.to_flat(params)
    return {path: np.asarray(array).tobytes() for path, array in arrays.items()}


# Others are slow only because each compiles programs of its own; padding has one door.
QUICK = ("wanda", "taylor")


@pytest.mark.parametrize(
    "name",
    slow_unless(QUICK.__contains__, TRANSFORMS),
)
def test_every_transform_gives_the_same_bytes(tiny, alone, name):
    model, params = tiny if "depth" in name else alone
    transform = TRANSFORMS[name]()
    results = {}
    for layout, calibration in LAYOUTS.items():
        call = {"calibration": calibration, "rng": jax.random.key(0)}
        results[layout] = bytes_of(transform(model, params, **call)[1])
    for layout in ("left", "right", "both"):
        assert results[layout] == results["none"], layout


@pytest.mark.slow
def test_pruned_encoders_ignore_padding(make_member, batch_of):
    """Scores of encoders need images, which each row of every layout brings along."""
    model, params = make_member("sandwich")
    drawn = batch_of(model, rows=3, length=24)
    results = {}
    for name, first, right in (("none", 0, 0), ("left", 5, 0), ("right", 0, 6), ("both", 3, 2)):
        wide = ((0, 0), (first, right))
        batch = drawn | {
            "tokens": np.pad(drawn["tokens"], wide),
            "valid": np.pad(np.ones((3, 24), bool), wide),
        }
        transform = prune.encoders(heads=0.5, neurons=0.3, neuron_multiple=1)
        results[name] = bytes_of(transform(model, params, [batch])[1])
    for name in ("left", "right", "both"):
        assert results[name] == results["none"], name


@pytest.mark.slow
def test_plans_are_the_same_with_and_without_padding(tiny):
    model, params = tiny
    size = boxes.stored_bytes(params) // 3
    results = [
        plan(model, params, size, ("int8", "int4"), LAYOUTS[layout], transform="gptq")
        for layout in ("none", "left")
    ]
    assert results[0] == results[1]


@pytest.mark.slow
def test_streams_give_the_same_bytes(tiny, tmp_path):
    save(*tiny, tmp_path / "dense")
    results = []
    for layout in ("none", "left"):
        out = tmp_path / layout
        compress_checkpoint(
            tmp_path / "dense", out, quantize.gptq("int3", where=WHERE), LAYOUTS[layout]
        )
        results.append([path.read_bytes() for path in sorted(out.glob("*.safetensors"))])
    assert results[0] == results[1]


@pytest.mark.slow
def test_padding_that_is_called_valid_changes_the_result(tiny):
    model, params = tiny
    transform = quantize.gptq("int3", where=WHERE)
    tokens, valid = padded(rows((10, 10)), 0, 8)
    results = [
        bytes_of(transform(model, params, [{"tokens": tokens, "valid": marks}])[1])
        for marks in (valid, np.ones_like(valid))
    ]
    assert results[0] != results[1]


@pytest.mark.slow
def test_statistics_of_shorter_rows_are_those_of_rows_alone(tiny):
    """Attention sums over other shapes: float32 rounding of a few sums is the only difference."""
    model, params = tiny
    leaves = dict(boxes.path_items(params))
    parts = rows((10, 7, 9), seed=1)
    tokens, valid = padded(parts, 4, 0)
    asked = [[{"tokens": tokens, "valid": valid}], [{"tokens": part[None]} for part in parts]]
    results = []
    for calibration in asked:
        states, sums = stages.first_states(model, calibration), {}
        for stage in stages.stages(model):
            local = {p: x for p, x in leaves.items() if stage.holds(p) or p in stage.borrows}
            for path, value in stage.collect(local, states, stages.MARKED_ROWS).items():
                retained = np.asarray(value["rows"], np.float64)[np.asarray(value["valid"])]
                sums[path] = retained.T @ retained, len(retained)
            states = stage.run(local, states)
        results.append(sums)
    assert results[0].keys() == results[1].keys()
    for path, (gram, count) in results[0].items():
        alone, number = results[1][path]
        assert count == number == 26
        np.testing.assert_allclose(gram, alone, rtol=1e-5, atol=1e-5 * np.abs(alone).max())


def test_a_batch_loses_its_padding_with_all_that_goes_along(make_member, batch_of):
    model, _ = make_member("sandwich")
    batch = batch_of(model, rows=2, length=12)
    batch["loss_mask"] = np.random.default_rng(0).random((2, 12)).astype(np.float32)
    batch["positions"] = np.random.default_rng(1).integers(0, 9, (3, 2, 12))
    batch["mask"] = np.tril(np.random.default_rng(2).random((2, 1, 12, 12)) < 0.9)
    plain = batches.to_device(model, batch)
    assert "valid" not in plain
    wide = ((0, 1), (5, 0))
    more = {
        "tokens": np.pad(batch["tokens"], wide),
        "loss_mask": np.pad(batch["loss_mask"], wide),
        "positions": np.pad(batch["positions"], ((0, 0), *wide)),
        "mask": np.pad(batch["mask"], ((0, 1), (0, 0), (5, 0), (5, 0))),
        "images": np.pad(batch["images"], ((0, 1), (0, 0), (0, 0), (0, 0))),
        "valid": np.pad(np.ones((2, 12), bool), wide),
    }
    # A row of nothing but padding goes with its image.
    result = batches.to_device(model, more)
    assert result.keys() == plain.keys()
    jax.tree.map(np.testing.assert_array_equal, result, plain)


def test_predictions_of_padding_weigh_nothing(tiny):
    model, params = tiny
    parts = rows((9, 6))
    tokens, valid = padded(parts, 3, 2)
    # Labels that reach into the padding, as those of a mask of tokens do.
    batch = batches.to_device(model, {"tokens": tokens, "valid": valid, "loss_mask": valid * 1.0})
    weights = np.asarray(batches.loss_weights(model, batch))
    np.testing.assert_array_equal(weights.sum(axis=1), [8, 5])
    losses = jax.jit(batches.row_losses, static_argnums=0)(model, params, batch)
    for part, loss in zip(parts, losses, strict=True):
        alone = batches.to_device(model, {"tokens": part[None]})
        local = jax.jit(batches.row_losses, static_argnums=0)(model, params, alone)
        np.testing.assert_allclose(loss, local[0], rtol=1e-5)


@pytest.mark.parametrize(
    ("config", "tokens", "weights", "valid"),
    [
        # The pad token, at both ends and not inside.
        ({}, [0, 0, 7, 0, 8, 0], None, "001110"),
        # No pad token, no weights: everything counts.
        ({"pad_token_id": None}, [0, 0, 7, 8, 0, 0], None, "111111"),
        # A prompt without weights is no padding.
        ({"pad_token_id": None}, [5, 6, 7, 8, 9, 9], [0, 0, 0, 1, 1, 0], "111111"),
        # A repeated token without weights at one end is.
        ({"pad_token_id": None}, [5, 6, 7, 8, 9, 9], [0, 0, 1, 1, 0, 0], "111100"),
        # Two such tokens contradict each other.
        ({"pad_token_id": None}, [5, 5, 7, 8, 9, 9], [0, 0, 1, 1, 0, 0], "111111"),
        # Placeholders of images at the beginning of a prompt are no padding.
        (
            {"pad_token_id": None, "image_token_id": 5},
            [5, 5, 7, 8, 9, 4],
            [0, 0, 1, 1, 0, 0],
            "111111",
        ),
        # What is weighed is no padding.
        ({}, [7, 8, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0], "111000"),
        # A mask of the real tokens is one position late, which is no sign.
        ({}, [7, 8, 9, 0, 0, 0], [1, 1, 1, 0, 0, 0], "111000"),
        # A stop token that is taught belongs to the answer, those behind it fill the row.
        ({"eos_token_ids": (0,)}, [7, 8, 9, 0, 0, 0], [0, 1, 1, 0, 0, 0], "111100"),
        # Padding that is also a placeholder says nothing.
        ({"audio_token_id": 0}, [0, 0, 7, 8, 9, 4], None, "111111"),
    ],
)
def test_valid_tokens_by_the_only_sign(config, tokens, weights, valid):
    batch = {} if weights is None else {"loss_mask": np.asarray([weights])}
    result = valid_tokens(Config(**config), batch, np.asarray([tokens]), "test")
    assert "".join(map(str, result[0].astype(int))) == valid


def test_an_encoder_is_told_what_is_padding():
    from glm_edge.configs import TextConfig

    model = TextEncoder(TextConfig(40, 16, 1, 2, 24, 16, num_labels=3, pooler="tanh"))
    parts = rows((8, 5))
    tokens, valid = padded(parts, 0, 3)
    params = init(model, tokens)["params"]
    run = jax.jit(batches.apply_batch, static_argnums=0)
    result = run(model, params, batches.to_device(model, {"tokens": tokens, "valid": valid}))
    for part, logits in zip(parts, result, strict=True):
        np.testing.assert_allclose(run(model, params, {"tokens": part[None]})[0], logits, rtol=1e-4)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"valid": np.ones((2, 5), bool)}, "valid must be booleans"),
        ({"valid": np.full((2, 6), 7)}, "valid must be booleans"),
        ({"valid": np.zeros((2, 6), bool)}, "contains only padding"),
        ({"tokens": np.full((2, 6), 99)}, "token 99 is not in the model's vocabulary of 40"),
        ({"mask": np.zeros((2, 1, 6, 6), np.float32)}, "mask must be booleans"),
        ({"tokens": [[1, 2], [1, 2, 3]]}, "tokens is not one array"),
        ({"tokens": "text"}, "tokens must be numbers"),
        ({"labels": np.zeros(2)}, "unknown key 'labels'.*Calibration"),
    ],
)
def test_batches_that_do_not_fit_are_refused(tiny, batch, message):
    complete = {"tokens": np.full((2, 6), 11), **batch}
    with pytest.raises(DataError, match=message):
        batches.to_device(tiny[0], complete)


def test_token_ids_beyond_the_vocabulary_may_fill_rows(tiny):
    tokens, valid = padded(rows((6, 4)), 0, 0)
    result = batches.to_device(tiny[0], {"tokens": np.where(valid, tokens, -100), "valid": valid})
    assert int(result["tokens"].min()) == PAD
