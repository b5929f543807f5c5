"""Signatures of an exported model, and the description of a file.

Shapes: `T` tokens, `S` cache slots, `D` hidden size, `K` key/value heads, `H` head dimension, `M`
features of one image or recording, `V` vocabulary size.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from glm_edge import __version__
from glm_edge import params as boxes
from glm_edge.checkpoint.shapes import expected_shapes
from glm_edge.configs import GLMConfig, to_dict
from glm_edge.errors import ExportError
from glm_edge.export.common.sizes import (
    all_lengths,
    attended_by,
    check_attended,
    check_forced,
    check_lengths,
    logit_rows,
    step_name,
)
from glm_edge.export.common.weights import Conversion
from glm_edge.models.glm import KEY_BY_HEAD, VALUE_BY_HEAD
from glm_edge.models.multimodal import MultimodalGLM
from glm_edge.params.tree import Params

Inputs = dict[str, Array]


@dataclass(frozen=True, eq=False)
class Signature:
    """One entry point of the file, equal to itself only.

    Attributes:
      name: name, such as `prefill_128`.
      inputs: shapes and types by name.
      function: pure function `(params, inputs) -> outputs`.
      subtrees: first components of the parameter paths that it may read.
    """

    name: str
    inputs: dict[str, jax.ShapeDtypeStruct]
    function: Callable[[Any, Inputs], dict[str, Array]]
    subtrees: tuple[str, ...]


def signatures(
    model: MultimodalGLM,
    prefill_lengths: Iterable[int],
    cache_slots: int,
    prefill_logits: bool = False,
    attended_slots: Iterable[int] = (),
    forced_lengths: Iterable[int] = (),
) -> list[Signature]:
    """List the functions that an exported model offers.

    `embed` and `embed_<T>` map `tokens` [1, T] to `embeddings` [1, T, D]. `vision` maps `images`
    [1, height, width, channels], and `speech` maps `audio` [1, frames, bins], to `features`
    [1, M, D]; the caller replaces placeholder embeddings with these features. `decode` (T = 1) and
    `prefill_<T>` take `embeddings`, `input_pos` [T], an additive `mask` [1, 1, T, S] and the cache,
    `kv_cache_k_<i>` [1, K, S, H] and `kv_cache_v_<i>` [1, K, H, S]. They write the cache from slot
    `input_pos[0]` on and return it; `decode` also returns `logits` [1, 1, V]. A model with
    three-dimensional rotary positions also takes `positions` [3, T]. `decode_<A>` and
    `prefill_<T>_<A>` attend to the first `A` slots only, which must contain all tokens: their
    `mask` is [1, 1, T, A].

    `prefill_<T>` of `forced_lengths` returns `logits` [1, 1, V] of its last row. The caller feeds
    fewer tokens by repeating the last one, with its position and mask: equal rows give equal
    logits, and a later call overwrites the rows of the cache behind it.

    Args:
      model: the model; its `compute` selects the arithmetic of matrix products.
      prefill_lengths: token counts `T` of the prefill signatures.
      cache_slots: number `S` of cache slots.
      prefill_logits: whether prefill also returns `logits` [1, T, V].
      attended_slots: slot counts `A`; prefill uses the smallest that fits `T` tokens, unless `T` is
        one of `forced_lengths`.
      forced_lengths: token counts `T` of further prefill signatures, for a free token and the run
        that a grammar forces behind it.

    Returns:
      The signatures.
    """
    lengths, slots = tuple(prefill_lengths), tuple(attended_slots)
    return list(
        _signatures(model, lengths, cache_slots, prefill_logits, slots, tuple(forced_lengths))
    )


@functools.lru_cache(maxsize=4)
def _signatures(
    model: MultimodalGLM,
    prefill_lengths: tuple[int, ...],
    cache_slots: int,
    prefill_logits: bool,
    attended_slots: tuple[int, ...],
    forced_lengths: tuple[int, ...],
) -> list[Signature]:
    """Make the same objects for the same arguments, so that traces and conversions are kept."""
    config = model.config
    entries = []
    for length in all_lengths(prefill_lengths, forced_lengths):
        entries.append(_embed(model, "embed" if length == 1 else f"embed_{length}", length))
        rows = logit_rows(length, prefill_lengths, prefill_logits, forced_lengths)
        for attended in (None, *attended_by(length, attended_slots, forced_lengths)):
            entries.append(_step(model, length, cache_slots, attended, rows))
    if config.vision is not None:
        image = (1, *config.vision.image_size, config.vision.channels)
        entries.append(_encoder(model, "vision", "images", image, MultimodalGLM.encode_images))
    if config.speech is not None:
        mel = (1, config.speech.num_frames, config.speech.mel_bins)
        entries.append(_encoder(model, "speech", "audio", mel, MultimodalGLM.encode_audio))
    return entries


def _encoder(
    model: MultimodalGLM, name: str, argument: str, shape: tuple[int, ...], method: Callable
) -> Signature:
    def function(params: Any, inputs: Inputs) -> dict[str, Array]:
        features: Any = model.apply({"params": params}, inputs[argument], method=method)
        return {"features": features}

    return Signature(name, {argument: jax.ShapeDtypeStruct(shape, jnp.float32)}, function, (name,))


def _embed(model: MultimodalGLM, name: str, length: int) -> Signature:
    def function(params: Any, inputs: Inputs) -> dict[str, Array]:
        embedded, _ = model.apply(
            {"params": params}, inputs["tokens"], method=MultimodalGLM.embed_inputs
        )
        return {"embeddings": embedded}

    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    return Signature(name, {"tokens": tokens}, function, ("embed",))


def _step(
    model: MultimodalGLM, length: int, slots: int, attended: int | None, logit_rows: int
) -> Signature:
    decoder = model.config.decoder

    def run(module: MultimodalGLM, inputs: Inputs) -> dict[str, Array]:
        positions = inputs["input_pos"][None]
        if decoder.mrope_section:
            positions = inputs["positions"][:, None]
        cache: Any = {
            "layers": [
                {
                    KEY_BY_HEAD: inputs[f"kv_cache_k_{layer}"],
                    VALUE_BY_HEAD: inputs[f"kv_cache_v_{layer}"],
                }
                for layer in range(decoder.num_layers)
            ],
            "length": inputs["input_pos"][0],
        }
        final, _, cache = module.decoder(inputs["embeddings"], positions, inputs["mask"], cache)
        outputs = {"logits": module.predict(final[:, length - logit_rows :])} if logit_rows else {}
        for layer, slots_of_layer in enumerate(cache["layers"]):
            outputs[f"kv_cache_k_{layer}"] = slots_of_layer[KEY_BY_HEAD]
            outputs[f"kv_cache_v_{layer}"] = slots_of_layer[VALUE_BY_HEAD]
        return outputs

    def function(params: Any, inputs: Inputs) -> dict[str, Array]:
        outputs: Any = model.apply({"params": params}, inputs, method=run)
        return outputs

    inputs = {
        "embeddings": jax.ShapeDtypeStruct((1, length, decoder.hidden_size), jnp.float32),
        "input_pos": jax.ShapeDtypeStruct((length,), jnp.int32),
        "mask": jax.ShapeDtypeStruct((1, 1, length, attended or slots), jnp.float32),
    }
    if decoder.mrope_section:
        inputs["positions"] = jax.ShapeDtypeStruct((3, length), jnp.int32)
    for layer in range(decoder.num_layers):
        heads, width = decoder.kv_heads(layer), decoder.head_dim
        key, value = (1, heads, slots, width), (1, heads, width, slots)
        inputs[f"kv_cache_k_{layer}"] = jax.ShapeDtypeStruct(key, jnp.float32)
        inputs[f"kv_cache_v_{layer}"] = jax.ShapeDtypeStruct(value, jnp.float32)
    name = step_name(length, attended)
    return Signature(name, inputs, function, ("embed", "decoder", "head"))


@dataclass(frozen=True)
class ExportSpec:
    """A checked model and the signatures of its exported file.

    Attributes:
      config: configuration of the model.
      shapes: dense shapes of its parameters by path.
      prefill_lengths: token counts of the prefill signatures, ascending.
      cache_slots: number of cache slots.
      prefill_logits: whether prefill returns logits of every token.
      attended_slots: slot counts of the signatures that attend to fewer slots, ascending.
      forced_lengths: token counts of the signatures with logits of their last token, ascending.
      signatures: the signatures.
    """

    config: GLMConfig
    shapes: dict[str, tuple[int, ...]]
    prefill_lengths: list[int]
    cache_slots: int
    prefill_logits: bool
    attended_slots: list[int]
    forced_lengths: list[int]
    signatures: list[Signature]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the signatures."""
        return tuple(signature.name for signature in self.signatures)

    def read_bytes(self, sizes: Mapping[str, int]) -> list[int]:
        """Sum the bytes of the parameters that each signature may read.

        Args:
          sizes: stored bytes by parameter path.

        Returns:
          Bytes of each signature, in the order of `signatures`.
        """
        return [
            sum(size for path, size in sizes.items() if path.split("/")[0] in signature.subtrees)
            for signature in self.signatures
        ]

    def description(self, parameters: Any, conversions: Iterable[Conversion]) -> dict[str, Any]:
        """Describe the file as JSON values, not yet verified.

        Args:
          parameters: JSON value that describes the stored parameters.
          conversions: conversions of the parameters.

        Returns:
          The fields of the description.
        """
        return {
            "version": __version__,
            "config": to_dict(self.config),
            "signatures": list(self.names),
            "prefill_lengths": self.prefill_lengths,
            "prefill_logits": self.prefill_logits,
            "cache_slots": self.cache_slots,
            "attended_slots": self.attended_slots,
            "forced_lengths": self.forced_lengths,
            "parameters": parameters,
            "conversions": [str(conversion) for conversion in conversions],
            "verified": False,
        }


def make_spec(
    model: MultimodalGLM,
    params: Params,
    prefill_lengths: Iterable[int],
    cache_slots: int | None,
    prefill_logits: bool,
    attended_slots: Iterable[int] = (),
    forced_lengths: Iterable[int] | None = (),
) -> ExportSpec:
    """Check a model and build the signatures of its file; see `signatures`.

    Args:
      model: the model.
      params: its parameters.
      prefill_lengths: token counts of the prefill signatures.
      cache_slots: number of cache slots; None uses the model's context length, at most 1024.
      prefill_logits: whether prefill returns logits of every token.
      attended_slots: slot counts of the signatures that attend to fewer slots.
      forced_lengths: token counts of the signatures with logits of their last token; None takes
        those of `sizes.FORCED_LENGTHS` that fit the cache.

    Returns:
      The spec.

    Raises:
      ExportError: the model is not a `MultimodalGLM`, the parameters belong to another model, or a
        length is not a fixed integer or does not fit the model's context.
    """
    shapes = check_model(model, params)
    lengths, slots = check_lengths(model.config, prefill_lengths, cache_slots)
    attended = check_attended(attended_slots, slots)
    forced = check_forced(forced_lengths, slots)
    float32 = model.clone(compute="float32")
    entries = signatures(float32, lengths, slots, prefill_logits, attended, forced)
    sizes = lengths, slots, prefill_logits, attended, forced
    return ExportSpec(model.config, shapes, *sizes, entries)


def check_model(model: Any, params: Params) -> dict[str, tuple[int, ...]]:
    """Return the dense shapes of a model's parameters by path.

    Args:
      model: the model.
      params: its parameters.

    Returns:
      Dense shape by parameter path.

    Raises:
      ExportError: the model is not a `MultimodalGLM`, or the parameters belong to another model.
    """
    if not isinstance(getattr(model, "config", None), GLMConfig):
        raise ExportError(
            f"{type(model).__name__}: only a MultimodalGLM can be exported in this format; use "
            "ge.export.function, which writes any traceable function as a .tflite file"
        )
    expected = expected_shapes(model)
    shapes = {name: tuple(leaf.shape) for name, leaf in boxes.path_items(params)}
    for name in sorted(expected.keys() | shapes.keys()):
        if expected.get(name) != shapes.get(name):
            raise ExportError(
                f"{name}: shape {shapes.get(name, 'missing')} in the parameters, "
                f"{expected.get(name, 'missing')} in the model"
            )
    return expected
