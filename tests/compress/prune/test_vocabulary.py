import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import glm_edge as ge
from glm_edge import params as boxes
from glm_edge.compress import batches
from glm_edge.compress.prune.shrink import tokenizer as tokens_lib
from glm_edge.compress.prune.shrink.tokenizer import frequent_tokens, shrink_tokenizer
from glm_edge.compress.prune.shrink.vocabulary import map_tokens, shrink_vocabulary
from glm_edge.compress.prune.vocabulary import from_ranges, to_ranges, vocabulary
from glm_edge.compress.quantize import rtn
from glm_edge.configs import DecoderConfig, GLMConfig, TextConfig
from glm_edge.errors import DataError, RecipeError
from glm_edge.generate import greedy
from glm_edge.models.multimodal import MultimodalGLM
from glm_edge.models.text import TextEncoder
from tests.tiny_models import init

apply = jax.jit(batches.apply_batch, static_argnums=0)

TEXTS = ["the cat sat on the mat and the dog sat on the cat", "a dog and a cat met a rat"] * 3
OTHER = "strange zebras quietly hum: ünïcode, 世界!"
SPECIAL = ["<|end|>", "<|user|>", "<|image|>"]


@pytest.fixture(scope="module")
def tokenizer():
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([*TEXTS, "strange zebras quietly hum and hum again"] * 4, trainer)
    made.add_tokens(["[12,", "34]"])
    return made


@pytest.fixture(scope="module")
def small(tokenizer):
    size = tokenizer.get_vocab_size() + 5
    fields = {"vocab_size": size, "hidden_size": 16, "num_layers": 1, "num_heads": 2}
    fields |= {"num_kv_heads": 1, "head_dim": 8, "intermediate_size": 24, "tie_embeddings": False}
    config = GLMConfig("small", DecoderConfig(**fields), eos_token_ids=(0,), pad_token_id=0)
    model = MultimodalGLM(config)
    params = init(model, jnp.zeros((1, 2), jnp.int32))["params"]
    return model, params


@pytest.fixture(scope="module")
def keep(tokenizer, small):
    return frequent_tokens(tokenizer, TEXTS, config=small[0].config)


def test_shrunk_tokenizer_reads_any_text(tokenizer, keep):
    """Text of kept tokens reads as before and other text is not lost."""
    smaller = shrink_tokenizer(tokenizer, keep)
    assert smaller.get_vocab_size() == len(keep) < tokenizer.get_vocab_size()
    for text in TEXTS[:2]:
        before = tokenizer.encode(text).ids
        np.testing.assert_array_equal(smaller.encode(text).ids, map_tokens(before, keep))
        assert smaller.decode(smaller.encode(text).ids) == text
    assert smaller.decode(smaller.encode(OTHER).ids) == OTHER
    assert len(smaller.encode(OTHER).ids) > len(tokenizer.encode(OTHER).ids)
    for token in SPECIAL:
        assert smaller.token_to_id(token) == list(keep).index(tokenizer.token_to_id(token))


def test_added_tokens_that_are_not_special_go_when_they_are_rare(tokenizer, keep):
    coordinate = tokenizer.token_to_id("34]")
    assert coordinate not in keep
    with_it = frequent_tokens(tokenizer, [[coordinate, coordinate], *TEXTS])
    smaller = shrink_tokenizer(tokenizer, with_it)
    assert smaller.encode("34]").ids == [len(with_it) - 1]
    assert smaller.token_to_id("[12,") is None
    assert smaller.decode(smaller.encode("[12,").ids) == "[12,"


def test_merges_on_the_way_to_a_token_stay(tokenizer):
    vocabulary_of = tokens_lib.Vocabulary(tokenizer)
    index = tokenizer.token_to_id("Ġcat")
    named = {vocabulary_of.tokens[part] for part in vocabulary_of.parts(index)}
    assert {"Ġ", "c", "a", "t", "Ġcat"} <= named
    assert any(len(token) in (2, 3) for token in named)
    required = sorted(vocabulary_of.required)
    without = sorted({*required, index})
    with pytest.raises(RecipeError, match="merges make"):
        shrink_tokenizer(tokenizer, without)
    smaller = shrink_tokenizer(tokenizer, sorted({*required, *vocabulary_of.parts(index)}))
    assert len(smaller.encode(" cat").ids) == 1


def test_size_limits_what_is_kept_to_the_most_frequent(tokenizer, keep):
    required = len(tokens_lib.Vocabulary(tokenizer).required)
    fewer = frequent_tokens(tokenizer, TEXTS, size=required + 6)
    assert required < len(fewer) <= required + 6
    assert set(fewer) <= set(keep)
    with pytest.raises(RecipeError, match=f"size=100, but {required} tokens must stay"):
        frequent_tokens(tokenizer, TEXTS, size=100)


def test_the_smaller_model_scores_the_kept_tokens_as_before(tokenizer, small, keep, tmp_path):
    model, params = small
    smaller, shrunk, report = vocabulary(keep, tokenizer=tokenizer)(model, params)
    ids = np.array([tokenizer.encode(TEXTS[0]).ids])
    masked = jax.device_get(params)
    gone = np.setdiff1d(np.arange(model.config.decoder.vocab_size), keep)
    for name in ("embed", "head"):
        masked[name] = {"weight": np.array(masked[name]["weight"])}
        masked[name]["weight"][gone] = 0
    expected = apply(model, masked, {"tokens": ids})
    mapped = map_tokens(ids, keep)
    actual = apply(smaller, shrunk, {"tokens": mapped})
    np.testing.assert_allclose(actual, expected[..., keep], atol=1e-5)
    assert smaller.config.decoder.vocab_size == len(keep)
    assert report.flops_after["token"] < report.flops_before["token"]
    assert (report.count_after, len(report.rows)) == (report.count_before - 2 * 16 * len(gone), 2)
    extras = {"tokenizer.json": shrink_tokenizer(tokenizer, keep).to_str().encode()}
    ge.save(smaller, shrunk, tmp_path / "out", format="safetensors", extras=extras)
    loaded, read = ge.load(tmp_path / "out")
    reader = ge.checkpoint.load_tokenizer(tmp_path / "out")
    prompt = np.array([reader.encode(TEXTS[0]).ids])
    np.testing.assert_array_equal(prompt, mapped)
    answer = greedy(loaded, read, prompt, max_new_tokens=2)
    assert int(answer[0, 0]) == int(jnp.argmax(expected[0, -1, keep]))


def test_placeholders_and_stop_tokens_are_renumbered(make_member):
    model, params = make_member("nano")
    keep = [0, 2, 5, 8, *range(10, 48)]
    smaller, small = shrink_vocabulary(model, params, keep)
    config = smaller.config
    assert (config.image_token_id, config.audio_token_id, config.pad_token_id) == (2, 3, 0)
    assert "head" not in small
    ends = dataclasses.replace(model.config, eos_token_ids=(8,), pad_token_id=8)
    config = shrink_vocabulary(model.clone(config=ends), params, keep)[0].config
    assert (config.eos_token_ids, config.pad_token_id) == ((3,), 3)
    with pytest.raises(RecipeError, match="token 5 must stay, since it is image_token_id"):
        shrink_vocabulary(model, params, [0, 8, 20])


@pytest.mark.parametrize("format", ["int4", "int4-g8"])
def test_rows_of_a_quantized_embedding_keep_their_scales(small, keep, format):
    model, params = small
    _, rounded, _ = rtn(format, where="^(embed|head)/")(model, params)
    smaller, shrunk = shrink_vocabulary(model, rounded, keep)
    batch = {"tokens": keep[:9][None]}
    # Without boxes, so that one program serves both formats.
    rounded, shrunk = (
        jax.tree.map(boxes.dense, tree, is_leaf=boxes.is_box) for tree in (rounded, shrunk)
    )
    expected = apply(model, rounded, batch)[..., keep]
    actual = apply(smaller, shrunk, {"tokens": np.arange(9)[None]})
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_a_text_encoder_and_its_word_pieces_shrink():
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "cat", "##s", "dog", "sat"]
    made = Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens(["[PAD]", "[CLS]", "[SEP]"])
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    keep = frequent_tokens(made, ["the cats sat"])
    smaller = shrink_tokenizer(made, keep)
    assert smaller.encode("the cats sat dog").tokens == [
        "[CLS]", "the", "cat", "##s", "sat", "[UNK]", "[SEP]",
    ]  # fmt: skip
    model = TextEncoder(TextConfig(len(pieces), 16, 1, 2, 24, num_labels=2))
    before, after = made.encode("the cats sat").ids, smaller.encode("the cats sat").ids
    assert list(map_tokens(before, keep)) == after
    params = init(model, jnp.asarray([before]))["params"]
    shrunk_model, shrunk = shrink_vocabulary(model, params, keep)
    np.testing.assert_allclose(
        jax.jit(shrunk_model.apply)({"params": shrunk}, jnp.asarray([after]))[0],
        jax.jit(model.apply)({"params": params}, jnp.asarray([before]))[0],
        atol=1e-6,
    )


def test_a_unigram_tokenizer_shrinks():
    entries = [("<unk>", 0.0), ("a", -3.0), ("b", -3.0), ("ab", -1.0), ("ba", -2.0), ("c", -3.0)]
    made = Tokenizer(models.Unigram(entries, unk_id=0, byte_fallback=False))
    smaller = shrink_tokenizer(made, [0, 1, 3, 4])
    assert smaller.encode("abba").tokens == ["ab", "ba"]
    with pytest.raises(RecipeError, match="the token of unknown text"):
        shrink_tokenizer(made, [1, 2])


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("<|user|>", r"'<\|user\|>'\) must stay, since it is a special token"),
        ("<|image|>", "must stay, since it is a special token"),
        ("Ā", "must stay, since it is a byte that any text may hold"),
    ],
)
def test_special_tokens_and_bytes_cannot_go(tokenizer, keep, missing, message):
    fewer = keep[keep != tokenizer.token_to_id(missing)]
    with pytest.raises(RecipeError, match=message):
        vocabulary(fewer, tokenizer=tokenizer)
    with pytest.raises(RecipeError, match=message):
        shrink_tokenizer(tokenizer, fewer)


def test_vocabulary_without_a_tokenizer_keeps_config_tokens(tokenizer, small, keep):
    """Without a tokenizer only what the configuration names is safe."""
    user = tokenizer.token_to_id("<|user|>")
    smaller, _, report = vocabulary(keep[keep != user])(*small)
    assert smaller.config.decoder.vocab_size == len(keep) - 1
    (note,) = report.notes
    assert "the configuration names stayed (eos_token_ids, pad_token_id)" in note
    assert "checked where vocabulary is given tokenizer=" in note
    with pytest.raises(RecipeError, match="token 0 must stay, since it is"):
        vocabulary(keep[1:])(*small)


def test_byte_fallback_tokens_cannot_go():
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    words = {token: i for i, token in enumerate(["<unk>", *fallback, "a", "b", "ab"])}
    made = Tokenizer(models.BPE(words, [("a", "b")], unk_token="<unk>", byte_fallback=True))
    keep = sorted(tokens_lib.Vocabulary(made).required)
    assert len(keep) == 257
    smaller = shrink_tokenizer(made, keep)
    assert smaller.encode("ab").tokens == ["<0x61>", "<0x62>"]
    with pytest.raises(RecipeError, match=r"'<0x00>'.* a byte"):
        shrink_tokenizer(made, keep[:1] + keep[2:])


def test_affixes_are_not_guessed_at():
    made = Tokenizer(models.BPE({"a": 0, "b</w>": 1}, [], end_of_word_suffix="</w>"))
    with pytest.raises(RecipeError, match="cannot be cut"):
        frequent_tokens(made, ["ab"])


def test_a_recipe_holds_the_ids_as_text(keep):
    transform = vocabulary(keep)
    assert ge.recipe_from_json(ge.to_json(transform)) == transform
    text = transform.keep
    np.testing.assert_array_equal(from_ranges(text), keep)
    assert to_ranges([0, 1, 2, 7, 9, 10]) == "0-2,7,9-10"


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ([], "nothing of .* would remain"),
        ([3, 1], "ascending whole numbers"),
        ("1-", "keep must be ids such as"),
        ("5-2", "nothing of"),
        ("0-99999999999", "not an id of a token"),
    ],
)
def test_ids_without_a_meaning_are_refused(keep, message):
    with pytest.raises(RecipeError, match=message):
        vocabulary(keep)


def test_ids_beyond_the_model_and_lost_tokens_are_refused(small):
    model, params = small
    with pytest.raises(RecipeError, match="tokens to keep must be ascending"):
        shrink_vocabulary(model, params, [0, 4000])
    with pytest.raises(DataError, match="token 3 did not stay, nor did 1 of 3"):
        map_tokens([[1, 3, 7]], [1, 2, 7])
    with pytest.raises(DataError, match="token 9 did not stay"):
        map_tokens([9], [1, 2, 7])
    assert dataclasses.is_dataclass(model.config)
