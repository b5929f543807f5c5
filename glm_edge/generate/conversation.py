"""A conversation answered in text: messages in, an answer out."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax import Array

from glm_edge.errors import DataError
from glm_edge.generate.decoding import GREEDY, generate
from glm_edge.generate.prompts import config_of
from glm_edge.generate.sampling import Sampling
from glm_edge.models.multimodal import MultimodalGLM
from glm_edge.preprocess.chat import split_thinking as split
from glm_edge.preprocess.media import KINDS, listed
from glm_edge.preprocess.processor import Processor, conversations_of

Answer = str | tuple[str, str]


def chat(
    model: MultimodalGLM,
    params: Any,
    processor: Processor,
    messages: str | Mapping[str, Any] | Sequence[Any],
    images: Any = (),
    videos: Any = (),
    audio: Any = (),
    tools: Sequence[Mapping[str, Any]] | None = None,
    max_new_tokens: int = 256,
    sampling: Sampling = GREEDY,
    rng: Array | None = None,
    stop_strings: Sequence[str] = (),
    split_thinking: bool = False,
    variables: Mapping[str, Any] | None = None,
    **options: Any,
) -> Answer | list[Answer]:
    """Answers a conversation.

        processor = ge.Processor.from_checkpoint(path)
        ge.chat(model, params, processor, "What does the screen show?", images=["screen.png"])

    Args:
      model: the model.
      params: its parameters, boxed or not.
      processor: of the same checkpoint.
      messages: a question; or a message `{"role": …, "content": …}`; or a conversation, a list of
        them; or a list of conversations, which are answered as one batch.
      images: paths, Pillow images or arrays in reading order, or a single one, see
        `glm_edge.Processor`; beside a question, they are shown before it.
      videos: as for `images`.
      audio: recordings, as for `images`.
      tools: JSON schemas of functions.
      max_new_tokens: tokens of an answer at most; a warning says where they were not enough.
      sampling: how tokens are drawn; greedy by default.
      rng: a PRNG key for it; None is key 0.
      stop_strings: texts that end an answer and are not part of it.
      split_thinking: returns `(thinking, answer)` instead of one text.
      variables: what else the chat template reads, such as `{"enable_thinking": False}`.
      **options: of `glm_edge.generate.generate`, such as `cache_dtype`.

    Returns:
      The answer without white space at its ends; of several conversations, a list of them. Special
      tokens inside, such as `<think>`, stay in the text.

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
    inputs = processor(conversations, images, videos, audio, tools, **(variables or {}))
    stops = (*processor.stop_token_ids, *config_of(model).eos_token_ids)
    options = {"stop_tokens": tuple(dict.fromkeys(stops)), **options}
    generation = generate(
        model,
        params,
        **inputs,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        rng=rng,
        **options,
    )
    lengths = np.asarray(generation.lengths)
    rows = zip(np.asarray(generation.tokens), lengths, strict=True)
    texts = [processor.decode(row[:length]) for row, length in rows]
    cut = [
        length == max_new_tokens and not any(stop in text for stop in stop_strings)
        for text, length in zip(texts, lengths, strict=True)
    ]
    if any(cut):
        warnings.warn(
            f"{sum(cut)} of {len(cut)} answers reached max_new_tokens={max_new_tokens} before a "
            "stop token and end there; raise it for whole ones",
            stacklevel=2,
        )
    texts = [_before(text, stop_strings).strip() for text in texts]
    answers: list[Answer] = [split(text) for text in texts] if split_thinking else texts
    return answers if several else answers[0]


def _question(
    text: str, images: Sequence[Any], videos: Sequence[Any], audio: Sequence[Any]
) -> dict[str, Any]:
    """Makes a user's message that shows what comes beside a question, then asks it."""
    media = {"image": images, "video": videos, "audio": audio}
    parts = [{"type": kind} for kind, values in media.items() for _ in values]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}] if parts else text}


def _before(text: str, stop_strings: Sequence[str]) -> str:
    """Cuts a text at the first of some strings."""
    starts = [start for stop in stop_strings if (start := text.find(stop)) >= 0]
    return text[: min(starts, default=len(text))]
