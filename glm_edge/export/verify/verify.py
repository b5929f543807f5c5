"""Comparing an exported model, run in its runtime, with the JAX model of the same integers."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from glm_edge import params as boxes
from glm_edge.configs import GLMConfig, SpeechConfig, VisionConfig
from glm_edge.errors import DataError, ExportError
from glm_edge.export.common.directory import write_description
from glm_edge.export.common.signatures import DECODE, attended_by, step_name
from glm_edge.export.common.weights import check_weights
from glm_edge.export.tflite import file as tflite_file
from glm_edge.export.verify.graph_directory import PackageModel
from glm_edge.export.verify.runner import JaxModel, LiteRTModel, PhoneModel
from glm_edge.models.multimodal import MultimodalGLM

# Where a file multiplies as JAX does, nearly every token is the same.
ALIKE = 0.99
# LiteRT rounds activations, which `float32` does not.
ROUNDED = {"float32": 0.97}
MIN_TOKENS = 1000
# Of a conversation with a bundle's engine.
MIN_TURNS = 3
# Another graph is off by about 1; rounding activations alone costs a few hundredths.
SIGNATURE_LIMIT = 0.25


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
      max_abs_error: largest difference of a logit at them; None where a runtime gives no logits.
      mean_kl: mean of KL(JAX || file) in nats at them; None likewise.
      free_running_agreement: fraction of greedily generated tokens that are the same.
      free_running_tokens: tokens generated.
      compute: how the JAX model multiplied.
      threshold: the agreement asked for.
      usual_threshold: the agreement asked for where the caller names none.
      turns: of the conversation with a bundle's engine; None where none is asked for.
      signatures: by name, the distance between what a signature and its JAX function give for the
        same random inputs, as a fraction of the latter's norm; a step that gives no logits is
        judged by those of the next one, which reads its cache.
    """

    agreement: float
    tokens: int
    max_abs_error: float | None
    mean_kl: float | None
    free_running_agreement: float | None
    free_running_tokens: int
    compute: str
    threshold: float
    usual_threshold: float
    turns: int | None = None
    signatures: Mapping[str, float] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """True when the agreement reaches the threshold and every signature is JAX's function."""
        return self.agreement >= self.threshold and not self.other_signatures

    @property
    def verified(self) -> bool:
        """True when the comparison passed and was enough to mark the file as verified."""
        return self.passed and not self.shortfalls

    @property
    def shortfalls(self) -> list[str]:
        """Reasons why the comparison is too small to mark a file as verified."""
        reasons = []
        if not self.threshold >= self.usual_threshold:
            reasons.append(f"the threshold is usually {self.usual_threshold:.2%}")
        if self.tokens < MIN_TOKENS:
            reasons.append(f"{self.tokens} of at least {MIN_TOKENS:,} tokens were compared")
        if self.turns is not None and self.turns < MIN_TURNS:
            reasons.append(
                f"the cache is too small for a conversation of {MIN_TURNS} turns, it took "
                f"{self.turns}"
            )
        return reasons

    @property
    def other_signatures(self) -> list[str]:
        """Signatures that are further from their JAX functions than rounding explains."""
        return [name for name, error in self.signatures.items() if not error <= SIGNATURE_LIMIT]

    def __str__(self) -> str:
        line = f"{self.agreement:.2%} of {self.tokens} top-1 tokens as in JAX ({self.compute})"
        if self.max_abs_error is not None:
            line += f", max |error| {self.max_abs_error:.3g}, mean KL {self.mean_kl:.3g} nats"
        if self.signatures:
            worst = max(self.signatures.values())
            line += f", {len(self.signatures)} signatures within {worst:.2g} of their functions"
        if self.free_running_agreement is not None:
            free = f"{self.free_running_agreement:.2%} of {self.free_running_tokens}"
            line += f", free-running {free}"
        return f"{'passed' if self.passed else 'failed'}: {line}; {self.reason}"

    @property
    def reason(self) -> str:
        """The condition that was met, the conditions that were not, or why no file is marked."""
        asked = f"at least {self.threshold:.2%} must agree"
        if self.verified:
            return asked
        if self.passed:
            return f"{asked}; not marked as verified: {', and '.join(self.shortfalls)}"
        reasons = []
        if not self.agreement >= self.threshold:
            reasons.append(
                f"{asked} (scores that nearly tie differ by rounding, as random tokens or weights "
                "give them: compare on text that the model knows)"
            )
        if self.other_signatures:
            names = ", ".join(self.other_signatures)
            reasons.append(
                f"{names} compute something else than in JAX, by more than {SIGNATURE_LIMIT:g}"
            )
        return "; ".join(reasons)


def verify(
    path: str | Path,
    model: MultimodalGLM,
    params: Any,
    windows: Iterable[Window] | None = None,
    threshold: float | None = None,
    compute: str | None = None,
    free_running: int = 8,
    max_new_tokens: int = 32,
    seed: int = 0,
    check: bool = True,
    isolated: bool = True,
) -> Verification:
    """Runs an exported file against the JAX model of the same integers.

    A `.tflite` file runs in LiteRT. The graphs of a directory run in onnxruntime or MNN, in float32
    on dequantized weights, after its integers and scales were found to be the model's bit for bit
    (of MNN, those that products read). Texts are scored token by token with the same tokens before
    (`agreement`), some are continued greedily, and each signature is run once on random inputs.

    Args:
      path: the file, or the directory of ONNX or MNN graphs.
      model: that it was traced from.
      params: as the file holds them: `ExportedModel.params` or `Package.params`.
      windows: texts to compare on; None draws random ones with at least 1,000 positions.
      threshold: least agreement; None takes 0.99, but 0.97 of a `.tflite` file, which rounds
        activations, against `float32`.
      compute: how the JAX model multiplies; None takes `int8_static` where the parameters have
        static grids, which the file then has, and else `int8_dynamic`. ONNX and MNN graphs are
        compared with `float32` alone.
      free_running: windows that are also continued greedily from their first tokens.
      max_new_tokens: of each continuation.
      seed: of random windows.
      check: raise when the agreement is below the threshold.
      isolated: run the file in a process of its own, so that a damaged one can crash nothing else;
        False is faster, for a `.tflite` file that was just written. Directories always run so.

    Returns:
      The comparison. When it passes, at the threshold that None takes and on at least 1,000
      positions, the file's description is marked as verified; `Verification.shortfalls` says what
      that lacked.

    Raises:
      ExportError: the agreement is below the threshold, a signature computes something else, no
        position is counted, the file is damaged, or is one of another model.
      DataError: a window does not fit the cache, or counts other positions than it has.
    """
    package = Path(path).is_dir()
    phone = PackageModel(path) if package else LiteRTModel(path, isolated=isolated)
    if phone.config != model.config:
        raise ExportError(f"{path}: holds another model than {model.config.name}")
    if package:
        shapes = {name: tuple(leaf.shape) for name, leaf in boxes.path_items(params)}
        check_weights(phone.read_weights(shapes), params, path)
    if phone.float32 and compute not in (None, "float32"):
        raise ExportError(
            f"{path}: is run in float32, so that {compute} would compare other sums; right would "
            "be compute='float32'"
        )
    if compute is None:
        compute = "float32" if phone.float32 else compute_of(params)
    reference = JaxModel(
        model.clone(compute=compute),
        params,
        phone.prefill_lengths,
        phone.cache_slots,
        phone.prefill_logits,
    )
    usual = threshold_of(compute, phone.float32)
    windows = list(windows) if windows is not None else random_windows(phone, seed)
    same, errors, divergences = [], [], []
    for index, window in enumerate(windows):
        counted = _counted(window)
        content = (window.tokens, window.image, window.audio)
        # The file first: a damaged one fails before JAX compiles anything.
        # Every second text goes through the signatures that look at all slots.
        run = phone.looking_at_all_slots() if index % 2 else phone
        found = run.score(*content)[counted]
        if not np.isfinite(found).all():
            raise ExportError(f"{path}: gives scores that are not finite")
        expected = reference.score(*content)[counted]
        same.append(expected.argmax(-1) == found.argmax(-1))
        errors.append(np.abs(expected - found).max(initial=0.0))
        divergences.append(_kl(expected, found))
    distances = signature_distances(reference, phone, seed)
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
        threshold=usual if threshold is None else threshold,
        usual_threshold=usual,
        signatures=distances,
    )
    if check and not result.passed:
        raise ExportError(f"{path}: {result}")
    if result.verified:
        if package:
            write_description(phone.path, {**phone.description, "verified": True})
        else:
            tflite_file.mark_verified(path)
    return result


def signature_distances(
    reference: PhoneModel, phone: PhoneModel, seed: int = 0
) -> dict[str, float]:
    """How far each signature of a file is from the JAX function that it was traced from.

    Args:
      reference: the functions.
      phone: the file.
      seed: of the inputs.

    Returns:
      `Verification.signatures`.
    """
    rng, config, found = np.random.default_rng(seed), phone.config, {}
    if config.vision is not None:
        image = _random_image(config.vision, rng)
        found["vision"] = _distance(reference.encode_images(image), phone.encode_images(image))
    if config.speech is not None:
        audio = _random_audio(config.speech, rng)
        found["speech"] = _distance(reference.encode_audio(audio), phone.encode_audio(audio))
    for length in (1, *phone.prefill_lengths):
        name = "embed" if length == 1 else f"embed_{length}"
        tokens = rng.choice(_ordinary(config), (1, length)).astype(np.int32)
        expected, given = (model.run(name, tokens=tokens) for model in (reference, phone))
        rows = expected["embeddings"]
        found[name] = _distance(rows, given["embeddings"])
        expected = _steps(reference, rows[0], None)
        for attended in (None, *attended_by(length, phone.attended_slots)):
            given = _steps(phone, rows[0], attended)
            found[step_name(length, attended)] = _distance(expected, given)
    return found


def _steps(model: PhoneModel, rows: np.ndarray, attended: int | None) -> np.ndarray:
    """Logits of the signature for so many rows and of a step behind it, where there is room."""
    length = len(rows)
    inputs = model.step_inputs(rows, 0, length, attended)
    cache = model.run(step_name(length, attended), **inputs, **model.empty_cache())
    logits = [cache.pop("logits")[0]] if "logits" in cache else []
    if length < model.cache_slots:
        inputs = model.step_inputs(rows[-1:], length, 1)
        logits.append(model.run(DECODE, **inputs, **cache)["logits"][0])
    return np.concatenate(logits)


def _distance(expected: np.ndarray, found: np.ndarray) -> float:
    expected = expected.astype(np.float64)
    return float(np.linalg.norm(expected - found) / np.linalg.norm(expected))


def compute_of(params: Any) -> str:
    """How LiteRT multiplies with parameters: on static grids where they have some."""
    leaves = boxes.path_items(params)
    static = any(getattr(leaf, "input_scale", None) is not None for _, leaf in leaves)
    return "int8_static" if static else "int8_dynamic"


def threshold_of(compute: str, float32: bool = False) -> float:
    """Least agreement with a JAX model that multiplies so, of a file that rounds activations.

    Args:
      compute: of the JAX model.
      float32: the file rounds none.
    """
    return ALIKE if float32 else ROUNDED.get(compute, ALIKE)


def random_windows(model: PhoneModel, seed: int) -> list[Window]:
    """Random texts of at least 1,000 positions together, a third each with image and speech."""
    rng = np.random.default_rng(seed)
    config, slots = model.config, model.cache_slots
    length = min(max(model.prefill_lengths, default=32), slots)
    ordinary = _ordinary(config)
    windows, total = [], 0
    while total < MIN_TOKENS:
        tokens = rng.choice(ordinary, length).astype(np.int32)
        image = audio = None
        kind = len(windows) % 3
        vision, speech = config.vision, config.speech
        if kind == 1 and vision is not None and vision.num_tokens + length <= slots:
            tokens = np.concatenate([np.full(vision.num_tokens, config.image_token_id), tokens])
            image = _random_image(vision, rng)
        if kind == 2 and speech is not None and speech.num_tokens + length <= slots:
            tokens = np.concatenate([np.full(speech.num_tokens, config.audio_token_id), tokens])
            audio = _random_audio(speech, rng)
        windows.append(Window(tokens.astype(np.int32), image, audio))
        total += len(tokens)
    return windows


def _ordinary(config: GLMConfig) -> np.ndarray:
    """Tokens that stand for themselves."""
    placeholders = {config.image_token_id, config.audio_token_id} - {None}
    return np.setdiff1d(np.arange(config.decoder.vocab_size), list(placeholders))


def _random_image(vision: VisionConfig, rng: np.random.Generator) -> np.ndarray:
    return rng.random((*vision.image_size, vision.channels), np.float32)


def _random_audio(speech: SpeechConfig, rng: np.random.Generator) -> np.ndarray:
    return rng.normal(size=(speech.num_frames, speech.mel_bins)).astype(np.float32)


def _counted(window: Window) -> np.ndarray:
    if window.counted is None:
        return np.ones(len(window.tokens), bool)
    if np.shape(window.counted) != (len(window.tokens),):
        raise DataError(
            f"counted has shape {np.shape(window.counted)}; {len(window.tokens)} tokens need one "
            "bool each"
        )
    return np.asarray(window.counted, bool)


def _free_running(
    reference: PhoneModel, phone: PhoneModel, window: Window, max_new_tokens: int
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
