"""Loss of a model on text, and its distance from a reference model on the same text."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from glm_edge.cli import corpora
from glm_edge.cli.console import bar
from glm_edge.export.verify.runner import SignatureRunner
from glm_edge.params.tree import Params

# Tokens per evaluation window.
WINDOW = 256


@functools.partial(jax.jit, static_argnums=(0, 2))
def _window_statistics(
    model: nn.Module,
    params: Params,
    reference_model: nn.Module,
    reference_params: Params,
    tokens: jax.Array,
) -> tuple[jax.Array, ...]:
    def log_probabilities(model: nn.Module, params: Params) -> jax.Array:
        logits = model.apply({"params": params}, tokens)[0][:, :-1]
        return jax.nn.log_softmax(logits.astype(jnp.float32))

    scores = log_probabilities(model, params)
    nats = -jnp.take_along_axis(scores, tokens[:, 1:, None], axis=-1)[..., 0]
    reference = log_probabilities(reference_model, reference_params)
    kl = jnp.sum(jnp.exp(reference) * (reference - scores), axis=-1)
    return nats, kl, scores.argmax(-1) != reference.argmax(-1)


def text_loss(
    model: nn.Module,
    params: Params,
    windows: corpora.Windows,
    reference: tuple[nn.Module, Params] | None = None,
    batch: int = 8,
) -> dict[str, float]:
    """Compute loss on text, and the distance from a reference model on the same windows.

    Args:
      model: model to measure.
      params: its parameters.
      windows: windows from `corpora.windows`.
      reference: reference model and dense parameters; None compares the model with itself.
      batch: windows per batch.

    Returns:
      `perplexity` per token, `bits_per_byte`, `kl` in nats from the reference, and `flips`, the
      fraction of positions whose top-1 token differs from the reference's.
    """
    reference_model, reference_params = reference or (model, params)
    total = np.zeros(3)
    for start in range(0, len(windows.tokens), batch):
        index = np.minimum(np.arange(start, start + batch), len(windows.tokens) - 1)
        counted = (
            windows.scored[index] * (np.arange(start, start + batch) < len(windows.tokens))[:, None]
        )
        statistics = _window_statistics(
            model, params, reference_model, reference_params, windows.tokens[index]
        )
        total += [float(np.sum(np.asarray(s) * counted)) for s in statistics]
    return summarized(total, windows)


def exported_text_loss(
    file: SignatureRunner, windows: corpora.Windows, reference: tuple[nn.Module, Params]
) -> dict[str, float]:
    """Measure an exported file as `text_loss` does, with scores that the file computes.

    Args:
      file: that is run, such as a `glm_edge.export.LiteRTModel`.
      windows: from `corpora.windows`.
      reference: dense model and parameters.

    Returns:
      As `text_loss`.
    """
    model, params = reference
    dense = jax.jit(lambda tokens: jax.nn.log_softmax(model.apply({"params": params}, tokens)[0]))
    total = np.zeros(3)
    for tokens, scored in bar("exported, text")(
        list(zip(windows.tokens, windows.scored, strict=True))
    ):
        scores = np.asarray(jax.nn.log_softmax(jnp.asarray(file.score(tokens))))[:-1][scored]
        expected = np.asarray(dense(tokens[None]))[0, :-1][scored]
        nats = -np.take_along_axis(scores, tokens[1:][scored][:, None], axis=-1)
        kl = np.sum(np.exp(expected) * (expected - scores), axis=-1)
        flips = scores.argmax(-1) != expected.argmax(-1)
        total += [nats.sum(), kl.sum(), flips.sum()]
    return summarized(total, windows)


def summarized(total: np.ndarray, windows: corpora.Windows) -> dict[str, float]:
    """Compute the measures of a text from sums over all scored tokens.

    Args:
      total: float64 [3]: loss in nats, KL divergence in nats, and number of top-1 flips.
      windows: windows of the text.

    Returns:
      `perplexity`, `bits_per_byte`, `kl` (nats per token) and `flips` (fraction of tokens).
    """
    nats, kl, flips = total / windows.num_scored
    return {
        "perplexity": float(np.exp(nats)),
        "bits_per_byte": corpora.bits_per_byte(total[0], windows.num_bytes),
        "kl": float(kl),
        "flips": float(flips),
    }
