"""Evaluation of a checkpoint on phone screens: taps on unseen screens."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from experiments.common.tap_items import Item, prompt_batches
from experiments.nano.phone_screens import metrics
from glm_edge import generate
from glm_edge.configs import GLMConfig
from glm_edge.models.multimodal import MultimodalGLM

ANSWER_TOKENS = 12
# An answer of a dialogue begins with a thought.
DIALOGUE_TOKENS = 32


def answers(
    model: MultimodalGLM, params: Any, tokenizer: Tokenizer, items: Sequence[Item], progress=iter
) -> list[str]:
    """Generate the model's greedy answer to each item.

    Args:
      model: model with vision, and with speech for spoken questions.
      params: its parameters.
      tokenizer: tokenizer of the model.
      items: the questions.
      progress: function that wraps the iterator of batches, such as a progress bar.

    Returns:
      Answers as text, up to the stop token.
    """
    texts = []
    count = ANSWER_TOKENS if all(item.turn is None for item in items) else DIALOGUE_TOKENS
    for batch in progress(list(prompt_batches(items, model.config, tokenizer))):
        generated = generate.greedy(model, params, batch, count)
        texts.extend(answer_text(tokenizer, row, model.config) for row in np.asarray(generated))
    return texts[: len(items)]


def answer_text(tokenizer: Tokenizer, ids: np.ndarray, config: GLMConfig) -> str:
    """Return the text of generated ids up to the first stop token."""
    stops = np.flatnonzero(np.isin(ids, config.eos_token_ids))
    answer = ids[: stops[0]] if len(stops) else ids
    return tokenizer.decode([int(i) for i in answer], skip_special_tokens=False)


def outcomes(items: Sequence[Item], texts: Sequence[str]) -> dict[str, metrics.Rate | None]:
    """Return parse rate, action accuracy, answer accuracy and tap-in-box rate with intervals."""
    return metrics.score(zip([i.question for i in items], texts, strict=True))


def hits(items: Sequence[Item], texts: Sequence[str]) -> list[float]:
    """Return 1.0 for each tap inside its box, 0.0 for others."""
    judged = [metrics.judge(i.question, text) for i, text in zip(items, texts, strict=True)]
    return [float(outcome.in_box) for outcome in judged if outcome.in_box is not None]


def per_speaker(items: Sequence[Item], texts: Sequence[str]) -> dict[str, dict[str, float]]:
    """Compute the tap-in-box rate of each speaker, and its mean with an interval over speakers.

    Args:
      items: spoken questions.
      texts: answers to them.

    Returns:
      Rates with intervals over questions by speaker, and over speakers as "mean".
    """
    speakers = sorted({item.speaker for item in items if item.speaker is not None})
    rates = {}
    for speaker in speakers:
        asked = [(i, t) for i, t in zip(items, texts, strict=True) if i.speaker == speaker]
        right = hits([item for item, _ in asked], [text for _, text in asked])
        rates[speaker] = metrics.wilson(int(sum(right)), len(right))
    mean = metrics.over_people([rate.value for rate in rates.values()])
    return {name: vars(rate) for name, rate in {**rates, "mean": mean}.items()}
