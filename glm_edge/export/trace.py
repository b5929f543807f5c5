"""The signatures of an exported model, and their conversion to a TFLite graph without weights.

Letters of shapes: `T` tokens, `S` cache slots, `D` hidden size, `K` key/value heads, `H` head
dimension, `M` features of one image or recording, `V` vocabulary.
"""

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from glm_edge.errors import ExportError, require
from glm_edge.export.lowering import without_erf
from glm_edge.models.glm import KEY_BY_HEAD, VALUE_BY_HEAD
from glm_edge.models.multimodal import MultimodalGLM
from glm_edge.params.tree import nested
from glm_edge.process_wide import shared

Inputs = dict[str, Array]
DECODE = "decode"


@dataclass(frozen=True)
class Signature:
    """One entry point of the file.

    Attributes:
      name: such as `prefill_128`.
      inputs: name to shape and type.
      function: `(params, inputs) -> outputs`, pure.
      subtrees: first names of the parameter paths that it may read.
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
    """Lists what an exported model offers.

    `embed` and `embed_<T>` turn `tokens` [1, T] into `embeddings` [1, T, D]; `vision` and `speech`
    turn `images` [1, height, width, channels] and `audio` [1, frames, bins] into `features`
    [1, M, D], which the caller puts in the places of placeholder embeddings. `decode` (T = 1) and
    `prefill_<T>` take `embeddings`, `input_pos` [T], an additive `mask` [1, 1, T, S] and the cache,
    `kv_cache_k_<i>` [1, K, S, H] and `kv_cache_v_<i>` [1, K, H, S], write it from slot
    `input_pos[0]` on, and give it back; `decode` gives `logits` [1, 1, V] with it. A model with
    three-dimensional rotary positions also takes `positions` [3, T]. `decode_<A>` and
    `prefill_<T>_<A>` do the same where the first `A` slots hold all tokens, and look at no others:
    their `mask` is [1, 1, T, A].

    Args:
      model: the model; its `compute` decides how the functions multiply.
      prefill_lengths: lengths `T` of the prefill signatures.
      cache_slots: slots `S` of the cache.
      prefill_logits: prefill gives `logits` [1, T, V], too.
      attended_slots: numbers `A` of slots; prefill has the least that holds `T` tokens.

    Returns:
      The signatures.
    """
    config = model.config
    attended_slots = tuple(attended_slots)
    offered = []
    for length in (1, *prefill_lengths):
        offered.append(_embed(model, "embed" if length == 1 else f"embed_{length}", length))
        for attended in (None, *attended_by(length, attended_slots)):
            logits = prefill_logits or length == 1
            offered.append(_step(model, length, cache_slots, attended, logits))
    if config.vision is not None:
        shape = (1, *config.vision.image_size, config.vision.channels)
        offered.append(_encoder(model, "vision", "images", shape, MultimodalGLM.encode_images))
    if config.speech is not None:
        shape = (1, config.speech.num_frames, config.speech.mel_bins)
        offered.append(_encoder(model, "speech", "audio", shape, MultimodalGLM.encode_audio))
    return offered


def step_name(length: int, attended: int | None = None) -> str:
    """Name of the signature for so many tokens that looks at so many slots, None for all."""
    name = DECODE if length == 1 else f"prefill_{length}"
    return name if attended is None else f"{name}_{attended}"


def attended_by(length: int, attended_slots: Iterable[int]) -> list[int]:
    """Of numbers of slots, those that have a signature for so many tokens, rising."""
    fitting = sorted(attended for attended in attended_slots if attended >= length)
    return fitting if length == 1 else fitting[:1]


def _encoder(
    model: MultimodalGLM, name: str, argument: str, shape: tuple[int, ...], method: Callable
) -> Signature:
    def function(params: Any, inputs: Inputs) -> dict[str, Array]:
        return {"features": model.apply({"params": params}, inputs[argument], method=method)}

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
        cache = {
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
        return model.apply({"params": params}, inputs, method=run)

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


def skeleton(
    offered: Iterable[Signature], shapes: Mapping[str, tuple[int, ...]], kind: str = "graph"
) -> tuple[bytes, dict[str, str]]:
    """Converts signatures to one TFLite graph in which every weight is an input.

    Args:
      offered: the signatures.
      shapes: parameter path to dense shape.
      kind: what is converted, for messages.

    Returns:
      `(content, arguments)`: the flatbuffer, and input name to parameter path.

    Raises:
      ExportError: the converter refuses the graph, or needs more than builtin operators.
    """
    jax2tf, tf = tensorflow()
    arguments = {f"weight_{index}": path for index, path in enumerate(shapes)}
    module, functions = tf.Module(), {}
    for signature in offered:
        weights = {
            name: jax.ShapeDtypeStruct(shapes[path], jnp.float32)
            for name, path in arguments.items()
            if path.split("/")[0] in signature.subtrees
        }
        functions[signature.name] = _concrete(jax2tf, tf, signature, weights, arguments)
    module.functions = functions
    with tempfile.TemporaryDirectory() as directory:
        tf.saved_model.save(module, directory, signatures=functions)
        converter = tf.lite.TFLiteConverter.from_saved_model(
            directory, signature_keys=list(functions)
        )
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
        return converted(converter, kind), arguments


def converted(converter: Any, kind: str) -> bytes:
    """Runs a converter of TensorFlow.

    Raises:
      ExportError: it refuses; the message has the first line of its reason.
    """
    try:
        with quiet():
            return bytes(converter.convert())
    except Exception as error:  # the converter has no exception class of its own
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ExportError(f"TensorFlow Lite cannot hold this {kind}: {reason[0]}") from error


def _concrete(
    jax2tf: Any,
    tf: Any,
    signature: Signature,
    weights: dict[str, jax.ShapeDtypeStruct],
    arguments: Mapping[str, str],
) -> Any:
    def call(values: dict[str, Array]) -> dict[str, Array]:
        params = nested({arguments[name]: values[name] for name in weights})
        return signature.function(params, {name: values[name] for name in signature.inputs})

    converted = jax2tf.convert(without_erf(call), with_gradient=False)
    specs = {
        name: tf.TensorSpec(struct.shape, tf.as_dtype(struct.dtype), name=name)
        for name, struct in {**weights, **signature.inputs}.items()
    }
    function = tf.function(lambda **values: converted(values), autograph=False)
    return function.get_concrete_function(**specs)


@shared
@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps what native libraries print to standard error from the terminal."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as sink:
        terminal = os.dup(2)
        try:
            os.dup2(sink.fileno(), 2)
            yield
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)


def tensorflow() -> tuple[Any, Any]:
    """jax2tf and TensorFlow, told to keep quiet."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    with quiet():
        tf = require("tensorflow", extra="export")
    tf.get_logger().setLevel("ERROR")
    return require("jax.experimental.jax2tf", extra="export"), tf
