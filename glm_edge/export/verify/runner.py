"""Driver of an exported model's signatures, in the order of a phone's runtime.

Shapes: `T` tokens, `D` hidden size, `M` features of one image or recording, `V` vocabulary size.
"""

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

import numpy as np

from glm_edge.configs import GLMConfig
from glm_edge.errors import DataError, ExportError
from glm_edge.export.common.sizes import all_lengths, attended_by, logit_rows, step_name
from glm_edge.export.verify import answer
from glm_edge.export.verify import prefix as prefixes
from glm_edge.export.verify.prefix import Prefix
from glm_edge.export.verify.schedule import Call, split, split_with_logits
from glm_edge.generate.constraint import Matcher

MASKED = -1e9


class SignatureRunner:
    """A driver that calls signatures as a phone's runtime does; subclasses run one signature.

    Attributes:
      float32: True if products are known to be in float32, on dequantized weights.
      path: path of the exported model; None if there is no file.
    """

    float32 = False
    path: str | Path | None = None

    def __init__(
        self,
        config: GLMConfig,
        prefill_lengths: Iterable[int],
        cache_slots: int,
        prefill_logits: bool = True,
        attended_slots: Iterable[int] = (),
        forced_lengths: Iterable[int] = (),
    ):
        self.config = config
        self.prefill_logits = prefill_logits
        self.prefill_lengths = sorted(prefill_lengths)
        self.cache_slots = cache_slots
        self.attended_slots = sorted(attended_slots)
        self.forced_lengths = sorted(forced_lengths)

    @property
    def lengths(self) -> list[int]:
        """Token counts of all signatures of steps, ascending from one."""
        return all_lengths(self.prefill_lengths, self.forced_lengths)

    def run(self, signature: str, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Run one signature on arrays that match its shapes exactly.

        Args:
          signature: name of the signature.
          **inputs: input arrays by name.

        Returns:
          Output arrays by name.

        Raises:
          DataError: the file lacks the signature.
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
        # A lookup takes no time beside its call, so few calls are best.
        sizes = self.cache_slots, self.lengths, self.cache_slots
        for start, end, length in split(0, len(tokens), *sizes):
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
        matcher: Matcher | None = None,
        prefix: Prefix | None = None,
    ) -> list[int]:
        """Extend a prompt by the top-1 token until a stop token, which is included.

        With a `matcher`, the answer is a text of its grammar. The runs that the grammar forces are
        fed together with the free token before them, in one call of a signature of
        `forced_lengths`. A file without them decodes token by token, or runs a long run through
        prefill. If only a stop token can follow, nothing runs: the answer then ends with the first
        stop token of the model that may follow.

        Args:
          tokens: token ids, int [T].
          image: pixels [height, width, channels], or None.
          audio: log-mel frames [num_frames, mel_bins], or None.
          max_new_tokens: most tokens to generate, at least one.
          matcher: constraint of the answer, from `glm_edge.generate.Constraints` with the model's
            stop tokens; it is not changed. None allows every token.
          prefix: beginning of `tokens` whose rows exist, from `keep_prefix`; None has none.

        Returns:
          The new tokens.

        Raises:
          DataError: as for `embed`; or prompt and answer do not fit the cache, logits are not
            finite, the grammar exceeds a limit or has no next token, or the prompt does not begin
            with the prefix.
          ExportError: the prefix belongs to another model.
        """
        media = {"image": image, "audio": audio}
        return answer.generate(self, tokens, media, max_new_tokens, matcher, prefix)

    def prefill(
        self,
        tokens: np.ndarray,
        image: np.ndarray | None = None,
        audio: np.ndarray | None = None,
        prefix: Prefix | None = None,
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Run a prompt, from the end of a prefix on.

        Args:
          tokens: token ids, int [T], with placeholders for features.
          image: pixels [height, width, channels], or None.
          audio: log-mel frames [num_frames, mel_bins], or None.
          prefix: beginning of `tokens` whose rows exist; None has none.

        Returns:
          `(logits, cache)`: logits [1, V] of the token after the prompt, and the cache.

        Raises:
          DataError: as for `embed`; or the prompt does not begin with the prefix.
          ExportError: the prefix belongs to another model.
        """
        tokens = np.asarray(tokens, np.int32).reshape(-1)
        start, cache = 0, self.empty_cache()
        if prefix is not None:
            start = prefixes.start(prefix, self, tokens, cache)
        return self.extend(self.embed(tokens[start:], image, audio), start, cache)

    def keep_prefix(self, tokens: np.ndarray, path: str | Path | None = None) -> Prefix:
        """Compute the rows of a fixed beginning of prompts once, or open those of an earlier run.

            system = runner.keep_prefix(tokens, runner.prefix_path(tokens))
            answer = runner.generate(prompt, image, prefix=system)

        Args:
          tokens: token ids of text, int [P], such as those of a system prompt.
          path: path of the file of these rows. An existing file is mapped into memory; otherwise
            the rows are computed and written. None keeps them in this process only.

        Returns:
          The prefix.

        Raises:
          DataError: as for `embed`; or the tokens contain a placeholder.
          ExportError: the file is damaged, or belongs to another model or other tokens; or this
            runner has no file of a model.
          OutputError: the file cannot be written.
        """
        return prefixes.keep(self, tokens, path)

    def prefix_path(self, tokens: np.ndarray) -> Path:
        """Name the file of a prefix beside the model, by hashes of the model and of the tokens.

        Args:
          tokens: token ids, int [P].

        Returns:
          The path. A changed model has another one.

        Raises:
          ExportError: this runner has no file of a model.
        """
        return prefixes.path_beside(self, tokens)

    def model_digest(self) -> bytes:
        """Compute the SHA-256 of the exported model, which `verify` does not change.

        Returns:
          32 bytes.

        Raises:
          ExportError: this runner has no file of a model, or it cannot be read.
        """
        raise ExportError(f"{self.config.name}: {type(self).__name__} has no file of a model")

    def extend(
        self,
        embedded: np.ndarray,
        slot: int,
        cache: dict[str, np.ndarray],
        every_position: bool = False,
        positions: np.ndarray | None = None,
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Run embedded tokens, starting at a slot of the cache.

        The tokens are split into the calls that take the least time. A signature with logits runs
        last; with `every_position`, only signatures with logits of all tokens run.

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
        logits = []
        for start, end, length in self._calls(slot, slot + len(embedded), every_position):
            attended = self.attended(start, length)
            part = slice(start - slot, end - slot)
            placed = None if positions is None else positions[:, part]
            inputs = self.step_inputs(embedded[part], start, length, attended, placed)
            outputs = self.run(step_name(length, attended), **inputs, **cache)
            if "logits" in outputs:
                # A signature with logits of its last row only has one row, of the last token.
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
        fitting = attended_by(length, self.attended_slots, self.forced_lengths)
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
          embedded: embedded tokens, at most [length, D]; the last one is repeated, so that the
            last row of the signature is that of the last token.
          slot: slot of the first token.
          length: token count of the signature.
          attended: number of slots that it attends to; None for all.
          positions: three-dimensional rotary positions of the tokens; None takes the slots.

        Returns:
          Inputs by name.
        """
        slots = np.minimum(np.arange(slot, slot + length), slot + len(embedded) - 1)
        slots = slots.astype(np.int32)
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

    def _calls(self, start: int, end: int, every_position: bool) -> list[Call]:
        """Split slots `start..end` into calls of steps that return the wanted logits."""
        sizes = self.prefill_lengths, self.prefill_logits, self.forced_lengths
        rows = {length: logit_rows(length, *sizes) for length in self.lengths}
        if every_position:
            complete = [length for length, count in rows.items() if count == length]
            return split(start, end, self.cache_slots, complete)
        scored = [length for length, count in rows.items() if count]
        return split_with_logits(start, end, self.cache_slots, self.lengths, scored)

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


def check_signature(path: str | Path, signature: str, names: Iterable[str]) -> None:
    """Refuse a signature that an exported model lacks.

    Args:
      path: path of the exported model, for messages.
      signature: name of the signature.
      names: names of its signatures.

    Raises:
      DataError: the model lacks it.
    """
    if signature not in names:
        offered = ", ".join(sorted(names))
        raise DataError(f"{path}: has no signature {signature!r}; it has {offered:.400}")


def _insert(embedded: np.ndarray, placeholder: np.ndarray, features: np.ndarray) -> None:
    rank = np.cumsum(placeholder)[placeholder] - 1
    embedded[placeholder] = features[np.minimum(rank, len(features) - 1)]


def _padded(rows: np.ndarray, length: int) -> np.ndarray:
    """Repeat the last row up to `length` rows."""
    padding = [(0, length - len(rows))] + [(0, 0)] * (rows.ndim - 1)
    return np.pad(rows, padding, mode="edge")
