"""Quantization-aware training: gradients, what trains, and what is stored at the end."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_edge import params as boxes
from glm_edge.compress import Trainable, TrainOptions, chain, prune
from glm_edge.compress.quantize import rtn
from glm_edge.compress.quantize.options import QuantizeConfig
from glm_edge.compress.quantize.qat import fake, finalize, lr_scale_of, qat
from glm_edge.errors import DataError, RecipeError
from glm_edge.params import Format, Masked, Quantized
from tests.marks import slow_unless

DECODER = r"^decoder/"
FORMATS = (
    "int8-channel",
    "int4-g16",
    "int4-g16-affine",
    "int3-channel",
    "int2-g16",
    "int2-tensor",
    "ternary-channel",
    "ternary34-g16",
    "nf4-g16",
)
PATH = "decoder/layers/0/mlp/down_proj/weight"


@pytest.fixture
def small(make_model):
    return make_model(num_layers=1, num_heads=4, num_kv_heads=4, intermediate_size=32)


def arrays_of(params):
    return {name: np.asarray(array) for name, array in boxes.to_flat(params)[0].items()}


def weight_of(rows=6, columns=32, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)


def lsq(weight, scale, upstream, low, high):
    """Gradients of learned step size quantization, element by element in float64."""
    columns = weight.shape[1]
    size = columns // scale.shape[1]
    by_weight, by_scale = np.zeros(weight.shape), np.zeros(scale.shape)
    for row, column in np.ndindex(weight.shape):
        step = float(scale[row, column // size])
        v = float(weight[row, column]) / step
        inside = low <= v <= high
        by_weight[row, column] = upstream[row, column] * inside
        local = low if v < low else high if v > high else np.round(v) - v
        by_scale[row, column // size] += upstream[row, column] * local
    return by_weight, by_scale / np.sqrt(size * max(abs(low), high))


@pytest.mark.parametrize(
    ("text", "low", "high"),
    [("int4-g16", -8, 7), ("int2-channel", -2, 1), ("ternary-channel", -1, 1)],
)
def test_gradients_match_learned_step_size_quantization(text, low, high):
    format = Format(*text.split("-")[:1], *([16] if "g16" in text else []))
    weight, upstream = weight_of(), weight_of(seed=1)
    box = fake(PATH, jnp.asarray(weight), QuantizeConfig(format, "mse"))
    box = box.replace(scale=np.asarray(box.scale) * np.float32(0.7))

    def product(value, scale):
        return jnp.sum(box.replace(value=value, scale=scale).unbox() * upstream)

    actual = jax.jit(jax.grad(product, (0, 1)))(box.value, box.scale)
    expected = lsq(weight, np.asarray(box.scale), upstream.astype(np.float64), low, high)
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "text",
    slow_unless(
        lambda text: text not in ("int8-channel", "int3-channel", "int2-g16", "ternary-channel"),
        FORMATS,
    ),
)
def test_what_is_stored_is_the_last_forward_pass_bit_for_bit(text):
    format = Format.parse(text)
    leaf = jnp.asarray(weight_of())
    box = fake(PATH, leaf, QuantizeConfig(format, "mse"))
    rng = np.random.default_rng(2)
    moved = np.float32(np.asarray(box.value) + 0.3 * rng.normal(size=box.value.shape))
    scale = np.asarray(box.scale) * np.float32(rng.uniform(0.8, 1.2))
    box = box.replace(value=jnp.asarray(moved), scale=jnp.asarray(scale))
    stored = finalize(PATH, box, leaf)
    assert isinstance(stored, Quantized)
    assert stored.format == format
    np.testing.assert_array_equal(np.asarray(jax.jit(box.unbox)()), np.asarray(stored.unbox()))


@pytest.mark.parametrize("text", ["int4-g16", "int2-channel", "ternary-channel", "nf4-g16"])
def test_masks_keep_their_zeros(text):
    keep = np.random.default_rng(3).random((6, 32)) < 0.5
    leaf = boxes.mask(jnp.asarray(weight_of()), jnp.asarray(keep))
    box = fake(PATH, leaf, QuantizeConfig(Format.parse(text), "mse"))
    assert isinstance(box, Masked)
    box = box.replace(value=box.value.replace(value=box.value.value + 0.7))
    stored = finalize(PATH, box, leaf)
    assert np.all(np.asarray(stored.unbox())[~keep] == 0.0)
    np.testing.assert_array_equal(np.asarray(box.unbox()), np.asarray(stored.unbox()))


def test_a_weight_that_is_quantized_starts_on_its_own_grid():
    format = Format.parse("int4-g16")
    leaf = boxes.fake_quantized(
        jnp.asarray(weight_of()), jnp.full((6, 2), 0.37), None, format
    ).finalize()
    same = fake(PATH, leaf, QuantizeConfig(format, "max"))
    np.testing.assert_array_equal(np.asarray(same.unbox()), np.asarray(leaf.unbox()))
    other = fake(PATH, leaf, QuantizeConfig(Format.parse("int3-g16"), "max"))
    assert not np.array_equal(other.scale, same.scale)
    np.testing.assert_array_equal(np.asarray(other.value), np.asarray(leaf.unbox()))


@pytest.mark.parametrize(
    "format",
    ["int2-g16", *(pytest.param(x, marks=pytest.mark.slow) for x in ("int2-affine", "ternary34"))],
)
def test_training_brings_the_student_to_its_teacher(small, calibration, format):
    model, params = small
    transform = qat(
        format, where=DECODER, train=TrainOptions(steps=40, learning_rate=0.003, warmup=0.05)
    )
    same, trained, report = transform(model, params, calibration=calibration)
    assert same is model
    last = np.mean([point.soft for point in report.curve[-4:]])
    assert last < 0.7 * report.curve[0].soft
    for path, leaf in boxes.path_items(trained):
        assert isinstance(leaf, Quantized) == ("proj/weight" in path), path
    assert [row.path for row in report.rows] == [
        p for p in dict(boxes.path_items(params)) if "proj" in p
    ]
    assert trained["embed"]["weight"] is params["embed"]["weight"]


def moved_by(model, params, calibration, where, path, learning_rate=1e-3, **options):
    transform = qat(
        "int2-g16",
        where=where,
        scale="max",
        train=TrainOptions(steps=2, warmup=0.05, learning_rate=learning_rate),
        **options,
    )
    _, trained, _ = transform(model, params, calibration=calibration)
    old, new = arrays_of(params), arrays_of(trained)
    moved = {n for n in old if n in new and not np.array_equal(old[n], new[n])}
    first = rtn("int2-g16", where=where)(model, params)[1]
    after, before = (dict(boxes.path_items(tree))[path].scale for tree in (trained, first))
    return moved, not np.array_equal(after, before)


def test_what_trains_is_what_is_rounded_and_the_norms_beside_it(small, stock, calibration):
    model, params = small
    moved, scales = moved_by(model, params, calibration, "layers/0/mlp", PATH, learning_rate=0.02)
    assert scales
    assert moved == {n for n in arrays_of(params) if n.startswith("decoder/") and "norm" in n}
    moved, scales = moved_by(
        *stock,
        calibration,
        "hidden",
        "hidden/kernel",
        learning_rate=0.02,
        trainable=Trainable(learned_scale=False, where="^embed|hidden/kernel"),
    )
    assert not scales
    assert moved == {"embed/embedding"}
    with pytest.raises(RecipeError, match="where= of trainable= matches no trainable parameter"):
        moved_by(
            *stock, calibration, "hidden", "hidden/kernel", trainable=Trainable(where="vision")
        )


def test_scales_move_by_a_share_of_themselves():
    box = fake(PATH, jnp.asarray(weight_of()), QuantizeConfig(Format.parse("int4-g16"), "max"))
    trainable = boxes.partition({"weight": box, "bias": jnp.ones(3)})[0]
    lr_scale = lr_scale_of(trainable, 0.5)
    np.testing.assert_allclose(lr_scale["weight"].scale, 0.5 * box.scale)
    assert float(lr_scale["weight"].value) == float(lr_scale["bias"]) == 1.0


def test_pruned_weights_stay_pruned_through_training(stock, calibration):
    model, params = stock
    recipe = chain(
        prune.magnitude(0.5, where="kernel"),
        qat("int4-g16", where="kernel", train=TrainOptions(steps=3, warmup=0.05)),
    )
    _, trained, _ = recipe(model, params, calibration=calibration)
    masked = prune.magnitude(0.5, where="kernel")(model, params)[1]
    assert {p for p, leaf in boxes.path_items(masked) if isinstance(leaf, Masked)} == {
        "hidden/kernel",
        "out/kernel",
    }
    for path, leaf in boxes.path_items(masked):
        if isinstance(leaf, Masked):
            stored = dict(boxes.path_items(trained))[path]
            assert np.all(np.asarray(stored.unbox())[~np.asarray(leaf.mask)] == 0.0)


def test_a_quantized_model_trains_on(small, calibration):
    model, params = small
    recipe = chain(
        rtn("int2-g16", where=DECODER, scale="mse"),
        qat(
            "int2-g16",
            where=DECODER,
            train=TrainOptions(steps=30, learning_rate=0.003, warmup=0.05),
        ),
    )
    _, _, report = recipe(model, params, calibration=calibration)
    assert np.mean([p.soft for p in report.curve[-4:]]) < 0.8 * report.curve[0].soft


def test_the_same_seed_gives_the_same_bytes(small, calibration):
    model, params = small

    def train(seed):
        rng = jax.random.key(seed)
        return arrays_of(
            qat("int2-g16", where=DECODER, train=TrainOptions(steps=3, warmup=0.05))(
                model, params, calibration=calibration, rng=rng
            )[1]
        )

    one, again, other = train(0), train(0), train(3)
    assert all(one[name].tobytes() == again[name].tobytes() for name in one)
    assert any(one[name].tobytes() != other[name].tobytes() for name in one)


def test_types_of_parameters_stay(stock, calibration):
    model, params = stock
    narrow = boxes.cast(params, jnp.bfloat16)
    _, trained, _ = qat("int4-g16", where="kernel", train=TrainOptions(steps=2, warmup=0.05))(
        model, narrow, calibration=calibration
    )
    bias = trained["hidden"]["bias"]
    assert bias.dtype == jnp.bfloat16
    assert np.any(np.float32(bias) != np.float32(narrow["hidden"]["bias"]))
    leaf = trained["hidden"]["kernel"]
    assert (leaf.dtype, leaf.scale.dtype) == ("bfloat16", jnp.bfloat16)


def test_what_cannot_be_trained_is_refused(small, calibration):
    model, params = small
    with pytest.raises(DataError, match="needs calibration="):
        qat("int4")(model, params)
    with pytest.raises(RecipeError, match="choose a divisor"):
        qat("int4-g48")(model, params, calibration=calibration)
    broken = jax.tree.map(lambda leaf: np.asarray(leaf) * np.float32(np.nan), params)
    with pytest.raises(RecipeError, match="NaN or infinity"):
        qat("int4")(model, broken, calibration=calibration)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": {"steps": 0}}, "steps must be a whole number"),
        ({"trainable": {"scale_rate": 0.0}}, "scale_rate must be positive"),
        ({"alpha": 1.5}, "alpha must be in 0..1"),
        ({"train": {"compute": "int8"}}, "compute must be one of"),
        ({"teacher": 3}, "teacher must be"),
        ({"trainable": {"where": "("}}, "not a regular expression"),
        ({"format": "float16"}, "cannot round to"),
    ],
)
def test_options_without_a_meaning_are_refused(options, message):
    with pytest.raises(RecipeError, match=message):
        qat(**options)
