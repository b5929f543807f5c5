"""Chat: answers to conversations, as text."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from glm_edge.errors import DataError
from glm_edge.generate.decoding import generate
from glm_edge.generate.prompts import config_of
from glm_edge.models.multimodal import MultimodalGLM
from glm_edge.params.tree import Params
from glm_edge.preprocess.media import KINDS, Media, listed
from glm_edge.preprocess.processor import Processor, conversations_of

MAX_NEW_TOKENS = 256


def chat(
    model: MultimodalGLM,
    params: Params,
    processor: Processor,
    messages: str | Mapping[str, Any] | Sequence[Any],
    images: Media = (),
    videos: Media = (),
    audio: Media = (),
    variables: Mapping[str, Any] | None = None,
    stop_strings: Sequence[str] = (),
    **options: Any,
) -> str | list[str]:
    """Answer a conversation.

        processor = ge.Processor.from_checkpoint(path)
        ge.chat(model, params, processor, "What does the screen show?", images=["screen.png"])

    `glm_edge.preprocess.split_thinking` separates the reasoning of an answer from the rest.

    Args:
      model: the model.
      params: its parameters, boxed or not.
      processor: of the same checkpoint.
      messages: a question; or a message `{"role": …, "content": …}`; or a conversation, a list of
        messages; or a list of conversations, which are answered as one batch.
      images: paths, Pillow images or arrays in reading order, or a single one, see
        `glm_edge.Processor`. Beside a question, they come before it.
      videos: as for `images`.
      audio: recordings, as for `images`.
      variables: variables of the chat template besides messages, such as
        `{"enable_thinking": False}`, and `tools`, JSON schemas of functions.
      stop_strings: texts that end an answer and are not part of it.
      **options: further arguments of `glm_edge.generate.generate`, such as `sampling`. The default
        of `max_new_tokens` is 256; a warning reports answers that reach it.

    Returns:
      The answer without white space at its ends; a list of answers for several conversations.
      Special tokens inside, such as `<think>`, stay in the text.

    Raises:
      DataError: messages, images or recordings are malformed or do not fit the model.
    """
    if not isinstance(processor, Processor):
        raise DataError(
            f"processor must be a glm_edge.Processor, not a {type(processor).__name__}; "
            "Processor.from_checkpoint(directory) makes one"
        )
    if isinstance(stop_strings, str) or not all(stop_strings):
        raise DataError(f"stop_strings must be a list of texts, none empty: {stop_strings!r}")
    images, videos, audio = (
        listed(kind, values) for kind, values in zip(KINDS, (images, videos, audio), strict=True)
    )
    if isinstance(messages, str):
        messages = [_question(messages, images, videos, audio)]
    conversations = conversations_of(messages)
    several = not isinstance(messages, Mapping) and conversations is messages
    inputs = processor(conversations, images, videos, audio, **(variables or {}))
    stops = (*processor.stop_token_ids, *config_of(model).eos_token_ids)
    options = {
        "stop_tokens": tuple(dict.fromkeys(stops)),
        "max_new_tokens": MAX_NEW_TOKENS,
        **options,
    }
    generation = generate(model, params, inputs, **options)
    lengths = np.asarray(generation.lengths)
    rows = zip(np.asarray(generation.tokens), lengths, strict=True)
    texts = [processor.decode(row[:length]) for row, length in rows]
    limit = options["max_new_tokens"]
    cut = [
        length == limit and not any(stop in text for stop in stop_strings)
        for text, length in zip(texts, lengths, strict=True)
    ]
    if any(cut):
        warnings.warn(
            f"{sum(cut)} of {len(cut)} answers reached max_new_tokens={limit} before a stop token "
            "and are cut off; raise max_new_tokens for complete answers",
            stacklevel=2,
        )
    answers = [_before(text, stop_strings).strip() for text in texts]
    return answers if several else answers[0]


def _question(
    text: str, images: Sequence[Any], videos: Sequence[Any], audio: Sequence[Any]
) -> dict[str, Any]:
    """Make a user's message of media, then the question."""
    media = {"image": images, "video": videos, "audio": audio}
    parts = [{"type": kind} for kind, values in media.items() for _ in values]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}] if parts else text}


def _before(text: str, stop_strings: Sequence[str]) -> str:
    """Cut a text before the first stop string."""
    starts = [start for stop in stop_strings if (start := text.find(stop)) >= 0]
    return text[: min(starts, default=len(text))]
