"""What is handed to peers and back, checked without them; and those installed, against numpy."""

import json
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

import glm_edge as ge
from experiments.bench.peers import ai_edge, exchange, ours
from experiments.bench.peers.exchange import Stored, Task
from experiments.common.child import Child, ChildError
from glm_edge.checkpoint.hugging_face import decoders

ROOT = Path(__file__).parents[3]
RNG = np.random.default_rng(3)
PATH = "decoder/layers/1/attention/q_proj/weight"


def test_a_result_comes_back_with_the_bits_of_all_its_matrices(tmp_path):
    weights = {name: RNG.normal(size=(4, 8)).astype(np.float32) for name in ("a", "b")}
    stored = {"a": Stored(weights["a"] + 1, 130, 100), "b": Stored(weights["b"], 70)}
    exchange.write(tmp_path / "o.npz", stored, weights, {"seconds": 2.0})
    dense, meta = exchange.read(tmp_path / "o.npz")
    assert (meta["stored_bits"], meta["packed_bits"], meta["weights"]) == (200, 170, 64)
    assert meta["seconds"] == 2.0
    for name in weights:
        np.testing.assert_array_equal(dense[name], stored[name].dense)


@pytest.mark.parametrize("wrong", [np.zeros((8, 4)), np.full((4, 8), np.nan)])
def test_a_result_of_another_shape_or_not_finite_is_refused(tmp_path, wrong):
    with pytest.raises(ValueError, match="expected finite"):
        exchange.write(tmp_path / "o.npz", {"a": Stored(wrong, 1)}, {"a": np.zeros((4, 8))}, {})
    assert not (tmp_path / "o.npz").exists()


def test_equal_inputs_are_stored_once_and_read_by_every_name(tmp_path):
    rows = {name: RNG.normal(size=(9, 4)).astype(np.float32) for name in ("q", "other")}
    rows["k"] = rows["q"].copy()
    path, tokens = tmp_path / "i.npz", np.arange(6).reshape(2, 3)
    exchange.write_inputs(path, rows, tokens)
    with np.load(path) as file:
        assert {"q", "other"} < set(file.files)
        assert "k" not in file.files
    task = Task({}, path, {}, None)
    for name, array in rows.items():
        np.testing.assert_array_equal(task.rows(name), array)
    np.testing.assert_array_equal(task.rows("k", limit=3), rows["q"][[0, 4, 8]])
    np.testing.assert_array_equal(task.tokens(), tokens)
    with pytest.raises(ValueError, match="calibration"):
        Task({}, None, {}, None).rows("q")


def test_a_peer_that_is_not_installed_says_so(tmp_path):
    script = tmp_path / "absent.py"
    script.write_text(
        "from experiments.bench.peers.exchange import serve\n"
        "serve(lambda task: {}, {'no-such-peer': 'no_such_peer'})\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert json.loads(done.stdout)["missing"].startswith("no-such-peer is not installed")


def test_a_peer_answers_with_its_matrices(tmp_path, monkeypatch):
    """A peer reads a task from a child's standard input and writes its matrices."""
    weight = RNG.normal(size=(4, 8)).astype(np.float32)
    np.savez(tmp_path / "w.npz", **{PATH: weight})
    (tmp_path / "peer.py").write_text(
        "from experiments.bench.peers.exchange import Stored, serve\n"
        "serve(lambda task: {p: Stored(2 * w, 8) for p, w in task.weights.items()}, {})\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    fields = {"weights": str(tmp_path / "w.npz"), "options": {}, "checkpoint": str(tmp_path)}
    with Child("peer") as peer:
        peer.ask("quantize", out=str(tmp_path / "o.npz"), **fields)
        with pytest.raises(ChildError, match="quantize: FileNotFoundError"):
            peer.ask("quantize", out="o.npz", **{**fields, "weights": "none.npz"})
    dense, meta = exchange.read(tmp_path / "o.npz")
    np.testing.assert_array_equal(dense[PATH], 2 * weight)
    assert (meta["weights"], meta["stored_bits"]) == (32, 8)


def test_layer_names_equal_hugging_face_names():
    """Names of layers are those that a hugging face directory gets."""
    entries = decoders.decoder_entries(ge.load(ge.shipped("nano"))[0].config.decoder, "model.", "")
    matrices = [e for e in entries if e.paths[0].endswith("_proj/weight")]
    assert len(matrices) == 24
    for entry in matrices:
        assert f"{exchange.hugging_face_name(entry.paths[0])}.weight" == entry.names[0]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_tflite_integers_are_read_lowest_bits_first(bits):
    """Packed integers of a tflite buffer are read lowest bits first."""
    low = -(2 ** (bits - 1))
    values = RNG.integers(low, -low, size=24)
    data = bytearray()
    for start in range(0, len(values), 8 // bits):
        byte = sum(
            (int(v) % 2**bits) << bits * i for i, v in enumerate(values[start:][: 8 // bits])
        )
        data.append(byte)
    np.testing.assert_array_equal(ai_edge._unpack(np.frombuffer(data, np.uint8), bits), values)


@pytest.mark.parametrize(("format", "bits"), [("int4-g32", 4 + 16 / 32), ("int4", 4 + 32 / 64)])
def test_bits_count_codes_and_scales(format, bits):
    """Bits of ours hold codes and scales of the matrices that match."""
    weight = jnp.asarray(RNG.normal(size=(16, 64)), jnp.float32)
    params = {"decoder": {"a": {"weight": weight}}, "head": {"weight": weight}}
    transform = ge.quantize.rtn(format, where="^decoder/")
    _, params, _ = transform(nn.Module(), params)
    measured = ours.sizes(params, "^decoder/")
    assert measured["stored_bits"] / measured["weights"] == bits
    assert measured["weights"] == weight.size
    assert ours.sizes(params, "")["stored_bits"] == bits * weight.size + 32 * weight.size


def task_of(weight: np.ndarray, tmp_path: Path, **options) -> Task:
    rows = RNG.normal(size=(128, weight.shape[1])).astype(np.float32)
    exchange.write_inputs(tmp_path / "i.npz", {PATH: rows}, np.zeros((1, 2), np.int32))
    return Task({PATH: weight}, tmp_path / "i.npz", json.loads(json.dumps(options)), None)


def check_symmetric(dense: np.ndarray, weight: np.ndarray, group: int, top: float, atol: float):
    """Against round-to-nearest in float64, the largest magnitude of a group on `top`.

    That magnitude itself is left out: on a `top` of 7.5 it ties, and either neighbour is right.
    """
    rows = weight.astype(np.float64).reshape(-1, group)
    largest = np.abs(rows).max(1, keepdims=True)
    expected = np.round(rows / (largest / top)) * (largest / top)
    compared = np.abs(rows) < largest
    np.testing.assert_allclose(dense.reshape(rows.shape)[compared], expected[compared], atol=atol)


def test_qwix_rounds_as_numpy_does(tmp_path):
    pytest.importorskip("qwix")
    from experiments.bench.peers import qwix

    weight = RNG.normal(size=(8, 64)).astype(np.float32)
    task = task_of(weight, tmp_path, algorithm="rtn", qtype="int4", tile=32)
    stored = qwix.quantize(task)[PATH]
    check_symmetric(stored.dense, weight, 32, 7.5, 1e-6)
    assert stored.stored_bits == weight.size * (4 + 32 / 32)


def test_llama_cpp_rounds_as_numpy_does(tmp_path):
    pytest.importorskip("gguf")
    from experiments.bench.peers import ggml

    weight = RNG.normal(size=(8, 64)).astype(np.float32)
    stored = ggml.quantize(task_of(weight, tmp_path, type="Q8_0"))[PATH]
    check_symmetric(stored.dense, weight, 32, 127, 2e-3)
    assert stored.stored_bits == weight.size * 8.5


def test_torchao_rounds_as_numpy_does(tmp_path):
    pytest.importorskip("torchao")
    from experiments.bench.peers import torchao

    weight = RNG.normal(size=(8, 64)).astype(np.float32)
    stored = torchao.quantize(task_of(weight, tmp_path, config="int8"))[PATH]
    check_symmetric(stored.dense, weight, 64, 127.5, 1e-4)
    assert stored.stored_bits == weight.size * (8 + 32 / 64)
