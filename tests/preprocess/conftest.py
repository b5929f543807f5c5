"""A tokenizer with a byte vocabulary and GLM's special tokens, and directories that hold one."""

import json

import pytest
import tokenizers

SPECIALS = (
    "<|endoftext|>",
    "[gMASK]",
    "<sop>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
    "<|begin_of_image|>",
    "<|end_of_image|>",
    "<|begin_of_video|>",
    "<|end_of_video|>",
    "<|image|>",
    "<|video|>",
    "<|begin_of_audio|>",
    "<|end_of_audio|>",
    "<|pad|>",
)


@pytest.fixture
def tokenizer():
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: index for index, character in enumerate(alphabet)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIALS))
    tokenizer.add_tokens(["<think>", "</think>"])
    # What a converter leaves behind: prompts must not begin with these twice.
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[gMASK] <sop> $A",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("[gMASK]", "<sop>")],
    )
    return tokenizer


@pytest.fixture
def checkpoint(tmp_path, tokenizer):
    """Writes a directory: `checkpoint(config, **files)`, a name's last underscore being a dot."""

    def write(config, **files):
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        (tmp_path / "config.json").write_text(json.dumps(config))
        for name, content in files.items():
            file = tmp_path / ".".join(name.rsplit("_", 1))
            file.write_text(content if isinstance(content, str) else json.dumps(content))
        return tmp_path

    return write
