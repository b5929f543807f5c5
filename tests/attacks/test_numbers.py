"""Sick weights and Gram matrices through every type and every way to choose a scale."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import glm_edge as ge
from glm_edge import params as boxes
from glm_edge.compress.prune.masks import sparse_columns
from glm_edge.compress.quantize.solvers import gptq_solver as gptq
from glm_edge.compress.quantize.solvers import hqq_solver as hqq
from glm_edge.compress.quantize.solvers import scales as grids
from glm_edge.configs import DecoderConfig, GLMConfig
from glm_edge.errors import RecipeError
from glm_edge.kernels.packing import QTYPES
from glm_edge.kernels.quantization import INTEGERS
from glm_edge.models.multimodal import MultimodalGLM
from glm_edge.params import Format
from glm_edge.params.tree import nested

COLUMNS = 24


def sick(seed):
    """Rows by name; those of zeros must stay zero."""
    rng = np.random.default_rng(seed)
    plain = rng.normal(size=COLUMNS)
    spike = np.zeros(COLUMNS)
    spike[rng.integers(COLUMNS)] = rng.choice([-3.0, 5.0])
    half = np.where(np.arange(COLUMNS) < 8, 0.0, plain)
    named = {
        "zero": np.zeros(COLUMNS),
        "plain": plain,
        "constant": np.full(COLUMNS, rng.normal()),
        "spike": spike,
        "half": half,
        "tiny": plain * 1e-9,
        "denormal": plain * 1e-41,
        "huge": plain * 1e25,
        "negative": -np.abs(plain),
    }
    return list(named), np.stack(list(named.values())).astype(np.float32)


def formats():
    for qtype in QTYPES:
        for size in (None, 8, "tensor"):
            for scale_dtype in ("float32", "float16", "bfloat16"):
                yield Format(qtype, size, True, scale_dtype)
        if qtype in INTEGERS:
            yield Format(qtype, 8, False, "float16")


@pytest.mark.slow
@pytest.mark.parametrize("scale", ["max", "mse"])
@pytest.mark.parametrize("format", formats(), ids=lambda f: f"{f}-{f.scale_dtype}")
def test_rounding_keeps_zeros_and_stays_finite(format, scale):
    for seed in (11, 12):
        names, weight = sick(seed)
        if format.scale_dtype == "float16" or format.group_size == "tensor":
            keep = [index for index, name in enumerate(names) if name != "huge"]
            names, weight = [names[index] for index in keep], weight[keep]
        codes, grid = grids.nearest(weight, format, scale)
        dense = np.float64(grids.decode(codes, grid, format))
        assert np.isfinite(dense).all()
        no_zero = format.qtype == "ternary34" and format.group_size == "tensor"
        if not no_zero:
            assert not dense[names.index("zero")].any()
        if format.group_size == 8 and not no_zero:
            assert not dense[names.index("half"), :8].any()
        if format.group_size != "tensor" and format.scale_dtype == "float32":
            for name in ("plain", "tiny", "negative"):
                row = np.float64(weight[names.index(name)])
                error = np.linalg.norm(dense[names.index(name)] - row) / np.linalg.norm(row)
                assert error < 1.6


@pytest.mark.slow
@pytest.mark.parametrize("qtype", QTYPES)
def test_solvers_keep_zeros_of_sick_rows(qtype):
    names, weight = sick(21)
    keep = [index for index, name in enumerate(names) if name != "huge"]
    names, weight = [names[index] for index in keep], jnp.asarray(weight[keep])
    inputs = np.random.default_rng(5).normal(size=(60, COLUMNS))
    gram = jnp.asarray(inputs.T @ inputs, jnp.float32)
    format = Format(qtype, 8)
    options = [{}, {"refit": True}, {"refit": True, "sweeps": 2}, {"act_order": True}]
    results = [gptq.solve(weight, gram, format, "mse", **option)[:2] for option in options]
    results.append(hqq.solve(weight, format, steps=5))
    for codes, grid in results:
        dense = np.asarray(grids.decode(codes, grid, format))
        assert np.isfinite(dense).all()
        assert not dense[names.index("zero")].any()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_sick_gram_matrices_end(seed):
    rng = np.random.default_rng(300 + seed)
    weight = jnp.asarray(rng.normal(size=(6, 16)), jnp.float32)
    inputs = rng.normal(size=(5, 16))
    grams = [
        np.zeros((16, 16)),
        inputs.T @ inputs,
        inputs.T @ inputs * 1e36,
        inputs.T @ inputs * 1e-36,
        np.diag(10.0 ** rng.integers(-30, 37, 16)),
        rng.normal(size=(16, 16)),
        -np.eye(16) * 3e38,
        np.full((16, 16), 2e38),
    ]
    for gram in grams:
        gram = jnp.asarray(gram, jnp.float32)
        codes, grid, info = gptq.solve(weight, gram, Format("int4", 8), refit=True, sweeps=1)
        assert np.isfinite(np.asarray(grids.decode(codes, grid, Format("int4", 8)))).all()
        assert np.isfinite(info.damping)
        result, _, _ = sparse_columns.solve(weight, gram, 0.5, refine=2)
        assert result.shape == weight.shape


@pytest.mark.slow
@pytest.mark.parametrize("size", [1e7, 1e9, 1e12])
def test_transforms_end_on_activations_near_the_end_of_float32(size):
    decoder = DecoderConfig(
        vocab_size=40, hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8,
        intermediate_size=32,
    )  # fmt: skip
    model = MultimodalGLM(GLMConfig(name="small", decoder=decoder, pad_token_id=0))
    params = jax.jit(model.init)(jax.random.key(4), jnp.zeros((1, 2), jnp.int32))["params"]
    leaves = dict(boxes.path_items(params))
    path = "decoder/layers/0/mlp/gate_up_proj/weight"
    leaves[path] = leaves[path] * size
    batches = [{"tokens": np.random.default_rng(9).integers(1, 40, (2, 10)).astype(np.int32)}]
    for transform in (
        ge.quantize.gptq("int4-g8", where="down_proj"),
        ge.prune.sparsegpt(sparsity=0.5, where="down_proj"),
    ):
        try:
            _, compressed, _ = transform(model, nested(leaves), batches, jax.random.key(0))
        except RecipeError:
            # The Gram matrix itself overflows.
            assert size > 1e9
            continue
        for _, leaf in boxes.path_items(compressed):
            assert bool(jnp.isfinite(boxes.dense(leaf)).all())
