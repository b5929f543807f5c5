"""Scores of compressed models by one compiled float32 program: text, and taps on phone screens.

Shapes: `W` windows of `T` tokens, `N` questions, `A` answer tokens, `V` vocabulary size.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from experiments.common import tap_eval, tap_items
from glm_edge.cli import corpora

WINDOWS = 8
# Limit of the reference's log-probabilities that stay in memory.
MAX_STORED_BYTES = 1 << 32


class Scorer:
    """A scorer that stores the float32 model's predictions and compares other models with them.

    Args:
      model: reference model.
      params: its parameters.
      tokenizer: tokenizer of the model.
      windows: windows of held-out text.
      questions: questions by kind (`image`, `spoken`).
    """

    def __init__(
        self,
        model: Any,
        params: Any,
        tokenizer: Tokenizer,
        windows: corpora.Windows,
        questions: dict[str, Sequence[tap_items.Item]],
    ):
        self.tokenizer, self.windows, self.questions = tokenizer, windows, questions
        self.prompts = {
            kind: list(tap_items.prompt_batches(items, model.config, tokenizer))
            for kind, items in questions.items()
            if items
        }
        self.answered = {
            kind: self._generate(model, params, batches) for kind, batches in self.prompts.items()
        }
        self._reference = (model, params)
        size = 4 * windows.tokens.size * model.config.decoder.vocab_size
        self._stored = None if size > MAX_STORED_BYTES else list(self._expected())
        self.expected_answers = {
            kind: self._answer_scores(model, params, kind) for kind in self.prompts
        }

    def score(self, model: Any, params: Any) -> dict[str, Any]:
        """Measure a model.

        Args:
          model: model with the reference's inputs and vocabulary.
          params: its parameters; dense float32 ones with the reference's structure need no
            compilation.

        Returns:
          `perplexity`, `bits_per_byte`, `kl_text` (nats), `flips_text`, `window_nats` (summed loss
          per window); per kind of question `tap_in_box_<kind>` with `hits_<kind>` (0 or 1 per tap),
          and `kl_<kind>` and `flips_<kind>` over the reference's answers.
        """
        measured = self._text(model, params)
        for kind, items in self.questions.items():
            if kind not in self.prompts:
                names = ("tap_in_box", "kl", "flips", "hits")
                measured |= {f"{name}_{kind}": None for name in names}
                continue
            tokens = self._generate(model, params, self.prompts[kind])
            texts = [tap_eval.answer_text(self.tokenizer, row, model.config) for row in tokens]
            hits = tap_eval.hits(items, texts[: len(items)])
            measured[f"tap_in_box_{kind}"] = float(np.mean(hits)) if hits else None
            measured[f"hits_{kind}"] = "".join(str(int(hit)) for hit in hits)
            kl, flips = _distance(
                self.expected_answers[kind], self._answer_scores(model, params, kind)
            )
            counted = self._counted(model.config, kind)
            measured[f"kl_{kind}"] = float((kl * counted).sum() / counted.sum())
            measured[f"flips_{kind}"] = float((flips * counted).sum() / counted.sum())
        return measured

    def _batches(self):
        count = len(self.windows.tokens)
        for start in range(0, count, WINDOWS):
            index = np.minimum(np.arange(start, start + WINDOWS), count - 1)
            fresh = np.arange(start, start + WINDOWS) < count
            yield self.windows.tokens[index], self.windows.scored[index] & fresh[:, None]

    def _expected(self) -> Iterator[np.ndarray]:
        """Yield the reference's log-probabilities of each batch."""
        for tokens, _ in self._batches():
            yield np.asarray(_window_scores(*self._reference, tokens))

    def _text(self, model: Any, params: Any) -> dict[str, float]:
        total, windows = np.zeros(3), []
        # Those of a large vocabulary do not fit in memory, and are computed again for each model.
        expected_scores = self._expected() if self._stored is None else self._stored
        for (tokens, counted), expected in zip(self._batches(), expected_scores, strict=True):
            scores = _window_scores(model, params, tokens)
            measured = _window_statistics(scores, expected, tokens)
            sums = [np.sum(np.asarray(m, np.float64) * counted, axis=1) for m in measured]
            total += np.sum(sums, axis=1)
            windows += sums[0].tolist()
        nats, kl, flips = total / self.windows.num_scored
        return {
            "perplexity": float(np.exp(nats)),
            "bits_per_byte": corpora.bits_per_byte(total[0], self.windows.num_bytes),
            "kl_text": float(kl),
            "flips_text": float(flips),
            "window_nats": [round(nats, 4) for nats in windows[: len(self.windows.tokens)]],
        }

    def _generate(self, model: Any, params: Any, batches: Sequence[dict[str, Any]]) -> np.ndarray:
        greedy = functools.partial(tap_eval.generate.greedy, max_new_tokens=tap_eval.ANSWER_TOKENS)
        return np.concatenate([np.asarray(greedy(model, params, batch)) for batch in batches])

    def _answer_scores(self, model: Any, params: Any, kind: str) -> np.ndarray:
        """Compute log-probabilities float32 [N, A, V] along the reference's answers."""
        answers = self.answered[kind].reshape(len(self.prompts[kind]), -1, tap_eval.ANSWER_TOKENS)
        return np.concatenate(
            [
                np.asarray(_answer_scores(model, params, batch, answer))
                for batch, answer in zip(self.prompts[kind], answers, strict=True)
            ]
        )

    def _counted(self, config: Any, kind: str) -> np.ndarray:
        """Count answer tokens up to the first stop token, without padding rows."""
        stops = np.isin(self.answered[kind], config.eos_token_ids)
        counted = np.cumsum(stops, axis=1) - stops == 0
        counted[len(self.questions[kind]) :] = False
        return counted


def _distance(expected: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    kl = np.sum(np.exp(expected) * (expected - scores), axis=-1)
    return kl, scores.argmax(-1) != expected.argmax(-1)


@functools.partial(jax.jit, static_argnums=0)
def _window_scores(model, params, tokens):
    logits = model.apply({"params": params}, tokens)[0][:, :-1]
    return jax.nn.log_softmax(logits.astype(jnp.float32))


@jax.jit
def _window_statistics(scores, expected, tokens):
    nats = -jnp.take_along_axis(scores, tokens[:, 1:, None], axis=-1)[..., 0]
    kl = jnp.sum(jnp.exp(expected) * (expected - scores), axis=-1)
    return nats, kl, scores.argmax(-1) != expected.argmax(-1)


@functools.partial(jax.jit, static_argnums=0)
def _answer_scores(model, params, batch, answer):
    length = batch["tokens"].shape[1]
    tokens = jnp.concatenate([batch["tokens"], answer[:, :-1]], axis=1)
    valid = jnp.concatenate([batch["valid"], jnp.ones_like(answer[:, :-1], bool)], axis=1)
    positions = jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0)
    causal = jnp.tril(jnp.ones((tokens.shape[1],) * 2, bool))
    # Padding attends to itself, so that no row of attention is empty.
    mask = causal & (valid[:, None, :] | jnp.eye(tokens.shape[1], dtype=bool))
    logits, _ = model.apply(
        {"params": params},
        tokens,
        images=batch["images"],
        audio=batch["audio"],
        positions=positions,
        mask=mask[:, None],
    )
    return jax.nn.log_softmax(logits[:, length - 1 :].astype(jnp.float32))
