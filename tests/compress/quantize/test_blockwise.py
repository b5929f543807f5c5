"""Block by block: each block comes closer to the original's, chained and deterministic."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_edge import params as boxes
from glm_edge.compress import TrainOptions, batches, chain
from glm_edge.compress.layerwise.stages import first_states, stages
from glm_edge.compress.quantize import rtn
from glm_edge.compress.quantize.blockwise import block_error, blockwise
from glm_edge.compress.quantize.qat import qat
from glm_edge.errors import DataError, RecipeError
from glm_edge.params import Quantized

DECODER = r"^decoder/"


def arrays_of(params):
    return {name: np.asarray(array) for name, array in boxes.to_flat(params)[0].items()}


def outputs(model, params, calibration, name):
    states = first_states(model, calibration)
    # Dense weights, so that all formats run the same programs.
    leaves = {path: boxes.dense(leaf) for path, leaf in boxes.path_items(params)}
    for stage in stages(model):
        states = stage.run(leaves, states)
        if stage.name == name:
            return np.concatenate([np.asarray(state["x"]) for state in states])


@pytest.mark.parametrize("format", ["int2-g16", pytest.param("ternary", marks=pytest.mark.slow)])
def test_blockwise_beats_nearest_rounding(square, calibration, format):
    """A trained block is closer to the originals than nearest rounding."""
    model, params = square
    nearest = rtn(format, where=DECODER, scale="mse")(model, params)[1]
    transform = blockwise(format, where=DECODER, train=TrainOptions(steps=60, learning_rate=0.003))
    _, trained, report = transform(model, params, calibration=calibration)
    name = "decoder/layers/1"
    wanted, rounded, actual = (
        outputs(model, p, calibration, name) for p in (params, nearest, trained)
    )
    assert np.linalg.norm(actual - wanted) < 0.8 * np.linalg.norm(rounded - wanted)
    selected = [leaf for path, leaf in boxes.path_items(trained) if "proj/weight" in path]
    assert all(isinstance(leaf, Quantized) for leaf in selected)
    assert len(report.rows) == len(selected) == 12
    assert "block error" in report.rows[0].action
    assert trained["embed"]["weight"] is params["embed"]["weight"]


def test_norms_train_only_when_asked(square, calibration):
    model, params = square

    def moved(**options):
        transform = blockwise("int2-g16", where=DECODER, train=TrainOptions(steps=3), **options)
        trained = arrays_of(transform(model, params, calibration=calibration)[1])
        return {
            name
            for name, old in arrays_of(params).items()
            if name in trained and "norm" in name and not np.array_equal(old, trained[name])
        }

    assert moved(norms=False) == set()
    assert len(moved()) == 4


def test_the_same_seed_gives_the_same_bytes(square, calibration):
    model, params = square

    def train(seed, mix=0.5):
        transform = blockwise("int2-g16", where=DECODER, mix=mix, train=TrainOptions(steps=4))
        rng = jax.random.key(seed)
        return arrays_of(transform(model, params, calibration=calibration, rng=rng)[1])

    one, again, other = train(0), train(0), train(1)
    assert all(one[name].tobytes() == again[name].tobytes() for name in one)
    assert any(one[name].tobytes() != other[name].tobytes() for name in one)


@pytest.mark.slow
def test_every_stage_of_every_member_trains(member, make_member, batch_of):
    model, params = make_member(member)
    data = [batch_of(model, seed=seed) for seed in range(2)]
    transform = blockwise("int8", fallback_bits=8, train=TrainOptions(steps=1, compute="bfloat16"))
    _, trained, _ = transform(model, params, calibration=data)
    for path, leaf in boxes.path_items(trained):
        assert isinstance(leaf, Quantized) == boxes.is_matrix(path, leaf), path
    assert bool(jnp.isfinite(batches.mean_loss(model, trained, batches.to_device(model, data[0]))))


@pytest.mark.slow
def test_training_end_to_end_follows_the_blocks(square, calibration):
    model, params = square
    recipe = chain(
        blockwise("int2-g16", where=DECODER, train=TrainOptions(steps=20)),
        qat(
            "int2-g16",
            where=DECODER,
            train=TrainOptions(steps=40, learning_rate=0.002, warmup=0.05),
        ),
    )
    _, trained, report = recipe(model, params, calibration=calibration)
    first, last = (
        np.mean([p.soft for p in part]) for part in (report.curve[:4], report.curve[-4:])
    )
    assert last < 0.9 * first
    leaf = trained["decoder"]["layers"]["0"]["mlp"]["down_proj"]["weight"]
    assert isinstance(leaf, Quantized)
    assert str(leaf.format) == "int2-g16"


def test_the_error_matches_numpy():
    rng = np.random.default_rng(0)
    original, target = rng.normal(size=(2, 3, 5, 7))
    squared = np.mean((original - target) ** 2) / np.mean(target**2)
    assert float(block_error(original, target, False)) == pytest.approx(squared, rel=1e-5)
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (target, original))
    divergence = np.mean(np.sum(p * np.log(p / q), axis=-1))
    assert float(block_error(original, target, True)) == pytest.approx(divergence, rel=1e-4)


def test_what_cannot_be_trained_is_refused(square, calibration, make_member, batch_of):
    model, params = square
    with pytest.raises(DataError, match="needs calibration="):
        blockwise()(model, params)
    broken = jax.tree.map(lambda leaf: np.asarray(leaf) * np.float32(np.nan), params)
    with pytest.raises(RecipeError, match="NaN or infinity"):
        blockwise(where=DECODER, train=TrainOptions(steps=2))(
            model, broken, calibration=calibration
        )
    model, params = make_member("edge_v")
    text = [{"tokens": batch_of(model)["tokens"] % 4 + 20}]
    with pytest.raises(RecipeError, match="no calibration batch reaches vision/front"):
        blockwise(train=TrainOptions(steps=1))(model, params, calibration=text, without=("images",))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": {"steps": 0}}, "steps must be a whole number"),
        ({"train": {"learning_rate": 0.0}}, "must be positive"),
        ({"train": {"weight_decay": 0.1}}, "train= takes steps, .*, not weight_decay"),
        ({"mix": 2.0}, "must be in 0..1"),
        ({"train": {"compute": "int8"}}, "compute must be one of"),
        ({"format": "bfloat16"}, "cannot round to"),
        ({"format": "int7"}, "'int7' is not a type; types: int8"),
    ],
)
def test_options_without_a_meaning_are_refused(options, message):
    with pytest.raises(RecipeError, match=message):
        blockwise(**options)
