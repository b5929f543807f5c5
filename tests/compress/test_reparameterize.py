"""Folded norms and joined branches, against convolutions written out in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_edge import params as boxes
from glm_edge.compress import batches, prune, quantize, recipe_from_json, to_json
from glm_edge.compress.reparameterize import (
    fold_batch_norm,
    identity_kernel,
    join_branches,
    reparameterize,
)
from glm_edge.errors import RecipeError
from glm_edge.models.cnn import (
    CNN,
    NORM_EPS,
    Inverted,
    MobileNetV2Config,
    ResNetConfig,
    StageConfig,
    Stem,
    preset,
)
from glm_edge.models.layers import Linear

LOGITS = jax.jit(batches.apply_batch, static_argnums=0)
# The published models' other parts in small: ResNet-50's stem of 7x7 with its maximum, and its
# bottlenecks; MobileNetV2's stem of stride 2 and its first block, which does not widen.
PARTS = {
    config.name: config
    for config in (
        ResNetConfig(
            "bottlenecks",
            Stem(8, 7, 2, pool=True),
            (StageConfig(12, 2, 2),),
            num_classes=10,
            image_size=(32, 32, 3),
        ),
        MobileNetV2Config(
            "mobilenet_v2_narrow",
            Stem(8),
            (Inverted(8, 8, 1, False), Inverted(12, 12, 2), Inverted(6, 12, 1, False)),
            head_features=16,
            num_classes=10,
            image_size=(16, 16, 3),
        ),
    )
}
DIGITS = {
    name: dataclasses.replace(preset(name), image_size=(8, 8, 1))
    for name in (f"{kind}_digits" for kind in ("resnet", "separable", "mobilenet_v2", "repvgg"))
}
# The digits' other parts in small: basic blocks with a shortcut and without, depthwise and
# pointwise convolutions, and branches.
PARTS |= {
    "basic": dataclasses.replace(
        DIGITS["resnet_digits"], stages=(StageConfig(24, 1, 1), StageConfig(12, 1, 2))
    ),
    "separable": dataclasses.replace(DIGITS["separable_digits"], blocks=((16, 2), (16, 1))),
    "repvgg": dataclasses.replace(
        DIGITS["repvgg_digits"], stages=(StageConfig(16, 1, 1), StageConfig(12, 1, 2))
    ),
}
SMALL = {**DIGITS, **PARTS}


def convolve(x, kernel, stride=1, groups=1):
    """A convolution [B, H, W, C] in float64, position by position of the kernel."""
    kernel, border = np.asarray(kernel, np.float64), kernel.shape[0] // 2
    padded = np.pad(x, ((0, 0), (border, border), (border, border), (0, 0)))
    rows = -(-x.shape[1] // stride)
    inside, outside = kernel.shape[2], kernel.shape[3] // groups
    result = np.zeros((len(x), rows, rows, kernel.shape[3]))
    for group in range(groups):
        read = padded[..., group * inside : (group + 1) * inside]
        written = slice(group * outside, (group + 1) * outside)
        for i in range(kernel.shape[0]):
            for j in range(kernel.shape[1]):
                observed = read[:, i : i + rows * stride : stride, j : j + rows * stride : stride]
                result[..., written] += observed[:, :rows, :rows] @ kernel[i, j][:, written]
    return result


def maximum(x):
    """The greatest of each 3x3 window, every second row and column, in float64."""
    result = np.full((len(x), -(-x.shape[1] // 2), -(-x.shape[2] // 2), x.shape[3]), -np.inf)
    for i, j in np.ndindex(result.shape[1:3]):
        rows, columns = (slice(max(0, 2 * at - 1), 2 * at + 2) for at in (i, j))
        result[:, i, j] = x[:, rows, columns].max((1, 2))
    return result


def normalize(x, norm, stats):
    norm, stats = (
        {name: np.asarray(leaf, np.float64) for name, leaf in tree.items()}
        for tree in (norm, stats)
    )
    return norm["scale"] * (x - stats["mean"]) / np.sqrt(stats["var"] + NORM_EPS) + norm["bias"]


class Reference:
    """A whole model in float64, read from its variables by the papers' formulas."""

    def __init__(self, config, variables):
        self.config, self.params = config, variables["params"]
        self.stats = variables["batch_stats"]

    def conv(self, x, *path, stride=1, groups=1):
        params, stats = self.params, self.stats
        for name in path:
            params, stats = params[name], stats[name]
        y = convolve(x, params["conv"]["kernel"], stride, groups)
        return normalize(y, params["norm"], stats["norm"])

    def block(self, x, name, stride):
        relu = lambda y: np.maximum(y, 0.0)  # noqa: E731
        kinds = self.params[name]
        if "branch_3x3" in kinds:
            y = self.conv(x, name, "branch_3x3", stride=stride)
            y = y + self.conv(x, name, "branch_1x1", stride=stride)
            if "branch_identity" in kinds:
                norms = kinds["branch_identity"], self.stats[name]["branch_identity"]
                y = y + normalize(x, *norms)
            return relu(y)
        if "pointwise" in kinds:
            y = relu(self.conv(x, name, "depthwise", stride=stride, groups=x.shape[-1]))
            return relu(self.conv(y, name, "pointwise"))
        if "project" in kinds:
            y = np.clip(self.conv(x, name, "expand"), 0, 6) if "expand" in kinds else x
            y = self.conv(y, name, "depthwise", stride=stride, groups=y.shape[-1])
            y = self.conv(np.clip(y, 0, 6), name, "project")
            return x + y if x.shape == y.shape else y
        if "conv3" in kinds:
            y = relu(self.conv(relu(self.conv(x, name, "conv1")), name, "conv2", stride=stride))
            y = self.conv(y, name, "conv3")
        else:
            y = self.conv(relu(self.conv(x, name, "conv1", stride=stride)), name, "conv2")
        return relu(
            y + (self.conv(x, name, "shortcut", stride=stride) if "shortcut" in kinds else x)
        )

    def __call__(self, images):
        x, config = np.asarray(images, np.float64), self.config
        if "conv" in self.params["stem"]:
            x = self.conv(x, "stem", stride=config.stem.stride)
            x = np.clip(x, 0, 6 if "v2" in config.name else np.inf)
        else:
            x = self.block(x, "stem", 1)
        if config.stem.pool:
            x = maximum(x)
        if hasattr(config, "stages"):
            strides = [s.stride if i == 0 else 1 for s in config.stages for i in range(s.depth)]
        else:
            strides = [getattr(b, "stride", None) or b[1] for b in config.blocks]
        for index, stride in enumerate(strides):
            x = self.block(x, f"blocks_{index}", stride)
        if "head" in self.params:
            x = np.clip(self.conv(x, "head"), 0, 6)
        head = {
            name: np.asarray(leaf, np.float64) for name, leaf in self.params["classifier"].items()
        }
        return x.mean((1, 2)) @ head["weight"].T + head["bias"]


def variables_of(model, seed=0):
    """Variables with statistics, shifts and scales that are nowhere zero or one."""
    abstract = jax.eval_shape(
        model.init, jax.random.key(0), jnp.zeros((1, *model.config.image_size))
    )
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = path.rsplit("/", 1)[-1]
        if name in ("var", "scale"):
            return jnp.asarray(rng.uniform(0.3, 1.8, leaf.shape), jnp.float32)
        spread = 0.5 if len(leaf.shape) == 1 else (2.0 / np.prod(leaf.shape[:-1])) ** 0.5
        return jnp.asarray(rng.normal(0.1 * spread, spread, leaf.shape), jnp.float32)

    return boxes.map_with_path(draw, abstract)


@pytest.fixture(scope="module")
def built():
    """`(model, variables, images, logits)` by name, of few pixels."""
    results = {}

    def build(name):
        if name not in results:
            model = CNN(SMALL[name])
            variables = variables_of(model)
            size = (3, *model.config.image_size)
            images = np.random.default_rng(1).normal(size=size).astype(np.float32)
            logits = jax.jit(lambda v, x: model.apply(v, x)[0])(variables, images)
            results[name] = model, variables, images, logits
        return results[name]

    return build


@pytest.mark.parametrize(
    "name", [*PARTS, *(pytest.param(name, marks=pytest.mark.slow) for name in DIGITS)]
)
def test_models_and_deployed_models_equal_float64(built, name):
    model, variables, images, logits = built(name)
    expected = Reference(model.config, variables)(images)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=1e-4)
    deployed, folded, report = reparameterize()(model, variables)
    assert deployed.deploy
    actual = jax.jit(lambda v, x: deployed.apply(v, x)[0])(folded, images)
    np.testing.assert_allclose(actual, expected, atol=1e-4, rtol=1e-4)
    needed = jax.eval_shape(deployed.init, jax.random.key(0), images)
    assert jax.tree.map(jnp.shape, folded) == jax.tree.map(lambda leaf: leaf.shape, needed)
    assert report.count_after == boxes.count(folded) < report.count_before
    assert report.bytes_after == boxes.stored_bytes(folded) < report.bytes_before


def test_statistics_matter(built):
    model, variables, images, logits = built("repvgg")
    other = jax.tree.map(lambda leaf: 1.1 * leaf, variables["batch_stats"])
    deployed, folded, _ = reparameterize()(model, {**variables, "batch_stats": other})
    result = jax.jit(deployed.apply)(folded, images)[0]
    assert float(jnp.abs(result - logits).max()) > 1e-2


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_a_norm_folds_into_convolutions_with_groups_and_biases(groups):
    rng = np.random.default_rng(groups)
    kernel = rng.normal(size=(3, 3, 6 // groups, 12)).astype(np.float32)
    bias = rng.normal(size=12).astype(np.float32)
    norm = {name: rng.uniform(0.5, 2, 12).astype(np.float32) for name in ("scale", "bias")}
    stats = {name: rng.uniform(0.5, 2, 12).astype(np.float32) for name in ("mean", "var")}
    x = rng.normal(size=(2, 5, 5, 6))
    folded, shift = fold_batch_norm(jnp.asarray(kernel), jnp.asarray(bias), norm, stats)
    expected = normalize(convolve(x, kernel, groups=groups) + bias, norm, stats)
    actual = convolve(x, np.asarray(folded), groups=groups) + np.asarray(shift)
    np.testing.assert_allclose(actual, expected, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 3])
def test_branches_of_several_sizes_join(groups):
    rng = np.random.default_rng(0)
    branches = [
        (jnp.asarray(rng.normal(size=(size, size, 6 // groups, 6)), jnp.float32), jnp.ones(6))
        for size in (1, 5, 3)
    ]
    branches.append((identity_kernel(6, groups), jnp.zeros(6)))
    kernel, bias = join_branches(*branches)
    x = rng.normal(size=(2, 7, 7, 6))
    expected = x + sum(convolve(x, np.asarray(k), groups=groups) for k, _ in branches[:-1])
    np.testing.assert_allclose(convolve(x, np.asarray(kernel), groups=groups), expected, atol=1e-5)
    assert kernel.shape[:2] == (5, 5)
    np.testing.assert_array_equal(bias, 3 * np.ones(6))


def test_a_masked_kernel_keeps_its_zeros(built):
    model, variables, images, _ = built("separable")
    _, masked, _ = prune.magnitude(0.5)(model, variables)
    logits, _ = jax.jit(model.apply)(masked, images)
    deployed, folded, report = reparameterize()(model, masked)
    kernel = folded["params"]["blocks_1"]["pointwise"]["conv"]["kernel"]
    assert isinstance(kernel, boxes.Masked)
    assert np.mean(kernel.mask) == 0.5
    assert {row.keep_ratio for row in report.rows} == {0.5}
    result, _ = jax.jit(deployed.apply)(folded, images)
    np.testing.assert_allclose(result, logits, atol=1e-4)


def test_what_cannot_be_folded_is_refused(built):
    model, variables, _, _ = built("repvgg")
    _, masked, _ = prune.magnitude(0.5, where="branch_3x3")(model, variables)
    with pytest.raises(RecipeError, match=r"branch_3x3 is masked.*reparameterize first"):
        reparameterize()(model, masked)
    _, rounded, _ = quantize.rtn("int8", where="stem/branch_1x1")(model, variables)
    with pytest.raises(RecipeError, match="is quantized; reparameterize before quantizing"):
        reparameterize()(model, rounded)
    with pytest.raises(RecipeError, match=r"needs its variables.*found 'params'"):
        reparameterize()(model, {"params": variables["params"]})
    deployed, folded, _ = reparameterize()(model, variables)
    with pytest.raises(RecipeError, match="deployed already"):
        reparameterize()(deployed, folded)
    with pytest.raises(RecipeError, match="no factor is known to move"):
        reparameterize()(Linear(3), {"weight": jnp.ones((3, 3))})


@pytest.mark.parametrize(
    "member", ["glm4", "tied", "sandwich", pytest.param("ocr", marks=pytest.mark.slow)]
)
def test_norms_of_a_glm_fold_into_what_reads_them(make_shallow, batch_of, member):
    model, params = make_shallow(member)
    smaller, folded, report = reparameterize()(model, params)
    assert smaller == model
    batch = batch_of(model)
    expected = LOGITS(model, params, batch)
    actual = LOGITS(model, folded, batch)
    limit = 1e-4 * max(1.0, float(jnp.abs(expected).max()))
    assert float(jnp.abs(actual - expected).max()) < limit
    leaves = dict(boxes.path_items(folded))
    for index in range(model.config.decoder.num_layers):
        for norm in ("input_norm", "post_attention_norm"):
            np.testing.assert_array_equal(leaves[f"decoder/layers/{index}/{norm}/weight"], 1.0)
    tied = model.config.decoder.tie_embeddings
    assert bool(jnp.all(leaves["decoder/norm/weight"] == 1.0)) == (not tied)
    assert report.count_after == report.count_before


def test_a_norm_weight_of_zero_is_no_harm(make_shallow, batch_of):
    model, params = make_shallow("glm4")
    layer = params["decoder"]["layers"]["0"]
    weight = np.array(layer["input_norm"]["weight"])
    weight[3] = 0.0
    norm = {"weight": jax.device_put(weight)}
    layers = {**params["decoder"]["layers"], "0": {**layer, "input_norm": norm}}
    params = {**params, "decoder": {**params["decoder"], "layers": layers}}
    _, folded, _ = reparameterize()(model, params)
    batch = batch_of(model)
    expected = LOGITS(model, params, batch)
    np.testing.assert_allclose(LOGITS(model, folded, batch), expected, atol=1e-4)


def test_it_is_data_and_gives_the_same_bytes(built):
    model, variables, _, _ = built("repvgg")
    transform = reparameterize()
    assert recipe_from_json(to_json(transform)) == transform
    first, second = (transform(model, variables)[1] for _ in range(2))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), first, second))
