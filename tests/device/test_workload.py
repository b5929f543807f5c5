"""Operations and bytes against `ge.cost`, the plan's bytes, and a cache in memory."""

import dataclasses

import jax
import pytest

from glm_edge import params as boxes
from glm_edge.compress import cost
from glm_edge.compress.allocate.knapsack import bytes_with, format_everything
from glm_edge.configs import preset
from glm_edge.device import workload
from glm_edge.errors import ConfigError, DataError
from glm_edge.models.glm import init_cache
from glm_edge.models.multimodal import MultimodalGLM
from glm_edge.params import Format
from tests.tiny_models import tiny_config


def pruned_config(tie=True):
    """A decoder whose layers have different widths, and both encoders."""
    decoder = {
        "num_heads": (4, 2),
        "num_kv_heads": (2, 1),
        "intermediate_size": (64, 24),
        "tie_embeddings": tie,
    }
    return tiny_config(decoder=decoder, vision={}, speech={})


@pytest.mark.parametrize("config", [pruned_config(), pruned_config(False), preset("nano")])
@pytest.mark.parametrize("context", [1, 128])
def test_operations_are_those_of_cost(config, context):
    counts = cost.flops(MultimodalGLM(config), context)
    sizes = workload.bytes_by_path(workload.abstract_params(config))
    assert workload.total(workload.decode_ops(config, sizes, context)).ops == counts["token"]
    assert workload.total(workload.image_ops(config, sizes)).ops == counts["image"]
    assert workload.total(workload.clip_ops(config, sizes)).ops == counts["clip"]


@pytest.mark.parametrize("tie", [True, False])
def test_a_prompt_is_the_sum_of_its_tokens_with_one_head(tie):
    config = pruned_config(tie)
    sizes = workload.bytes_by_path(workload.abstract_params(config))
    tokens = 17
    each = [workload.decode_ops(config, sizes, n) for n in range(1, tokens + 1)]
    head = each[0][-1].ops
    expected = sum(workload.total(ops).ops for ops in each) - (tokens - 1) * head
    assert workload.total(workload.prefill_ops(config, sizes, tokens)).ops == expected


@pytest.mark.parametrize("tie", [True, False])
def test_bytes_are_those_of_the_plan(tie):
    config = pruned_config(tie)
    params = workload.abstract_params(config)
    formats = format_everything(params, Format.parse("int4-g8"), Format("int8"))
    sizes = workload.bytes_by_path(params, formats)
    assert sum(sizes.values()) == bytes_with(params, formats)
    # Everything is read by a token or by an encoder, besides the rows of an untied table.
    table = sizes["embed/embedding"] if "embed/embedding" in sizes else sizes["embed/weight"]
    token = workload.total(workload.decode_ops(config, sizes, 8)).weight_bytes
    row = -(-table // config.decoder.vocab_size)
    encoders = [*workload.image_ops(config, sizes), *workload.clip_ops(config, sizes)]
    read = token - row + sum(op.weight_bytes for op in encoders)
    assert read == sum(sizes.values()) - (0 if tie else table)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
def test_bytes_of_the_cache_are_those_of_a_cache(dtype):
    config = pruned_config()
    cache = jax.eval_shape(lambda: init_cache(config.decoder, 1, 24, dtype)["layers"])
    peak = workload.peak_bytes(config, {"embed/embedding": 96}, 24, dtype)
    assert peak["cache"] == boxes.stored_bytes(cache)


def test_wrong_lengths_and_missing_parts_are_refused():
    config = pruned_config()
    sizes = workload.bytes_by_path(workload.abstract_params(config))
    limit = config.decoder.max_position_embeddings
    for context in (0, limit + 1):
        with pytest.raises(DataError, match=f"context {context} must be in 1..{limit} tokens"):
            workload.decode_ops(config, sizes, context)
    with pytest.raises(ConfigError, match="no parameter below 'embed/'"):
        workload.decode_ops(config, {}, 8)
    blind = dataclasses.replace(config, vision=None)
    with pytest.raises(ConfigError, match="a model with vision is needed"):
        workload.image_ops(blind, sizes)
