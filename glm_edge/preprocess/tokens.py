"""Prompts: instruction, image and recording as the token ids that a model was trained on."""

from typing import Any

from glm_edge.errors import DataError

USER, ASSISTANT = "<|user|>", "<|assistant|>"
IMAGE = ("<|begin_of_image|>", "<|image|>", "<|end_of_image|>")
AUDIO = ("<|begin_of_audio|>", "<|audio|>", "<|end_of_audio|>")


def prompt_ids(
    tokenizer: Any, instruction: str = "", image_tokens: int = 0, audio_tokens: int = 0
) -> list[int]:
    """Formats one question: user, image, recording, text, assistant.

    Args:
      tokenizer: a `tokenizers.Tokenizer`.
      instruction: text; empty when the instruction is spoken. Names of special tokens in it are
        read as text.
      image_tokens: placeholders for image features, `VisionConfig.num_tokens`, or 0.
      audio_tokens: placeholders for speech features, `SpeechConfig.num_tokens`, or 0.

    Returns:
      Token ids that end with the assistant's token.

    Raises:
      DataError: the tokenizer lacks a special token that is needed, or nothing is asked.
    """
    if not instruction and not audio_tokens:
        raise DataError("a prompt needs an instruction, as text or as a recording")
    ids = [_special(tokenizer, USER)]
    for count, (begin, placeholder, end) in ((image_tokens, IMAGE), (audio_tokens, AUDIO)):
        if count < 0:
            raise DataError(f"number of {placeholder} tokens must not be negative, found {count}")
        if count:
            ids.append(_special(tokenizer, begin))
            ids.extend([_special(tokenizer, placeholder)] * count)
            ids.append(_special(tokenizer, end))
    return [*ids, *text_ids(tokenizer, instruction), _special(tokenizer, ASSISTANT)]


def _special(tokenizer: Any, token: str) -> int:
    index = tokenizer.token_to_id(token)
    if index is None:
        raise DataError(f"the tokenizer has no special token {token!r}, which this prompt needs")
    return index


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """Encodes text in which names of special tokens are no more than text.

    Args:
      tokenizer: a `tokenizers.Tokenizer`.
      text: to encode.

    Returns:
      Token ids, none of them special.
    """
    before = tokenizer.encode_special_tokens
    tokenizer.encode_special_tokens = True
    try:
        return tokenizer.encode(text, add_special_tokens=False).ids
    finally:
        tokenizer.encode_special_tokens = before
