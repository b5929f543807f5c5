"""GGUF files as checkpoints: weights, boxes, wrong files, copies that reload."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import glm_edge as ge
from glm_edge import params as boxes
from glm_edge.checkpoint.lazy import open_lazily
from glm_edge.errors import CheckpointError, ConfigError, GlmEdgeError
from tests.gguf_writer import (
    dequantized,
    random_tensor,
    tiny_metadata,
    tiny_tensors,
    write_gguf,
)

NAMES = {
    "embed/weight": ("token_embd",),
    "decoder/norm/weight": ("output_norm",),
    "decoder/layers/1/attention/k_proj/weight": ("blk.1.attn_k",),
    "decoder/layers/0/mlp/gate_up_proj/weight": ("blk.0.ffn_gate", "blk.0.ffn_up"),
    "decoder/layers/0/mlp/down_proj/weight": ("blk.0.ffn_down",),
    "decoder/layers/1/input_norm/weight": ("blk.1.attn_norm",),
    "decoder/layers/1/post_attention_norm/weight": ("blk.1.ffn_norm",),
}


@pytest.fixture
def write(tmp_path):
    def write(metadata=None, tensors=None):
        return write_gguf(
            tmp_path / "tiny.gguf", metadata or tiny_metadata(), tensors or tiny_tensors()
        )

    return write


def expected_values(tensors, names) -> np.ndarray:
    return np.concatenate([dequantized(tensors[f"{name}.weight"]) for name in names])


def test_load_reads_the_configuration_of_a_file(write):
    model, params = ge.load(write())
    decoder = model.config.decoder
    assert model.config.name == "tiny"
    assert (decoder.num_layers, decoder.hidden_size, decoder.intermediate_size) == (2, 32, 64)
    assert (decoder.num_heads, decoder.num_kv_heads, decoder.head_dim) == (4, 2, 8)
    assert (decoder.rms_norm_eps, decoder.rope_theta) == (1e-5, 1e5)
    assert decoder.rotary_interleaved
    assert decoder.tie_embeddings
    assert decoder.max_position_embeddings == 64
    assert (model.config.eos_token_ids, model.config.pad_token_id) == ((2,), 0)
    assert ge.build(write()).config == model.config
    logits, _ = jax.jit(model.apply)({"params": params}, jnp.ones((1, 4), jnp.int32))
    assert logits.shape == (1, 4, decoder.vocab_size)


@pytest.mark.parametrize("kind", ["F32", "F16", "Q4_0", "Q4_1", "Q8_0"])
def test_load_dequantizes_every_type(write, kind):
    tensors = tiny_tensors(kind)
    _, params = ge.load(write(tensors=tensors))
    leaves = dict(boxes.path_items(params))
    for path, names in NAMES.items():
        values = expected_values(tensors, names)
        np.testing.assert_array_equal(np.asarray(leaves[path], np.float32), values)
        stored = jnp.float16 if kind == "F16" and values.ndim == 2 else jnp.float32
        assert leaves[path].dtype == (jnp.float32 if path == "embed/weight" else stored)
    _, cast = ge.load(write(tensors=tensors), dtype="bfloat16")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(cast)} == {"bfloat16"}


@pytest.mark.parametrize(("kind", "exact"), [("Q4_0", True), ("Q4_1", False), ("Q8_0", True)])
def test_load_keeps_blocks_as_boxes_that_compute_alike(write, kind, exact):
    path = write(tensors=tiny_tensors(kind))
    model, dense = ge.load(path)
    _, boxed = ge.load(path, weights="boxes")
    values, leaves = dict(boxes.path_items(dense)), dict(boxes.path_items(boxed))
    for name, leaf in leaves.items():
        assert boxes.is_box(leaf) == (leaf.ndim == 2 if hasattr(leaf, "ndim") else True)
        if exact or not boxes.is_box(leaf):
            np.testing.assert_array_equal(boxes.dense(leaf), values[name])
        else:
            np.testing.assert_allclose(boxes.dense(leaf), values[name], rtol=0, atol=1e-6)
    apply, tokens = jax.jit(model.apply), jnp.arange(6)[None]
    logits = [apply({"params": params}, tokens)[0] for params in (dense, boxed)]
    np.testing.assert_allclose(logits[0], logits[1], rtol=0, atol=1e-4)


def test_load_boxes_parameters_that_join_types_as_dense_ones(write):
    tensors = tiny_tensors("Q4_0")
    rng = np.random.default_rng(1)
    tensors["blk.0.ffn_up.weight"] = random_tensor("Q8_0", (64, 32), rng)
    _, params = ge.load(write(tensors=tensors), weights="boxes")
    joined = params["decoder"]["layers"]["0"]["mlp"]["gate_up_proj"]["weight"]
    names = ("blk.0.ffn_gate", "blk.0.ffn_up")
    np.testing.assert_array_equal(joined, expected_values(tensors, names))


def test_load_unties_a_file_with_an_output_head(write):
    tensors = tiny_tensors(tied=False)
    model, params = ge.load(write(tensors=tensors))
    assert not model.config.decoder.tie_embeddings
    expected = expected_values(tensors, ("output",))
    np.testing.assert_array_equal(params["head"]["weight"], expected)


def test_load_accepts_a_directory_with_one_file(write):
    path = write()
    _, params = ge.load(path)
    _, others = ge.load(path.parent)
    assert jax.tree.all(jax.tree.map(np.array_equal, params, others))


def test_open_lazily_reads_parts_of_a_file(write):
    path = write()
    model, params = ge.load(path)
    opened = open_lazily(path)
    assert opened.model == model
    leaves = dict(boxes.path_items(params))
    assert {name: leaf.shape for name, leaf in opened.abstract.items()} == {
        name: leaf.shape for name, leaf in leaves.items()
    }
    for name, leaf in opened.read(list(NAMES)).items():
        np.testing.assert_array_equal(leaf, leaves[name])


def test_compress_checkpoint_streams_a_file(write, tmp_path):
    path = write()
    ge.compress_checkpoint(path, tmp_path / "out", ge.quantize.rtn("int4-g32"))
    _, params = ge.load(tmp_path / "out")
    _, source = ge.load(path)
    boxed = params["decoder"]["layers"]["0"]["attention"]["q_proj"]["weight"]
    values = source["decoder"]["layers"]["0"]["attention"]["q_proj"]["weight"]
    assert str(boxed.format) == "int4-g32"
    assert np.abs(boxes.dense(boxed) - values).max() < np.abs(values).max() / 7
    tokens = ge.load_tokenizer(tmp_path / "out").encode(" the").ids
    assert tokens == ge.load_tokenizer(path).encode(" the").ids


@pytest.mark.parametrize("weights", ["dense", "boxes"])
def test_save_writes_a_directory_that_reloads(write, tmp_path, weights):
    path = write()
    model, params = ge.load(path, weights=weights)
    copy = ge.save(model, params, tmp_path / "copy", source=path)
    again, reloaded = ge.load(copy)
    assert again.config == model.config
    assert jax.tree.structure(reloaded) == jax.tree.structure(params)
    assert jax.tree.all(jax.tree.map(np.array_equal, params, reloaded))
    first, second = map(ge.Processor.from_checkpoint, (path, copy))
    messages = [{"role": "user", "content": "hi the <|im_end|>"}]
    np.testing.assert_array_equal(first(messages).tokens, second(messages).tokens)
    assert first.stop_token_ids == second.stop_token_ids == (2,)
    assert first.pad_token_id == second.pad_token_id == 0


@pytest.mark.slow
def test_transformers_opens_a_saved_file(write, tmp_path):
    torch = pytest.importorskip("torch", reason="needs the extra `reference`")
    transformers = pytest.importorskip("transformers", reason="needs the extra `reference`")
    path = write(tensors=tiny_tensors(tied=False))
    model, params = ge.load(path)
    copy = ge.save(model, params, tmp_path / "copy", source=path)
    reference = transformers.AutoModelForCausalLM.from_pretrained(copy, dtype="float32").eval()
    tokens = np.arange(40).reshape(2, 20) * 7 % model.config.decoder.vocab_size
    with torch.no_grad():
        expected = reference(torch.tensor(tokens)).logits.numpy()
    logits, _ = jax.jit(model.apply)({"params": params}, tokens)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    tokenizer = transformers.AutoTokenizer.from_pretrained(copy)
    text = "the 12 <|im_end|>"
    assert tokenizer(text).input_ids == ge.load_tokenizer(path).encode(text).ids


def test_load_places_boxes_on_a_mesh(write):
    path = write()
    mesh = jax.make_mesh((1, 1), ("data", "model"))
    for weights in ("dense", "boxes"):
        _, params = ge.load(path, mesh=mesh, weights=weights)
        _, single = ge.load(path, weights=weights)
        assert jax.tree.all(jax.tree.map(np.array_equal, params, single))
        meshes = {leaf.sharding.mesh.axis_names for leaf in jax.tree.leaves(params)}
        assert meshes == {("data", "model")}


METADATA = {
    "architecture": ({"general.architecture": "mamba"}, "'mamba', which is unsupported"),
    "no architecture": ({"general.architecture": ("u32", 3)}, "which is unsupported"),
    "a part": ({"split.count": 3}, "is one of 3 parts"),
    "experts": ({"llama.expert_count": 8}, "'llama.expert_count' is 8"),
    "scaled positions": ({"llama.rope.scaling.type": "yarn"}, "'yarn', which is unsupported"),
    "unknown field": ({"llama.new_field": 5}, "'llama.new_field' (5) is unsupported"),
    "no layers": ({"llama.block_count": None}, "'llama.block_count' is missing"),
    "layers": ({"llama.block_count": 900}, "900 layers"),
    "heads of a layer": ({"llama.attention.head_count": [4, 2]}, "head_count' is [4, 2]"),
    "shared heads": ({"llama.attention.head_count_kv": 3}, "must divide"),
    "width": ({"llama.embedding_length": 64}, "dimension_count' is 8"),
    "neurons": ({"llama.feed_forward_length": 32}, "has shape"),
    "head size": (
        dict.fromkeys(("llama.attention.key_length", "llama.rope.dimension_count"), 2**31 - 8),
        "exceeds",
    ),
    "rotated": ({"llama.rope.dimension_count": 16}, "rope.dimension_count' is 16"),
    "vocabulary": ({"llama.vocab_size": 7}, "has shape"),
    "stop token": ({"tokenizer.ggml.eos_token_id": "x"}, "must be a token id"),
}


@pytest.mark.parametrize("field", METADATA)
def test_load_refuses_metadata(write, field):
    changed, message = METADATA[field]
    metadata = {k: v for k, v in (tiny_metadata() | changed).items() if v is not None}
    for open_checkpoint in (ge.load, open_lazily):
        with pytest.raises((ConfigError, CheckpointError)) as caught:
            open_checkpoint(write(metadata))
        assert message in str(caught.value)
        assert "tiny.gguf" in str(caught.value)


def infinite_scale(tensor):
    kind, shape, raw = tensor
    return kind, shape, np.array([np.inf], "<f2").tobytes() + raw[2:]


TENSORS = {
    "missing": (lambda t: t.pop("blk.1.attn_q.weight"), "tensor 'blk.1.attn_q.weight' is missing"),
    "unexpected": (
        lambda t: t.update({"rope_freqs.weight": t["output_norm.weight"]}),
        "tensor 'rope_freqs.weight' has no place in the model",
    ),
    "transposed": (
        lambda t: t.update(
            {"blk.0.ffn_up.weight": random_tensor("Q4_1", (32, 64), np.random.default_rng(0))}
        ),
        "has shape (32, 64), the model needs (64, 32)",
    ),
    "infinite": (
        lambda t: t.update({"blk.0.attn_q.weight": infinite_scale(t["blk.0.attn_q.weight"])}),
        "finite",
    ),
}


@pytest.mark.parametrize("weights", ["dense", "boxes"])
@pytest.mark.parametrize("damage", TENSORS)
def test_load_refuses_tensors(write, damage, weights):
    change, message = TENSORS[damage]
    tensors = tiny_tensors()
    change(tensors)
    with pytest.raises(GlmEdgeError) as caught:
        ge.load(write(tensors=tensors), weights=weights)
    assert message in str(caught.value)


def test_load_refuses_arguments_without_meaning(write, tmp_path):
    path = write()
    with pytest.raises(CheckpointError, match="weights 'packed' is unknown"):
        ge.load(path, weights="packed")
    with pytest.raises(CheckpointError, match="remove model="):
        ge.load(path, model=ge.build(path))
    (tmp_path / "a.txt").write_text("not a model at all")
    with pytest.raises(CheckpointError, match=r"a\.txt: is a file; a checkpoint is a directory"):
        ge.load(tmp_path / "a.txt")
    (tmp_path / "a.gguf").write_text("not a model at all")
    with pytest.raises(CheckpointError, match="not a GGUF file"):
        ge.load(tmp_path / "a.gguf")
    with pytest.raises(CheckpointError, match="does not exist"):
        ge.load(tmp_path / "absent.gguf")


def test_mutations_of_a_header_load_or_raise_one_error(write):
    """Bytes of the header, changed at random, never raise another exception."""
    path = write()
    original = path.read_bytes()
    header = len(original) - sum(-(-len(raw) // 32) * 32 for _, _, raw in tiny_tensors().values())
    rng, messages = np.random.default_rng(0), []
    for _ in range(80):
        mutated = bytearray(original)
        for position in rng.integers(0, header, rng.integers(1, 4)):
            mutated[position] = rng.integers(0, 256)
        path.write_bytes(mutated)
        try:
            open_lazily(path)
            ge.Processor.from_checkpoint(path)
        except GlmEdgeError as error:
            messages.append(str(error))
    assert len(messages) > 40
    assert all(message.isprintable() for message in messages)
