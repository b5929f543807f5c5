"""Files and checkpoints of models whose layers, heads, neurons, words and channels went."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

import glm_edge as ge
from glm_edge import export
from glm_edge import params as boxes
from glm_edge.errors import ExportError
from glm_edge.models.multimodal import MultimodalGLM


@functools.partial(jax.jit, static_argnums=0)
def applied(model, variables, *inputs):
    return model.apply(variables, *inputs)


# All that a placeholder or a stop needs, and two of three others.
KEEP = [index for index in range(320) if index < 24 or index % 3]
SHRINK = ge.chain(
    ge.prune.structured(0.25, neurons=0.3, score="magnitude", where="layers/[01]/"),
    ge.prune.depth([1]),
    ge.prune.encoders(0.25, neurons=0.3, score="magnitude", where="layers/0/"),
    ge.prune.vocabulary(KEEP),
)


@pytest.fixture(scope="module")
def shrunk(small_config, random_params):
    """A model of three layers, less one and less parts of the others, and its parameters."""
    model = MultimodalGLM(small_config(num_layers=3))
    return SHRINK(model, random_params(model))


@pytest.fixture(scope="module")
def rounded(shrunk, rounded):
    return shrunk[0], rounded(shrunk[1])


@pytest.fixture(scope="module")
def dense_file(shrunk, tmp_path_factory):
    return write(shrunk, tmp_path_factory.mktemp("shrunk") / "dense.tflite")


@pytest.fixture(scope="module")
def rounded_file(rounded, tmp_path_factory):
    return write(rounded, tmp_path_factory.mktemp("shrunk") / "rounded.tflite")


def write(result, path):
    return export.tflite(*result[:2], path, (32,), cache_slots=64, prefill_logits=True)


def test_layers_of_a_file_have_widths_of_their_own(shrunk, dense_file):
    model, params, report = shrunk
    config = export.LiteRTRunner(dense_file.path).config
    assert config == model.config
    decoder, vision, speech = config.decoder, config.vision, config.speech
    assert (decoder.num_layers, decoder.vocab_size) == (2, len(KEEP))
    assert (decoder.num_heads, decoder.intermediate_size) == ((6, 8), (352, 512))
    assert (vision.num_heads, vision.head_dim) == ((3, 4), 32)
    assert vision.intermediate_size == (160, 256)
    assert (speech.num_heads, speech.intermediate_size) == (3, 256)
    assert dense_file.stored_bytes == report.bytes_after == boxes.stored_bytes(params)
    assert dense_file.file_bytes <= 1.02 * report.bytes_after + 1e6
    stored = export.read_constants(dense_file.path)
    assert {path: constant.shape for path, constant in stored.items()} == {
        path: tuple(leaf.shape) for path, leaf in boxes.path_items(params)
    }


def test_a_file_of_a_shrunk_model_gives_its_logits(dense_file):
    result = dense_file.verify(free_running=3, isolated=False)
    assert result.agreement == 1.0
    assert result.max_abs_error < 1e-4
    assert result.free_running_agreement == 1.0


# Rounded parameters are written above all in tflite/test_export.py, those of a shrunk model below.
@pytest.mark.slow
def test_a_shrunk_model_is_rounded_and_written(rounded_file):
    forms = {constant.type for constant in export.read_constants(rounded_file.path).values()}
    assert forms == {"int4", "int8", "float32"}


@pytest.mark.slow
def test_a_shrunk_and_rounded_model_agrees_with_its_file(rounded_file):
    assert rounded_file.verify(free_running=2, isolated=False).passed


@pytest.mark.parametrize("kind", ["dense", pytest.param("rounded", marks=pytest.mark.slow)])
def test_a_checkpoint_of_a_shrunk_model_is_what_its_file_holds(kind, request, tmp_path):
    (model, params, *_), written = (
        request.getfixturevalue(name)
        for name in (("shrunk", "dense_file") if kind == "dense" else ("rounded", "rounded_file"))
    )
    ge.save(model, params, tmp_path / "saved")
    loaded, read = ge.load(tmp_path / "saved")
    assert loaded.config == model.config
    assert jax.tree.structure(read) == jax.tree.structure(params)
    stored = export.read_constants(written.path)
    for path, leaf in boxes.path_items(read):
        codes = leaf.data if isinstance(leaf, boxes.Quantized) else leaf
        assert stored[path].data.tobytes() == np.asarray(codes).tobytes()


def test_parameters_of_the_larger_model_are_no_longer_its_own(shrunk, small_config, tmp_path):
    larger = MultimodalGLM(small_config())
    with pytest.raises(ExportError, match=r"decoder/layers/0/attention/o_proj/weight: shape"):
        write((larger, shrunk[1]), tmp_path / "a.tflite")


@pytest.mark.slow
def test_shrunk_vocabulary_answers_alike(small_config, random_params, tmp_path):
    """Fewer words answer as all did where only they can be said."""
    words = ["<end>", "<pad>", *(f"w{index:03d}" for index in range(2, 320))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<end>", "<pad>"])
    config = dataclasses.replace(
        small_config(num_layers=1),
        vision=None,
        speech=None,
        image_token_id=None,
        audio_token_id=None,
        eos_token_ids=(0,),
        pad_token_id=1,
    )
    model = MultimodalGLM(config)
    params = random_params(model)
    rng = np.random.default_rng(0)
    text = " ".join(rng.choice(words[2:], 150, replace=False))
    keep = ge.prune.frequent_tokens(tokenizer, [text], config=config)
    assert len(keep) == 152
    smaller, shrunk, report = ge.prune.vocabulary(keep, tokenizer=tokenizer)(model, params)
    reader = ge.prune.shrink_tokenizer(tokenizer, keep)
    written = export.tflite(smaller, shrunk, tmp_path / "a.tflite", (16,), cache_slots=32)
    assert written.stored_bytes == report.bytes_after < report.bytes_before
    prompt = " ".join(text.split()[:12])
    answer = export.LiteRTRunner(written.path).generate(
        np.array(reader.encode(prompt).ids), max_new_tokens=8
    )
    ids = tokenizer.encode(prompt).ids
    for _ in answer:
        logits = applied(model, {"params": params}, jnp.asarray([ids]))[0][0, -1]
        ids.append(int(keep[np.argmax(logits[jnp.asarray(keep)])]))
    assert reader.decode(answer, skip_special_tokens=False) == tokenizer.decode(
        ids[12:], skip_special_tokens=False
    )
