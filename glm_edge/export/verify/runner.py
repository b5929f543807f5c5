"""Runners of an exported model's signatures in LiteRT or JAX, in the order of a phone's runtime.

Shapes: `T` tokens, `D` hidden size, `M` features of one image or recording, `V` vocabulary size.
"""

import copy
import functools
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np

from glm_edge.configs import GLMConfig, from_dict
from glm_edge.errors import DataError, ExportError, GlmEdgeError, require
from glm_edge.export.common.interface import Tensor
from glm_edge.export.common.parsing import PARSE_ERRORS
from glm_edge.export.common.quiet import quiet
from glm_edge.export.common.signatures import (
    attended_by,
    described_sizes,
    signatures,
    step_name,
)
from glm_edge.export.tflite.file import read_metadata
from glm_edge.export.tflite.interface import checked_graphs
from glm_edge.export.tflite.reader import Graph
from glm_edge.export.verify.worker import TIMEOUT, InterpreterProcess
from glm_edge.models.multimodal import MultimodalGLM

MASKED = -1e9


class SignatureRunner:
    """A driver that calls signatures as a phone's runtime does; subclasses run one signature.

    Attributes:
      float32: True if products are known to be in float32, on dequantized weights.
    """

    float32 = False

    def __init__(
        self,
        config: GLMConfig,
        prefill_lengths: Iterable[int],
        cache_slots: int,
        prefill_logits: bool = True,
        attended_slots: Iterable[int] = (),
    ):
        self.config = config
        self.prefill_logits = prefill_logits
        self.prefill_lengths = sorted(prefill_lengths)
        self.cache_slots = cache_slots
        self.attended_slots = sorted(attended_slots)

    def run(self, signature: str, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Run one signature on arrays that match its shapes exactly.

        Args:
          signature: name of the signature.
          **inputs: input arrays by name.

        Returns:
          Output arrays by name.
        """
        raise NotImplementedError

    def encode_images(self, image: np.ndarray) -> np.ndarray:
        """Encode one image [height, width, channels] to features [M, D].

        Args:
          image: pixels [height, width, channels].

        Returns:
          Features, float32 [M, D].

        Raises:
          DataError: the model has no vision encoder, or the shape is wrong.
        """
        vision = self.config.vision
        shape = None if vision is None else (*vision.image_size, vision.channels)
        return self._encode("vision", "images", image, shape)

    def encode_audio(self, audio: np.ndarray) -> np.ndarray:
        """Encode the log-mel frames [num_frames, mel_bins] of one recording to features [M, D].

        Args:
          audio: log-mel frames [num_frames, mel_bins].

        Returns:
          Features, float32 [M, D].

        Raises:
          DataError: the model has no speech encoder, or the shape is wrong.
        """
        speech = self.config.speech
        shape = None if speech is None else (speech.num_frames, speech.mel_bins)
        return self._encode("speech", "audio", audio, shape)

    def _encode(
        self, signature: str, argument: str, array: np.ndarray, shape: tuple[int, ...] | None
    ) -> np.ndarray:
        if shape is None:
            raise DataError(f"{argument}: {self.config.name} has no {signature} encoder")
        if np.shape(array) != shape:
            raise DataError(f"{argument}: shape {np.shape(array)}, expected {shape}")
        inputs = {argument: np.asarray(array, np.float32)[None]}
        return self.run(signature, **inputs)["features"][0]

    def embed(
        self,
        tokens: np.ndarray,
        image: np.ndarray | None = None,
        audio: np.ndarray | None = None,
    ) -> np.ndarray:
        """Embed tokens, with encoded image and speech at their placeholders.

        Args:
          tokens: token ids, int [T].
          image: pixels [height, width, channels], or None.
          audio: log-mel frames [num_frames, mel_bins], or None.

        Returns:
          Embeddings, float32 [T, D].

        Raises:
          DataError: the text is empty, does not fit the cache, or has an unknown token; the model
            lacks the encoder; or an array has the wrong shape.
        """
        tokens, size = np.asarray(tokens, np.int32).reshape(-1), self.config.decoder.vocab_size
        if not tokens.size or tokens.min() < 0 or tokens.max() >= size:
            raise DataError(f"tokens: must contain at least one token, all from 0 to {size - 1}")
        parts = []
        for start, end, length in self._chunks(0, len(tokens)):
            padded = _padded(tokens[start:end], length)[None]
            name = "embed" if length == 1 else f"embed_{length}"
            parts.append(self.run(name, tokens=padded)["embeddings"][0, : end - start])
        embedded = np.concatenate(parts)
        if image is not None:
            _insert(embedded, tokens == self.config.image_token_id, self.encode_images(image))
        if audio is not None:
            _insert(embedded, tokens == self.config.audio_token_id, self.encode_audio(audio))
        return embedded

    def score(
        self,
        tokens: np.ndarray,
        image: np.ndarray | None = None,
        audio: np.ndarray | None = None,
    ) -> np.ndarray:
        """Compute logits of the next token at every position of a text.

        Args:
          tokens: token ids, int [T], with placeholders for features.
          image: pixels [height, width, channels], or None.
          audio: log-mel frames [num_frames, mel_bins], or None.

        Returns:
          Logits, float32 [T, V].

        Raises:
          DataError: as for `embed`.
        """
        return self.extend(self.embed(tokens, image, audio), 0, self.empty_cache(), True)[0]

    def generate(
        self,
        tokens: np.ndarray,
        image: np.ndarray | None = None,
        audio: np.ndarray | None = None,
        max_new_tokens: int = 16,
    ) -> list[int]:
        """Extend a prompt by the top-1 token until a stop token, which is included.

        Args:
          tokens: token ids, int [T].
          image: pixels [height, width, channels], or None.
          audio: log-mel frames [num_frames, mel_bins], or None.
          max_new_tokens: most tokens to generate, at least one.

        Returns:
          The new tokens.

        Raises:
          DataError: as for `embed`; or prompt and answer do not fit the cache, or logits are not
            finite.
        """
        embedded = self.embed(tokens, image, audio)
        logits, cache = self.extend(embedded, 0, self.empty_cache())
        generated = [_argmax(logits[-1])]
        while len(generated) < max_new_tokens and generated[-1] not in self.config.eos_token_ids:
            slot = len(embedded) + len(generated) - 1
            last = self.run("embed", tokens=np.array([generated[-1:]], np.int32))["embeddings"][0]
            logits, cache = self.extend(last, slot, cache)
            generated.append(_argmax(logits[-1]))
        return generated

    def extend(
        self,
        embedded: np.ndarray,
        slot: int,
        cache: dict[str, np.ndarray],
        every_position: bool = False,
        positions: np.ndarray | None = None,
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Run embedded tokens, starting at a slot of the cache.

        If prefill returns no logits, the last token is decoded after the others, or every token if
        `every_position` is set.

        Args:
          embedded: embedded tokens [T, D].
          slot: slot of the first token; the slots before it are full.
          cache: cache from `empty_cache`, or from the previous call.
          every_position: whether to return logits of all tokens instead of the last only.
          positions: three-dimensional rotary positions [3, T]; None takes the slots.

        Returns:
          `(logits, cache)`: logits [T, V] or [1, V], and the cache with these tokens.

        Raises:
          DataError: the tokens do not fit the cache.
        """
        logits, end = [], slot + len(embedded)
        chunks: Iterable[tuple[int, int, int]]
        if self.prefill_logits:
            chunks = self._chunks(slot, end)
        elif every_position:
            chunks = ((at, at + 1, 1) for at in self._within(slot, end))
        else:
            chunks = (*self._chunks(slot, end - 1), (end - 1, end, 1))
        for start, end, length in chunks:
            attended = self.attended(start, length)
            part = slice(start - slot, end - slot)
            placed = None if positions is None else positions[:, part]
            inputs = self.step_inputs(embedded[part], start, length, attended, placed)
            outputs = self.run(step_name(length, attended), **inputs, **cache)
            if "logits" in outputs:
                logits.append(outputs.pop("logits")[0, : end - start])
            cache = outputs
        return np.concatenate(logits) if every_position else logits[-1][-1:], cache

    def attended(self, slot: int, length: int) -> int | None:
        """Return the attended slots of the fastest signature for some tokens; None for all.

        Args:
          slot: slot of the first token.
          length: number of tokens.

        Returns:
          The number of slots, or None for all.
        """
        fitting = attended_by(length, self.attended_slots)
        return next((attended for attended in fitting if slot + length <= attended), None)

    def looking_at_all_slots(self) -> Self:
        """Return a copy in the same runtime whose signatures attend to all slots.

        Returns:
          The copy, which shares the runtime.
        """
        other = copy.copy(self)
        other.attended_slots = []
        return other

    def step_inputs(
        self,
        embedded: np.ndarray,
        slot: int,
        length: int,
        attended: int | None = None,
        positions: np.ndarray | None = None,
    ) -> dict[str, np.ndarray]:
        """Make the inputs of `decode` or `prefill_<length>` except the cache.

        Args:
          embedded: embedded tokens, at most [length, D]; missing rows are padded.
          slot: slot of the first token.
          length: token count of the signature.
          attended: number of slots that it attends to; None for all.
          positions: three-dimensional rotary positions of the tokens; None takes the slots.

        Returns:
          Inputs by name.
        """
        slots = np.arange(slot, slot + length, dtype=np.int32)
        visible = np.arange(attended or self.cache_slots) <= slots[:, None]
        inputs = {
            "embeddings": _padded(embedded, length)[None],
            "input_pos": slots,
            "mask": np.where(visible, 0.0, MASKED).astype(np.float32)[None, None],
        }
        if self.config.decoder.mrope_section:
            placed = slots[None] if positions is None else _padded(positions.T, length).T
            inputs["positions"] = np.broadcast_to(placed, (3, length))
        return inputs

    def _within(self, start: int, end: int) -> range:
        if end > self.cache_slots:
            raise DataError(f"{end} tokens do not fit the {self.cache_slots} slots of the cache")
        return range(start, end)

    def _chunks(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Split slots `start..end` into `(start, end, length of the signature)`."""
        self._within(start, end)
        while start < end:
            free = self.cache_slots - start
            fitting = [length for length in self.prefill_lengths if length <= free]
            covering = [length for length in fitting if length >= end - start]
            length = min(covering, default=max(fitting, default=1)) if end - start > 1 else 1
            yield start, min(end, start + length), length
            start += length

    def empty_cache(self) -> dict[str, np.ndarray]:
        """Make an empty cache; its keys are the input names of the signatures.

        Returns:
          Zeros [1, K, S, H] and [1, K, H, S] by name.
        """
        decoder, cache = self.config.decoder, {}
        for layer in range(decoder.num_layers):
            heads, width = decoder.kv_heads(layer), decoder.head_dim
            cache[f"kv_cache_k_{layer}"] = np.zeros((1, heads, self.cache_slots, width), np.float32)
            cache[f"kv_cache_v_{layer}"] = np.zeros((1, heads, width, self.cache_slots), np.float32)
        return cache


class LiteRTRunner(SignatureRunner):
    """An exported file in the LiteRT interpreter, which runs without JAX.

    The runner is thread-safe; the interpreter runs one signature at a time.

    Args:
      path: path of the file.
      num_threads: number of threads of the interpreter.
      isolated: whether to check all tables of the file and run it in a separate process, so that a
        damaged file can crash only that process. The process stores the caches; other arrays are
        copied through a pipe.
      timeout: time limit in seconds for one answer of that process.

    Raises:
      ExportError: glm_edge did not export the file, or it is damaged or does not load.
      MissingExtraError: LiteRT is not installed.
    """

    def __init__(
        self,
        path: str | Path,
        num_threads: int = 2,
        isolated: bool = False,
        timeout: float = TIMEOUT,
    ):
        description = read_metadata(path)
        try:
            config = from_dict(description["config"])
            sizes = described_sizes(description, config)
            super().__init__(config, **vars(sizes))
        except (*PARSE_ERRORS, GlmEdgeError) as error:
            raise ExportError(f"{path}: damaged: its description: {error}") from error
        self.path, self.description = path, description
        self._graphs: dict[str, Graph] = {}
        self._worker: InterpreterProcess | None = None
        self._runners: dict[str, Any] = {}
        self._lock = threading.Lock()
        if isolated:
            self._graphs = checked_graphs(
                path,
                self.config,
                self.prefill_lengths,
                self.cache_slots,
                self.prefill_logits,
                self.attended_slots,
            )
            self._worker = InterpreterProcess(path, num_threads, timeout)
            return
        interpreter = require("ai_edge_litert.interpreter", extra="export")
        try:
            with quiet():
                self.interpreter = interpreter.Interpreter(
                    model_path=str(path), num_threads=num_threads
                )
        except (ValueError, RuntimeError) as error:
            raise ExportError(f"{path}: LiteRT cannot load it: {error}") from error

    def run(self, signature: str, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Run one signature on arrays that match its shapes exactly."""
        if self._worker is not None:
            graph = self._graphs[signature]
            tensors = graph.inputs, graph.outputs
            return run_checked(self._worker, self.path, signature, inputs, *tensors)
        # A call sets inputs, invokes, and copies outputs, all in the memory of one interpreter.
        with self._lock:
            if signature in self._runners:
                return self._runners[signature](**inputs)
            # The first run allocates memory, and the runtime then logs its delegate.
            with quiet():
                self._runners[signature] = self.interpreter.get_signature_runner(signature)
                return self._runners[signature](**inputs)

    def close(self) -> None:
        """End the process of an isolated file, which also ends when this object is deleted."""
        if self._worker is not None:
            self._worker.close()


def run_checked(
    process: InterpreterProcess,
    path: str | Path,
    signature: str,
    inputs: Mapping[str, Any],
    takes: Mapping[str, Tensor],
    gives: Mapping[str, Tensor],
) -> dict[str, Any]:
    """Run a signature in another process, which keeps outputs that are named like inputs.

    Args:
      process: process that runs it.
      path: path of the exported model, for messages.
      signature: name of the signature.
      inputs: input arrays by name.
      takes: expected tensors of `inputs`.
      gives: expected tensors of the outputs.

    Returns:
      Output arrays by name; `RemoteArray`s for those that stay in the process.

    Raises:
      DataError: an input is missing, or has the wrong type or shape.
      ExportError: an output is missing, or has the wrong type or shape; or the process fails.
    """
    for name, tensor in takes.items():
        if name not in inputs or not tensor.fits(inputs[name]):
            raise DataError(f"{signature}: {name} must be {tensor.type} {list(tensor.shape)}")
    outputs = process.run(signature, inputs, takes.keys() & gives.keys())
    for name, tensor in gives.items():
        if name not in outputs or not tensor.fits(outputs[name]):
            raise ExportError(f"{path}: {signature} gives no {tensor.type} {name!r}")
    return outputs


class JaxRunner(SignatureRunner):
    """The functions that an exported file was traced from, run in JAX on boxed parameters.

    Args:
      model: the model; its `compute` selects how products with quantized weights round activations.
      params: parameters with the values that the file stores.
      prefill_lengths: token counts of the file's prefill signatures.
      cache_slots: number of cache slots of the file.
      prefill_logits: whether prefill returns logits of every token, as in the file.
    """

    def __init__(
        self,
        model: MultimodalGLM,
        params: Any,
        prefill_lengths: Iterable[int],
        cache_slots: int,
        prefill_logits: bool = True,
    ):
        super().__init__(model.config, prefill_lengths, cache_slots, prefill_logits)
        self._params = params
        lengths = tuple(self.prefill_lengths)
        self._functions = _compiled(model, lengths, cache_slots, prefill_logits)

    def run(self, signature: str, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Run one signature on arrays that match its shapes exactly."""
        outputs = self._functions[signature](self._params, inputs)
        return {name: np.array(value) for name, value in outputs.items()}


@functools.lru_cache(maxsize=4)
def _compiled(
    model: MultimodalGLM, lengths: tuple[int, ...], cache_slots: int, prefill_logits: bool
) -> dict[str, Any]:
    """Compile the functions of a model once for comparisons with any number of its files."""
    entries = signatures(model, lengths, cache_slots, prefill_logits)
    return {entry.name: jax.jit(entry.function) for entry in entries}


def _argmax(scores: np.ndarray) -> int:
    """Return the top-1 token of scores [V].

    Raises:
      DataError: the logits are not finite.
    """
    if not np.isfinite(scores).all():
        raise DataError(
            "the exported model's logits are NaN or infinite; check its weights and inputs"
        )
    return int(scores.argmax())


def _insert(embedded: np.ndarray, placeholder: np.ndarray, features: np.ndarray) -> None:
    rank = np.cumsum(placeholder)[placeholder] - 1
    embedded[placeholder] = features[np.minimum(rank, len(features) - 1)]


def _padded(rows: np.ndarray, length: int) -> np.ndarray:
    padding = [(0, length - len(rows))] + [(0, 0)] * (rows.ndim - 1)
    return np.pad(rows, padding)
