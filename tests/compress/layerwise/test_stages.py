"""A model as stages: the same numbers as the whole, and statistics of what meets each weight."""

import functools
import gc
import weakref

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_edge import params as boxes
from glm_edge.compress import chain, quantize
from glm_edge.compress.batches import apply_batch
from glm_edge.compress.layerwise import stages
from glm_edge.compress.layerwise.runner import LayerwiseTransform
from glm_edge.compress.transform import registered
from glm_edge.errors import DataError, RecipeError
from tests.compress.conftest import MEMBERS
from tests.marks import slow_unless
from tests.tiny_models import init, init_glm, tiny_config

logits = jax.jit(apply_batch, static_argnums=0)


def leaves_of(stage, leaves):
    return {p: leaf for p, leaf in leaves.items() if stage.holds(p) or p in stage.borrows}


# What differs in code: both encoders, an untied head, embeddings at the ends of images, and layers
# of other widths. The other members are other decoder layers.
QUICK = ("nano", "sandwich", "edge_v", "pruned")


@pytest.mark.parametrize(
    "member",
    slow_unless(QUICK.__contains__, sorted(MEMBERS)),
)
def test_stages_in_turn_are_the_model(make_member, make_shallow, batch_of, member):
    # Widths of the pruned member differ from layer to layer.
    model, params = (make_member if member == "pruned" else make_shallow)(member)
    leaves, batches = dict(boxes.path_items(params)), [batch_of(model, seed=s) for s in (0, 1)]
    states, actual = stages.first_states(model, batches), stages.stages(model)
    for path in leaves:
        assert sum(stage.holds(path) for stage in actual) == 1, path
    for stage in actual:
        states = stage.run(leaves_of(stage, leaves), states)
    for state, batch in zip(states, batches, strict=True):
        expected = logits(model, params, batch)
        np.testing.assert_allclose(state["x"], expected, rtol=1e-4, atol=1e-4)


# What meets the weights of an encoder is checked in `test_inputs.py` as well.
@pytest.mark.parametrize("name", ["tied", pytest.param("nano", marks=pytest.mark.slow)])
def test_statistics_are_of_the_rows_that_meet_a_weight(make_shallow, batch_of, name):
    model, params = make_shallow(name)
    leaves, batches = dict(boxes.path_items(params)), [batch_of(model, seed=s) for s in (0, 1)]
    states, observed = stages.first_states(model, batches), {}
    kinds = {name: getattr(stages, name) for name in ("ABS_SUM", "ABS_MAX", "RANGE", "ROWS")}

    def measure(rows, valid):
        return {name: kind.measure(rows, valid) for name, kind in kinds.items()}

    def join(a, b):
        return {name: kind.join(a[name], b[name]) for name, kind in kinds.items()}

    everything, reduced = stages.Statistic(measure, join), {name: {} for name in kinds}
    for stage in stages.stages(model):
        mine = leaves_of(stage, leaves)
        for path, result in stage.collect(mine, states, everything).items():
            for name in kinds:
                reduced[name][path] = result[name]
        states = stage.run(mine, states)
    run = jax.jit(functools.partial(model.apply, mutable=["inputs"]))
    for batch in batches:
        inputs = {name: batch[name] for name in ("images", "audio") if name in batch}
        sown = run({"params": params}, batch["tokens"], **inputs)[1]
        for path, rows in jax.tree_util.tree_flatten_with_path(sown["inputs"])[0]:
            names = [key.key for key in path if hasattr(key, "key")]
            observed.setdefault("/".join((*names[:-1], "weight")), []).append(np.float64(rows))
    assert set(observed) == set(reduced["ROWS"])
    for path, parts in observed.items():
        rows = np.concatenate(parts)
        close = {"rtol": 1e-3, "atol": 1e-3}
        np.testing.assert_allclose(reduced["ROWS"][path], rows, **close)
        assert reduced["ABS_SUM"][path]["count"] == len(rows)
        np.testing.assert_allclose(reduced["ABS_SUM"][path]["sum"], np.abs(rows).sum(0), **close)
        np.testing.assert_allclose(reduced["ABS_MAX"][path], np.abs(rows).max(0), **close)
        np.testing.assert_allclose(reduced["RANGE"][path]["low"], rows.min(0), **close)
        np.testing.assert_allclose(reduced["RANGE"][path]["high"], rows.max(0), **close)


def test_layers_alike_share_a_compiled_program(make_member):
    model, _ = make_member("edge")
    layers = [s.module for s in stages.stages(model) if s.name.startswith("decoder/layers")]
    assert layers[0] == layers[1]
    pruned, _ = make_member("pruned")
    layers = [s.module for s in stages.stages(pruned) if s.name.startswith("decoder/layers")]
    assert layers[0] != layers[1]


class Stock(nn.Module):
    """A module that is none of ours."""

    sizes: tuple[int, ...] = (9, 5, 16, 7)

    @nn.compact
    def __call__(self, tokens):
        vocabulary, width, hidden, outputs = self.sizes
        x = nn.Dense(hidden, name="first")(nn.Embed(vocabulary, width)(tokens))
        return nn.Dense(outputs, name="second")(nn.relu(x))


def test_a_stock_module_is_one_stage_whose_inputs_are_seen():
    model, tokens = Stock(), jnp.arange(8).reshape(2, 4)
    params = init(model, tokens)["params"]
    (stage,) = stages.stages(model)
    states = stages.first_states(model, [{"tokens": tokens}])
    result = stage.collect(dict(boxes.path_items(params)), states, stages.ROWS)
    assert {path: rows.shape for path, rows in result.items()} == {
        "first/kernel": (8, 5),
        "second/kernel": (8, 16),
    }


def needing_calibration():
    return [
        name
        for name in ("quantize.gptq", "quantize.awq", "quantize.smoothquant", "quantize.adaround")
        if issubclass(registered(name), LayerwiseTransform)
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda batches: None, "needs calibration= batches"),
        (lambda batches: [], "needs calibration= batches"),
        (lambda batches: [{"tokens": batches[0]["tokens"]}], "reads images"),
        (
            lambda batches: [{k: v for k, v in batches[0].items() if k != "audio"}],
            "reads audio",
        ),
        (lambda batches: [batches[0] | {"tokens": batches[0]["tokens"] + 30}], "another tokenizer"),
        (lambda batches: [batches[0] | {"tokens": -batches[0]["tokens"]}], "another tokenizer"),
        (lambda batches: [batches[0] | {"sound": 1}], "unknown key 'sound'"),
    ],
)
@pytest.mark.parametrize("name", needing_calibration())
def test_calibration_that_does_not_fit_is_refused(make_member, batch_of, name, change, message):
    model, params = make_member("nano")
    transform = getattr(quantize, name.partition(".")[2])()
    with pytest.raises(DataError, match=message):
        transform(model, params, change([batch_of(model)]))


def test_a_known_lack_is_allowed(make_member, batch_of):
    model, params = make_member("nano")
    batch = {k: v for k, v in batch_of(model).items() if k not in ("images", "audio")}
    batch["tokens"] = np.random.default_rng(0).integers(10, 48, (2, 24)).astype(np.int32)
    transform = quantize.gptq(
        "int4",
        where="^decoder/layers/0/attention/q_proj",
        solver={"sweeps": 0, "refit": False, "propagate": 0.0},
    )
    _, after, _ = transform(model, params, [batch], without=["images", "audio"])
    assert boxes.stored_bytes(after) < boxes.stored_bytes(params)


def test_what_is_quantized_already_is_refused_by_name(make_member):
    model, params = make_member("tied")
    recipe = chain(quantize.rtn("int4", where="^decoder/"), quantize.rtn("int8", where="o_proj"))
    with pytest.raises(RecipeError, match="o_proj/weight, which is int4-channel already"):
        recipe(model, params)


@pytest.mark.parametrize("name", ["rtn", pytest.param("gptq", marks=pytest.mark.slow), "qat"])
def test_no_full_precision_copy_stays_alive(batch_of, name):
    # Matrices alike share a program: 24 columns, and 24 rows but for two of them.
    alike = {"num_kv_heads": 3, "num_heads": 3, "intermediate_size": 24, "hidden_size": 24}
    batch = {"tokens": np.arange(24, dtype=np.int32).reshape(2, 12) % 7}
    if name == "qat":
        model, options = Stock((16, 16, 16, 16)), {"train": {"steps": 2}}
        params = init(model, batch["tokens"])["params"]
    else:
        model, params = init_glm(tiny_config({"num_layers": 1, **alike}))
        batch, options = batch_of(model), {}
    transform = getattr(quantize, name)("int4", **options)
    dense = [
        weakref.ref(leaf) for path, leaf in boxes.path_items(params) if boxes.is_matrix(path, leaf)
    ]
    _, small, _ = transform(model, params, [batch], rng=jax.random.key(0))
    del params
    gc.collect()
    assert [ref() for ref in dense if ref() is not None] == []
    assert all(isinstance(leaf, boxes.Quantized) for leaf in matrices(small))


def matrices(params):
    return [leaf for path, leaf in boxes.path_items(params) if boxes.is_matrix(path, leaf)]
