"""A small multimodal GLM with random weights, boxed in every way that a file can hold."""

import dataclasses
import functools
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_edge import configs
from glm_edge import params as boxes
from glm_edge.kernels import matmul, quantization
from glm_edge.models.multimodal import MultimodalGLM
from glm_edge.params import Format
from tests.tiny_models import init

if not (find_spec("tensorflow") and find_spec("ai_edge_litert")):
    collect_ignore_glob = ["test_*.py", "*/test_*.py"]

INT8 = Format("int8")
INT4 = Format("int4")
BLOCKS = Format("int4", 32, scale_dtype="bfloat16")


def small_config(**decoder) -> configs.GLMConfig:
    """Nano with fewer layers, one of the decoder."""
    nano = configs.preset("nano")
    fields = {"num_layers": 1, "vocab_size": 320, "max_position_embeddings": 128, **decoder}
    return dataclasses.replace(
        nano,
        name="small",
        decoder=dataclasses.replace(nano.decoder, **fields),
        vision=dataclasses.replace(
            nano.vision, image_size=(64, 32), num_layers=2, window=(4, 4), global_layers=(1,)
        ),
        speech=dataclasses.replace(nano.speech, num_layers=1, num_frames=32),
    )


def random_params(model: MultimodalGLM, seed: int = 0):
    """Random parameters, with biases and norms that are not their initial constants."""
    params = init(model, np.zeros((1, 1), np.int32), seed=seed)["params"]
    rng = np.random.default_rng(seed + 1)

    def disturb(leaf):
        noise = rng.normal(0.0, 0.1, leaf.shape) if leaf.ndim == 1 else 0.0
        return (leaf + noise).astype(np.float32)

    params = jax.device_put(jax.tree.map(disturb, jax.device_get(params)))
    # Spreads the logits: the tied embedding starts with rows of norm one.
    params["decoder"]["norm"]["weight"] *= 4.0
    return params


@functools.partial(jax.jit, static_argnums=1)
def quantize(weight: jax.Array, form: Format) -> boxes.Quantized:
    """Rounds to nearest, with the largest value of each group at the end of the range."""
    groups = weight.reshape(len(weight), -1, form.group_size or weight.shape[1])
    scale = jnp.abs(groups).max(-1) / (2 ** (form.bits - 1) - 1)
    scale = jnp.where(scale == 0.0, 1.0, scale).astype(form.scale_dtype)
    zero = None if form.symmetric else jnp.zeros(scale.shape, jnp.int8)
    codes = quantization.quantize(weight, scale, zero, form.qtype)
    return boxes.quantized(codes, scale, zero, form)


def mixed(path: str, leaf):
    """The rule of the `exported` fixture: every form that a file can hold."""
    if not boxes.is_matrix(path, leaf):
        return leaf
    if path.startswith("decoder"):
        return quantize(leaf, BLOCKS)
    if path.startswith("vision/layers/0"):
        return quantize(leaf, INT4)
    if path == "speech/linear_1/weight":
        return boxes.mask(leaf, jnp.abs(leaf) > 0.05)
    return leaf if path == "speech/linear_2/weight" else quantize(leaf, INT8)


def mapped(rule, params):
    """Applies a rule to all parameters in one program."""
    return jax.jit(functools.partial(boxes.map_with_path, rule))(params)


@pytest.fixture(scope="session")
def model():
    """The small model."""
    return MultimodalGLM(small_config())


@pytest.fixture(scope="session")
def dense_params(model):
    """Its parameters, not compressed."""
    return random_params(model)


@pytest.fixture(scope="session")
def params(dense_params):
    """Its parameters in every form that a file can hold."""
    return mapped(mixed, dense_params)


@pytest.fixture(scope="session")
def sizes():
    """Options of the small model's files; files of the same sizes share their conversion."""
    lengths = {"prefill_lengths": (32,), "forced_lengths": (4,)}
    return {**lengths, "cache_slots": 64, "prefill_logits": True}


@pytest.fixture(scope="session")
def dense_export(model, dense_params, sizes, tmp_path_factory):
    """The float32 file."""
    from glm_edge import export

    path = tmp_path_factory.mktemp("export") / "dense.tflite"
    return export.tflite(model, dense_params, path, **sizes)


@pytest.fixture(scope="session")
def exported(model, params, sizes, tmp_path_factory):
    """The compressed file."""
    from glm_edge import export

    path = tmp_path_factory.mktemp("export") / "mixed.tflite"
    return export.tflite(model, params, path, **sizes)


@pytest.fixture(scope="session")
def text_model():
    """The small model without encoders."""
    return MultimodalGLM(dataclasses.replace(small_config(), vision=None, speech=None))


@pytest.fixture(scope="session")
def text_params(text_model):
    """Its parameters, not compressed."""
    return random_params(text_model)


@pytest.fixture(scope="session")
def product():
    """Makes a file of one product, `product_<rows>`, and returns what was made of its weight."""
    from glm_edge.export.common.signatures import Signature
    from glm_edge.export.tflite import file as tflite_file
    from glm_edge.export.tflite.converter import skeleton
    from glm_edge.export.tflite.flatbuffer import FlatModel
    from glm_edge.export.tflite.weights import to_constant

    def multiply(params, inputs):
        return {"y": matmul.dense(inputs["x"], params["weight"])}

    signatures = [
        Signature(
            f"product_{rows}",
            {"x": jax.ShapeDtypeStruct((1, rows, 256), jnp.float32)},
            multiply,
            ("weight",),
        )
        for rows in (1, 16)
    ]
    content, arguments = skeleton(signatures, {"weight": (48, 256)})

    def write(box, path):
        constant, effective, conversions = to_constant("weight", box)
        graph = FlatModel(content)
        graph.attach({name: (where, constant) for name, where in arguments.items()})
        graph.compact()
        tflite_file.write(graph.model, path, overwrite=False)
        return effective, conversions

    return write


@pytest.fixture(scope="session")
def outcome():
    """`passed`, `failed`, or the message of the refusal, of a verification."""
    from glm_edge import export
    from glm_edge.errors import ExportError

    def verified(*arguments) -> str:
        try:
            return "passed" if export.verify(*arguments).passed else "failed"
        except ExportError as error:
            return str(error)

    return verified


@pytest.fixture(scope="session")
def rounded():
    """Boxes the decoder's matrices as int4 in groups of 32, and all others as int8."""

    def box(path, leaf):
        form = Format("int4", 32) if path.startswith("decoder") else INT8
        return quantize(leaf, form) if boxes.is_matrix(path, leaf) else leaf

    return functools.partial(mapped, box)


@pytest.fixture(scope="session", name="small_config")
def small_config_fixture():
    """The function `small_config`."""
    return small_config


@pytest.fixture(scope="session", name="random_params")
def random_params_fixture():
    """The function `random_params`."""
    return random_params


@pytest.fixture(scope="session", name="mapped")
def mapped_fixture():
    """The function `mapped`."""
    return mapped


@pytest.fixture(scope="session", name="quantize")
def quantize_fixture():
    """The function `quantize`."""
    return quantize
