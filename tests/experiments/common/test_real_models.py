"""Trained models inside packages: text, answers, an independent forward pass, an exported file."""

import dataclasses
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import glm_edge as ge
from experiments.common import real_models
from glm_edge import params as boxes
from glm_edge.cli import checkpoints, corpora
from glm_edge.cli.loss import text_loss
from glm_edge.errors import MissingExtraError

DATA = Path(os.environ.get("GLM_EDGE_DATA", "nowhere"))


@pytest.fixture(scope="module")
def smollm2():
    try:
        return real_models.smollm2()
    except MissingExtraError as error:
        pytest.skip(str(error))


def cut(model, params, layers=2):
    """The first layers, with the rest of the model."""
    decoder = dataclasses.replace(model.config.decoder, num_layers=layers)
    stack = {str(index): params["decoder"]["layers"][str(index)] for index in range(layers)}
    small = ge.MultimodalGLM(dataclasses.replace(model.config, decoder=decoder))
    return small, params | {"decoder": params["decoder"] | {"layers": stack}}


@pytest.mark.slow
def test_smollm2_loads_with_its_published_shape(smollm2):
    model, params, tokenizer = smollm2
    assert boxes.count(params) == 134_515_008
    assert model.config.decoder.num_layers == 30
    assert tokenizer.get_vocab_size() == model.config.decoder.vocab_size == 49152
    text = "The year 2024: don't  stop\n\tÅ 中文"
    ids = corpora.encode_text(tokenizer, text)
    assert tokenizer.decode(ids.tolist()) == text
    assert corpora.token_bytes(tokenizer)[ids].sum() == len(text.encode())


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason="GLM_EDGE_DATA names no folder of data")
def test_smollm2_predicts_text(smollm2, optimized):
    model, params, tokenizer = smollm2
    text = (DATA / "text_books" / "war_and_peace_train.txt").read_text(encoding="utf-8")[:20000]
    ids = tokenizer.encode(text).ids
    rows = np.resize(ids, (len(ids) // 256, 256))[:8]
    windows = corpora.windows(rows.reshape(-1), corpora.token_bytes(tokenizer), 256)
    measured = text_loss(model, params, windows, batch=2)
    assert windows.num_scored == 2040
    # Computed by the package gguf, a tokenizer built by hand, and transformers' LlamaForCausalLM.
    assert measured["perplexity"] == pytest.approx(39.7298, rel=1e-4)
    assert measured["bits_per_byte"] == pytest.approx(1.334415, rel=1e-4)


@pytest.mark.slow
def test_smollm2_answers_a_question(smollm2, optimized):
    model, params, tokenizer = smollm2
    prompt = jnp.asarray([tokenizer.encode("The capital of France is").ids])
    tokens = ge.generate.generate(model, params, prompt, max_new_tokens=2).tokens
    assert tokenizer.decode(np.asarray(tokens)[0].tolist()) == " Paris."
    processor = ge.Processor.from_checkpoint(checkpoints.checkpoint_of("smollm2"))
    answer = ge.chat(model, params, processor, "What is the capital of France?", max_new_tokens=12)
    assert answer == "The capital of France is Paris."


@pytest.mark.slow
def test_smollm2_boxes_compute_like_dense_weights(smollm2, optimized):
    model, params, tokenizer = smollm2
    _, boxed = ge.load(checkpoints.checkpoint_of("smollm2"), weights="boxes")
    assert boxes.stored_bytes(boxed) < 0.2 * boxes.stored_bytes(params)
    tokens = np.asarray([tokenizer.encode("The capital of France is").ids])
    apply = jax.jit(model.apply)
    dense, low = (np.asarray(apply({"params": p}, tokens)[0]) for p in (params, boxed))
    np.testing.assert_allclose(low, dense, rtol=0, atol=2e-3)


def half_split(rows: np.ndarray, heads: int) -> np.ndarray:
    """Reorders rows from adjacent rotary pairs to pairs half a head apart."""
    width = len(rows) // heads
    return rows.reshape(heads, width // 2, 2, -1).swapaxes(1, 2).reshape(rows.shape)


@pytest.mark.slow
def test_smollm2_agrees_with_transformers(smollm2, optimized):
    torch = pytest.importorskip("torch", reason="needs the extra `reference`")
    transformers = pytest.importorskip("transformers", reason="needs the extra `reference`")
    model, params, tokenizer = smollm2
    decoder = model.config.decoder
    reference = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=decoder.vocab_size,
            hidden_size=decoder.hidden_size,
            intermediate_size=decoder.intermediate_size,
            num_hidden_layers=decoder.num_layers,
            num_attention_heads=decoder.num_heads,
            num_key_value_heads=decoder.num_kv_heads,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
            tie_word_embeddings=True,
        )
    ).eval()
    stored = {}
    for path, leaf in boxes.path_items(params):
        array, name = np.asarray(leaf), path.replace("/", ".").removeprefix("decoder.")
        name = name.replace("input_norm", "input_layernorm").replace("attention.", "self_attn.")
        name = name.replace("post_attention_norm", "post_attention_layernorm")
        for heads, part in ((decoder.num_heads, "q_proj"), (decoder.num_kv_heads, "k_proj")):
            array = half_split(array, heads) if part in name else array
        if "gate_up" in name:
            for half, part in zip(np.split(array, 2), ("gate", "up"), strict=True):
                stored[f"model.{name.replace('gate_up', part)}"] = torch.tensor(half)
        else:
            stored[f"model.{name.replace('embed.', 'embed_tokens.')}"] = torch.tensor(array)
    missing, unexpected = reference.load_state_dict(stored, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    ids = tokenizer.encode("The capital of France is Paris, and 12 miles from it").ids
    with torch.no_grad():
        expected = reference(torch.tensor([ids])).logits.numpy()
    logits, _ = jax.jit(model.apply)({"params": params}, jnp.asarray([ids]))
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-3)


@pytest.mark.slow
def test_smollm2_exports_its_first_layers(smollm2, tmp_path):
    pytest.importorskip("ai_edge_litert", reason="needs the extra `export`")
    pytest.importorskip("tensorflow", reason="needs the extra `export`")
    model, params, tokenizer = smollm2
    small, params = cut(model, params)
    ids = corpora.encode_text(tokenizer, corpora.pydoc_topics("evaluation"))[:1024]
    exported = ge.export.tflite(
        small, params, tmp_path / "a.tflite", prefill_lengths=(16,), cache_slots=128
    )
    outcome = exported.verify([ge.export.Window(row) for row in ids.reshape(-1, 128)])
    assert outcome.verified
    assert outcome.tokens >= 1000


@pytest.fixture(scope="module")
def minilm():
    try:
        return real_models.minilm()
    except MissingExtraError as error:
        pytest.skip(str(error))


def test_minilm_ranks_sentences_by_meaning(minilm):
    model, params, tokenizer = minilm
    sentences = ["Set an alarm for seven.", "Wake me up at 7 o'clock.", "The stock market fell."]
    vectors = real_models.sentence_vectors(model, params, tokenizer, sentences)
    cosine = vectors @ vectors.T
    np.testing.assert_allclose(np.diag(cosine), 1, rtol=1e-5)
    assert cosine[0, 1] > 0.5 > 0.2 > cosine[0, 2]
    # Padding changes nothing.
    (alone,) = real_models.sentence_vectors(model, params, tokenizer, sentences[2:])
    np.testing.assert_allclose(alone, vectors[2], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_minilm_agrees_with_transformers(minilm):
    torch = pytest.importorskip("torch", reason="needs the extra `reference`")
    transformers = pytest.importorskip("transformers", reason="needs the extra `reference`")
    model, params, tokenizer = minilm
    reference = transformers.AutoModel.from_pretrained(checkpoints.checkpoint_of("minilm")).eval()
    ids = tokenizer.encode("Wake me up at 7 o'clock.").ids
    with torch.no_grad():
        states = reference(torch.tensor([ids])).last_hidden_state[0].mean(0).numpy()
    (vector,) = real_models.sentence_vectors(model, params, tokenizer, ["Wake me up at 7 o'clock."])
    np.testing.assert_allclose(vector, states / np.linalg.norm(states), rtol=0, atol=1e-5)
