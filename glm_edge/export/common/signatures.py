"""Signatures of an exported model, their sizes, and the description of a file.

Shapes: `T` tokens, `S` cache slots, `D` hidden size, `K` key/value heads, `H` head dimension, `M`
features of one image or recording, `V` vocabulary size.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from glm_edge import __version__
from glm_edge import params as boxes
from glm_edge.checkpoint.shapes import expected_shapes
from glm_edge.configs import GLMConfig, to_dict
from glm_edge.errors import ExportError
from glm_edge.export.common.weights import Conversion
from glm_edge.models.glm import KEY_BY_HEAD, VALUE_BY_HEAD
from glm_edge.models.multimodal import MultimodalGLM
from glm_edge.params.tree import Params

Inputs = dict[str, Array]
DECODE = "decode"
DEFAULT_SLOTS = 1024


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

    Args:
      model: the model; its `compute` selects the arithmetic of matrix products.
      prefill_lengths: token counts `T` of the prefill signatures.
      cache_slots: number `S` of cache slots.
      prefill_logits: whether prefill also returns `logits` [1, T, V].
      attended_slots: slot counts `A`; prefill uses the smallest that fits `T` tokens.

    Returns:
      The signatures.
    """
    sizes = tuple(prefill_lengths), cache_slots, prefill_logits, tuple(attended_slots)
    return list(_signatures(model, *sizes))


@functools.lru_cache(maxsize=4)
def _signatures(
    model: MultimodalGLM,
    prefill_lengths: tuple[int, ...],
    cache_slots: int,
    prefill_logits: bool,
    attended_slots: tuple[int, ...],
) -> list[Signature]:
    """Make the same objects for the same arguments, so that traces and conversions are kept."""
    config = model.config
    entries = []
    for length in (1, *prefill_lengths):
        entries.append(_embed(model, "embed" if length == 1 else f"embed_{length}", length))
        for attended in (None, *attended_by(length, attended_slots)):
            logits = prefill_logits or length == 1
            entries.append(_step(model, length, cache_slots, attended, logits))
    if config.vision is not None:
        image = (1, *config.vision.image_size, config.vision.channels)
        entries.append(_encoder(model, "vision", "images", image, MultimodalGLM.encode_images))
    if config.speech is not None:
        mel = (1, config.speech.num_frames, config.speech.mel_bins)
        entries.append(_encoder(model, "speech", "audio", mel, MultimodalGLM.encode_audio))
    return entries


def step_name(length: int, attended: int | None = None) -> str:
    """Name the signature for `length` tokens that attends to `attended` slots, None for all.

    Args:
      length: number of tokens.
      attended: number of slots that the signature attends to, or None for all.

    Returns:
      The name, such as `decode`, `prefill_128` or `prefill_128_256`.
    """
    name = DECODE if length == 1 else f"prefill_{length}"
    return name if attended is None else f"{name}_{attended}"


def attended_by(length: int, attended_slots: Iterable[int]) -> list[int]:
    """List, in ascending order, the slot counts that have a signature for `length` tokens.

    Args:
      length: number of tokens.
      attended_slots: slot counts of the file.

    Returns:
      The slot counts.
    """
    fitting = sorted(attended for attended in attended_slots if attended >= length)
    return fitting if length == 1 else fitting[:1]


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
    model: MultimodalGLM, length: int, slots: int, attended: int | None, with_logits: bool
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
        outputs = {"logits": module.predict(final)} if with_logits else {}
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
      signatures: the signatures.
    """

    config: GLMConfig
    shapes: dict[str, tuple[int, ...]]
    prefill_lengths: list[int]
    cache_slots: int
    prefill_logits: bool
    attended_slots: list[int]
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
) -> ExportSpec:
    """Check a model and build the signatures of its file; see `signatures`.

    Args:
      model: the model.
      params: its parameters.
      prefill_lengths: token counts of the prefill signatures.
      cache_slots: number of cache slots; None uses the model's context length, at most 1024.
      prefill_logits: whether prefill returns logits of every token.
      attended_slots: slot counts of the signatures that attend to fewer slots.

    Returns:
      The spec.

    Raises:
      ExportError: the model is not a `MultimodalGLM`, the parameters belong to another model, or a
        length is not a fixed integer or does not fit the model's context.
    """
    shapes = check_model(model, params)
    lengths, slots = check_lengths(model.config, prefill_lengths, cache_slots)
    attended = check_attended(attended_slots, slots)
    float32 = model.clone(compute="float32")
    entries = signatures(float32, lengths, slots, prefill_logits, attended)
    return ExportSpec(model.config, shapes, lengths, slots, prefill_logits, attended, entries)


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


def check_lengths(
    config: GLMConfig, prefill_lengths: Iterable[int], cache_slots: int | None
) -> tuple[list[int], int]:
    """Return the prefill lengths in ascending order, and the number of cache slots.

    Args:
      config: configuration of the model.
      prefill_lengths: token counts of the prefill signatures.
      cache_slots: number of cache slots; None uses the model's context length, at most 1024.

    Returns:
      `(prefill_lengths, cache_slots)`.

    Raises:
      ExportError: a length is not a fixed integer, or does not fit the model's context.
    """
    lengths = fixed_lengths("prefill_lengths", prefill_lengths)
    context = config.decoder.max_position_embeddings
    slots = min(context, DEFAULT_SLOTS)
    if cache_slots is not None:
        (slots,) = check_fixed("cache_slots", [cache_slots])
    if not 1 <= slots <= context:
        raise ExportError(f"cache_slots={slots}: must be 1 to {context}, the model's context")
    for length in lengths:
        if not 2 <= length <= slots:
            raise ExportError(f"prefill_lengths: {length} must be 2 to {slots}, the cache's slots")
    return lengths, slots


def check_attended(attended_slots: Iterable[int], cache_slots: int) -> list[int]:
    """Return the slot counts that signatures attend to, in ascending order.

    Args:
      attended_slots: slot counts of signatures.
      cache_slots: number of cache slots.

    Returns:
      The distinct slot counts.

    Raises:
      ExportError: a slot count is not a fixed integer, or is not below `cache_slots`.
    """
    attended = fixed_lengths("attended_slots", attended_slots)
    if attended and not 2 <= attended[0] <= attended[-1] < cache_slots:
        shown = f"{attended[:8]}"
        raise ExportError(
            f"attended_slots: {shown} must be 2 to {cache_slots - 1}, fewer than cache_slots"
        )
    return attended


@dataclass(frozen=True)
class Sizes:
    """The sizes of a file's signatures, read from its description.

    Attributes:
      prefill_lengths: token counts of the prefill signatures, ascending.
      cache_slots: number of cache slots.
      prefill_logits: whether prefill returns logits of every token.
      attended_slots: slot counts of the signatures that attend to fewer slots, ascending.
    """

    prefill_lengths: list[int]
    cache_slots: int
    prefill_logits: bool
    attended_slots: list[int]


def described_sizes(description: Mapping[str, Any], config: GLMConfig) -> Sizes:
    """Read the sizes from an untrusted description.

    Args:
      description: description of a file or directory.
      config: configuration of the model, from the description.

    Returns:
      The sizes, which are possible for an export of that model.

    Raises:
      ExportError: a size is missing, has the wrong type, or is impossible for an export.
    """
    names = ("prefill_lengths", "cache_slots", "prefill_logits", "attended_slots")
    # Core ML packages have no attended slots, and the descriptions of older ones lack the field.
    fields = {"attended_slots": [], **description}
    missing = [name for name in names if name not in fields]
    if missing:
        raise ExportError(f"{missing[0]} is missing")
    for name in ("prefill_lengths", "attended_slots"):
        if not isinstance(fields[name], list):
            raise ExportError(f"{name}: must be a list, not {type(fields[name]).__name__}")
    if not isinstance(fields["prefill_logits"], bool):
        raise ExportError(
            f"prefill_logits: must be true or false, not {fields['prefill_logits']!r}"
        )
    if fields["cache_slots"] is None:
        raise ExportError("cache_slots: must be an integer, not None")
    lengths, slots = check_lengths(config, fields["prefill_lengths"], fields["cache_slots"])
    attended = check_attended(fields["attended_slots"], slots)
    for name, sizes in (("prefill_lengths", lengths), ("attended_slots", attended)):
        if sizes != fields[name]:
            raise ExportError(f"{name}: {fields[name][:8]} must be ascending without duplicates")
    return Sizes(lengths, slots, fields["prefill_logits"], attended)


def fixed_lengths(name: str, lengths: Iterable[int]) -> list[int]:
    """Return the distinct lengths in ascending order.

    Args:
      name: name of the argument, for messages.
      lengths: the lengths.

    Returns:
      The lengths.

    Raises:
      ExportError: a length is not a fixed integer.
    """
    return sorted(set(check_fixed(name, lengths)))


def check_fixed(name: str, lengths: Iterable[int]) -> list[int]:
    """Return the lengths as integers; each becomes one graph.

    Args:
      name: name of the argument, for messages.
      lengths: the lengths.

    Returns:
      The lengths in their order.

    Raises:
      ExportError: a length is not an integer of at least 1, such as None, a symbol or -1.
    """
    values = list(lengths) if isinstance(lengths, Iterable) else [lengths]
    for length in values:
        if not isinstance(length, Integral) or isinstance(length, bool) or length < 1:
            raise ExportError(
                f"{name}: {length!r} is not a fixed length; use an integer of at least 1, as "
                "every graph has one shape"
            )
    return [int(length) for length in values]
