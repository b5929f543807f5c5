"""Answers of an exported model: one free token per call, with the run that a grammar forces."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from glm_edge.errors import DataError
from glm_edge.export.verify.prefix import Prefix
from glm_edge.generate.constraint import Matcher, allowed_tokens

if TYPE_CHECKING:
    from glm_edge.export.verify.runner import SignatureRunner


def generate(
    runner: "SignatureRunner",
    tokens: np.ndarray,
    media: Mapping[str, Any],
    max_new_tokens: int,
    matcher: Matcher | None = None,
    prefix: Prefix | None = None,
) -> list[int]:
    """Extend a prompt by the top-1 token; see `SignatureRunner.generate`.

    Args:
      runner: runner of the model.
      tokens: token ids, int [T].
      media: image and recording of the prompt.
      max_new_tokens: most tokens to generate, at least one.
      matcher: constraint of the answer, or None; it is not changed.
      prefix: beginning of `tokens` whose rows exist, or None.

    Returns:
      The new tokens.

    Raises:
      DataError: as for `SignatureRunner.generate`.
    """
    text = None if matcher is None else matcher.copy()
    # A grammar may force the beginning of the answer, which then runs with the prompt.
    generated = _forced_run(text, max_new_tokens)
    pending = np.array([*np.asarray(tokens).reshape(-1), *generated], np.int32)
    logits: np.ndarray | None = None
    cache: dict[str, Any] = {}
    slot = 0
    while len(generated) < max_new_tokens:
        if text is not None and text.finished:
            # Only a stop token can follow, so nothing needs to run.
            return [*generated, _stop_token(text, runner)]
        if logits is None:
            logits, cache = runner.prefill(pending, **media, prefix=prefix)
        else:
            logits, cache = runner.extend(runner.embed(pending), slot, cache)
        slot += len(pending)
        token = _top_token(logits[-1], text)
        generated.append(token)
        if text is not None:
            text.accept(token)
        if token in runner.config.eos_token_ids or (text is not None and text.ended):
            break
        run = _forced_run(text, max_new_tokens - len(generated))
        generated += run
        pending = np.array([token, *run], np.int32)
    return generated


def _forced_run(text: Matcher | None, most: int) -> list[int]:
    """Accept at most `most` tokens that the grammar forces, and return them."""
    if text is None:
        return []
    run = text.forced()[:most]
    for token in run:
        text.accept(token)
    return run


def _top_token(scores: np.ndarray, text: Matcher | None) -> int:
    """Return the top-1 token of scores [V] that may follow.

    Raises:
      DataError: the scores are not finite, or the grammar has no next token.
    """
    if not np.isfinite(scores).all():
        raise DataError(
            "the exported model's logits are NaN or infinite; check its weights and inputs"
        )
    if text is not None:
        scores = np.where(allowed_tokens(text.allowed(), len(scores)), scores, -np.inf)
    return int(scores.argmax())


def _stop_token(text: Matcher, runner: "SignatureRunner") -> int:
    """Return the stop token of a text that nothing else may follow."""
    allowed = allowed_tokens(text.allowed(), runner.config.decoder.vocab_size)
    stops = [token for token in runner.config.eos_token_ids if allowed[token]]
    return stops[0] if stops else int(allowed.argmax())
