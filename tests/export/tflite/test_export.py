"""What the exported file holds, what is refused, and how it is written."""

import dataclasses
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_edge import export
from glm_edge import params as boxes
from glm_edge.errors import ExportError, MissingExtraError, OutputError
from glm_edge.export.tflite import file as tflite_file
from glm_edge.export.tflite.flatbuffer import FlatModel
from glm_edge.export.tflite.weights import to_constant
from glm_edge.export.verify.schedule import split
from glm_edge.kernels import quantization
from glm_edge.models.multimodal import MultimodalGLM
from glm_edge.params import Format, Masked, Quantized

INT8 = Format("int8")
INT4 = Format("int4")
TWO_BITS = Format("int2", scale_dtype="bfloat16")
BLOCKS = Format("int4", 32, scale_dtype="bfloat16")
# Bytes that the graphs of all signatures of a small model keep below.
GRAPHS = 200_000


@functools.partial(jax.jit, static_argnums=0)
def applied(model, params, tokens):
    return model.apply({"params": params}, tokens)[0]


def texts(seed, *lengths):
    """Random texts of these lengths."""
    rng = np.random.default_rng(seed)
    return [export.Window(rng.integers(20, 300, length).astype(np.int32)) for length in lengths]


def replaced(params, path, leaf):
    return boxes.map_with_path(lambda p, old: leaf if p == path else old, params)


def forms_held_bit_for_bit(path, params):
    """Compares a file with parameters and returns the forms of their matrices."""
    stored = export.read_constants(path)
    assert stored.keys() == {path for path, _ in boxes.path_items(params)}
    observed = set()
    for path, leaf in boxes.path_items(params):
        constant = stored[path]
        assert constant.shape == tuple(leaf.shape)
        if not isinstance(leaf, Quantized):
            values = np.asarray(boxes.dense(leaf))
            kind = "float16" if values.dtype == np.float16 and values.ndim == 2 else "float32"
            assert constant.type == kind
            assert constant.data.tobytes() == values.astype(kind).tobytes()
            assert constant.scale is None
            observed |= {kind} if values.ndim == 2 else set()
            continue
        observed.add(str(leaf.format))
        assert constant.type == leaf.format.qtype
        assert constant.data.tobytes() == np.asarray(leaf.data).tobytes()
        assert constant.block_size == (leaf.format.group_size or 0)
        scale = np.asarray(leaf.scale.astype(jnp.float32))
        np.testing.assert_array_equal(constant.scale.astype(np.float32).reshape(scale.shape), scale)
    return observed


def test_file_holds_our_integers_and_scales_bit_for_bit(exported, params):
    observed = forms_held_bit_for_bit(exported.path, params)
    assert observed == {str(INT8), str(INT4), str(BLOCKS), "float32"}


def assert_no_part_is_stored_twice(written):
    """Holds a file against its bound, and its graphs against what a second decoder would take."""
    assert written.file_bytes == written.path.stat().st_size
    assert written.file_bytes <= 1.02 * written.stored_bytes + 1e6
    stored = export.read_constants(written.path)
    decoder = sum(c.data.nbytes for path, c in stored.items() if path.startswith("decoder/"))
    graphs = written.file_bytes - written.stored_bytes
    assert 0 < graphs < GRAPHS < graphs + min(decoder, stored["embed/weight"].data.nbytes)


def test_file_size_and_builtin_operators(exported, dense_export):
    """File is as large as its weights and needs builtin operators only."""
    for written in (exported, dense_export):
        assert_no_part_is_stored_twice(written)
        names = FlatModel(written.path.read_bytes()).operator_names()
        assert "FULLY_CONNECTED" in names
        assert "EMBEDDING_LOOKUP" in names
        assert not {name for name in names if "CUSTOM" in name or "FLEX" in name}


def test_stored_bytes_are_those_of_the_boxes(exported):
    assert exported.stored_bytes == boxes.stored_bytes(exported.params)


def test_weights_are_stored_once_for_all_signatures(exported):
    graph = FlatModel(exported.path.read_bytes()).model
    buffers = {}
    for subgraph in graph.subgraphs:
        for tensor in subgraph.tensors:
            if tensor.name in (b"embed/weight", b"decoder/layers/0/mlp/down_proj/weight"):
                buffers.setdefault(tensor.name, []).append(tensor.buffer)
    assert {name: len(set(result)) for name, result in buffers.items()} == dict.fromkeys(buffers, 1)
    assert len(buffers[b"embed/weight"]) == 6
    assert len(buffers[b"decoder/layers/0/mlp/down_proj/weight"]) == 3


def test_conversions_are_reported(exported, model, dense_params, quantize, sizes, tmp_path):
    assert [str(c) for c in exported.conversions] == [
        "speech/linear_1/weight: mask written as zeros in a dense weight"
    ]
    assert not exported.conversions[0].changes_values
    assert not isinstance(exported.params["speech"]["linear_1"]["weight"], Masked)

    wide = Format("int4", 32)
    path = "decoder/layers/0/mlp/down_proj/weight"
    box = quantize(dense_params["decoder"]["layers"]["0"]["mlp"]["down_proj"]["weight"], wide)
    halved = replaced(dense_params, path, box)
    halved["decoder"]["norm"]["weight"] = halved["decoder"]["norm"]["weight"].astype(jnp.bfloat16)
    written = export.tflite(model, halved, tmp_path / "a.tflite", **sizes)
    by_path = {c.path: c for c in written.conversions}
    assert by_path.keys() == {path, "decoder/norm/weight"}
    assert by_path[path].changes_values
    assert "float32 to bfloat16" in by_path[path].rule
    assert not by_path["decoder/norm/weight"].changes_values
    stored = export.read_constants(written.path)[path]
    effective = written.params["decoder"]["layers"]["0"]["mlp"]["down_proj"]["weight"]
    np.testing.assert_array_equal(stored.scale.astype(np.float32), np.asarray(effective.scale))
    np.testing.assert_array_equal(effective.codes(), box.codes())


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (Format("int8", 32), "no kernel for int8 in groups; use int8"),
        (
            Format("int4", 32, symmetric=False),
            "does not store zero points; use a format without -affine",
        ),
        (Format("int8", symmetric=False), "use a format without -affine"),
        (Format("int4", 16), "group sizes must be a multiple of 32"),
    ],
    ids=str,
)
def test_forms_that_litert_cannot_run_are_refused(
    form, message, model, dense_params, quantize, tmp_path
):
    path = "decoder/layers/0/mlp/down_proj/weight"
    box = quantize(dense_params["decoder"]["layers"]["0"]["mlp"]["down_proj"]["weight"], form)
    with pytest.raises(ExportError, match=message) as caught:
        export.tflite(model, replaced(dense_params, path, box), tmp_path / "a.tflite")
    assert str(caught.value).startswith(path)
    assert not list(tmp_path.iterdir())


def test_stock_kernels_are_refused():
    stock = boxes.quantized(jnp.ones((4, 6), jnp.int8), jnp.ones((4, 1)), None, INT8, (6, 4))
    with pytest.raises(ExportError, match=r"stored \[in, out\]"):
        to_constant("w", stock)


@pytest.mark.parametrize(
    ("form", "columns", "stored"),
    [
        ("int2", 64, None),
        ("int2", 66, "int4-channel"),
        ("int4", 33, "int8-channel"),
        ("int6", 64, "int8-channel"),
        ("int5", 64, "int8-channel"),
        ("int3", 64, "int4-channel"),
        ("ternary", 64, "int2-channel"),
        ("ternary34", 64, "int2-channel"),
        ("int8-tensor", 64, "int8-channel"),
        ("int4-tensor", 64, "int4-channel"),
        ("int2-g32", 64, "int4-g32"),
        ("int3-g32", 64, "int4-g32"),
        ("ternary-g64", 128, "int4-g64"),
    ],
)
def test_codes_move_to_a_wider_type_that_runs_and_values_stay(form, columns, stored):
    rng, parsed = np.random.default_rng(0), Format.parse(form)
    low, high = quantization.code_range(parsed.qtype)
    codes = rng.integers(low, high + 1, (6, columns)).astype(np.int8)
    groups = 1 if isinstance(parsed.group_size, str | None) else columns // parsed.group_size
    rows = 1 if parsed.group_size == "tensor" else 6
    scale = rng.uniform(0.5, 2.0, (rows, groups)).astype(np.float16).astype(np.float32)
    box = boxes.quantized(*jax.device_put((codes, scale)), None, parsed)
    constant, effective, conversions = to_constant("w", box)
    written = form if "-" in form else f"{form}-channel"
    rules = [f"w: {written} written as {stored} with the same values"] if stored else []
    assert [str(c) for c in conversions] == rules
    assert not any(conversion.changes_values for conversion in conversions)
    np.testing.assert_array_equal(box.unbox(), effective.unbox())
    np.testing.assert_array_equal(box.codes(), effective.codes())
    assert constant.data.tobytes() == np.asarray(effective.data).tobytes()
    assert constant.type == effective.format.qtype


def test_halves_are_held_as_they_are_where_float16_can():
    weight = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    half, _, conversions = to_constant("w", jnp.asarray(weight, jnp.float16))
    assert (half.type, conversions) == ("float16", [])
    brain = jnp.asarray(weight, jnp.bfloat16)
    stored, effective, conversions = to_constant("w", brain)
    assert (stored.type, conversions[0].changes_values) == ("float16", False)
    np.testing.assert_array_equal(effective, np.asarray(brain).astype(np.float32))
    large, _, conversions = to_constant("w", jnp.asarray(1e6 * weight, jnp.bfloat16))
    assert (large.type, conversions[0].changes_values) == ("float32", False)
    bias, _, _ = to_constant("b", jnp.asarray(weight[0], jnp.float16))
    assert bias.type == "float32"


def test_halves_and_two_bits_run(text_model, text_params, quantize, tmp_path):
    def narrow(path, leaf):
        two_bits = "mlp" in path and leaf.ndim == 2
        return quantize(leaf, TWO_BITS) if two_bits else np.asarray(leaf, np.float16)

    written = boxes.map_with_path(narrow, text_params)
    file = export.tflite(text_model, written, tmp_path / "a.tflite", (32,), 32, True)
    assert forms_held_bit_for_bit(file.path, written) == {str(TWO_BITS), "float16"}
    assert_no_part_is_stored_twice(file)
    assert file.verify(free_running=3, isolated=False).passed


def test_a_table_of_int4_is_looked_up_and_multiplied_with(
    text_model, text_params, quantize, tmp_path
):
    table = quantize(text_params["embed"]["weight"], INT4)
    params = replaced(text_params, "embed/weight", table)
    file = export.tflite(text_model, params, tmp_path / "a.tflite", (32,), 32, True)
    assert forms_held_bit_for_bit(file.path, params) == {str(INT4), "float32"}
    flat = FlatModel(file.path.read_bytes())
    readers = {}
    for graph in flat.model.subgraphs:
        for operator in graph.operators:
            for index in operator.inputs:
                if graph.tensors[index].name == b"embed/weight":
                    assert graph.tensors[index].type == flat.schema.TensorType.INT4
                    name = flat.operator_name(operator)
                    readers.setdefault(name, set()).add(graph.tensors[index].buffer)
    assert readers.keys() == {"EMBEDDING_LOOKUP", "FULLY_CONNECTED"}
    assert len(set().union(*readers.values())) == 1
    tokens = np.arange(0, text_model.config.decoder.vocab_size, 7)
    rows = export.LiteRTRunner(file.path).embed(tokens[:32])
    np.testing.assert_array_equal(rows, np.asarray(params["embed"]["weight"].unbox())[tokens[:32]])
    result = file.verify(isolated=False)
    assert result.passed
    weight_only = file.verify(compute="float32", check=False, free_running=0, isolated=False)
    assert weight_only.mean_kl > result.mean_kl
    assert weight_only.threshold == 0.97
    assert weight_only.free_running_agreement is None


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(value, model, dense_params, tmp_path):
    weight = dense_params["decoder"]["norm"]["weight"].at[3].set(value)
    with pytest.raises(ExportError, match="decoder/norm/weight: contains NaN or infinity"):
        export.tflite(
            model, replaced(dense_params, "decoder/norm/weight", weight), tmp_path / "a.tflite"
        )
    assert not list(tmp_path.iterdir())


def test_parameters_of_another_model_are_refused(model, dense_params, tmp_path):
    short = replaced(dense_params, "decoder/norm/weight", jnp.ones(3))
    with pytest.raises(ExportError, match=r"decoder/norm/weight: shape \(3,\) in the parameters"):
        export.tflite(model, short, tmp_path / "a.tflite")
    missing = {name: tree for name, tree in dense_params.items() if name != "speech"}
    with pytest.raises(ExportError, match="speech/conv1/bias: shape missing"):
        export.tflite(model, missing, tmp_path / "a.tflite")
    with pytest.raises(ExportError, match="only a MultimodalGLM"):
        export.tflite(object(), dense_params, tmp_path / "a.tflite")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (((8,), 500), "must be 1 to 128"),
        (((8, 64), 32), "64 must be 2 to 32"),
        (((1,), 32), "1 must be"),
        (((8,), 32, False, (), False, (4, 64)), "forced_lengths: 64 must be 2 to 32"),
        (((8,), 32, False, (), False, (1,)), "forced_lengths: 1 must be 2 to 32"),
        (((8,), 32, False, (), False, (2.5,)), "forced_lengths: 2.5 is not a fixed length"),
    ],
)
def test_lengths_outside_the_context_are_refused(sizes, message, model, dense_params, tmp_path):
    with pytest.raises(ExportError, match=message):
        export.tflite(model, dense_params, tmp_path / "a", *sizes)


def test_a_target_that_cannot_take_the_file_is_refused(model, dense_params, tmp_path):
    taken = tmp_path / "a.tflite"
    taken.write_bytes(b"before")
    with pytest.raises(OutputError, match="exists"):
        export.tflite(model, dense_params, taken)
    with pytest.raises(OutputError, match="exists"):
        export.tflite(model, dense_params, tmp_path, overwrite=True)
    with pytest.raises(OutputError, match="missing or cannot be written"):
        export.tflite(model, dense_params, tmp_path / "none" / "a.tflite")
    assert taken.read_bytes() == b"before"


def test_an_interrupted_write_leaves_what_was_there(exported, tmp_path, monkeypatch):
    graph = FlatModel(exported.path.read_bytes()).model
    target = tmp_path / "a.tflite"
    target.write_bytes(b"before")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left on device"):
        tflite_file.write(graph, target, overwrite=True)
    assert target.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [target]


def test_large_buffers_outside_the_flatbuffer(exported, tmp_path):
    """Large buffers lie outside the flatbuffer and run the same."""
    graph = FlatModel(exported.path.read_bytes()).model
    path = tmp_path / "outside.tflite"
    tflite_file.write(graph, path, overwrite=False, inline_limit=0)
    offsets = [b.offset for b in FlatModel(path.read_bytes()).model.buffers if b.offset]
    assert len(offsets) > 20
    assert not [offset for offset in offsets if offset % tflite_file.ALIGNMENT]
    inside, outside = export.read_constants(exported.path), export.read_constants(path)
    assert inside.keys() == outside.keys()
    for name, constant in inside.items():
        assert constant.data.tobytes() == outside[name].data.tobytes()
    tokens = np.arange(20, 30)
    np.testing.assert_array_equal(
        export.LiteRTRunner(path).score(tokens), export.LiteRTRunner(exported.path).score(tokens)
    )


def test_description_tells_the_model_and_that_nobody_verified_it(dense_export):
    description = export.read_metadata(dense_export.path)
    assert description["config"]["name"] == "small"
    assert description["cache_slots"] == 64
    assert tuple(description["signatures"]) == dense_export.signatures
    assert description["verified"] is False


def test_a_missing_extra_is_named(model, dense_params, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tensorflow", None)
    with pytest.raises(MissingExtraError, match="glm_edge\\[export\\]"):
        export.tflite(model, dense_params, tmp_path / "a.tflite", cache_slots=128)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def own_head(small_config, random_params, tmp_path_factory):
    """A text model with a head and positions of its own, and its file of few slots."""
    config = dataclasses.replace(
        small_config(tie_embeddings=False, mrope_section=(2, 3, 3)), vision=None, speech=None
    )
    text = MultimodalGLM(config)
    path = tmp_path_factory.mktemp("own_head") / "a.tflite"
    sizes = {"attended_slots": (16, 8), "forced_lengths": ()}
    return text, export.tflite(text, random_params(text), path, (4, 8), 32, **sizes)


@pytest.fixture(scope="module")
def own_logits(own_head):
    """Tokens and their logits."""
    text, written = own_head
    tokens = np.arange(20, 42)
    return tokens, np.asarray(applied(text, written.params, tokens[None]))[0]


def test_a_text_model_with_its_own_head_has_no_encoders(own_head, own_logits):
    _, written = own_head
    steps = ("embed", "decode", "decode_8", "decode_16", "embed_4", "prefill_4", "prefill_4_8")
    assert written.signatures == (*steps, "embed_8", "prefill_8", "prefill_8_8")
    phone = export.LiteRTRunner(written.path)
    details = phone.interpreter.get_signature_runner("prefill_4").get_input_details()
    assert tuple(details["positions"]["shape"]) == (3, 4)
    tokens, expected = own_logits
    assert [length for _, _, length in split(0, 11, 32, phone.lengths)] == [8, 4]
    logits, _ = phone.extend(phone.embed(tokens[:12]), 0, phone.empty_cache())
    np.testing.assert_allclose(logits[0], expected[11], atol=1e-4)
    np.testing.assert_allclose(phone.score(tokens[:11]), expected[:11], atol=1e-4)
    assert np.isfinite(expected).all()


def test_short_signatures_attend_wherever_decode_does(text_model, text_params, tmp_path):
    file = export.tflite(
        text_model,
        text_params,
        tmp_path / "a",
        (8,),
        32,
        attended_slots=(8, 16),
        forced_lengths=[4],
    )
    assert {name for name in file.signatures if name.startswith("prefill_4")} == {
        "prefill_4",
        "prefill_4_8",
        "prefill_4_16",
    }
    phone, tokens = export.LiteRTRunner(file.path), np.arange(20, 40)
    expected = np.asarray(applied(text_model, file.params, tokens[None]))[0]
    run, used, cache = phone.run, [], phone.empty_cache()
    phone.run = lambda name, **inputs: used.append(name) or run(name, **inputs)
    rows = phone.embed(tokens)
    used.clear()
    for slot in (0, 3, 6, 12, 15, 18):
        count = 2 if slot == 18 else 3
        if slot == 6:
            _, cache = phone.extend(rows[6:12], 6, cache)
            continue
        logits, cache = phone.extend(rows[slot : slot + count], slot, cache)
        np.testing.assert_allclose(logits[0], expected[slot + count - 1], atol=1e-4)
    assert used[:2] == ["prefill_4_8"] * 2
    assert used[-3:] == ["prefill_4_16", "prefill_4", "prefill_4"]


def test_signatures_that_look_at_few_slots_give_the_same(own_head, own_logits, tmp_path):
    text, written = own_head
    with pytest.raises(ExportError, match=r"attended_slots: \[8, 32\] must be 2 to 31"):
        export.tflite(text, written.params, tmp_path / "a.tflite", (4,), 32, attended_slots=(8, 32))
    phone, used = export.LiteRTRunner(written.path), []
    run = phone.run
    phone.run = lambda name, **inputs: used.append(name) or run(name, **inputs)
    tokens, expected = own_logits
    cache, rows = phone.empty_cache(), phone.embed(tokens)
    logits, cache = phone.extend(rows[:8], 0, cache)
    scores = [logits]
    for slot in range(8, len(tokens)):
        logits, cache = phone.extend(rows[slot : slot + 1], slot, cache)
        scores.append(logits)
    steps = {"decode", "decode_8", "decode_16"}
    assert set(used) == {*steps, "prefill_8_8", "embed_8"}
    np.testing.assert_allclose(np.concatenate(scores), expected[7:], atol=1e-4)
    phone.extend(rows[:4], 0, cache)
    assert used[-2:] == ["prefill_4_8", "decode_8"]
    phone.extend(rows[8:13], 8, cache)
    assert used[-2:] == ["prefill_4", "decode_16"]
    phone.extend(rows[8:14], 8, cache)
    assert used[-2:] == ["prefill_8", "decode_16"]
    assert written.verify(texts(0, *[24] * 6), isolated=False).passed
