"""Logical axes of every parameter, how they are cut, and constraints on activations."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

import glm_edge as ge
from glm_edge.checkpoint.shapes import expected_shapes
from glm_edge.configs import DecoderConfig, GLMConfig, SpeechConfig, TextConfig, VisionConfig
from glm_edge.configs.presets import PRESETS
from glm_edge.errors import ConfigError
from glm_edge.models.multimodal import MultimodalGLM
from glm_edge.models.speech import SpeechEncoder
from glm_edge.models.text import TextEncoder
from glm_edge.models.vision import VisionEncoder
from glm_edge.params import Format, sharding

TOWER = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 32}
MODELS = {name: MultimodalGLM(config) for name, config in PRESETS.items()} | {
    "siglip": VisionEncoder(
        VisionConfig(
            image_size=(8, 8),
            projector_size=0,
            merge_size=1,
            patch_size=4,
            patch_stride=4,
            norm="layer",
            gated_mlp=False,
            attention_bias=True,
            projection_bias=True,
            pooling_head=True,
            **TOWER,
        )
    ),
    "glm_ocr": VisionEncoder(
        VisionConfig(
            image_size=(8, 8),
            projector_size=24,
            patch_size=4,
            patch_stride=4,
            qk_norm=True,
            attention_bias=True,
            projection_bias=True,
            boundary_embeddings=True,
            **TOWER,
        ),
        out_features=8,
    ),
    "whisper": SpeechEncoder(
        SpeechConfig(
            mel_bins=4,
            num_frames=8,
            projector_size=0,
            merge_size=1,
            learned_positions=True,
            partial_rotary_factor=0.0,
            **TOWER,
        )
    ),
    "bert": TextEncoder(TextConfig(vocab_size=32, num_labels=3, pooler="tanh", **TOWER)),
}
GLM = GLMConfig(
    name="small",
    decoder=DecoderConfig(
        vocab_size=64,
        hidden_size=128,
        num_layers=2,
        num_heads=(8, 4),
        num_kv_heads=(4, 2),
        head_dim=16,
        intermediate_size=256,
    ),
)


@functools.cache
def shapes(name: str) -> dict[str, tuple[int, ...]]:
    return expected_shapes(MODELS[name])


def mesh_of(data: int, model: int) -> AbstractMesh:
    return AbstractMesh((data, model), ("data", "model"))


def spec(path: str, shape: tuple[int, ...], mesh=None, **options) -> P:
    leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
    return sharding.named_sharding(path, leaf, mesh or mesh_of(2, 4), **options).spec


@pytest.mark.parametrize("name", MODELS)
def test_every_axis_of_every_parameter_has_a_name(name):
    for path, shape in shapes(name).items():
        assert None not in sharding.logical_axes(path, shape), path


@pytest.mark.parametrize("name", PRESETS)
def test_large_matrices_of_presets_are_cut(name):
    config = PRESETS[name]
    for path, shape in shapes(name).items():
        cut = "model" in spec(path, shape, mesh_of(1, 2), config=config)
        replicated = ("norm", "patch", "conv", "position", "row", "column")
        small = len(shape) == 1 or any(part in path for part in replicated)
        assert cut or small, path


@pytest.mark.parametrize(
    ("path", "shape", "axes"),
    [
        ("embed/weight", (64, 8), ("vocab", "embed")),
        ("decoder/layers/11/attention/k_proj/weight", (8, 8), ("kv_heads", "embed")),
        ("decoder/layers/1/mlp/gate_up_proj/weight", (2, 16, 8), (None, "neurons", "embed")),
        ("decoder/layers/1/post_mlp_norm/weight", (8,), ("embed",)),
        ("vision/layers/0/attention/q_norm/weight", (8,), ("head_dim",)),
        ("vision/position", (9, 8), ("positions", "embed")),
        ("my_adapter/kernel", (4, 4), (None, None)),
        ("reembed/weight_g", (4,), (None,)),
    ],
)
def test_logical_axes(path, shape, axes):
    assert sharding.logical_axes(path, shape) == axes


def test_matrices_lie_as_the_rules_say():
    assert spec("embed/weight", (64, 128)) == P("model", None)
    assert spec("decoder/layers/0/mlp/down_proj/weight", (128, 256)) == P(None, "model")
    assert spec("decoder/layers/0/input_norm/weight", (128,)) == P(None)
    full = sharding.FULLY_SHARDED
    assert spec("embed/weight", (64, 128), rules=full) == P("model", "data")
    assert spec("embed/weight", (62, 128), rules=full) == P(None, "data")
    both = (("vocab", ("data", "model")),)
    assert spec("embed/weight", (64, 128), rules=both) == P(("data", "model"), None)


def test_an_axis_of_the_mesh_that_is_missing_counts_as_none():
    mesh = AbstractMesh((4,), ("model",))
    result = spec("embed/weight", (64, 128), mesh, rules=sharding.FULLY_SHARDED)
    assert result == P("model", None)
    with pytest.raises(ConfigError, match=r"axes \('x',\): the sharding rules name none"):
        spec("embed/weight", (64, 128), AbstractMesh((4,), ("x",)))


def test_heads_stay_whole():
    first, second = "decoder/layers/0/attention", "decoder/layers/1/attention"
    assert spec(f"{first}/k_proj/weight", (64, 128), config=GLM) == P("model", None)
    assert spec(f"{second}/k_proj/weight", (32, 128), config=GLM) == P(None, None)
    assert spec(f"{first}/o_proj/weight", (128, 128), mesh_of(1, 8), config=GLM) == P(None, "model")
    assert spec(f"{second}/o_proj/weight", (128, 64), mesh_of(1, 8), config=GLM) == P(None, None)
    assert spec(f"{first}/k_proj/weight", (64, 128)) == P(None, None)
    config = MODELS["siglip"].config
    assert spec("layers/0/attention/k_proj/bias", (16,), mesh_of(1, 2), config=config) == P("model")
    assert spec("layers/0/attention/k_proj/bias", (16,), mesh_of(1, 4), config=config) == P(None)


def quantized(columns: int, **options) -> ge.params.Quantized:
    format = Format(**options)
    groups = columns // (format.group_size or columns)
    return ge.params.quantized(
        np.zeros((8, columns), np.int8),
        jax.device_put(np.ones((8, groups), np.float32)),
        None if format.symmetric else jax.device_put(np.zeros((8, groups), np.int8)),
        format,
    )


@pytest.mark.parametrize(
    ("box", "shards", "data", "scale"),
    [
        (quantized(256, qtype="int4", group_size=32), 4, "model", "model"),
        (quantized(256, qtype="int4", group_size=32, symmetric=False), 8, "model", "model"),
        (quantized(128, qtype="int4", group_size=32), 8, None, None),
        (quantized(96, qtype="int8", group_size=32), 2, None, None),
        (quantized(256, qtype="int8"), 4, "model", None),
        (quantized(256, qtype="int4", group_size=256), 4, "model", None),
        (quantized(12, qtype="int4"), 4, None, None),
        (quantized(7, qtype="int4"), 4, None, None),
    ],
)
def test_columns_are_cut_at_whole_groups_and_bytes(box, shards, data, scale):
    path = "decoder/layers/0/mlp/down_proj/weight"
    result = sharding.named_sharding(path, box, mesh_of(1, shards))
    assert result.data.spec == P(None, data)
    assert result.scale.spec == P(None, scale)
    assert result.zero is None if box.zero is None else result.zero.spec == P(None, scale)
    assert jax.tree.structure(result) == jax.tree.structure(box)


def test_rows_of_boxes_are_cut_like_those_of_arrays():
    result = sharding.named_sharding("embed/weight", quantized(64, qtype="int8"), mesh_of(1, 4))
    assert (result.data.spec, result.scale.spec) == (P("model", None), P("model", None))
    masked = ge.params.mask(jnp.ones((8, 4)), jnp.ones((8, 4), bool))
    result = sharding.named_sharding("embed/weight", masked, mesh_of(1, 4))
    assert result.value.spec == result.mask.spec == P("model", None)
    stock = quantized(64, qtype="int8").replace(kernel_shape=(64, 8))
    result = sharding.named_sharding("embed/weight", stock, mesh_of(1, 4))
    assert result.data.spec == P(None, None)


@pytest.fixture(scope="module")
def nano():
    return ge.load(ge.shipped())


TOKENS = np.arange(12, 20, dtype=np.int32)[None]


def constraints(model, params) -> int:
    jaxpr = jax.make_jaxpr(lambda tokens: model.apply({"params": params}, tokens)[0])(TOKENS)
    return str(jaxpr).count("sharding_constraint[")


def test_activations_are_constrained_only_on_a_mesh(nano):
    model, params = nano
    assert constraints(model, params) == 0
    with sharding.on(jax.make_mesh((1, 1), ("data", "model"))):
        on_mesh = constraints(model, params)
    assert on_mesh == 2 + 7 * model.config.decoder.num_layers
    assert constraints(model, params) == 0


def test_jit_compiles_anew_on_a_mesh(nano):
    model, params = nano
    mesh = jax.make_mesh((1, 1), ("data", "model"))
    apply = jax.jit(lambda params: model.apply({"params": params}, TOKENS)[0])
    expected = apply(params)
    with sharding.on(mesh):
        logits = apply(ge.params.shard(params, mesh, config=model.config))
    assert logits.sharding.mesh.axis_names == ("data", "model")
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


def test_boxes_are_sharded_unchanged():
    params = {
        "embed": {"weight": ge.params.mask(jnp.ones((8, 4)), jnp.eye(8, 4) > 0)},
        "mlp": {
            "down_proj": {"weight": quantized(64, qtype="int4", group_size=32, symmetric=False)}
        },
        "norm": {"weight": jnp.arange(4.0)},
    }
    mesh = jax.make_mesh((1, 1), ("data", "model"))
    moved = ge.params.shard(params, mesh)
    assert jax.tree.structure(moved) == jax.tree.structure(params)
    for before, after in zip(jax.tree.leaves(params), jax.tree.leaves(moved), strict=True):
        np.testing.assert_array_equal(before, after)
        assert after.sharding.mesh.axis_types == (AxisType.Auto, AxisType.Auto)


def test_constraints_leave_other_shapes_to_the_compiler():
    x = jnp.ones((3, 4))
    assert sharding.constrain(x, "batch", "embed") is x
    with sharding.on(jax.make_mesh((1, 1), ("data", "model"))):
        assert sharding.constrain(x, "batch", "length", "embed") is x


def test_what_the_devices_do_not_divide_is_replicated():
    rules = tuple(rule for rule in sharding.RULES if rule[1])

    def constrained(x):
        return sharding.constrain(x, "batch", "length", "vocab")

    with jax.sharding.use_abstract_mesh(mesh_of(2, 4)), nn.logical_axis_rules(rules):
        jaxpr = str(jax.make_jaxpr(constrained)(jnp.ones((3, 5, 8))))
    assert "spec=P(None, None, 'model')" in jaxpr
