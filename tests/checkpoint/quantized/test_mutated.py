"""Mutations of quantized checkpoints: refused in one line, or loaded with finite weights.

A changed code, scale or zero point cannot be told from a right one, and loads.
"""

import json

import numpy as np
import pytest

import glm_edge as ge
from glm_edge import params as boxes
from glm_edge.checkpoint.safetensors import SafetensorsFile, write_safetensors
from tests.checkpoint.mutations import INDEX, load_mutated
from tests.checkpoint.quantized import packers

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": False, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"}


def matrices():
    return {
        name: packers.draw(shape, 4, 16, seed)
        for seed, (name, shape) in enumerate(packers.MODULES.items())
    }


def in_shards(directory, count=3):
    """Store the weights in several files, so that the index can be changed too."""
    files = list(map(SafetensorsFile, directory.glob("*.safetensors")))
    tensors = {name: file.read(name) for file in files for name in file.tensors}
    for file in files:
        file.path.unlink()
    weight_map = {}
    for shard in range(count):
        name = f"model-{shard + 1:05d}-of-{count:05d}.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[shard::count]}
        write_safetensors(directory / name, part)
        weight_map |= dict.fromkeys(part, name)
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def make_gptq(path):
    modules = {name: packers.gptq(matrix, 4, 1) for name, matrix in matrices().items()}
    return packers.write(path, GPTQ, modules)


def make_awq(path):
    modules = {name: packers.awq(matrix) for name, matrix in matrices().items()}
    return packers.write(path, AWQ, modules)


def make_compressed_tensors(path, **options):
    model, params = ge.load(make_awq(path / "first"))
    if options:
        params = boxes.map_with_path(lambda _, leaf: boxes.dense(leaf), params)
        params = ge.quantize.rtn("int8", where="^decoder/")(model, params)[1]
    with pytest.warns(UserWarning, match="without a tokenizer"):
        return ge.export.compressed_tensors(model, params, path / "second", **options).path


MAKERS = {
    "gptq": make_gptq,
    "awq": make_awq,
    "pack-quantized": make_compressed_tensors,
    "int-quantized": lambda path: make_compressed_tensors(path, activations="int8_dynamic"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", MAKERS)
def test_many_mutations_are_refused_or_load_finite_weights(tmp_path, watch, kind):
    check(tmp_path, kind, range(10, 160))


@pytest.mark.parametrize("kind", ["gptq", "pack-quantized"])
def test_mutations_are_refused_or_load_finite_weights(tmp_path, watch, kind):
    check(tmp_path, kind, range(10))


def assert_finite(params):
    for path, leaf in boxes.path_items(params):
        assert np.isfinite(np.asarray(boxes.dense(leaf), np.float32)).all(), path


def check(tmp_path, kind, seeds):
    (tmp_path / "made").mkdir()
    made = in_shards(MAKERS[kind](tmp_path / "made"))
    # Compiles before the first limit of time.
    ge.load(made)
    files = {path.name: path.read_bytes() for path in made.iterdir() if path.is_file()}
    loaded = load_mutated(tmp_path / "mutated", files, seeds, assert_finite)
    assert 0 < loaded < len(seeds)
