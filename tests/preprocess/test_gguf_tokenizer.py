"""Tokenizers and chat templates of GGUF files."""

import json

import pytest
import tokenizers

import glm_edge as ge
from glm_edge.errors import CheckpointError, ConfigError
from glm_edge.gguf_file import GGUFFile
from glm_edge.preprocess.gguf_tokenizer import companion_files, named_tokens, stop_tokens
from tests.gguf_writer import TEMPLATE, tokenizer_fields, vocabulary, write_gguf


@pytest.fixture
def write(tmp_path):
    def write(**changed):
        changed = {f"tokenizer.{name.replace('__', '.')}": v for name, v in changed.items()}
        fields = tokenizer_fields() | changed
        present = {name: value for name, value in fields.items() if value is not None}
        return write_gguf(tmp_path / "a.gguf", present, {})

    return write


def test_load_tokenizer_merges_splits_digits_and_decodes(write):
    tokenizer = ge.load_tokenizer(write())
    tokens, _ = vocabulary()
    encoded = tokenizer.encode("The th12 é<|im_end|>")
    assert encoded.tokens == ["T", "h", "e", "Ġth", "1", "2", "Ġ", "Ã", "©", "<|im_end|>"]
    assert [tokens[index] for index in encoded.ids] == encoded.tokens
    assert tokenizer.decode(encoded.ids, skip_special_tokens=True) == "The th12 é"


def test_load_tokenizer_equals_one_built_by_hand(write):
    tokens, merges = vocabulary()
    expected = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            {token: index for index, token in enumerate(tokens)},
            [tuple(merge.split(" ")) for merge in merges],
        )
    )
    expected.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    text = "the 2024 thaw: don't  x\n\n\tÅ 中文 ½ 😀 the"
    assert ge.load_tokenizer(write()).encode(text).ids == expected.encode(text).ids


@pytest.mark.parametrize(("digits", "pre"), [(["1", "2"], "smollm"), (["12"], "gpt-2")])
def test_load_tokenizer_splits_as_the_field_pre_says(write, digits, pre):
    splits = ge.load_tokenizer(write(ggml__pre=pre)).pre_tokenizer.pre_tokenize_str("12")
    assert [part for part, _ in splits] == digits


def test_load_tokenizer_adds_tokens_around_a_text(write):
    tokenizer = ge.load_tokenizer(write(ggml__add_bos_token=True, ggml__add_eos_token=True))
    assert tokenizer.encode("t").tokens == ["<|im_start|>", "t", "<|im_end|>"]
    assert tokenizer.encode("t", add_special_tokens=False).tokens == ["t"]


REFUSED = {
    "no tokenizer": ({"ggml__model": None}, "has no tokenizer"),
    "sentencepiece": ({"ggml__model": "llama"}, "model 'llama' with pre 'smollm'"),
    "unknown splits": ({"ggml__pre": "qwen2"}, "supported: model 'gpt2' with pre 'gpt-2'"),
    "no tokens": ({"ggml__tokens": None}, "ggml.tokens' must be a list"),
    "numbers": ({"ggml__tokens": [1, 2]}, "ggml.tokens' must be a list"),
    "a token twice": ({"ggml__tokens": ["a", "b", "a"]}, "token 'a' appears twice"),
    "a merge of three": ({"ggml__merges": ["Ġ t h"]}, "must be two tokens and a space"),
    "an unknown merge": ({"ggml__merges": ["Ġt Ġt"]}, "is not a readable tokenizer"),
    "types": ({"ggml__token_type": [3]}, "one type per token"),
    "an id": ({"ggml__bos_token_id": 9999, "ggml__add_bos_token": True}, "is 9999"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_load_tokenizer_refuses_damaged_fields(write, fault):
    changed, message = REFUSED[fault]
    with pytest.raises(CheckpointError) as caught:
        ge.load_tokenizer(write(**changed))
    assert message in str(caught.value)


def test_processor_renders_the_template_of_a_file(write):
    processor = ge.Processor.from_checkpoint(write())
    assert processor.template == TEMPLATE
    assert processor.variables["bos_token"] == "<|im_start|>"
    (row,) = processor([{"role": "user", "content": "the <|im_end|>"}]).tokens
    # The message's own spelling of a special token stays text.
    assert [int(i) for i in row].count(2) == 1
    text = "<|im_start|>user\nthe <|im_end|><|im_end|>\n<|im_start|>assistant\n"
    assert processor.tokenizer.decode([int(i) for i in row], skip_special_tokens=False) == text
    assert processor.decode([*processor.tokenizer.encode("th").ids, 2, 5]) == "th"


def test_processor_needs_a_template(write):
    path = write(chat_template=None)
    with pytest.raises(ConfigError, match="has no chat template"):
        ge.Processor.from_checkpoint(path)
    assert ge.Processor.from_checkpoint(path, template="x").template == "x"
    with pytest.raises(CheckpointError, match="must be a text of at most"):
        ge.Processor.from_checkpoint(write(chat_template=[1]))


def test_stop_tokens_are_those_of_text_and_turn(write):
    assert stop_tokens(GGUFFile(write(ggml__eot_token_id=0))) == (2, 0)
    assert stop_tokens(GGUFFile(write(ggml__eot_token_id=2))) == (2,)
    with pytest.raises(CheckpointError, match="the vocabulary has"):
        named_tokens(GGUFFile(write(ggml__eos_token_id=99999)))


def test_companion_files_hold_template_and_stop_tokens(write):
    files = companion_files(GGUFFile(write()))
    assert json.loads(files["generation_config.json"]) == {"eos_token_id": [2]}
    names = json.loads(files["tokenizer_config.json"])
    assert names["chat_template"] == TEMPLATE
    assert (names["eos_token"], names["pad_token"]) == ("<|im_end|>", "<|endoftext|>")
    assert companion_files(GGUFFile(write(ggml__model=None))) == {}
