"""The GLM decoder: RMSNorm, grouped-query attention, rotary positions, gated feed-forward."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from glm_edge.configs import DecoderConfig
from glm_edge.kernels import attention as attention_kernels
from glm_edge.kernels import cache as cache_kernels
from glm_edge.kernels import packing, rotary
from glm_edge.models.layers import GatedMLP, Linear, RMSNorm, Stack, gated
from glm_edge.params.sharding import constrain

LayerCache = dict[str, Array]
Cache = dict[str, Any]
# Entries of a layer's cache in the layout of on-device runtimes, instead of `key` and `value`.
KEY_BY_HEAD, VALUE_BY_HEAD = "key_by_head", "value_by_head"
# Parts of a layer to run, see `Decoder.run_layer`.
ALL_PARTS, KEYS_ONLY, AFTER_KEYS = "all", "keys", "after_keys"


class Attention(nn.Module):
    """Grouped-query attention with rotary positions and an explicit cache."""

    config: DecoderConfig
    layer: int
    compute: str = "float32"

    @nn.compact
    def __call__(
        self,
        x: Array,
        angle: Array,
        mask: Array,
        cache: LayerCache | None,
        slot: Array,
        part: str = ALL_PARTS,
    ) -> tuple[Array, LayerCache | None]:
        config = self.config
        heads, kv_heads = config.heads(self.layer), config.kv_heads(self.layer)

        def project(name: str, count: int, axis: str) -> Array:
            projected = Linear(
                count * config.head_dim, config.attention_bias, self.compute, name=name
            )(x)
            projected = projected.reshape(*x.shape[:2], count, config.head_dim)
            return constrain(projected, "batch", "length", axis, "head_dim")

        rotate = rotary.rotate_interleaved if config.rotary_interleaved else rotary.rotate_half
        by_head = cache is not None and KEY_BY_HEAD in cache
        if part != KEYS_ONLY:
            query = rotate(project("q_proj", heads, "heads"), angle)
        if part != AFTER_KEYS:
            key = rotate(project("k_proj", kv_heads, "kv_heads"), angle)
            value = project("v_proj", kv_heads, "kv_heads")
            if cache is not None and by_head:
                cache = write_cache_by_head(cache, key, value, slot)
            elif cache is not None:
                cache = write_cache(cache, {"key": key, "value": value}, slot)
            if part == KEYS_ONLY:
                return x, cache
        if cache is not None and by_head:
            attended = mask.shape[-1]
            key, value = cache[KEY_BY_HEAD][:, :, :attended], cache[VALUE_BY_HEAD][..., :attended]
        elif cache is not None:
            key, value = (read_cache(cache, name, config.head_dim) for name in ("key", "value"))
        if self.is_mutable_collection("attention") and not self.is_initializing():
            self.sow("attention", "weights", attention_kernels.attention_weights(query, key, mask))
        attend = attention_kernels.attention_by_head if by_head else attention_kernels.attention
        mixed = attend(query, key, value, mask).astype(x.dtype)
        mixed = gated(self, "heads", constrain(mixed, "batch", "length", "heads", "head_dim"))
        mixed = mixed.reshape(*x.shape[:2], heads * config.head_dim)
        return Linear(config.hidden_size, False, self.compute, name="o_proj")(mixed), cache


class DecoderLayer(nn.Module):
    """A pre-norm transformer layer; `sandwich_norm` adds a norm after each branch."""

    config: DecoderConfig
    layer: int
    compute: str = "float32"

    @nn.compact
    def __call__(
        self,
        x: Array,
        angle: Array,
        mask: Array,
        cache: LayerCache | None,
        slot: Array,
        part: str = ALL_PARTS,
    ) -> tuple[Array, LayerCache | None]:
        config = self.config

        def rms(name: str) -> RMSNorm:
            return RMSNorm(config.rms_norm_eps, name=name)

        attended, cache = Attention(config, self.layer, self.compute, name="attention")(
            rms("input_norm")(x), angle, mask, cache, slot, part
        )
        if part == KEYS_ONLY:
            return x, cache
        if config.sandwich_norm:
            attended = rms("post_self_attention_norm")(attended)
        x = constrain(x + attended, "batch", "length", "embed")
        neurons = config.neurons(self.layer)
        mixed = GatedMLP(neurons, config.hidden_size, compute=self.compute, name="mlp")(
            rms("post_attention_norm")(x)
        )
        if config.sandwich_norm:
            mixed = rms("post_mlp_norm")(mixed)
        return constrain(x + mixed, "batch", "length", "embed"), cache


class Decoder(nn.Module):
    """The layers and final norm of a GLM decoder, on embedded inputs."""

    config: DecoderConfig
    compute: str = "float32"

    def setup(self) -> None:
        self.layers = Stack(
            tuple(DecoderLayer(self.config, i, self.compute) for i in range(self.config.num_layers))
        )
        self.norm = RMSNorm(self.config.rms_norm_eps)

    def __call__(
        self,
        x: Array,
        positions: Array,
        mask: Array | None = None,
        cache: Cache | None = None,
    ) -> tuple[Array, list[Array], Cache | None]:
        """Run all layers.

        Args:
          x: [B, T, D] embedded tokens.
          positions: [B, T], or [3, B, T] for three-dimensional rotary positions.
          mask: bool, broadcastable to [B, 1, T, S], which must include causality; None is causal.
          cache: cache from `init_cache`, or None.

        Returns:
          `(final, hidden, cache)`: the normed output [B, T, D]; the input of every layer and the
          output of the last; and the cache with these tokens.
        """
        angle, mask, slot = self.prepare(x, positions, mask, cache)
        hidden, layer_caches = [x], []
        for index in range(self.config.num_layers):
            layer_cache = None if cache is None else cache["layers"][index]
            x, layer_cache = self.run_layer(index, x, angle, mask, layer_cache, slot)
            hidden.append(x)
            layer_caches.append(layer_cache)
        if cache is not None:
            cache = {"layers": layer_caches, "length": slot + x.shape[1]}
        return self.norm(x), hidden, cache

    def prepare(
        self, x: Array, positions: Array, mask: Array | None, cache: Cache | None
    ) -> tuple[Array, Array, Array]:
        """Compute the inputs that all layers share: rotary angles, mask and first cache slot."""
        config = self.config
        frequencies = rotary.inverse_frequencies(config.rotary_dim, config.rope_theta)
        angle = rotary.angles(positions, frequencies, config.mrope_section)
        slot = jnp.zeros((), jnp.int32) if cache is None else cache["length"]
        if mask is None:
            slots = x.shape[1] if cache is None else cache["layers"][0]["key"].shape[1]
            mask = attention_kernels.causal_mask(slot + jnp.arange(x.shape[1]), slots)
        return angle, mask, slot

    def run_layer(
        self,
        index: int,
        x: Array,
        angle: Array,
        mask: Array,
        cache: Any,
        slot: Array,
        part: str = ALL_PARTS,
    ) -> tuple[Array, Any]:
        """Run one layer, for calibration, block-wise training and early exit.

        Args:
          index: index of the layer.
          x: [B, T, D] input of the layer.
          angle: rotary angles from `prepare`.
          mask: mask from `prepare`.
          cache: cache of this layer, or None.
          slot: first cache slot to write.
          part: `all` runs the layer; `keys` writes keys and values to the cache and returns `x`
            unchanged; `after_keys` reads keys and values from a cache that `keys` wrote.

        Returns:
          `(x, cache)` after the layer.
        """
        return self.layers[index](x, angle, mask, cache, slot, part)


def init_cache(
    config: DecoderConfig, batch: int, num_slots: int, dtype: Any = jnp.float32
) -> Cache:
    """Create an empty cache.

    Args:
      config: configuration of the decoder.
      batch: count of rows, `B`.
      num_slots: capacity in tokens, `S`.
      dtype: type of keys and values: a floating type, or `int8` or `int4` with one symmetric scale
        per head and token.

    Returns:
      `{"layers": [{"key", "value"}: [B, S, K, H]], "length": 0}`. Integer caches also have
      `key_scale` and `value_scale` [B, S, K, 1]; int4 values are packed, [B, S, K, ceil(H / 2)].

    Example:
      >>> cache = init_cache(config.decoder, batch=1, num_slots=512, dtype="int8")
      >>> logits, intermediates = model.apply({"params": params}, tokens, cache=cache)
      >>> cache = intermediates["cache"]
    """
    qtype = jnp.dtype(dtype).name

    def empty(layer: int) -> LayerCache:
        rows = (batch, num_slots, config.kv_heads(layer))
        if qtype not in cache_kernels.LARGEST:
            return {name: jnp.zeros((*rows, config.head_dim), dtype) for name in ("key", "value")}
        width, stored = packing.packed_columns(config.head_dim, qtype), packing.stored_dtype(qtype)
        data = {name: jnp.zeros((*rows, width), stored) for name in ("key", "value")}
        scales = {
            f"{name}_scale": jnp.zeros((*rows, 1), cache_kernels.SCALE_DTYPE) for name in data
        }
        return data | scales

    layers = [empty(i) for i in range(config.num_layers)]
    return {"layers": layers, "length": jnp.zeros((), jnp.int32)}


def write_cache(cache: LayerCache, new: dict[str, Array], slot: Array) -> LayerCache:
    """Write the keys and values of tokens to `T` slots, in the type of the cache.

    Args:
      cache: cache of one layer from `init_cache`.
      new: `key` and `value`, [B, T, K, H] each.
      slot: first of the `T` slots: a scalar, or int [B] for rows of different lengths.

    Returns:
      The updated cache.
    """
    rows = dict(new)
    if "key_scale" in cache:
        qtype = "int8" if cache["key"].dtype == jnp.int8 else "int4"
        for name, values in new.items():
            rows[name], rows[f"{name}_scale"] = cache_kernels.quantize_rows(values, qtype)
    axes = ("batch", "slots", "kv_heads", "head_dim")

    def put(array: Array, values: Array) -> Array:
        values = values.astype(array.dtype)
        if jnp.ndim(slot) == 0:
            return jax.lax.dynamic_update_slice(array, values, (0, slot, 0, 0))
        put_row = jax.vmap(lambda a, v, s: jax.lax.dynamic_update_slice(a, v, (s, 0, 0)))
        return put_row(array, values, slot)

    return {name: constrain(put(array, rows[name]), *axes) for name, array in cache.items()}


def write_cache_by_head(cache: LayerCache, key: Array, value: Array, slot: Array) -> LayerCache:
    """Write like `write_cache` to `KEY_BY_HEAD` [B, K, S, H] and `VALUE_BY_HEAD` [B, K, H, S]."""
    update = jax.lax.dynamic_update_slice
    return {
        KEY_BY_HEAD: update(cache[KEY_BY_HEAD], jnp.swapaxes(key, 1, 2), (0, 0, slot, 0)),
        VALUE_BY_HEAD: update(
            cache[VALUE_BY_HEAD], jnp.transpose(value, (0, 2, 3, 1)), (0, 0, 0, slot)
        ),
    }


def read_cache(cache: LayerCache, name: str, head_dim: int) -> Array:
    """Read keys or values of all slots.

    Args:
      cache: cache of one layer from `init_cache`.
      name: `key` or `value`.
      head_dim: dimensions per head, `H`.

    Returns:
      [B, S, K, H]; integers are dequantized to float32.
    """
    if "key_scale" not in cache:
        return cache[name]
    return cache_kernels.dequantize_rows(cache[name], cache[f"{name}_scale"], head_dim)
