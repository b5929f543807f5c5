"""Batches with a domain: it reaches no model, and all consumers of calibration accept it."""

import jax
import numpy as np
import pytest

import glm_edge as ge
from glm_edge import params as boxes
from glm_edge.compress import (
    Calibration,
    OnPolicy,
    TrainOptions,
    batches,
    distill,
    prune,
    quantize,
)
from glm_edge.compress.allocate.divergence import split
from glm_edge.compress.allocate.plan import plan
from glm_edge.compress.calibration import called
from glm_edge.compress.distill.state import calibration_digest
from glm_edge.compress.domains import every_second, named_domains
from glm_edge.compress.layerwise.stream import compress_checkpoint
from glm_edge.compress.prune.scores.influence import influence
from glm_edge.errors import DataError, OutputError
from glm_edge.generate import fit_exits
from glm_edge.models.vision import VisionEncoder
from tests.marks import slow_unless
from tests.tiny_models import init

DECODER = "^decoder/"
ONE = "layers/0/mlp/down_proj"
TRAIN = TrainOptions(steps=2)
MASKED = prune.magnitude(0.5, where=ONE)


def named(calibration, names=("a", "b")):
    return [{**batch, "domain": names[i % len(names)]} for i, batch in enumerate(calibration)]


def assert_equal(one, other):
    arrays, spec = boxes.to_flat(one)
    others, other_spec = boxes.to_flat(other)
    assert spec == other_spec
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, others[name], err_msg=name)


def test_to_device_drops_the_domain(small, calibration):
    model, _ = small
    plain, with_name = (
        batches.to_device(model, b) for b in (calibration[0], named(calibration)[0])
    )
    assert with_name.keys() == plain.keys() == {"tokens"}
    assert batches.to_device(model, {**calibration[0], "domain": None}).keys() == {"tokens"}


@pytest.mark.parametrize("domain", [3, b"wiki", ["wiki"], np.array(["wiki"])])
def test_check_refuses_a_domain_that_is_not_a_string(small, calibration, domain):
    model, _ = small
    wrong = [calibration[0], {**calibration[1], "domain": domain}]
    message = "^mine: calibration batch 1: domain must be a string .* not " + type(domain).__name__
    with pytest.raises(DataError, match=message):
        batches.check(model, wrong, "mine")


def test_functions_of_a_calibration_see_no_domain_but_arrays():
    def apply(model, variables, batch):
        return batch

    for batch, keys in (
        ({"x": np.ones((2, 3)), "domain": "wiki"}, {"x"}),
        ({"x": np.ones((2, 3)), "domain": np.ones(2)}, {"x", "domain"}),
    ):
        reader = called(None, Calibration([batch], apply=apply))
        assert batches.to_device(reader, batch)["batch"].keys() == keys


FAMILIES = {
    "gptq": quantize.gptq("int4-g8", where=ONE, solver={"shrinkage": 0.0}),
    "sparsegpt": prune.sparsegpt(0.5, where=ONE, solver={"shrinkage": 0.0}),
    "awq": quantize.awq("int4-g8", where=DECODER),
    "smoothquant": quantize.smoothquant(where=DECODER),
    "adaround": quantize.adaround("int4-g8", where=ONE, steps=2),
    "blockwise": quantize.blockwise("int4-g8", where=ONE, train=TRAIN),
    "qat": quantize.qat("int4-g8", where=DECODER, train=TRAIN),
    "distill_scales": ge.chain(
        quantize.rtn("int4-g8", where=DECODER), quantize.distill_scales(train=TRAIN)
    ),
    "activations": ge.chain(quantize.rtn("int8", where=DECODER), quantize.activations()),
    "distill": ge.chain(MASKED, distill(train=TRAIN)),
    "mixture": ge.chain(MASKED, distill(train=TRAIN, mixture={"text": 1.0})),
    "on_policy": ge.chain(MASKED, distill(train=TRAIN, on_policy=OnPolicy(share=1.0, prompt=4))),
    "wanda": prune.mask(0.5, score="wanda", where=DECODER),
    "taylor": prune.mask(0.5, score="taylor", where=DECODER),
    "measured": prune.mask(0.5, allocation="measured", levels=(0.0, 0.5), where=ONE),
    "structured": prune.structured(heads=0.25, neurons=0.5),
    "depth": prune.depth(layers=1, score="loss"),
    "influence": prune.depth(layers=1),
}
QUICK = ("gptq", "smoothquant", "wanda", "depth")


@pytest.mark.parametrize("name", slow_unless(QUICK.__contains__, FAMILIES))
def test_transform_gives_equal_bytes_with_domains(name, make_model, calibration):
    model, params = make_model()
    rng = jax.random.key(0)
    results = [
        FAMILIES[name](model, params, data, rng)[1] for data in (calibration, named(calibration))
    ]
    assert_equal(*results)


@pytest.mark.slow
def test_plan_takes_batches_with_domains(make_shallow, batch_of):
    model, params = make_shallow("edge")
    data = named([batch_of(model, seed=seed) for seed in range(4)])
    result = plan(model, params, 7000, ("int8", "int4-g8"), data, transform="awq")
    assert result.held_out == {"text": 2}


def test_split_holds_out_batches_of_every_domain(calibration):
    data = named([*calibration, *calibration])
    calibrating, held_out = split(data, reads=True)
    for half in (calibrating, held_out["text"]):
        assert [batch["domain"] for batch in half] == ["a", "a", "b", "b"]
    plain, _ = every_second(calibration)
    assert plain == calibration[::2]
    single = named(calibration, "abcd")
    assert every_second(single) == (single[::2], single[1::2])


def test_named_domains_are_in_the_order_of_batches():
    assert named_domains(["b", None, "a", "b"]) == ("b", "a")
    assert named_domains([None]) == ()


def test_influence_of_an_encoder_takes_batches_with_domains(make_member):
    config = make_member("edge_v")[0].config
    model = VisionEncoder(config.vision, config.decoder.hidden_size)
    size = (2, *config.vision.image_size, config.vision.channels)
    images = np.random.default_rng(0).normal(size=size).astype(np.float32)
    params = init(model, images)["params"]
    scores = influence(model, params, named([{"images": images}]), "vision")
    np.testing.assert_array_equal(scores, influence(model, params, [{"images": images}], "vision"))


def test_fit_exits_takes_batches_with_domains(small, calibration):
    model, params = small
    maps, expected = (fit_exits(model, params, d, (1,)) for d in (named(calibration), calibration))
    jax.tree.map(np.testing.assert_array_equal, maps, expected)


def test_digest_of_calibration_covers_the_domain(calibration):
    digests = [
        calibration_digest(data)
        for data in (calibration, named(calibration), named(calibration, ("a", "c")))
    ]
    assert len(set(digests)) == 3
    assert calibration_digest(named(calibration)) == digests[1]


def test_compress_checkpoint_with_domains_equals_memory(make_model, calibration, tmp_path):
    model, params = make_model(num_layers=1)
    transform = quantize.gptq("int4-g8", where=ONE)
    source = ge.save(model, params, tmp_path / "source", extras={})
    data = named(calibration)
    report = compress_checkpoint(source, tmp_path / "out", transform, data)
    assert "by 2 domains" in report.rows[0].action
    assert_equal(ge.load(tmp_path / "out")[1], transform(model, params, data)[1])


def test_training_with_domains_resumes(make_model, calibration, tmp_path):
    model, params = make_model(num_layers=1)
    train = TrainOptions(steps=2, state_dir=tmp_path / "state")
    step = ge.chain(MASKED, distill(train=train))
    first, second = (step(model, params, named(calibration))[1] for _ in range(2))
    assert_equal(first, second)
    with pytest.raises(OutputError, match="another calibration"):
        step(model, params, named(calibration, ("a", "c")))
