"""MNN files hold our integers and agree with JAX in MNN's interpreter."""

import dataclasses
import json
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_edge import export
from glm_edge import params as boxes
from glm_edge.errors import ExportError, MissingExtraError, OutputError
from glm_edge.export.common.directory import DESCRIPTION, write_description
from glm_edge.export.common.signatures import signatures
from glm_edge.export.mnn.export import CONVERTER, mnn
from glm_edge.export.mnn.reader import read_weights
from glm_edge.models.multimodal import MultimodalGLM
from glm_edge.params import Format, Quantized

MNN = pytest.importorskip("MNN")
pytest.importorskip("onnx")

SLOTS, LENGTH = 64, 32
TOLERANCE = 1e-5


def feed(signature, seed=0):
    """Random inputs; a step writes from slot 20 on and sees what is before."""
    rng, result = np.random.default_rng(seed), {}
    for name, struct in signature.inputs.items():
        complete = np.issubdtype(struct.dtype, np.integer)
        result[name] = (
            rng.integers(0, 60, struct.shape).astype(np.int32)
            if complete
            else rng.normal(size=struct.shape).astype(np.float32)
        )
    if "input_pos" in result:
        result["input_pos"] = np.arange(20, 20 + len(result["input_pos"]), dtype=np.int32)
        visible = np.arange(SLOTS) <= result["input_pos"][:, None]
        result["mask"] = np.where(visible, 0.0, -1e9).astype(np.float32)[None, None]
    return result


def tensor(array):
    kind = MNN.Halide_Type_Int if array.dtype == np.int32 else MNN.Halide_Type_Float
    return MNN.Tensor(array.shape, kind, array, MNN.Tensor_DimensionType_Caffe)


def run(directory, signature, inputs, params):
    """Runs a graph; returns the largest error of each output, in parts of its largest number."""
    expected = jax.jit(signature.function)(params, inputs)
    return errors(outputs_of(directory, signature.name, inputs, expected), expected)


def errors(actual, expected):
    assert {name.removesuffix("_out") for name in actual} == expected.keys()
    worst = {}
    for name, value in actual.items():
        reference = np.asarray(expected[name.removesuffix("_out")])
        worst[name] = float(np.abs(value - reference).max() / np.abs(reference).max())
    return worst


def outputs_of(directory, graph, inputs, expected):
    """Outputs of a graph, of the shapes of those expected."""
    interpreter = MNN.Interpreter(str(directory / f"{graph}.mnn"))
    interpreter.setExternalFile(str(directory / "weights.bin"))
    session = interpreter.createSession({"backend": "CPU", "numThread": 1, "precision": "high"})
    for name, array in inputs.items():
        interpreter.getSessionInput(session, name).copyFrom(tensor(array))
    interpreter.runSession(session)
    outputs = interpreter.getSessionOutputAll(session)
    arrays = {}
    for name, output in outputs.items():
        shape = expected[name.removesuffix("_out")].shape
        # A tensor does not keep the array that it is a view of.
        stored = np.zeros(shape, np.float32)
        actual = tensor(stored)
        output.copyToHostTensor(actual)
        arrays[name] = np.array(actual.getNumpyData()).reshape(shape)
    return arrays


@pytest.fixture(scope="module")
def exported_mnn(model, params, tmp_path_factory):
    path = tmp_path_factory.mktemp("mnn") / "small"
    return mnn(model, params, path, (LENGTH,), SLOTS, prefill_logits=True)


@pytest.fixture(scope="module")
def offered(model):
    return {s.name: s for s in signatures(model, (LENGTH,), SLOTS, prefill_logits=True)}


def test_files_hold_our_integers_and_scales_bit_for_bit(exported_mnn, params):
    stored = read_weights(exported_mnn.path)
    boxed = {p: leaf for p, leaf in boxes.path_items(params) if isinstance(leaf, Quantized)}
    assert stored.keys() == boxed.keys()
    for path, leaf in boxed.items():
        assert stored[path].type == leaf.format.qtype
        np.testing.assert_array_equal(stored[path].values, np.asarray(leaf.codes()))
        np.testing.assert_array_equal(
            stored[path].scale, np.asarray(leaf.scale.astype(jnp.float32))
        )


def test_weights_are_stored_once_and_packed(exported_mnn, params):
    # The embedding is stored for look-ups and for the head; scales are float32.
    embed = params["embed"]["weight"].codes().size
    stored = boxes.stored_bytes(params) + embed
    files = list(exported_mnn.path.iterdir())
    assert exported_mnn.file_bytes == sum(file.stat().st_size for file in files)
    assert (exported_mnn.path / "weights.bin").stat().st_size <= 1.1 * stored


@pytest.mark.parametrize("name", ["embed", "decode", f"prefill_{LENGTH}", "vision", "speech"])
def test_graphs_agree_with_jax(name, exported_mnn, offered, params):
    worst = run(exported_mnn.path, offered[name], feed(offered[name]), params)
    assert max(worst.values()) < TOLERANCE


def short_windows(count=1):
    return [export.Window(np.arange(3 + n, 15 + n, dtype=np.int32)) for n in range(count)]


def test_other_integers_give_other_results(exported_mnn, offered, model, params, tmp_path):
    """The bytes in the file are the ones that are multiplied with."""
    changed = shutil.copytree(exported_mnn.path, tmp_path / "changed")
    places = json.loads((changed / DESCRIPTION).read_text())["parameters"]
    _, start, length, _ = places["decoder/layers/0/attention/o_proj/weight"]
    content = bytearray((changed / "weights.bin").read_bytes())
    # Of the second half, behind what describes the codes, the one that changes most.
    at = start + length // 2
    high = np.frombuffer(content[at : start + length], np.uint8) >> 4
    content[at + int(np.abs(15 - 2 * high.astype(int)).argmax())] ^= 0xF0
    (changed / "weights.bin").write_bytes(content)
    inputs = feed(offered["decode"])
    assert run(changed, offered["decode"], inputs, params)["logits"] > 10 * TOLERANCE
    path = "decoder/layers/0/attention/o_proj/weight"
    with pytest.raises(ExportError, match=f"damaged, .*1 values of {path} differ"):
        export.verify(changed, model, exported_mnn.params, short_windows())


@pytest.mark.slow
def test_a_directory_that_runs_as_jax_does_is_marked_as_verified(exported_mnn):
    description = export.read_metadata(exported_mnn.path)
    assert description["verified"] is False
    result = exported_mnn.verify(free_running=3)
    assert (result.compute, result.threshold, result.passed) == ("float32", 0.99, True)
    assert result.tokens >= 1000
    assert result.mean_kl < 1e-6
    assert result.max_abs_error < 1e-2
    assert result.free_running_tokens > 0
    assert export.read_metadata(exported_mnn.path) == description | {"verified": True}
    with pytest.raises(ExportError, match="use compute='float32'"):
        exported_mnn.verify(compute="int8_dynamic")


def test_a_graph_that_computes_something_else_fails(exported_mnn, model, tmp_path):
    changed = shutil.copytree(exported_mnn.path, tmp_path / "a")
    write_description(changed, export.read_metadata(changed) | {"verified": False})
    # Numbers that no product reads, such as norms and biases, stand behind the codes and in
    # graphs: they are not compared bit for bit, but what is computed with them is.
    places = json.loads((changed / DESCRIPTION).read_text())["parameters"]
    content = bytearray((changed / "weights.bin").read_bytes())
    stored = np.zeros(len(content), bool)
    for _, start, length, scales in places.values():
        stored[start : start + length + scales] = True
    others = np.flatnonzero(~stored)
    for at in others[len(others) // 4 :]:
        content[at] = 0
    (changed / "weights.bin").write_bytes(content)
    with pytest.raises(ExportError, match="speech differ from JAX by more than"):
        export.verify(changed, model, exported_mnn.params, short_windows(3), free_running=0)
    assert export.read_metadata(changed)["verified"] is False


def test_damaged_directories_are_refused(exported_mnn, model, outcome, tmp_path):
    for index, name in enumerate(["decode.mnn", "weights.bin", DESCRIPTION]):
        changed = shutil.copytree(exported_mnn.path, tmp_path / f"{index}")
        content = (changed / name).read_bytes()
        (changed / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(ExportError, match=f"^{changed}: ") as caught:
            export.verify(changed, model, exported_mnn.params, short_windows(), free_running=0)
        assert "\n" not in str(caught.value)
    rng = np.random.default_rng(0)
    for index in range(8):
        changed = shutil.copytree(exported_mnn.path, tmp_path / f"f{index}")
        content = bytearray((changed / "decode.mnn").read_bytes())
        for at in rng.integers(0, len(content), 8):
            content[at] ^= 1 << int(rng.integers(8))
        (changed / "decode.mnn").write_bytes(content)
        says = outcome(changed, model, exported_mnn.params, short_windows())
        assert says == "passed" or (str(changed) in says and "\n" not in says)


def test_narrow_types_are_widened_and_zero_points_refused(
    model, dense_params, quantize, offered, tmp_path
):
    def boxed(form):
        path = "decoder/layers/0/mlp/down_proj/weight"
        return boxes.map_with_path(
            lambda p, leaf: quantize(leaf, form) if p == path else leaf, dense_params
        )

    params = boxed(Format("int2", 64))
    written = mnn(model, params, tmp_path / "a", prefill_lengths=(), cache_slots=SLOTS)
    assert ["int2 written as int4" in str(c) for c in written.conversions] == [True]
    worst = run(written.path, offered["decode"], feed(offered["decode"]), params)
    assert max(worst.values()) < TOLERANCE
    assert written.verify(short_windows(2), free_running=0).agreement == 1.0
    with pytest.raises(ExportError, match="use a format without -affine"):
        mnn(model, boxed(Format("int4", 32, False)), tmp_path / "b", (), SLOTS)
    with pytest.raises(OutputError, match="exists"):
        mnn(model, params, tmp_path / "a", (), SLOTS)
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_a_failed_conversion_leaves_nothing(model, params, tmp_path, monkeypatch):
    # The package has a function of the module's name.
    module = sys.modules["glm_edge.export.mnn.export"]
    monkeypatch.setattr(module, "CONVERTER", "import sys; print('no memory'); sys.exit(1)")
    with pytest.raises(ExportError, match="MNN's converter failed: no memory"):
        mnn(model, params, tmp_path / "a", prefill_lengths=(), cache_slots=SLOTS)
    assert not list(tmp_path.iterdir())


def test_graphs_that_look_at_few_slots_give_the_same(small_config, random_params, tmp_path):
    config = dataclasses.replace(small_config(num_layers=2), vision=None, speech=None)
    text = MultimodalGLM(config)
    params, options = random_params(text), {"prefill_lengths": (4,), "cache_slots": SLOTS}
    with pytest.raises(ExportError, match=r"attended_slots: \[8, 64\] must be 2 to 63"):
        mnn(text, params, tmp_path / "a", attended_slots=(8, 64), **options)
    written = mnn(text, params, tmp_path / "a", attended_slots=(24,), **options)
    steps = ("decode", "decode_24", "embed_4", "prefill_4", "prefill_4_24")
    assert written.signatures == ("embed", *steps)
    for signature in signatures(text, (4,), SLOTS):
        if f"{signature.name}_24" not in steps:
            continue
        inputs = feed(signature)
        expected = jax.jit(signature.function)(params, inputs)
        inputs["mask"] = inputs["mask"][..., :24].copy()
        actual = outputs_of(written.path, f"{signature.name}_24", inputs, expected)
        assert max(errors(actual, expected).values()) < TOLERANCE
        # Slots behind the first 24 reach the cache, and nothing else.
        inputs["kv_cache_v_0"][..., 24:] += 1000.0
        moved = outputs_of(written.path, f"{signature.name}_24", inputs, expected)
        changed = [name for name in actual if not np.array_equal(actual[name], moved[name])]
        assert changed == ["kv_cache_v_0_out"]


def test_the_converter_runs_without_its_command_line():
    """That module calls home and installs packages when it is imported."""
    assert "MNN.tools" not in CONVERTER


def test_a_directory_that_is_no_export_is_refused(tmp_path):
    with pytest.raises(ExportError, match="not a complete glm_edge export"):
        read_weights(tmp_path)


def test_a_missing_extra_is_named(model, params, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "MNN", None)
    with pytest.raises(MissingExtraError, match="glm_edge\\[mnn\\]"):
        mnn(model, params, tmp_path / "a")
    assert not list(tmp_path.iterdir())
