"""A small model, a tokenizer of one word a token, and their processor."""

import dataclasses

from glm_edge.preprocess import AudioProcessing, Processor

MARKS = ("<end>", "<image>", "<audio>", "<begin>", "<close>")
TEMPLATE = """
{%- for message in messages -%}
{%- if message.content is string -%}{{ message.content ~ ' ' }}
{%- else -%}
{%- for item in message.content -%}
{%- if item.type == 'text' -%}{{ item.text ~ ' ' }}
{%- else -%}{{ '<begin><' ~ item.type ~ '><close>' }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endfor -%}
"""
AUDIO = AudioProcessing(40, 8000, 200, 80, chunk_s=0.32, max_s=1.0)
VOCABULARY = 160
SLOTS = 96


def word_tokenizer():
    """One word a token, so that a text tells its tokens."""
    import tokenizers

    words = [*MARKS, *(f"w{index:03d}" for index in range(len(MARKS), VOCABULARY))]
    ids = {word: index for index, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token=MARKS[0]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(MARKS))
    return tokenizer


def tiny(small_config, **fields):
    """A small configuration of the tokens above."""
    sizes = {"hidden_size": 64, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
    config = small_config(
        vocab_size=VOCABULARY, intermediate_size=96, **sizes, **fields.pop("decoder", {})
    )
    ids = {"image_token_id": 1, "audio_token_id": 2, "eos_token_ids": (0,), "pad_token_id": 0}
    vision = dataclasses.replace(
        config.vision, num_layers=1, window=None, global_layers=(), **fields.pop("vision", {})
    )
    return dataclasses.replace(config, vision=vision, **ids, **fields)


def processor(**encoders):
    return Processor(
        word_tokenizer(),
        TEMPLATE,
        image_token="<image>",
        audio_token="<audio>",
        stop_token_ids=(0,),
        **encoders,
    )
