"""Running an exported file in the LiteRT interpreter, and comparing it with its JAX model.

Letters of shapes: `T` tokens, `D` hidden size, `M` features of one image or recording, `V`
vocabulary.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from glm_edge.configs import GLMConfig, from_dict
from glm_edge.errors import DataError, ExportError, require
from glm_edge.export import container
from glm_edge.export.trace import DECODE, signatures
from glm_edge.models.multimodal import MultimodalGLM

HIDDEN = -1e9
THRESHOLDS = {"int8_dynamic": 0.99, "float32": 0.97}
MIN_TOKENS = 1000


@dataclass(frozen=True)
class Window:
    """One text, with what its placeholders stand for, to compare two models on.

    Attributes:
      tokens: int [T].
      image: [height, width, channels], or None.
      audio: log-mel [num_frames, mel_bins], or None.
      counted: bool [T], False where the prediction made at a position is left out, as where the
        answer's grammar forces the next token; None counts every position.
      prompt_length: tokens that free-running generation starts from; None takes half.
    """

    tokens: np.ndarray
    image: np.ndarray | None = None
    audio: np.ndarray | None = None
    counted: np.ndarray | None = None
    prompt_length: int | None = None


@dataclass(frozen=True)
class Verification:
    """How far a file's predictions are from those of its JAX model.

    Attributes:
      agreement: fraction of counted positions with the same likeliest token, teacher-forced.
      tokens: counted positions.
      max_abs_error: largest difference of a logit at them.
      mean_kl: mean of KL(JAX || file) in nats at them.
      free_running_agreement: fraction of greedily generated tokens that are the same.
      free_running_tokens: tokens generated.
      compute: how the JAX model multiplied.
      threshold: the agreement asked for.
    """

    agreement: float
    tokens: int
    max_abs_error: float
    mean_kl: float
    free_running_agreement: float | None
    free_running_tokens: int
    compute: str
    threshold: float

    @property
    def passed(self) -> bool:
        """True when the agreement reaches the threshold."""
        return self.agreement >= self.threshold

    def __str__(self) -> str:
        free = self.free_running_agreement
        return (
            f"{self.agreement:.2%} of {self.tokens} top-1 tokens as in JAX ({self.compute}), "
            f"max |error| {self.max_abs_error:.3g}, mean KL {self.mean_kl:.3g} nats"
            + (f", free-running {free:.2%} of {self.free_running_tokens}" if free is not None else "")
        )


class _PhoneModel:
    """Drives the signatures as a phone's runtime does; subclasses run one signature."""

    def __init__(self, config: GLMConfig, prefill_lengths: Iterable[int], cache_slots: int):
        self.config = config
        self.prefill_lengths = sorted(prefill_lengths)
        self.cache_slots = cache_slots

    def run(self, signature: str, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Runs one signature on arrays of exactly its shapes."""
        raise NotImplementedError

    def encode_images(self, image: np.ndarray) -> np.ndarray:
        """Features [M, D] of one image [height, width, channels]."""
        return self._encode("vision", "images", image, self.config.vision)

    def encode_audio(self, audio: np.ndarray) -> np.ndarray:
        """Features [M, D] of one recording's log-mel frames [num_frames, mel_bins]."""
        return self._encode("speech", "audio", audio, self.config.speech)

    def _encode(self, signature: str, argument: str, array: np.ndarray, encoder: Any) -> np.ndarray:
        if encoder is None:
            raise DataError(f"{argument}: {self.config.name} has no {signature} encoder")
        inputs = {argument: np.asarray(array, np.float32)[None]}
        return self.run(signature, **inputs)["features"][0]

    def embed(
        self,
        tokens: np.ndarray,
        image: np.ndarray | None = None,
        audio: np.ndarray | None = None,
    ) -> np.ndarray:
        """Embeds tokens and puts encoded image and speech at their placeholders, [T, D]."""
        tokens = np.asarray(tokens, np.int32).reshape(-1)
        rows = [
            self.run(f"embed{_suffix(length)}", tokens=_padded(tokens[start:end], length)[None])
            for start, end, length in self._chunks(0, len(tokens))
        ]
        spans = self._chunks(0, len(tokens))
        embedded = np.concatenate(
            [r["embeddings"][0, : end - start] for r, (start, end, _) in zip(rows, spans, strict=True)]
        )
        if image is not None:
            _place(embedded, tokens == self.config.image_token_id, self.encode_images(image))
        if audio is not None:
            _place(embedded, tokens == self.config.audio_token_id, self.encode_audio(audio))
        return embedded

    def score(
        self,
        tokens: np.ndarray,
        image: np.ndarray | None = None,
        audio: np.ndarray | None = None,
    ) -> np.ndarray:
        """Scores of the next token at every position of a text.

        Args:
          tokens: int [T], with placeholders where features go.
          image: [height, width, channels], or None.
          audio: [num_frames, mel_bins], or None.

        Returns:
          float32 [T, V].

        Raises:
          DataError: the text does not fit the cache.
        """
        return self._extend(self.embed(tokens, image, audio), 0, self._empty_cache())[0]

    def generate(
        self,
        tokens: np.ndarray,
        image: np.ndarray | None = None,
        audio: np.ndarray | None = None,
        max_new_tokens: int = 16,
    ) -> list[int]:
        """Extends a prompt by the likeliest token until a stop token, which is included.

        Args:
          tokens: int [T].
          image: [height, width, channels], or None.
          audio: [num_frames, mel_bins], or None.
          max_new_tokens: at most so many.

        Returns:
          The new tokens.

        Raises:
          DataError: prompt and answer do not fit the cache.
        """
        embedded = self.embed(tokens, image, audio)
        logits, cache = self._extend(embedded, 0, self._empty_cache())
        generated = [int(logits[-1].argmax())]
        while len(generated) < max_new_tokens and generated[-1] not in self.config.eos_token_ids:
            slot = len(embedded) + len(generated) - 1
            last = self.run("embed", tokens=np.array([generated[-1:]], np.int32))["embeddings"][0]
            logits, cache = self._extend(last, slot, cache)
            generated.append(int(logits[-1].argmax()))
        return generated

    def _extend(
        self, embedded: np.ndarray, slot: int, cache: dict[str, np.ndarray]
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        logits = []
        for start, end, length in self._chunks(slot, slot + len(embedded)):
            positions = np.arange(start, start + length, dtype=np.int32)
            visible = np.arange(self.cache_slots) <= positions[:, None]
            inputs = {
                "embeddings": _padded(embedded[start - slot : end - slot], length)[None],
                "input_pos": positions,
                "mask": np.where(visible, 0.0, HIDDEN).astype(np.float32)[None, None],
            }
            if self.config.decoder.mrope_section:
                inputs["positions"] = np.broadcast_to(positions, (3, length))
            name = f"prefill{_suffix(length)}" if length > 1 else DECODE
            outputs = self.run(name, **inputs, **cache)
            logits.append(outputs.pop("logits")[0, : end - start])
            cache = outputs
        return np.concatenate(logits), cache

    def _chunks(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Splits slots `start..end` into `(start, end, length of the signature)`."""
        if end > self.cache_slots:
            raise DataError(f"{end} tokens do not fit the {self.cache_slots} slots of the cache")
        while start < end:
            room = self.cache_slots - start
            fitting = [length for length in self.prefill_lengths if length <= room]
            covering = [length for length in fitting if length >= end - start]
            length = min(covering, default=max(fitting, default=1)) if end - start > 1 else 1
            yield start, min(end, start + length), length
            start += length

    def _empty_cache(self) -> dict[str, np.ndarray]:
        decoder, cache = self.config.decoder, {}
        for layer in range(decoder.num_layers):
            heads, width = decoder.kv_heads(layer), decoder.head_dim
            cache[f"kv_cache_k_{layer}"] = np.zeros((1, heads, self.cache_slots, width), np.float32)
            cache[f"kv_cache_v_{layer}"] = np.zeros((1, heads, width, self.cache_slots), np.float32)
        return cache


class LiteRTModel(_PhoneModel):
    """An exported file in the LiteRT interpreter; needs nothing of JAX but this package.

    Args:
      path: of the file.
      num_threads: of the interpreter.

    Raises:
      ExportError: the file is not one that glm_edge exported, or does not load.
      MissingExtraError: LiteRT is not installed.
    """

    def __init__(self, path: str | Path, num_threads: int = 2):
        description = container.read_metadata(path)
        super().__init__(
            from_dict(description["config"]),
            description["prefill_lengths"],
            description["cache_slots"],
        )
        interpreter = require("ai_edge_litert.interpreter", extra="export")
        try:
            self.interpreter = interpreter.Interpreter(
                model_path=str(path), num_threads=num_threads
            )
        except (ValueError, RuntimeError) as error:
            raise ExportError(f"{path}: LiteRT does not load it: {error}") from error
        self._runners: dict[str, Any] = {}

    def run(self, signature: str, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Runs one signature on arrays of exactly its shapes."""
        if signature not in self._runners:
            self._runners[signature] = self.interpreter.get_signature_runner(signature)
        return self._runners[signature](**inputs)


class JaxModel(_PhoneModel):
    """The functions that an exported file was traced from, on boxed parameters.

    Args:
      model: its `compute` decides how products with quantized weights round activations.
      params: as the file holds them.
      prefill_lengths: of the file.
      cache_slots: of the file.
    """

    def __init__(
        self,
        model: MultimodalGLM,
        params: Any,
        prefill_lengths: Iterable[int],
        cache_slots: int,
    ):
        super().__init__(model.config, prefill_lengths, cache_slots)
        self._params = params
        self._functions = {
            signature.name: jax.jit(signature.function)
            for signature in signatures(model, self.prefill_lengths, cache_slots)
        }

    def run(self, signature: str, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Runs one signature on arrays of exactly its shapes."""
        outputs = self._functions[signature](self._params, inputs)
        return {name: np.array(value) for name, value in outputs.items()}


def verify(
    path: str | Path,
    model: MultimodalGLM,
    params: Any,
    windows: Iterable[Window] | None = None,
    threshold: float | None = None,
    compute: str = "int8_dynamic",
    free_running: int = 8,
    max_new_tokens: int = 32,
    seed: int = 0,
    check: bool = True,
) -> Verification:
    """Runs an exported file against the JAX model of the same integers.

    Args:
      path: the file.
      model: that it was traced from.
      params: as the file holds them: `ExportedModel.params`.
      windows: texts to compare on; None draws random ones with at least 1,000 positions.
      threshold: least agreement; None takes 0.99 against `int8_dynamic`, 0.97 against `float32`.
      compute: how the JAX model multiplies.
      free_running: windows that are also continued greedily from their first tokens.
      max_new_tokens: of each continuation.
      seed: of random windows.
      check: raise when the agreement is below the threshold.

    Returns:
      The comparison. When it passes, the file's description is marked as verified.

    Raises:
      ExportError: the agreement is below the threshold, or no position is counted.
    """
    phone = LiteRTModel(path)
    reference = JaxModel(
        model.clone(compute=compute), params, phone.prefill_lengths, phone.cache_slots
    )
    windows = list(windows) if windows is not None else random_windows(phone, seed)
    same, errors, divergences = [], [], []
    for window in windows:
        counted = np.ones(len(window.tokens), bool) if window.counted is None else window.counted
        content = (window.tokens, window.image, window.audio)
        expected = reference.score(*content)[counted]
        found = phone.score(*content)[counted]
        same.append(expected.argmax(-1) == found.argmax(-1))
        errors.append(np.abs(expected - found).max(initial=0.0))
        divergences.append(_kl(expected, found))
    same = np.concatenate(same) if same else np.zeros(0, bool)
    if not same.size:
        raise ExportError(f"{path}: nothing to verify on: no window counts a position")
    free = [_free_running(reference, phone, w, max_new_tokens) for w in windows[:free_running]]
    equal, generated = (sum(counts) for counts in zip(*free, strict=True)) if free else (0, 0)
    result = Verification(
        agreement=float(same.mean()),
        tokens=int(same.size),
        max_abs_error=float(max(errors)),
        mean_kl=float(np.concatenate(divergences).mean()),
        free_running_agreement=equal / generated if generated else None,
        free_running_tokens=generated,
        compute=compute,
        threshold=THRESHOLDS.get(compute, 0.99) if threshold is None else threshold,
    )
    if result.passed:
        container.mark_verified(path)
    elif check:
        raise ExportError(f"{path}: {result}; at least {result.threshold:.2%} must agree")
    return result


def random_windows(model: _PhoneModel, seed: int) -> list[Window]:
    """Random texts of at least 1,000 positions together, a third each with image and speech."""
    rng = np.random.default_rng(seed)
    config, slots = model.config, model.cache_slots
    length = min(max(model.prefill_lengths, default=32), slots)
    placeholders = {config.image_token_id, config.audio_token_id} - {None}
    ordinary = np.setdiff1d(np.arange(config.decoder.vocab_size), list(placeholders))
    windows, total = [], 0
    while total < MIN_TOKENS:
        tokens = rng.choice(ordinary, length).astype(np.int32)
        image = audio = None
        kind = len(windows) % 3
        vision, speech = config.vision, config.speech
        if kind == 1 and vision is not None and vision.num_tokens + length <= slots:
            tokens = np.concatenate([np.full(vision.num_tokens, config.image_token_id), tokens])
            image = rng.random((*vision.image_size, vision.channels), np.float32)
        if kind == 2 and speech is not None and speech.num_tokens + length <= slots:
            tokens = np.concatenate([np.full(speech.num_tokens, config.audio_token_id), tokens])
            audio = rng.normal(size=(speech.num_frames, speech.mel_bins)).astype(np.float32)
        windows.append(Window(tokens.astype(np.int32), image, audio))
        total += len(tokens)
    return windows


def _free_running(
    reference: _PhoneModel, phone: _PhoneModel, window: Window, max_new_tokens: int
) -> tuple[int, int]:
    length = window.prompt_length or max(1, len(window.tokens) // 2)
    room = min(max_new_tokens, phone.cache_slots - length)
    if room < 1:
        return 0, 0
    prompt = (window.tokens[:length], window.image, window.audio)
    expected = reference.generate(*prompt, max_new_tokens=room)
    found = phone.generate(*prompt, max_new_tokens=room)
    return sum(a == b for a, b in zip(expected, found, strict=False)), len(expected)


def _kl(expected: np.ndarray, found: np.ndarray) -> np.ndarray:
    log_p, log_q = _log_softmax(expected), _log_softmax(found)
    return (np.exp(log_p) * (log_p - log_q)).sum(-1)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def _place(embedded: np.ndarray, placeholder: np.ndarray, features: np.ndarray) -> None:
    rank = np.cumsum(placeholder)[placeholder] - 1
    embedded[placeholder] = features[np.minimum(rank, len(features) - 1)]


def _padded(rows: np.ndarray, length: int) -> np.ndarray:
    padding = [(0, length - len(rows))] + [(0, 0)] * (rows.ndim - 1)
    return np.pad(rows, padding)


def _suffix(length: int) -> str:
    return f"_{length}" if length > 1 else ""
