"""Random checkpoints of published shapes, and the verdict on how they load."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

import glm_edge as ge
from experiments.bench import load as bench_load
from experiments.golden import make_checkpoint
from glm_edge.errors import OutputError
from glm_edge.params import path_items

SMALL = make_checkpoint.CONFIGS["glm_4_9b_0414"] | {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


@pytest.mark.parametrize(
    ("shape", "count"),
    [
        ("glm_edge_1_5b", 1_472_055_296),
        ("glm_edge_4b", 4_327_984_128),
        ("glm_4_9b", 9_399_951_360),
        ("glm_4_9b_0414", 9_400_279_040),
    ],
)
def test_shapes_have_the_published_number_of_parameters(shape, count):
    shapes = make_checkpoint.tensor_shapes(make_checkpoint.CONFIGS[shape])
    assert sum(map(math.prod, shapes.values())) == count


def test_made_checkpoint_loads_for_any_shards(tmp_path):
    """A made checkpoint loads and does not depend on its shards."""
    loaded = []
    for name, size in (("one", 1e9), ("many", 3000)):
        make_checkpoint.write(SMALL, str(tmp_path / name), size, seed=4)
        model, params = ge.load(tmp_path / name)
        loaded.append({path: np.asarray(leaf) for path, leaf in path_items(params)})
    assert model.config.decoder.sandwich_norm
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    assert loaded[0].keys() == loaded[1].keys()
    for path, array in loaded[0].items():
        assert array.dtype.name == "bfloat16"
        np.testing.assert_array_equal(array, loaded[1][path])
    embedding = loaded[0]["embed/weight"].astype(np.float32)
    assert abs(embedding.mean()) < 0.002
    assert 0.018 < embedding.std() < 0.022
    total = json.loads((tmp_path / "one" / make_checkpoint.INDEX).read_text())["metadata"]
    assert total == {"total_size": sum(array.nbytes for array in loaded[0].values())}


def test_nothing_is_overwritten_unasked_nor_begun_on_a_full_disk(tmp_path, monkeypatch):
    out = tmp_path / "out"
    make_checkpoint.write(SMALL, str(out), 1e9, seed=0)
    with pytest.raises(OutputError, match="not empty"):
        make_checkpoint.write(SMALL, str(out), 1e9, seed=0)
    make_checkpoint.write(SMALL, str(out), 1e9, seed=0, overwrite=True)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10**7))
    with pytest.raises(OutputError, match=r"needs 0\.1 GB, 0\.0 GB are free"):
        make_checkpoint.write(SMALL, str(tmp_path / "other"), 1e9, seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def run(seconds: float, peak: int) -> dict[str, float]:
    return {"seconds": seconds, "peak_bytes": peak, "imported_bytes": 1}


@pytest.mark.parametrize(
    ("ours", "memory_holds", "time_holds"),
    [(run(4.0, 1200), True, True), (run(4.1, 1200), True, False), (run(4.0, 1201), False, True)],
)
def test_the_verdict_is_over_the_fastest_reader_and_the_bytes(ours, memory_holds, time_holds):
    runs = {
        "glm_edge": [run(1.0, 1), ours, run(9.0, 9999)],
        "safetensors torch": [run(2.0, 3000)] * 3,
        "safetensors flax": [run(3.0, 3000)] * 3,
        "transformers": [run(0.1, 100)] * 3,
    }
    report = bench_load.summary(runs, 1000)
    assert report["fastest"] == "safetensors torch"
    assert (report["memory_holds"], report["time_holds"]) == (memory_holds, time_holds)


def test_a_reader_is_measured_in_this_process(tmp_path):
    make_checkpoint.write(SMALL, str(tmp_path / "out"), 1e9, seed=0)
    measured = bench_load.measure("safetensors flax", tmp_path / "out")
    assert measured["seconds"] > 0
    # Linux counts pages per core and adds them up in batches, so that even a peak can fall a bit.
    assert measured["peak_bytes"] >= 0.99 * measured["imported_bytes"] > 10**6
