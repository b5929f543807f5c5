"""Stock Linen layers: which axes are inputs, what calibration sees, and stacks of layers."""

import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_edge import params as boxes
from glm_edge.compress import SolverOptions, prune, quantize
from glm_edge.compress.layerwise import stages
from glm_edge.compress.readings import layouts_of
from glm_edge.errors import RecipeError
from glm_edge.params.layouts import Layout, from_bias

WIDTH, HEADS = 16, 2


class Block(nn.Module):
    use_bias: bool = False

    @nn.compact
    def __call__(self, x, _=None):
        attention = nn.MultiHeadDotProductAttention(HEADS, use_bias=self.use_bias, name="attention")
        return x + nn.Dense(WIDTH, name="fc")(attention(x, x)), None


class Tower(nn.Module):
    """A token model with its layers unrolled, scanned, or each under `nn.remat`."""

    layers: int = 2
    kind: str = "unrolled"
    use_bias: bool = False

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(20, WIDTH, name="embed")(tokens)
        if self.kind == "scanned":
            axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
            x, _ = nn.scan(Block, length=self.layers, **axes)(self.use_bias, name="blocks")(x, None)
        else:
            block = nn.remat(Block) if self.kind == "remat" else Block
            for index in range(self.layers):
                x, _ = block(self.use_bias, name=f"block_{index}")(x)
        return nn.Dense(20, name="head")(x)


class Kinds(nn.Module):
    """One layer of each kind that has a kernel of three or more axes."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), (2, 1), padding="CIRCULAR", use_bias=False, name="conv")(x)
        x = nn.Conv(4, (3, 3), feature_group_count=2, use_bias=False, name="grouped")(x)
        x = nn.ConvTranspose(6, (2, 2), use_bias=False, name="transposed")(x)
        x = nn.DenseGeneral((2, 3), use_bias=False, name="several")(x)
        x = nn.DenseGeneral(5, axis=(-2, -1), use_bias=False, name="joined")(x)
        x = nn.Einsum((2, 5, 3), "...d,ndh->...nh", use_bias=False, name="einsum")(x)
        return nn.DenseGeneral(4, batch_dims=(0,), use_bias=False, name="batched")(x)


EXTENTS = {
    "conv": (4, 27),
    "grouped": (4, 18),
    "transposed": (6, 16),
    "several": (6, 6),
    "joined": (5, 6),
    "einsum": (6, 5),
    "batched": (4, 3),
}


def initial(model, x):
    """Parameters of any values: drawing them by `init` costs a compilation for each."""
    rng = np.random.default_rng(0)
    shapes = abstract(model, x)
    return jax.tree.map(lambda leaf: jnp.float32(rng.normal(size=leaf.shape)), shapes)


def abstract(model, x):
    return jax.eval_shape(model.init, jax.random.key(0), x)["params"]


TOKENS = np.arange(24).reshape(2, 12) % 20
IMAGE = np.random.default_rng(0).normal(size=(1, 8, 8, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def towers():
    """The unrolled model and the scanned one with the same numbers, `{kind: (model, params)}`."""
    model = Tower()
    params = initial(model, TOKENS)
    blocks = jax.tree.map(lambda *x: jnp.stack(x), params["block_0"], params["block_1"])
    scanned = {"blocks": blocks, "embed": params["embed"], "head": params["head"]}
    return {"unrolled": (model, params), "scanned": (Tower(kind="scanned"), scanned)}


def test_layouts_of_every_stock_kernel_come_from_the_module():
    leaves = dict(boxes.path_items(abstract(Kinds(), IMAGE)))
    layouts = layouts_of("test", Kinds(), leaves)
    shapes = {path: tuple(leaf.shape) for path, leaf in leaves.items()}
    assert {p.split("/")[0]: layouts[p].extent(shapes[p]) for p in shapes} == EXTENTS
    for path, shape in shapes.items():
        array = np.arange(np.prod(shape)).reshape(shape)
        rows = layouts[path].rows(array)
        np.testing.assert_array_equal(layouts[path].restored(rows, shape), array)


@pytest.mark.parametrize(
    ("kernel", "bias", "expected"),
    [
        ((8, 2, 4), (2, 4), Layout(0, (0,))),
        ((2, 4, 8), (8,), Layout(0, (0, 1))),
        ((3, 8, 2, 4), (3, 2, 4), Layout(1, (0,))),
        ((3, 8, 8), (3, 8), Layout(1, (0,))),
        ((3, 3, 4, 8), (8,), Layout(0, (0, 1, 2))),
        ((4, 4, 8), (4, 8), None),
        ((3, 8, 8), None, None),
    ],
)
def test_a_bias_tells_the_layout_where_one_fits(kernel, bias, expected):
    assert from_bias(kernel, bias) == expected


def test_what_cannot_be_known_is_refused_by_name():
    class Custom(nn.Module):
        @nn.compact
        def __call__(self, x, y):
            return nn.DenseGeneral((2, 4), use_bias=False, name="layer")(x + y)

    model = Custom()
    params = {"layer": {"kernel": jnp.ones((8, 2, 4))}}
    for transform in (quantize.rtn("int4"), quantize.hqq(), prune.mask(shape="2:4")):
        with pytest.raises(RecipeError, match=r"layer/kernel \[8, 2, 4\].*calibration=.*stacked="):
            transform(model, params)
    # What needs no axes is not refused.
    assert prune.magnitude(0.5)(model, params)[1]["layer"]["kernel"].mask.mean() == 0.5
    quantize.rtn("bfloat16")(model, params)


def nearest(rows, bits):
    """Rounded weights of symmetric integers, one scale per row, by numpy."""
    high = 2 ** (bits - 1) - 1
    scale = np.float32(np.abs(rows).max(axis=1, keepdims=True) / high)
    return np.clip(np.round(rows / scale), -high - 1, high) * scale


def as_matrix(kernel, inputs):
    return np.asarray(kernel).reshape(inputs, -1).T


@pytest.mark.parametrize("use_bias", [True, False])
def test_attention_has_a_scale_per_output(use_bias):
    model = Tower(layers=1, use_bias=use_bias)
    params = initial(model, TOKENS)
    attention = params["block_0"]["attention"]
    _, rounded, _ = quantize.rtn("int4", where="attention")(model, params)
    for name in ("query", "key", "value", "out"):
        kernel, box = attention[name]["kernel"], rounded["block_0"]["attention"][name]["kernel"]
        assert box.scale.shape == (WIDTH, 1)
        expected = nearest(as_matrix(kernel, WIDTH), 4)
        np.testing.assert_allclose(as_matrix(box.unbox(), WIDTH), expected, atol=1e-6)
    _, grouped, _ = quantize.rtn("int4-g8", where="query")(model, params)
    groups = as_matrix(attention["query"]["kernel"], WIDTH).reshape(WIDTH, 2, 8)
    scale = grouped["block_0"]["attention"]["query"]["kernel"].scale
    np.testing.assert_allclose(scale, np.abs(groups).max(-1) / 7, rtol=0.01)


def test_attention_is_masked_along_inputs_and_by_output():
    model = Tower(layers=1)
    params = initial(model, TOKENS)
    keep = prune.mask(shape="2:4")(model, params)[1]["block_0"]["attention"]["query"]["kernel"].mask
    np.testing.assert_array_equal(as_matrix(keep, WIDTH).reshape(-1, 4).sum(1), 2)
    pruned = prune.mask(0.25, shape="channel")(model, params)[1]
    for name in ("query", "out"):
        keep = as_matrix(pruned["block_0"]["attention"][name]["kernel"].mask, WIDTH)
        assert sorted(keep.sum(1).tolist()) == [0] * 4 + [WIDTH] * 12


def test_an_einsum_kernel_with_inputs_inside_is_restored():
    params = initial(Kinds(), IMAGE)
    _, rounded, _ = quantize.rtn("int8", where="einsum")(Kinds(), params)
    kernel, box = params["einsum"]["kernel"], rounded["einsum"]["kernel"]
    assert box.scale.shape == (6, 1)
    rows = np.asarray(kernel).transpose(0, 2, 1).reshape(6, 5)
    result = np.asarray(box.unbox()).transpose(0, 2, 1).reshape(6, 5)
    np.testing.assert_allclose(result, nearest(rows, 8), atol=1e-6)
    again = boxes.from_flat(*boxes.to_flat(rounded))["einsum"]["kernel"]
    assert again.kernel_axes == box.kernel_axes == (1, 0, 2)
    np.testing.assert_array_equal(again.unbox(), box.unbox())


def test_calibration_sees_the_rows_that_each_kernel_multiplies():
    model, params = Kinds(), initial(Kinds(), IMAGE)
    leaves = dict(boxes.path_items(params))
    outputs = {}

    def see(call, args, kwargs, context):
        outcome = call(*args, **kwargs)
        outputs["/".join((*context.module.path, "kernel"))] = outcome
        return outcome

    def forward(module, state):
        return {**state, "x": module(state["tokens"])}

    stage = stages.Stage("model", "", ("",), model, forward)
    rows = stage.collect(leaves, [{"tokens": IMAGE}], stages.ROWS)
    with nn.intercept_methods(see):
        model.apply({"params": params}, IMAGE)
    layouts = layouts_of("test", model, leaves)
    assert set(rows) == {f"{name}/kernel" for name in ("conv", "several", "joined", "einsum")}
    for path, x in rows.items():
        product = np.asarray(x) @ np.asarray(layouts[path].rows(leaves[path])).T
        np.testing.assert_allclose(product, outputs[path].reshape(product.shape), atol=1e-4)
    reasons = stage.unseen(leaves, [{"tokens": IMAGE}])
    assert {path.split("/")[0] for path in reasons} == {"grouped", "transposed", "batched"}


@pytest.mark.parametrize(
    ("kind", "unseen"),
    [
        pytest.param("unrolled", "1 of 7 matrices", marks=pytest.mark.slow),
        ("remat", "6 of 7 matrices"),
    ],
)
def test_gptq_counts_what_it_rounds_to_nearest(kind, unseen):
    model = Tower(1, kind)
    params = initial(Tower(1), TOKENS)
    batches = [{"tokens": TOKENS}]
    solver = SolverOptions(propagate=0.0, sweeps=0, refit=False)
    rounding = quantize.gptq("int4", scale="max", solver=solver)
    _, _, report = rounding(model, params, batches)
    (note,) = report.notes
    assert unseen in note
    assert "1 as its rows are looked up, not multiplied" in note
    assert ("nn.remat" in note) == (kind == "remat")
    errors = [row for row in report.rows if "output error" in row.action]
    assert len(errors) == (6 if kind == "unrolled" else 1)


def test_activations_count_what_gets_no_range(towers):
    model, params = towers["scanned"]
    rounded = quantize.rtn("int8")(model, params)[1]
    _, compressed, report = quantize.activations()(model, rounded, [{"tokens": TOKENS}])
    [note] = [note for note in report.notes if note.startswith("quantize.activations: ")]
    assert "6 of 7 matrices went without a range, as calibration cannot record" in note
    assert "5 as its layer runs inside nn.scan" in note
    assert "1 as its rows are looked up, not multiplied" in note
    ranged = {
        p
        for p, leaf in boxes.path_items(compressed)
        if getattr(leaf, "input_scale", None) is not None
    }
    assert ranged == {"head/kernel"}
    assert {row.path for row in report.rows if "without a range" not in row.action} == ranged
    assert len(report.rows) == 7


def test_wanda_scores_attention_by_its_inputs(towers):
    model, params = towers["unrolled"]
    masked = prune.mask(0.5, score="wanda")(model, params, [{"tokens": TOKENS}])
    x = jnp.asarray(params["embed"]["embedding"])[TOKENS].reshape(-1, WIDTH)
    kernel = as_matrix(params["block_0"]["attention"]["query"]["kernel"], WIDTH)
    scores = np.abs(kernel) * np.linalg.norm(x, axis=0)
    keep = as_matrix(masked[1]["block_0"]["attention"]["query"]["kernel"].mask, WIDTH)
    np.testing.assert_array_equal(keep, scores >= np.sort(scores, axis=1)[:, WIDTH // 2, None])


ON_STACKS = {
    "rtn": quantize.rtn("int4-g8"),
    "hqq": quantize.hqq("int4-g8-affine-zero=float16", steps=2),
    "magnitude": prune.magnitude(0.3),
    "2:4": prune.mask(shape="2:4"),
    "channel": prune.mask(0.25, shape="channel"),
    "block": prune.mask(0.5, shape="block:4x4"),
    "global": prune.mask(0.4, allocation="global"),
}


@pytest.mark.parametrize("name", ON_STACKS)
def test_scanned_layers_are_compressed_as_unrolled_ones(towers, name):
    results = {kind: ON_STACKS[name](*pair)[1] for kind, pair in towers.items()}
    for index in range(2):
        layer = jax.tree.map(lambda x, index=index: x[index], results["scanned"]["blocks"])
        jax.tree.map(np.testing.assert_array_equal, layer, results["unrolled"][f"block_{index}"])


@pytest.mark.parametrize("format", ["int8", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_a_scanned_model_runs_on_rounded_weights(towers, format):
    model, params = towers["scanned"]
    _, rounded, report = quantize.rtn(format)(model, params)
    run = jax.jit(lambda params: model.apply({"params": params}, TOKENS))
    after = run(rounded)
    assert after.dtype == jnp.float32
    assert report.bytes_after < 0.6 * report.bytes_before
    plain = jax.tree.map(boxes.dense, rounded, is_leaf=boxes.is_box)
    # Two programs sum in orders of their own, on activations of tens of thousands.
    expected = run(plain)
    np.testing.assert_allclose(after, expected, rtol=0, atol=1e-5 * float(jnp.abs(expected).max()))


def test_stacked_that_names_one_matrix_is_refused(towers):
    with pytest.raises(RecipeError, match=r"stacked='head' matches head/kernel .* one matrix"):
        quantize.rtn("int8", stacked="head")(*towers["unrolled"])


def test_stacks_along_another_axis_are_refused():
    axes = {"variable_axes": {"params": 1}, "split_rngs": {"params": True}, "length": 3}
    model = nn.scan(Block, **axes)()
    x = jnp.ones((1, 4, WIDTH))
    leaves = dict(boxes.path_items(abstract(model, x)))

    def watch(note):
        stage = stages.Stage("model", "", ("",), model, lambda m, state: m(state["x"], None), "x")
        stage.watch(leaves, {"x": x}, note)

    layouts = layouts_of("test", model, leaves, None, watch)
    with pytest.raises(RecipeError, match="not along the first axis"):
        layouts["fc/kernel"]


@pytest.mark.parametrize(
    "factory",
    [
        quantize.rtn,
        quantize.hqq,
        quantize.gptq,
        quantize.awq,
        quantize.adaround,
        quantize.qat,
        quantize.blockwise,
        prune.mask,
        prune.magnitude,
        prune.sparsegpt,
        prune.scheduled,
        prune.scores_of,
    ],
)
def test_stacked_is_an_option_of_what_reads_matrices(factory):
    assert "stacked" in inspect.signature(factory).parameters
