"""Functions of any module become files that hold the integers of its parameters."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_edge import export
from glm_edge import params as boxes
from glm_edge.errors import DataError, ExportError
from glm_edge.export.common.signatures import check_model
from glm_edge.export.common.weights import to_array
from glm_edge.kernels import quantization
from glm_edge.params import Format
from tests.tiny_models import init

IMAGE = {"images": jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)}
TOKENS = {"tokens": jax.ShapeDtypeStruct((1, 6), jnp.int32)}


rounded_to_codes = jax.jit(quantization.quantize, static_argnums=3)


class Seer(nn.Module):
    """A convolution, a batch norm, stock attention, and products."""

    @nn.compact
    def __call__(self, images):
        x = nn.Conv(16, (4, 4), strides=(4, 4), name="patches")(images)
        x = nn.BatchNorm(use_running_average=True, name="norm")(x).reshape(1, 4, 16)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(x, x)
        x = nn.gelu(nn.Dense(32, name="wide")(x))
        return nn.Dense(5, name="head")(nn.Dense(16, name="narrow")(x).mean(1))


class Reader(nn.Module):
    """A tied embedding, and layers stacked for a scan."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(24, 16, name="embed")
        layers = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        x, _ = layers(name="layers")(embed(tokens), None)
        return embed.attend(x)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.tanh(nn.Dense(16, name="dense")(x)), None


def boxed(kernel, form, stack=0):
    """A stock kernel in rows of outputs, rounded to nearest."""
    shape = kernel.shape[stack:]
    matrix = np.asarray(kernel).reshape(*kernel.shape[:stack], -1, shape[-1])
    rows = np.swapaxes(matrix, -1, -2)
    size = form.group_size or rows.shape[-1]
    groups = rows.reshape(*rows.shape[:-1], -1, size)
    scale = np.abs(groups).max(-1) / np.float32(quantization.code_range(form.qtype)[1])
    zero = None if form.symmetric else np.full(scale.shape, 2, np.int8)
    scale, zero = jax.device_put((scale, zero))
    codes = rounded_to_codes(rows, scale, zero, form.qtype)
    return boxes.quantized(codes, scale, zero, form, shape)


def table(array, form):
    highest = np.float32(quantization.code_range(form.qtype)[1])
    scale = jax.device_put(np.abs(np.asarray(array)).max(-1, keepdims=True) / highest)
    return boxes.quantized(rounded_to_codes(array, scale, None, form.qtype), scale, None, form)


def see(variables, inputs):
    return {"logits": Seer().apply(variables, inputs["images"])}


def read(params, inputs):
    return {"logits": Reader().apply({"params": params}, inputs["tokens"])}


@pytest.fixture(scope="module")
def variables():
    """Of `Seer`, in every form that a file can hold."""
    result = init(Seer(), jnp.zeros((1, 8, 8, 3)))
    norm = result["batch_stats"]["norm"]
    norm["mean"], norm["var"] = norm["mean"] + 0.1, norm["var"] * 2.0
    params = result["params"]
    params["patches"]["kernel"] = boxed(params["patches"]["kernel"], Format("int8"))
    for name, form in {
        "query": Format("int8"),
        "key": Format("int3"),
        "value": Format("int4", symmetric=False),
    }.items():
        side = params["attention"][name]
        side["kernel"] = boxed(side["kernel"], form)
    params["wide"]["kernel"] = boxed(params["wide"]["kernel"], Format("int4", 8))
    kernel = params["narrow"]["kernel"]
    mask = jax.device_put(np.abs(np.asarray(kernel)) > 0.1)
    params["narrow"]["kernel"] = boxes.mask(kernel, mask)
    params["head"]["kernel"] = params["head"]["kernel"].astype(jnp.bfloat16)
    return result


@pytest.fixture(scope="module")
def seer(variables, tmp_path_factory):
    pytest.importorskip("tensorflow")
    path = tmp_path_factory.mktemp("function") / "seer.tflite"
    return export.function(see, variables, IMAGE, path)


def test_function_gives_what_jax_gives(seer):
    result = seer.verify()
    assert result.passed
    assert max(result.distances.values()) < 1e-5
    assert export.read_metadata(seer.path)["verified"] is True
    image = np.random.default_rng(1).random((1, 8, 8, 3), np.float32)
    actual = seer.run(images=image)["logits"]
    expected = jax.jit(see)(seer.params, {"images": image})["logits"]
    np.testing.assert_allclose(actual, expected, atol=1e-5)
    with pytest.raises(DataError, match=r"inputs: \['image'\], expected the file's \['images'\]"):
        seer.run(image=image)
    with pytest.raises(DataError, match="expected the file's"):
        seer.verify([{"images": image[0]}])


def test_function_keeps_integers(seer, variables):
    stored = export.read_constants(seer.path)
    params = variables["params"]
    types = {path.removeprefix("params/"): constant.type for path, constant in stored.items()}
    assert types == {
        "patches/kernel": "int8",
        "attention/query/kernel": "int8",
        "attention/key/kernel": "int4",
        "attention/value/kernel": "int4",
        "wide/kernel": "int4",
    }
    box = params["patches"]["kernel"]
    constant = stored["params/patches/kernel"]
    np.testing.assert_array_equal(constant.data.view(np.int8), np.asarray(box.codes()).reshape(-1))
    np.testing.assert_array_equal(constant.scale, np.asarray(box.scale).reshape(-1))
    grouped, wide = stored["params/wide/kernel"], params["wide"]["kernel"]
    np.testing.assert_array_equal(grouped.data, np.asarray(wide.data).reshape(-1))
    np.testing.assert_array_equal(grouped.scale, np.asarray(wide.scale).reshape(-1))
    assert (stored["params/attention/value/kernel"].zero == 2).all()
    assert seer.stored_bytes == sum(c.data.nbytes + c.scale.nbytes for c in stored.values())


def test_function_lists_what_it_converts(seer):
    rules = {c.path.removeprefix("params/"): c.rule for c in seer.conversions}
    assert rules == {
        "attention/key/kernel": "int3 written as int4: the same integers and scales",
        "narrow/kernel": "mask written as zeros in a dense weight",
        "head/kernel": "bfloat16 written as float32",
    }


def test_function_of_tied_and_stacked_parameters(tmp_path):
    pytest.importorskip("tensorflow")
    params = init(Reader(), jnp.zeros((1, 6), jnp.int32))["params"]
    params["embed"]["embedding"] = table(params["embed"]["embedding"], Format("int8"))
    dense = params["layers"]["dense"]
    dense["kernel"] = boxed(dense["kernel"], Format("int4"), stack=1)
    exported = export.function(read, params, TOKENS, tmp_path / "reader.tflite")
    tokens = np.array([[3, 1, 23, 0, 7, 7]], np.int32)
    assert max(exported.verify([{"tokens": tokens}]).distances.values()) < 1e-5
    types = {path: c.type for path, c in export.read_constants(exported.path).items()}
    assert types == {"embed/embedding": "int8", "layers/dense/kernel": "int4"}


def test_function_that_closes_over_integers_is_refused(tmp_path):
    box = table(jnp.eye(4), Format("int8"))
    inputs = {"x": jax.ShapeDtypeStruct((1, 4), jnp.float32)}
    for run in (lambda x: x @ boxes.dense(box), jax.jit(lambda x: x @ boxes.dense(box))):
        with pytest.raises(ExportError, match=r"closes over .*int8 \[4, 4\].* pass it in params"):
            export.function(
                lambda _, original, run=run: {"y": run(original["x"])},
                {},
                inputs,
                tmp_path / "a.tflite",
            )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (
            Format("nf4"),
            "w: nf4-channel cannot be written as TFLite: its levels are not integer multiples",
        ),
        (Format("int8"), "w: is already quantized, which excludes examples="),
    ],
)
def test_function_refuses_by_name(form, message, tmp_path):
    scale = jnp.ones((4, 1))
    codes = quantization.quantize(jnp.eye(4), scale, None, form.qtype)
    params = {"w": boxes.quantized(codes, scale, None, form)}
    inputs = {"x": jax.ShapeDtypeStruct((1, 4), jnp.float32)}
    examples = [{"x": np.zeros((1, 4))}] if form.qtype == "int8" else None
    with pytest.raises(ExportError, match=message):
        export.function(
            lambda p, original: {"y": original["x"] @ p["w"]},
            params,
            inputs,
            tmp_path / "a.tflite",
            examples,
        )


def identity(params, inputs):
    return {"x": inputs["x"]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((identity, {}, {"x": (8, 16, 16, 3)}, "a"), r"inputs\['x'\] is \(8, 16, 16, 3\); use"),
        ((identity, {}, np.ones((1, 4)), "a"), "inputs is a ndarray; use {"),
        ((identity, {}, {}, "a"), "inputs is empty; use {"),
        (({}, identity, {"x": np.ones(4)}, "a"), "function is a dict; use lambda"),
        ((Reader(), {}, {"x": np.ones(4)}, "a"), "function is a Reader; use lambda"),
        ((identity, Reader(), {"x": np.ones(4)}, "a"), "params is a Reader; use"),
        ((identity, {}, "a", {"x": np.ones(4)}), "inputs is a str; use {"),
        ((identity, {}, {"x": np.ones(4)}, None), "path is a NoneType; use"),
    ],
)
def test_function_names_the_form_of_its_arguments(arguments, message):
    with pytest.raises(ExportError, match=message):
        export.function(*arguments)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_narrow_weight_is_told_by_its_types(dtype):
    box = boxes.narrow(jnp.ones((3, 2), dtype), "float32")
    array, conversions = to_array("w", box)
    assert array.dtype == jnp.float32
    assert [c.rule for c in conversions] == [f"{dtype} written as float32"]


def test_other_formats_of_a_stock_module_name_function(tmp_path):
    message = r"Reader: only a MultimodalGLM .* use ge\.export\.function"
    with pytest.raises(ExportError, match=message):
        export.tflite(Reader(), {}, tmp_path / "a.tflite")
    # All formats ask here.
    with pytest.raises(ExportError, match=message):
        check_model(Reader(), {})


def test_export_completes_its_public_names_only():
    assert dir(export) == sorted(export.__all__)
    assert "function" in export.__all__
