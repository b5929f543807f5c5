"""ONNX files hold our integers, pass the checker, and agree with JAX in onnxruntime."""

import dataclasses
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_edge import export
from glm_edge import params as boxes
from glm_edge.errors import DataError, ExportError, MissingExtraError, OutputError
from glm_edge.export.common.directory import DESCRIPTION, write_description
from glm_edge.export.common.signatures import signatures
from glm_edge.export.onnx.export import onnx
from glm_edge.export.onnx.graph import GraphBuilder
from glm_edge.export.onnx.reader import read_weights
from glm_edge.models.multimodal import MultimodalGLM
from glm_edge.params import Format, Quantized

onnx_library = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

SLOTS, LENGTH = 64, 32
FORMS = {
    "decoder/layers/0/attention/q_proj/weight": Format("int4", 32, False),
    "decoder/layers/0/attention/k_proj/weight": Format("int8", 64),
    "decoder/layers/0/attention/v_proj/weight": Format("int8", "tensor"),
    "decoder/layers/0/mlp/gate_up_proj/weight": Format("int3", 32),
    "decoder/layers/0/mlp/down_proj/weight": Format("int8", None, False),
    "embed/weight": Format("int2"),
}


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
        length = len(result["input_pos"])
        result["input_pos"] = np.arange(20, 20 + length, dtype=np.int32)
        visible = np.arange(SLOTS) <= result["input_pos"][:, None]
        result["mask"] = np.where(visible, 0.0, -1e9).astype(np.float32)[None, None]
    return result


def run(path, inputs, accuracy_level):
    """Runs a graph; level 1 multiplies in float32, level 4 rounds activations to int8."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", accuracy_level)
    session = onnxruntime.InferenceSession(str(path), options)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, inputs), strict=True))


def errors(signature, params, inputs, actual):
    """Largest error of each output, in parts of its largest number."""
    expected = jax.jit(signature.function)(params, inputs)
    assert {name.removesuffix("_out") for name in actual} == expected.keys()
    worst = {}
    for name, value in actual.items():
        reference = np.asarray(expected[name.removesuffix("_out")])
        worst[name] = float(np.abs(value - reference).max() / np.abs(reference).max())
    return worst


@pytest.fixture(scope="module")
def exported_onnx(model, params, tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "small"
    return onnx(model, params, path, (LENGTH,), SLOTS, prefill_logits=True)


@pytest.fixture(scope="module")
def offered(model):
    return {s.name: s for s in signatures(model, (LENGTH,), SLOTS, prefill_logits=True)}


def short_windows(count=1):
    return [export.Window(np.arange(3 + n, 15 + n, dtype=np.int32)) for n in range(count)]


def other_bytes(source, target, name, change):
    """A copy of a directory in which one file is another."""
    shutil.copytree(source, target)
    content = bytearray((target / name).read_bytes())
    (target / name).write_bytes(change(content))
    return target


def assert_held(weight, leaf):
    if not isinstance(leaf, Quantized):
        np.testing.assert_array_equal(weight.values, np.asarray(boxes.dense(leaf)))
        return
    np.testing.assert_array_equal(weight.values, np.asarray(leaf.codes()))
    scale = np.asarray(leaf.scale.astype(jnp.float32))
    np.testing.assert_array_equal(weight.scale, scale)
    if leaf.zero is not None:
        np.testing.assert_array_equal(weight.zero, np.asarray(leaf.zero))


def test_files_hold_our_integers_and_scales_bit_for_bit(exported_onnx, params):
    stored = read_weights(exported_onnx.path)
    assert stored.keys() == {path for path, _ in boxes.path_items(params)}
    for path, leaf in boxes.path_items(params):
        assert_held(stored[path], leaf)
    assert {weight.type for weight in stored.values()} == {"int8", "int4", "float32"}
    assert [c.path for c in exported_onnx.conversions] == ["speech/linear_1/weight"]


def test_weights_are_stored_once_and_packed(exported_onnx, params):
    files = list(exported_onnx.path.iterdir())
    assert exported_onnx.file_bytes == sum(file.stat().st_size for file in files)
    # Scales are float32 here and bfloat16 in the boxes; graphs take some kilobytes each.
    stored = boxes.stored_bytes(params)
    assert (exported_onnx.path / "weights.bin").stat().st_size <= 1.1 * stored
    assert max(file.stat().st_size for file in files if file.suffix == ".onnx") < 100_000


@pytest.mark.parametrize("name", ["embed", "decode", f"prefill_{LENGTH}", "vision", "speech"])
def test_graphs_are_valid_and_agree_with_jax(name, exported_onnx, offered, params):
    path = exported_onnx.path / f"{name}.onnx"
    onnx_library.checker.check_model(str(path), full_check=True)
    graph = onnx_library.load(path, load_external_data=False)
    assert [opset.version for opset in graph.opset_import] == [21]
    inferred = onnx_library.shape_inference.infer_shapes(graph, strict_mode=True, data_prop=True)
    shapes = {value.name for value in inferred.graph.value_info}
    produced = {o for node in inferred.graph.node for o in node.output}
    assert produced <= shapes | {output.name for output in inferred.graph.output}
    inputs = feed(offered[name])
    exact = errors(offered[name], params, inputs, run(path, inputs, "1"))
    assert max(exact.values()) < 1e-5
    rounded = errors(offered[name], params, inputs, run(path, inputs, "4"))
    assert max(rounded.values()) < 0.05


def test_products_with_integers_run_on_the_packed_kernel(exported_onnx, tmp_path, params):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(str(exported_onnx.path / "decode.onnx"), options)
    graph = onnx_library.load(options.optimized_model_filepath, load_external_data=False).graph
    operators = [node.op_type for node in graph.node]
    products = [p for p, leaf in boxes.path_items(params["decoder"]) if isinstance(leaf, Quantized)]
    # And the head, which is the embedding.
    assert operators.count("MatMulNBits") == len(products) + 1
    assert "DequantizeLinear" not in operators


@pytest.fixture(scope="module")
def other_forms(model, dense_params, quantize, tmp_path_factory):
    def box(path, leaf):
        if path not in FORMS:
            return leaf.astype(jnp.bfloat16) if path.endswith("o_proj/weight") else leaf
        form = FORMS[path]
        if form.group_size == "tensor":
            scale = jnp.abs(leaf).max(keepdims=True) / 127
            return boxes.quantized(jnp.round(leaf / scale).astype(jnp.int8), scale, None, form)
        made = quantize(leaf, form)
        return made if made.zero is None else made.replace(zero=made.zero + 1)

    params = boxes.map_with_path(box, dense_params)
    path = tmp_path_factory.mktemp("onnx") / "forms"
    written = onnx(model, params, path, prefill_lengths=(), cache_slots=SLOTS)
    return written, params


def test_a_directory_that_runs_as_jax_does_is_marked_as_verified(exported_onnx):
    description = export.read_metadata(exported_onnx.path)
    assert description["verified"] is False
    result = exported_onnx.verify(free_running=3)
    assert (result.compute, result.threshold, result.passed) == ("float32", 0.99, True)
    assert result.tokens >= 1000
    assert result.mean_kl < 1e-6
    assert result.max_abs_error < 1e-2
    assert result.free_running_tokens > 0
    assert export.read_metadata(exported_onnx.path) == description | {"verified": True}
    assert not [file for file in exported_onnx.path.iterdir() if file.name.startswith(".")]
    with pytest.raises(ExportError, match="use compute='float32'"):
        exported_onnx.verify(compute="int8_dynamic")


def test_one_other_byte_of_a_weight_is_found(exported_onnx, model, tmp_path):
    stored = onnx_library.load(exported_onnx.path / "decode.onnx", load_external_data=False)
    places = {tensor.name: tensor.external_data for tensor in stored.graph.initializer}
    for index, name in enumerate(
        ["decoder/layers/0/mlp/down_proj/weight", "decoder/norm/weight", "embed/weight.scale"]
    ):
        start = next(int(e.value) for e in places[name] if e.key == "offset")

        def change(content, start=start):
            content[start] ^= 1
            return content

        changed = other_bytes(exported_onnx.path, tmp_path / f"{index}", "weights.bin", change)
        path = name.removesuffix(".scale")
        with pytest.raises(ExportError, match=f"damaged, .*1 (values|scale) of {path} differ"):
            export.verify(changed, model, exported_onnx.params, short_windows())


def test_a_graph_that_computes_something_else_fails(exported_onnx, model, tmp_path):
    def change(content):
        stored = onnx_library.load_model_from_string(bytes(content))
        sums = [node for node in stored.graph.node if node.op_type == "Add"]
        # Of the residual after the last layer, say.
        for node in sums[-6:]:
            node.op_type = "Sub"
        return stored.SerializeToString()

    changed = other_bytes(exported_onnx.path, tmp_path / "a", f"prefill_{LENGTH}.onnx", change)
    write_description(changed, export.read_metadata(changed) | {"verified": False})
    with pytest.raises(ExportError, match=r"threshold 99\.00%"):
        export.verify(changed, model, exported_onnx.params, short_windows(3), free_running=0)
    assert export.read_metadata(changed)["verified"] is False


def test_damaged_directories_are_refused(exported_onnx, model, outcome, tmp_path):
    rng = np.random.default_rng(0)

    def cut(content):
        return content[: len(content) // 2]

    def flipped(content):
        for at in rng.integers(0, len(content), 8):
            content[at] ^= 1 << int(rng.integers(8))
        return content

    def fields(**changes):
        return lambda content: json.dumps({**json.loads(bytes(content)), **changes}).encode()

    changes = [
        ("decode.onnx", cut),
        ("weights.bin", cut),
        (DESCRIPTION, cut),
        (DESCRIPTION, lambda _: b"[]"),
        (DESCRIPTION, fields(config={})),
        (DESCRIPTION, fields(cache_slots=10**12)),
        (DESCRIPTION, fields(cache_slots=SLOTS // 2)),
        (DESCRIPTION, fields(prefill_lengths=[LENGTH, LENGTH])),
        (DESCRIPTION, fields(prefill_lengths=[LENGTH + 1])),
        (DESCRIPTION, fields(prefill_logits=False)),
    ]
    for index, (name, change) in enumerate(changes):
        changed = other_bytes(exported_onnx.path, tmp_path / f"{index}", name, change)
        with pytest.raises(ExportError, match=f"^{changed}: ") as caught:
            export.verify(changed, model, exported_onnx.params, short_windows(), free_running=0)
        assert "\n" not in str(caught.value)
    for index in range(8):
        changed = other_bytes(exported_onnx.path, tmp_path / f"f{index}", "decode.onnx", flipped)
        says = outcome(changed, model, exported_onnx.params, short_windows())
        assert says == "passed" or (str(changed) in says and "\n" not in says)


def test_a_directory_of_another_model_is_refused(exported_onnx, model, params):
    other = model.clone(config=dataclasses.replace(model.config, name="other"))
    with pytest.raises(ExportError, match="contains a different model than other"):
        export.verify(exported_onnx.path, other, params)
    with pytest.raises(DataError, match="65 tokens do not fit the 64 slots"):
        export.GraphDirectoryRunner(exported_onnx.path).score(np.arange(65))


def test_groups_zero_points_and_narrow_types_are_held_and_run(other_forms, offered):
    written, params = other_forms
    stored = read_weights(written.path)
    for path in FORMS:
        leaf = dict(boxes.path_items(params))[path]
        assert_held(stored[path], leaf)
    rules = {c.path: c for c in written.conversions}
    assert "int3 written as int4" in rules["decoder/layers/0/mlp/gate_up_proj/weight"].rule
    assert "int2 written as int4" in rules["embed/weight"].rule
    assert not any(conversion.changes_values for conversion in written.conversions)
    for name in ("embed", "decode"):
        inputs = feed(offered[name], seed=1)
        actual = run(written.path / f"{name}.onnx", inputs, "1")
        assert max(errors(offered[name], params, inputs, actual).values()) < 1e-5
    result = written.verify(short_windows(2), free_running=0)
    assert result.agreement == 1.0
    assert result.mean_kl < 1e-6


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (
            Format("nf4", 32),
            "nf4-g32-scale=float32 cannot be written as ONNX: its levels are not integer multiples",
        ),
        (Format("int4", 32, False, zero_dtype="float32"), "zero points must be integers"),
    ],
    ids=str,
)
def test_forms_that_onnx_cannot_hold_are_refused(
    form, message, model, dense_params, quantize, tmp_path
):
    path = "decoder/layers/0/mlp/down_proj/weight"

    def box(where, leaf):
        if where != path:
            return leaf
        made = quantize(leaf, Format("int4", 32, form.symmetric))
        zero = None if form.symmetric else made.zero.astype(jnp.float32) + 0.5
        codes = made.codes() & 15 if form.qtype == "nf4" else made.codes()
        return boxes.quantized(codes, made.scale, zero, form)

    with pytest.raises(ExportError, match=message) as caught:
        onnx(model, boxes.map_with_path(box, dense_params), tmp_path / "a", (), SLOTS)
    assert str(caught.value).startswith(path)
    assert not list(tmp_path.iterdir())


def test_a_function_without_an_operator_is_refused():
    struct = {"x": jax.ShapeDtypeStruct((4,), jnp.float32)}
    with pytest.raises(ExportError, match="no lowering for sort"):
        GraphBuilder({}).lower(lambda _, inputs: {"y": jnp.sort(inputs["x"])}, {}, struct)


def test_targets_are_written_whole_or_not_at_all(model, params, tmp_path, monkeypatch):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine.txt").write_text("before")
    with pytest.raises(OutputError, match="exists"):
        onnx(model, params, taken, (), SLOTS)
    with pytest.raises(OutputError, match="is not an export"):
        onnx(model, params, taken, (), SLOTS, overwrite=True)
    assert (taken / "mine.txt").read_text() == "before"

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left on device"):
        onnx(model, params, tmp_path / "a", (), SLOTS)
    assert list(tmp_path.iterdir()) == [taken]


def test_a_directory_that_is_no_export_is_refused(exported_onnx, tmp_path):
    with pytest.raises(ExportError, match="not a complete glm_edge export"):
        read_weights(tmp_path)
    (tmp_path / DESCRIPTION).write_text(json.dumps({"signatures": ["decode"]}))
    with pytest.raises(ExportError, match="not a complete glm_edge ONNX export"):
        read_weights(tmp_path)


def test_a_missing_extra_is_named(model, params, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises(MissingExtraError, match="glm_edge\\[onnx\\]"):
        onnx(model, params, tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_three_dimensional_positions_and_an_own_head(small_config, random_params, tmp_path):
    config = dataclasses.replace(
        small_config(tie_embeddings=False, mrope_section=(2, 3, 3)),
        vision=None,
        speech=None,
    )
    text = MultimodalGLM(config)
    params = random_params(text)
    written = onnx(text, params, tmp_path / "a", (LENGTH,), SLOTS, prefill_logits=True)
    assert written.signatures == ("embed", "decode", f"embed_{LENGTH}", f"prefill_{LENGTH}")
    for signature in signatures(text, (LENGTH,), SLOTS, prefill_logits=True):
        inputs = feed(signature)
        result = run(written.path / f"{signature.name}.onnx", inputs, "1")
        assert max(errors(signature, params, inputs, result).values()) < 1e-5
    assert written.verify(short_windows(2), free_running=1).agreement == 1.0


def test_graphs_that_look_at_few_slots_give_the_same(small_config, random_params, tmp_path):
    config = dataclasses.replace(small_config(num_layers=2), vision=None, speech=None)
    text = MultimodalGLM(config)
    params, options = random_params(text), {"prefill_lengths": (4,), "cache_slots": SLOTS}
    with pytest.raises(ExportError, match=r"attended_slots: \[8, 64\] must be 2 to 63"):
        onnx(text, params, tmp_path / "a", attended_slots=(8, 64), **options)
    written = onnx(text, params, tmp_path / "a", attended_slots=(32, 24), **options)
    steps = ("decode", "decode_24", "decode_32", "prefill_4", "prefill_4_24")
    assert written.signatures == ("embed", *steps[:3], "embed_4", *steps[3:])
    assert json.loads((tmp_path / "a" / DESCRIPTION).read_text())["attended_slots"] == [24, 32]
    offered = {s.name: s for s in signatures(text, (4,), SLOTS)}
    for complete, short in (("decode", 24), ("decode", 32), ("prefill_4", 24)):
        inputs = feed(offered[complete])
        expected = run(written.path / f"{complete}.onnx", inputs, "1")
        inputs["mask"] = inputs["mask"][..., :short]
        for name in [name for name in inputs if name.startswith("kv_cache")]:
            # Slots that are not looked at.
            others = [slice(None)] * 4
            others[2 if "_k_" in name else 3] = slice(short, None)
            inputs[name][tuple(others)] = np.nan
            expected[f"{name}_out"][tuple(others)] = np.nan
        actual = run(written.path / f"{complete}_{short}.onnx", inputs, "1")
        assert actual.keys() == expected.keys()
        for name, value in actual.items():
            np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-5, err_msg=name)
