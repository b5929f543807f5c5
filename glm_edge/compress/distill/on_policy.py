"""On-policy batches: the student samples continuations, on which its teacher trains it.

Letters of shapes: `B` rows, `T` tokens, `D` hidden size, `V` vocabulary.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from glm_edge import params as boxes
from glm_edge.compress import batches
from glm_edge.compress.calibration import Called
from glm_edge.compress.distill import intermediates as transfer
from glm_edge.errors import DataError, RecipeError
from glm_edge.models.glm import init_cache
from glm_edge.params.tree import Params

# Prefill reads prompts up to a multiple of this, so that few lengths compile.
_PREFIX = 16
# Separates these keys from those of the order of batches.
_STREAM = 0x6F6E


def is_written(share: float, rng: Array | None, number: int) -> bool:
    """Draw whether the student continues batch `number`, with a probability of `share`.

    Args:
      share: in 0..1.
      rng: jax key; None is key 0.
      number: of batches read before, which determines the result.
    """
    return share > 0.0 and float(jax.random.uniform(_key(rng, number))) < share


def written(
    model: nn.Module | Called,
    trainable: Params,
    frozen: Params,
    batch: batches.Batch,
    prompt: int | None,
    temperature: float,
    rng: Array | None,
    number: int,
) -> batches.Batch:
    """Replace the tokens after each prompt by a continuation that the student samples.

    Args:
      model: the student, with a cache: a GLM.
      trainable: see `glm_edge.params.combine`.
      frozen: see `glm_edge.params.combine`.
      batch: see `glm_edge.compress.batches`, on the device.
      prompt: tokens per row that stay; None keeps all before the first that `loss_mask` teaches.
        Placeholders of images and audio always stay.
      temperature: of sampling; 0 takes the top-1 token.
      rng: jax key; None is key 0.
      number: of batches read before; together with `rng` it determines the sampled tokens.

    Returns:
      A batch of the same shapes. `loss_mask` is 1 where the next token is sampled, stop token
      included, and 0 elsewhere.

    Raises:
      RecipeError: the model has no cache.
      DataError: the batch holds positions or a mask, or prompts fill it.
    """
    if not hasattr(model, "embed_inputs") or not hasattr(model, "start_positions"):
        raise RecipeError(
            "distill: on_policy= needs a model that generates, a GLM; "
            f"{type(getattr(model, 'model', model)).__name__} has no cache"
        )
    for name in ("positions", "mask"):
        if name in batch:
            raise DataError(f"distill: on_policy= cannot continue a batch that holds {name!r}")
    starts = first_written(model, batch, prompt)
    length = batch["tokens"].shape[1]
    if starts.min() >= length:
        raise DataError(
            f"distill: on_policy= has nothing to sample: prompts fill all {length} tokens of a "
            "batch; pass OnPolicy with a smaller prompt="
        )
    prefix = max(1, starts.min() // _PREFIX * _PREFIX)
    key = jax.random.fold_in(_key(rng, number), 1)
    tokens, weights = _write(
        model, trainable, frozen, batch, starts, key, int(prefix), float(temperature)
    )
    read = {name: value for name, value in batch.items() if name != "valid"}
    return {**read, "tokens": tokens, "loss_mask": weights}


def first_written(model: Any, batch: batches.Batch, prompt: int | None) -> np.ndarray:
    """Find the first sampled position of each row, int32 [B]; `T` where there is none."""
    tokens = np.asarray(batch["tokens"])
    length = tokens.shape[1]
    if prompt is None:
        taught = np.asarray(batches.loss_weights(model, batch)) > 0.0
        starts = np.where(taught.any(axis=1), np.argmax(taught, axis=1) + 1, length)
    else:
        starts = np.full(len(tokens), min(prompt, length))
    if "valid" in batch:
        # A row that is shorter than the others continues after its last token.
        starts = np.minimum(starts, np.asarray(batch["valid"]).sum(axis=1))
    placed = np.isin(tokens, _placeholders(model)) & np.asarray(batch.get("valid", True))
    after = np.where(placed.any(axis=1), length - np.argmax(placed[:, ::-1], axis=1), 0)
    return np.maximum(starts, after).astype(np.int32)


@functools.partial(jax.jit, static_argnames=("model", "prefix", "temperature"))
def _write(
    model: nn.Module,
    trainable: Params,
    frozen: Params,
    batch: batches.Batch,
    starts: Array,
    key: Array,
    prefix: int,
    temperature: float,
) -> tuple[Array, Array]:
    """Sample tokens and compute weights [B, T]; compile once per shape of batch and prefix."""
    variables = {"params": boxes.combine(transfer.without_projection(trainable)[0], frozen)}
    prompt_tokens = batch["tokens"]
    rows, length = prompt_tokens.shape
    stops = jnp.asarray(model.config.eos_token_ids, jnp.int32)
    # A sampled placeholder would stand for an image that is not in the batch.
    barred = jnp.asarray(_placeholders(model), jnp.int32)

    def read(module: nn.Module) -> tuple[Any, ...]:
        sound = batch.get("audio"), batch.get("audio_frames")
        x, _ = module.embed_inputs(prompt_tokens, batch.get("images"), *sound)
        positions, _ = module.start_positions(prompt_tokens, None, batch.get("images"))
        cache = init_cache(module.config.decoder, rows, length)
        final, _, cache = module.decoder(x[:, :prefix], positions[..., :prefix], None, cache)
        return x, positions, module.predict(final[:, -1:])[:, 0].astype(jnp.float32), cache

    begun: Any = model.apply(variables, method=read)
    x, positions, logits, cache = begun

    def step(carry: tuple[Any, ...], slot: Array) -> tuple[tuple[Any, ...], tuple[Array, Array]]:
        logits, cache, last, stopped = carry
        logits = logits.at[:, barred].set(-jnp.inf)
        drawn = jnp.argmax(logits, axis=-1)
        if temperature:
            keys = jax.vmap(lambda row: jax.random.fold_in(key, row * length + slot))
            drawn = jax.vmap(jax.random.categorical)(keys(jnp.arange(rows)), logits / temperature)
        sampled = slot >= starts
        token = jnp.where(sampled, jnp.where(stopped, last, drawn), prompt_tokens[:, slot]).astype(
            prompt_tokens.dtype
        )
        taught = sampled & ~stopped

        def run(module: nn.Module) -> tuple[Array, Any]:
            fed = jnp.where(sampled[:, None], module.embed(token[:, None])[:, 0], x[:, slot])
            position = positions[..., slot][..., None]
            final, _, after = module.decoder(fed[:, None], position, None, cache)
            return module.predict(final)[:, 0].astype(jnp.float32), after

        logits, after = model.apply(variables, method=run)
        return (logits, after, token, stopped | sampled & jnp.isin(token, stops)), (token, taught)

    start = (logits, cache, prompt_tokens[:, prefix - 1], jnp.zeros(rows, bool))
    _, (sampled_tokens, taught) = jax.lax.scan(step, start, jnp.arange(prefix, length))
    tokens = jnp.concatenate([prompt_tokens[:, :prefix], sampled_tokens.T], axis=1)
    # The position before a token predicts it.
    weights = jnp.zeros((rows, length)).at[:, prefix - 1 : -1].set(taught.T)
    return tokens, weights


def _placeholders(model: nn.Module) -> list[int]:
    ids = (model.config.image_token_id, model.config.audio_token_id)
    return [token for token in ids if token is not None]


def _key(rng: Array | None, number: int) -> Array:
    key = jax.random.key(0) if rng is None else rng
    return jax.random.fold_in(jax.random.fold_in(key, _STREAM), number)
