"""Comparison of the answers of LiteRT-LM's engine, run on a bundle, with those of JAX."""

import dataclasses
import itertools
import struct
import tempfile
import wave
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from glm_edge.errors import DataError, ExportError
from glm_edge.export.litertlm.bundle import TFLITE, read_sections
from glm_edge.export.litertlm.chat_templates import new_text, reads_strings
from glm_edge.export.litertlm.signatures import takes_embeddings
from glm_edge.export.tflite.file import mark_verified, read_constants
from glm_edge.export.tflite.flatbuffer import Constant
from glm_edge.export.tflite.weights import to_tflite_weights
from glm_edge.export.verify.results import MIN_TURNS, Verification, compute_of, conclude
from glm_edge.export.verify.worker import TIMEOUT, InterpreterProcess
from glm_edge.generate.decoding import generate
from glm_edge.preprocess import AudioProcessing, Processor

if TYPE_CHECKING:
    from glm_edge.export.litertlm.export import Bundle

PROMPT_TOKENS = 24
# Settings of a conversation. A compared message uses 1 / `EARLY_SHARE` of the cache; an answer has
# at most `TURN_TOKENS` tokens; with `SHORT_OF_SLOTS` free slots or fewer, messages are as short as
# possible.
EARLY_SHARE = 8
TURN_TOKENS = 8
SHORT_OF_SLOTS = 64
LONGEST_WORD = 12
# Replacement of an incomplete character at the end of an answer; runtimes differ in showing it.
REPLACEMENT_CHARACTER = "\ufffd"


@dataclasses.dataclass(frozen=True)
class EnginePrompt:
    """A user's message, for the engine and for `Processor`.

    Attributes:
      to_engine: parts of the message, with media as paths.
      to_jax: parts of the message, with media as arrays.
    """

    to_engine: list[dict[str, str]]
    to_jax: list[dict[str, Any]]


def verify_bundle(
    bundle: "Bundle",
    texts: Sequence[str] | None = None,
    prompts: int = 48,
    max_new_tokens: int = 32,
    threshold: float | None = None,
    compute: str | None = None,
    seed: int = 0,
    check: bool = True,
    timeout: float = TIMEOUT,
) -> Verification:
    """Compare the greedy answers of LiteRT-LM's engine with those of JAX.

    First compares the sections' codes and scales with the model's, bit for bit. The engine then
    opens the bundle in a separate process and answers one conversation per prompt. If the model has
    the encoders, a third of the prompts contain an image and a third a recording. The engine uses
    the runtime's chat template, tokenizer, resampling and spectrogram; JAX uses those of the
    bundle's `Processor`, with the text of a message in the form that the checkpoint's template
    expects.

    Finally, a text conversation continues until the cache is full. The answers to its first three
    messages are also compared; later messages only need an answer while slots are free.

    An answer is compared token by token up to the first difference, since the contexts differ
    afterwards. `agreement` counts predictions from equal contexts. `free_running_agreement` is the
    fraction of all JAX tokens that the engine generated before a difference. The engine returns no
    logits, so errors and divergences are None.

    Args:
      bundle: the bundle.
      texts: texts of the prompts, used cyclically; None draws random tokens.
      prompts: number of prompts.
      max_new_tokens: most tokens per answer.
      threshold: minimum agreement; None uses 0.99, or 0.97 against `float32`.
      compute: arithmetic of the JAX model, as in `glm_edge.export.verify`.
      seed: seed of random texts, images and recordings.
      check: whether to raise if the agreement is below the threshold.
      timeout: time limit for one answer in seconds.

    Returns:
      The comparison. If it passes the default threshold on at least 1,000 tokens and in a
      conversation of at least three turns, the descriptions of all sections are marked as verified.
      Otherwise `Verification.shortfalls` lists the reasons.

    Raises:
      ExportError: the agreement is below the threshold, the conversation ends before the cache is
        full, the bundle is damaged, or no prompt fits its cache.
      DataError: a text is empty.
      MissingExtraError: LiteRT-LM is not installed.
    """
    if texts is not None and not all(text.strip() for text in texts or [""]):
        raise DataError("texts: must contain at least one text, and no empty one")
    check_sections(bundle)
    compute = compute_of(bundle.params) if compute is None else compute
    model, config = bundle.model.clone(compute=compute), bundle.model.config
    strings = reads_strings(bundle.processor)
    counts = _Counts()
    with tempfile.TemporaryDirectory() as name:
        directory, rng = Path(name), np.random.default_rng(seed)
        engine = InterpreterProcess(
            bundle.path,
            timeout=timeout,
            runtime="litertlm",
            images=int(config.vision is not None),
            audio=config.speech is not None,
            cache_dir=name,
        )
        for asked in _batches(bundle, texts, prompts, rng, directory, max_new_tokens):
            # The file runs first, so that a damaged one fails before JAX compiles anything.
            answers = [engine.reply(prompt.to_engine, max_new_tokens)[0] for prompt in asked]
            inputs = bundle.processor([_turn(prompt.to_jax, strings) for prompt in asked])
            generated = generate(model, bundle.params, inputs, max_new_tokens)
            tokens, lengths = np.asarray(generated.tokens), np.asarray(generated.lengths)
            for answer, row, length in zip(answers, tokens, lengths, strict=True):
                # The stop token also counts as predicted.
                counts.add(row[: length + 1].tolist(), answer, bundle.processor.decode)
        if counts.compared:
            turns = _converse(bundle, model, engine, texts, rng, max_new_tokens, counts)
        engine.close()
    if not counts.compared:
        raise ExportError(
            f"{bundle.path}: no prompt fits its {bundle.cache_slots} cache slots together with "
            f"{max_new_tokens} tokens of an answer"
        )
    result = conclude(
        bundle.path,
        compute,
        threshold,
        check,
        agreement=counts.same / counts.compared,
        tokens=counts.compared,
        max_abs_error=None,
        mean_kl=None,
        free_running_agreement=counts.same / counts.generated,
        free_running_tokens=counts.generated,
        turns=turns,
    )
    if result.verified:
        mark_verified(bundle.path)
    return result


@dataclasses.dataclass
class _Counts:
    """Counts of answer tokens: equal in both, compared, and generated by JAX."""

    same: int = 0
    compared: int = 0
    generated: int = 0

    def add(
        self, expected: Sequence[int], answer: str, decode: Callable[[Sequence[int]], str]
    ) -> bool:
        """Count one answer; return True if all its tokens are equal."""
        agreed = agreeing(expected, answer, decode)
        self.same += agreed
        self.compared += min(agreed + 1, len(expected))
        self.generated += len(expected)
        return agreed == len(expected)


def _converse(
    bundle: "Bundle",
    model: Any,
    engine: InterpreterProcess,
    texts: Sequence[str] | None,
    rng: np.random.Generator,
    max_new_tokens: int,
    counts: _Counts,
) -> int:
    """Run one conversation until the cache is full, and count its first answers.

    Returns:
      The number of turns.

    Raises:
      ExportError: a message fails although enough slots are free.
    """
    processor, slots, reserve = bundle.processor, bundle.cache_slots, bundle.prefill_lengths[0]
    new_tokens = min(max_new_tokens, TURN_TOKENS)
    messages: list[dict[str, Any]] = []
    context: list[int] = []
    used, comparable = 0, True
    while True:
        turn, free = len(messages) // 2, slots - used
        wanted = slots // EARLY_SHARE if turn < MIN_TURNS else free // 2
        for count in (wanted, 1) if free > SHORT_OF_SLOTS else (1,):
            text = _text_of(processor, texts, rng, count)
            asked = [*messages, {"role": "user", "content": text}]
            try:
                added = _ids(processor, new_text(bundle.template, asked))
            except DataError as error:
                raise ExportError(f"{bundle.path}: message {turn + 1}: {error}") from error
            if used + len(added) + reserve <= slots:
                break
        else:
            return turn
        messages = asked
        try:
            answer, used = engine.reply(text, new_tokens, same=turn > 0)
        except ExportError as error:
            raise ExportError(
                f"{bundle.path}: message {turn + 1} of a conversation, {len(added)} tokens with "
                f"{free} of {slots} slots free, has no answer: {error}"
            ) from error
        if comparable and turn < MIN_TURNS:
            context += added
            generated = generate(
                model, bundle.params, np.array([context], np.int32), max_new_tokens=new_tokens
            )
            length = int(generated.lengths[0])
            expected = np.asarray(generated.tokens)[0, : length + 1].tolist()
            # After the first different token, the contexts differ.
            comparable = counts.add(expected, answer, processor.decode)
            if takes_embeddings(model.config):
                # The engine feeds zeros for the last token, which the graph replaces with
                # `answer_end`.
                comparable = comparable and bundle.answer_end is not None
                expected = [*expected[:-1], bundle.answer_end]
            context += expected
        messages.append({"role": "assistant", "content": answer})


def _ids(processor: Processor, text: str) -> list[int]:
    return processor.tokenizer.encode(text, add_special_tokens=False).ids


def _text_of(
    processor: Processor, texts: Sequence[str] | None, rng: np.random.Generator, tokens: int
) -> str:
    """Join words up to a number of tokens, and truncate a long word."""
    words: list[str] = []
    source = itertools.cycle(texts or [None])
    while len(_ids(processor, " ".join(words))) < tokens:
        text = next(source) or _random_text(processor, rng)
        for word in text.split():
            words.append(word[:LONGEST_WORD])
            if len(_ids(processor, " ".join(words))) >= tokens:
                break
    return " ".join(words)


def agreeing(expected: Sequence[int], answer: str, decode: Callable[[Sequence[int]], str]) -> int:
    """Count the leading tokens of JAX that an answer contains.

    Args:
      expected: JAX's tokens, including a stop token.
      answer: text of the engine's answer, without a stop token.
      decode: function that returns the text of tokens up to the first stop token.

    Returns:
      The number of tokens.
    """
    answer = _shown(answer)
    if answer == _shown(decode(expected)):
        return len(expected)
    counts = range(len(expected) - 1, -1, -1)
    return next(n for n in counts if answer.startswith(_shown(decode(expected[:n]))))


def check_sections(bundle: "Bundle") -> None:
    """Compare the weights of a bundle's sections with its parameters, bit for bit.

    Args:
      bundle: the bundle.

    Raises:
      ExportError: a weight has different bytes, or the bundle is damaged.
      MissingExtraError: LiteRT-LM's builder is not installed.
    """
    expected = to_tflite_weights(bundle.params).constants
    sections = [part for part in read_sections(bundle.path) if part.type == TFLITE]
    for name in bundle.sections:
        parts = [part for part in sections if part.model == name.lower()]
        if len(parts) != 1:
            raise ExportError(
                f"{bundle.path}: damaged: contains {len(parts)} sections {name}, not one"
            )
        try:
            stored = read_constants(bundle.path, parts[0].start, parts[0].size)
        except ExportError as error:
            raise ExportError(f"{bundle.path}: damaged: {name}: {error}") from error
        for path, constant in stored.items():
            if path not in expected or not _equal(constant, expected[path]):
                raise ExportError(
                    f"{bundle.path}: damaged, or of other parameters: {path} of {name} differs "
                    "from the model's"
                )


def _equal(stored: Constant, expected: Constant) -> bool:
    scales = [np.asarray(c.scale) for c in (stored, expected) if c.scale is not None]
    return (
        (stored.type, tuple(stored.shape)) == (expected.type, tuple(expected.shape))
        and np.array_equal(stored.data, expected.data)
        and (stored.scale is None) == (expected.scale is None)
        and (not scales or np.array_equal(scales[0], scales[1]))
    )


def _shown(text: str) -> str:
    return text.replace(REPLACEMENT_CHARACTER, "")


def _turn(parts: list[dict[str, Any]], strings: bool) -> list[Mapping[str, Any]]:
    """Make a message for the checkpoint's template; plain text is a string if it reads one."""
    alone = len(parts) == 1 and parts[0]["type"] == "text"
    return [{"role": "user", "content": parts[0]["text"] if strings and alone else parts}]


def _batches(
    bundle: "Bundle",
    texts: Sequence[str] | None,
    prompts: int,
    rng: np.random.Generator,
    directory: Path,
    max_new_tokens: int,
) -> Iterator[list[EnginePrompt]]:
    """Group prompts by kind, so that JAX compiles once per kind."""
    config, strings = bundle.model.config, reads_strings(bundle.processor)
    encoders = {"image": config.vision, "audio": config.speech}
    kinds = [None, *(kind for kind, encoder in encoders.items() if encoder is not None)]
    drawn = 0
    for index, kind in enumerate(kinds):
        asked = []
        for _ in range(len(range(index, prompts, len(kinds)))):
            text = texts[drawn % len(texts)] if texts else _random_text(bundle.processor, rng)
            drawn += 1
            asked.append(_prompt(bundle, kind, text, rng, directory / f"{drawn}"))
        slots = bundle.cache_slots - max_new_tokens
        fitting = [p for p in asked if _length(bundle.processor, p, strings) <= slots]
        if fitting:
            yield fitting


def _length(processor: Processor, prompt: EnginePrompt, strings: bool) -> int:
    return processor(_turn(prompt.to_jax, strings)).tokens.shape[1]


def _prompt(
    bundle: "Bundle", kind: str | None, text: str, rng: np.random.Generator, file: Path
) -> EnginePrompt:
    part: dict[str, Any] = {"type": "text", "text": text}
    value: Any
    if kind is None:
        return EnginePrompt([part], [part])
    if kind == "image":
        vision = bundle.model.config.vision_tower
        shape = (*(bundle.image_size or vision.image_size), vision.channels)
        value = rng.integers(0, 256, shape, dtype=np.uint8)
        file.write_bytes(png(value))
    else:
        audio = bundle.processor.audio
        if audio is None:
            raise ExportError(f"{bundle.path}: its processor prepares no audio")
        samples = _recording(audio, rng)
        value = samples.astype(np.float32) / 32768.0, audio.sample_rate
        with wave.open(str(file), "wb") as out:
            out.setparams((1, 2, audio.sample_rate, len(samples), "NONE", ""))
            out.writeframes(samples.astype("<i2").tobytes())
    to_engine = [{"type": kind, "path": str(file)}, part]
    return EnginePrompt(to_engine, [{"type": kind, kind: value}, part])


def _recording(audio: AudioProcessing, rng: np.random.Generator) -> np.ndarray:
    """Draw noise of rising volume, 0.5 to 1.5 chunks long, in multiples of a hop."""
    frames = audio.chunk_frames
    longest = min(3 * frames // 2, audio.max_chunks * frames)
    count = audio.hop_length * int(rng.integers(frames // 2, longest + 1))
    loudness = np.linspace(500.0, 8000.0, count)
    return np.clip(rng.standard_normal(count) * loudness, -32768, 32767).astype(np.int16)


def _random_text(processor: Processor, rng: np.random.Generator) -> str:
    """Draw text of random tokens, without special tokens."""
    tokenizer = processor.tokenizer
    special = list(tokenizer.get_added_tokens_decoder())
    ordinary = np.setdiff1d(np.arange(tokenizer.get_vocab_size()), special)
    while True:
        count = int(rng.integers(1, PROMPT_TOKENS + 1))
        text = tokenizer.decode(rng.choice(ordinary, count).tolist())
        text = "".join(c for c in _shown(text) if c.isprintable()).strip()
        if text:
            return text


def png(pixels: np.ndarray) -> bytes:
    """Encode uint8 pixels [height, width, 3] as PNG, a lossless format.

    Args:
      pixels: uint8 [height, width, 3].

    Returns:
      The bytes of the PNG file.
    """
    height, width, _ = pixels.shape

    def chunk(kind: bytes, data: bytes) -> bytes:
        content = kind + data
        return struct.pack(">I", len(data)) + content + struct.pack(">I", zlib.crc32(content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    ends = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(ends)
